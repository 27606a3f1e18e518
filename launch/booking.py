"""What a booked name means to gcloud and to GKE:  python3 launch/booking.py v5e-16

Prints one key=value a line. Needs no package: it runs where gcloud runs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vflax.errors import UserError
from vflax.slices import Slice, parse


@dataclasses.dataclass(frozen=True)
class Names:
    """How one generation of chips is called.

    Attributes:
        accelerator: before the dash of gcloud's --accelerator-type.
        runtime: the image that a TPU VM of it boots (cloud.google.com/tpu/docs/runtimes).
        label: value of the node label cloud.google.com/gke-tpu-accelerator.
        machine: GKE's machine type before its number of chips.
    """

    accelerator: str
    runtime: str
    label: str
    machine: str


# The last two columns: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
NAMES = {
    "v4": Names("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": Names("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": Names("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": Names("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard"),
}


def facts(name: str) -> dict[str, str]:
    """What the scripts ask about one booked name.

    Returns:
        accelerator_type: gcloud's; empty for a shape that has none and is booked by type and topology.
        generation, topology, runtime; chips of all slices; slices.
        gke_accelerator, machine; nodes of one slice, node_chips of one node, on GKE.

    Raises:
        UserError: a name that nobody can book.
    """
    booked = parse(name)
    names, chips = NAMES[booked.generation.name], math.prod(booked.shape)
    node_chips = min(chips, booked.generation.host_chips)
    if chips % node_chips:
        raise UserError(f"{name}: {chips} chips do not fill hosts of {node_chips}")
    return {
        "accelerator_type": _accelerator_type(booked, names),
        "generation": booked.generation.name,
        "topology": "x".join(map(str, booked.shape)),
        "runtime": names.runtime,
        "chips": str(booked.chips),
        "slices": str(booked.slices),
        "gke_accelerator": names.label,
        "machine": f"{names.machine}-{node_chips}t",
        "nodes": str(chips // node_chips),
        "node_chips": str(node_chips),
    }


def _accelerator_type(booked: Slice, names: Names) -> str:
    chips, kind = math.prod(booked.shape), booked.generation
    if kind.shapes.get(chips) == booked.shape:
        return f"{names.accelerator}-{chips * 2 if kind.counts_cores else chips}"
    if kind.name != "v4":
        raise UserError(
            f"{booked.name}: gcloud books another shape than the usual one for v4 only; {chips} chips of "
            f"{kind.name} come as {'x'.join(map(str, kind.shapes[chips])) if chips in kind.shapes else 'no slice'}"
        )
    return ""


def main() -> int:
    """Entry point."""
    if len(sys.argv) != 2:
        print("error: expected one name, such as v5e-16", file=sys.stderr)
        return 1
    try:
        found = facts(sys.argv[1])
    except UserError as error:
        print(f"error: {str(error).replace('--topology=', '', 1)}", file=sys.stderr)
        return 1
    print("\n".join(f"{key}={value}" for key, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
