"""TPU slices as users book them: how many chips, in which shape, with how much memory, how fast.

    v5e-16        16 chips, 4 x 4            (v5e and v6e count chips)
    v4-32         16 chips, 2 x 2 x 4        (v4 and v5p count cores, two a chip)
    2xv5e-256     two slices of 256 chips, joined across the data-centre network
    v5e:2x4       a shape named directly

Figures are those of cloud.google.com/tpu/docs/system-architecture-tpu-vm; clocks are what libtpu's cost model divides
by (cycles / clock = seconds), checked against its own times.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from vflax.constants import GIB
from vflax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU chip.

    Attributes:
        name: as it is booked and as JAX's topologies know it.
        counts_cores: whether a booked number counts cores, two a chip.
        hbm: bytes of a chip that a program may use.
        peak: dense bfloat16 FLOP/s of a chip.
        clock: cycles per second.
        host_chips: chips of one host.
        bandwidth: bytes per second between a chip and its memory.
        shapes: {chips: shape} of the slices that can be booked.
    """

    name: str
    counts_cores: bool
    hbm: int
    peak: float
    clock: float
    host_chips: int
    bandwidth: float
    shapes: Mapping[int, tuple[int, ...]]


_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
}  # fmt: skip
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", True, int(30.75 * GIB), 275e12, 1.05e9, 4, 1.2e12, _CUBES),
        Generation("v5e", False, int(15.75 * GIB), 197e12, 1.503e9, 4, 8.19e11, _FLAT),
        Generation("v5p", True, int(95 * GIB), 459e12, 1.75e9, 4, 2.765e12, _CUBES),
        Generation("v6e", False, int(31.25 * GIB), 918e12, 1.75e9, 4, 1.64e12, _FLAT),
    )
}
_NAME = re.compile(
    r"(?:(?P<slices>\d+)x)?(?P<generation>v\d+[a-z]*)(?:-(?P<count>\d+)|:(?P<shape>\d+(?:x\d+)+))"
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One booking: `slices` equal slices of one generation.

    Attributes:
        name: as it was given.
        generation: of its chips.
        shape: chips of one slice along each axis of its network.
        slices: how many.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def topology(self) -> str:
        """What jax.experimental.topologies calls one slice."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Slice:
    """The slice of a booked name.

    Raises:
        UserError: an unknown generation, a size that cannot be booked, or no name of this form.
    """
    match = _NAME.fullmatch(name.strip().lower().replace("v5litepod", "v5e"))
    if match is None:
        raise UserError(
            f"--topology={name}: expected a slice as it is booked, such as v5e-16, v4-32, 2xv5e-256 or v5e:2x4"
        )
    generation = GENERATIONS.get(match["generation"])
    if generation is None:
        raise UserError(f"--topology={name}: {match['generation']} is none of {', '.join(GENERATIONS)}")
    slices = int(match["slices"] or 1)
    if slices < 1:
        raise UserError(f"--topology={name}: expected at least one slice")
    if match["shape"]:
        shape = tuple(map(int, match["shape"].split("x")))
        if len(shape) != len(next(iter(generation.shapes.values()))):
            example = "x".join(map(str, generation.shapes[8]))
            raise UserError(f"--topology={name}: a shape of {generation.name} looks like {example}")
        return Slice(name, generation, shape, slices)
    count = int(match["count"])
    unit = 2 if generation.counts_cores else 1
    if count % unit or count // unit not in generation.shapes:
        what = "cores, two a chip" if generation.counts_cores else "chips"
        known = ", ".join(f"{generation.name}-{chips * unit}" for chips in generation.shapes)
        raise UserError(
            f"--topology={name}: {generation.name} is booked in {known} ({what}); another shape is named as "
            f"{generation.name}:{'x'.join(map(str, generation.shapes[8]))}"
        )
    return Slice(name, generation, generation.shapes[count // unit], slices)
