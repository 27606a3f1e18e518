"""Which layouts of the fsdp axis make a TPU's compiler reduce-scatter a gradient, and which all-reduce it.

    python -m benchmarks.reductions --out=benchmarks/results/reductions.json

One product is compiled for each mesh, that of a kernel's gradient: its rows are spread over all chips, its result over
fsdp, as in the training step. Nothing is run. `group` is how many chips of fsdp lie along each axis of the slice.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks import common
from vflax.planner.environment import ENVIRONMENT

# (slice, config.mesh.data); fsdp takes what is left.
MESHES = (
    ("v5e-4", 1), ("v5e-8", 1), ("v5e-16", 1), ("v5e-16", 2), ("v5e-16", 4), ("v5e-32", 1), ("v5e-64", 1),
    ("v5e-64", 2), ("v5e-64", 4), ("v5e-256", 1), ("v5e-256", 2), ("v6e-16", 1), ("v6e-16", 2), ("v4-32", 1),
    ("v4-32", 2), ("v5p-16", 1),
)  # fmt: skip
# Rows of a chip, and the sides of the gradient: a multiple of 128 on each of 256 chips.
ROWS, INPUTS, OUTPUTS = 512, 2**15, 128


def main() -> None:
    args = common.parser(__doc__).parse_args()
    os.environ.update(ENVIRONMENT)
    result = {
        **common.made(),
        "versions": common.versions("jax", "libtpu"),
        "meshes": [measure(topology, data) for topology, data in MESHES],
    }
    common.write(args.out, result)


def measure(topology: str, data: int) -> dict[str, Any]:
    """The group of chips that share a gradient out, and MB by kind of collective."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from vflax import aot, sharding
    from vflax.hlo import Program
    from vflax.xla_options import compiler_options

    devices = aot.find_target(topology).devices
    mesh = sharding.make_mesh(data, -1, 1, devices)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    x, grad = (
        jax.ShapeDtypeStruct((len(devices) * ROWS, width), jnp.bfloat16, sharding=rows)
        for width in (INPUTS, OUTPUTS)
    )
    shared_out = NamedSharding(mesh, PartitionSpec("fsdp"))
    with jax.set_mesh(mesh):
        product = jax.jit(lambda x, grad: x.T @ grad, out_shardings=shared_out)
        compiled = product.lower(x, grad).compile(compiler_options=compiler_options("tpu"))
    moved = Program(compiled.as_text()).collective_bytes()
    coordinates = [device.coords for device in mesh.devices[0].flat]
    return {
        "slice": topology,
        "data": data,
        "fsdp": mesh.shape["fsdp"],
        "group": "x".join(str(len(set(axis))) for axis in zip(*coordinates, strict=True)),
        "gradient_mb": round(INPUTS * OUTPUTS * 2 / 1e6, 2),
        "collectives_mb": {kind: round(size / 1e6, 2) for kind, size in moved.items()},
    }


if __name__ == "__main__":
    main()
