"""Compile a run's own training step for a TPU slice that is not here: no array is made, nothing runs.

libtpu holds the compiler of every generation, and JAX can describe a slice (jax.experimental.topologies), so a machine
with nothing but a CPU finds out what the slice would be given to run. "cpu:N" stands for N devices of this machine, so
that everything here can be tried and tested without libtpu.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vflax import freeze, sharding
from vflax.constants import GIB
from vflax.errors import UserError
from vflax.hlo import Program
from vflax.models.llava import LlavaConfig
from vflax.models.lora import LoraConfig
from vflax.planner.environment import local_devices
from vflax.slices import Slice
from vflax.slices import parse as parse_slice
from vflax.step import ModelShapes, TrainProgram, build_train_program, shape_model

# The newest libtpu whose programs jax 0.10 can print for every generation.
LIBTPU = "0.0.42.1"
NO_TIMES = f"no times, for this libtpu cannot print its programs; libtpu=={LIBTPU} can"
_OVERFLOW = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_TEMPORARIES = re.compile(
    r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for: a slice, or devices of this machine.

    Attributes:
        name: as it was given.
        slice: None for devices of this machine.
        devices: for a mesh; those of a slice are descriptions only.
    """

    name: str
    slice: Slice | None
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        return len(self.devices)

    @property
    def slices(self) -> int:
        return self.slice.slices if self.slice else 1


def find_target(name: str) -> Target:
    """The devices of a booked slice, or of "cpu:N".

    Raises:
        UserError: no such slice, no libtpu here, or fewer CPU devices than N.
    """
    count = local_devices(name)
    if count is not None:
        here = jax.devices("cpu")
        if not 1 <= count <= len(here):
            raise UserError(
                f"--topology={name}: this process has {len(here)} CPU devices; "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count} makes so many"
            )
        return Target(name, None, tuple(here[:count]))
    return Target(name, found := parse_slice(name), tuple(_describe(found).devices))


def _describe(wanted: Slice) -> Any:
    """JAX's description of a slice's devices."""
    options: dict[str, Any] = {}
    if wanted.slices > 1:
        options["num_slices"] = wanted.slices
    if wanted.generation.name == "v4":
        # Both cores of a chip as one device, as JAX has them on a v4 slice.
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    elif wanted.shape == (2, 4):
        options["chips_per_host_bounds"] = (2, 4, 1)  # booked as one host of eight chips
    elif wanted.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=wanted.topology, **options)
    except Exception as error:  # libtpu raises RuntimeError and JaxRuntimeError, the import ImportError
        said = " ".join(str(error).split())
        if "not installed" in said:
            raise UserError(
                "no libtpu on this machine, which holds the TPU compiler: "
                f"pip install 'vflax[plan]', or pip install libtpu=={LIBTPU}; or set TPU_LIBRARY_PATH to a libtpu.so"
            ) from None
        raise UserError(f"--topology={wanted.name}: libtpu does not know this slice ({said[:300]})") from None


def make_mesh(config: ConfigDict, target: Target) -> tuple[Mesh, str]:
    """The mesh of config.mesh on a target, and what of it had to be changed, for a person ("" for nothing).

    Across slices the axis `data` must run; where the config leaves it at 1 it becomes the number of slices.
    """
    sizes = dict(config.mesh)
    note = ""
    if target.slices > 1 and sizes["data"] == 1:
        sizes["data"] = target.slices
        note = f"--config.mesh.data={target.slices}, one for each slice"
    return sharding.make_mesh(sizes["data"], sizes["fsdp"], sizes["tensor"], target.devices), note


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step holds.

    Attributes:
        rows: of a micro-batch, over all chips.
        capacity: the most supervised tokens of a row.
        total_steps: of the run.
    """

    rows: int
    capacity: int
    total_steps: int


@dataclasses.dataclass(frozen=True)
class Step:
    """A run's training step for a mesh, traced.

    Attributes:
        model: its shapes.
        program: what is jitted.
        mesh: where.
        arguments: (state, frozen, batch) of ShapeDtypeStructs with shardings.
        traced: jax.stages.Traced.
    """

    model: ModelShapes
    program: TrainProgram
    mesh: Mesh
    arguments: tuple[Any, dict[str, Any], dict[str, Any]]
    traced: Any


def batch_shapes(config: ConfigDict, model: LlavaConfig, mesh: Mesh, rows: int) -> dict[str, Any]:
    """The batch as the loader gives it (vflax/data/rows.py): leaves [A, rows, ...]."""
    accumulation, length, size = config.batch.accumulation, config.data.max_length, model.vision.image_size
    where = sharding.batch_sharding(mesh)

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((accumulation, rows, *shape), dtype, sharding=where)

    tokens = {name: leaf((length,), jnp.int32) for name in ("ids", "labels", "segments", "positions")}
    return {**tokens, "images": leaf((config.data.slots, size, size, 3), jnp.uint8)}


def step_arguments(
    config: ConfigDict, model: LlavaConfig, shapes: ModelShapes, program: TrainProgram, mesh: Mesh, rows: int
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(state, frozen, batch) that a run calls its step with, as ShapeDtypeStructs with shardings.

    Args:
        rows: of a micro-batch, over all chips.
    """
    _, frozen = freeze.split(shapes.abstract, shapes.verdict)
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shapes.shardings[path])
        for path, leaf in frozen.items()
    }
    return program.state, placed, batch_shapes(config, model, mesh, rows)


def trace_step(
    config: ConfigDict, model: LlavaConfig, adapters: LoraConfig | None, mesh: Mesh, work: Work
) -> Step:
    """Trace the step that vflax.train would run.

    Raises:
        UserError: rows that do not divide among the chips, or keys that the model cannot have.
    """
    shards = sharding.batch_shards(mesh)
    if work.rows % shards:
        raise UserError(f"{work.rows} rows do not divide among {shards} chips along data and fsdp")
    shapes = shape_model(config, model, adapters, mesh)
    program = build_train_program(
        config, shapes, adapters, mesh, capacity=work.capacity, total_steps=work.total_steps
    )
    arguments = step_arguments(config, model, shapes, program, mesh, work.rows)
    with jax.set_mesh(mesh):
        traced = program.step.trace(*arguments)
    return Step(shapes, program, mesh, arguments, traced)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip, by the compiler.

    Attributes:
        peak: the most that is held at a time; the figure that must fit.
        host: what it keeps in the host's memory.
    """

    peak: int
    host: int


@dataclasses.dataclass(frozen=True)
class Overflow:
    """What the compiler says of a program that does not fit; bytes of one chip, None where it does not say."""

    needs: int | None
    limit: int | None
    message: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a mesh.

    Attributes:
        lowered, executable: jax.stages.Lowered and jax.stages.Compiled.
        memory: of one chip.
        program: its HLO; None where this libtpu cannot print it.
        seconds, cpu_seconds: that the compilation took.
    """

    lowered: Any
    executable: Any
    memory: Memory
    program: Program | None
    seconds: float
    cpu_seconds: float


def compile_traced(traced: Any, mesh: Mesh) -> Compiled | Overflow:
    """Lower and compile; a program that is too large for the chips is a result, not an error."""
    wall, processor = time.perf_counter(), time.process_time()
    try:
        with jax.set_mesh(mesh):
            lowered = traced.lower()
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return read_overflow(str(error))
    seconds, cpu = time.perf_counter() - wall, time.process_time() - processor
    analysis = executable.memory_analysis()
    peak = analysis.peak_memory_in_bytes
    if mesh.devices.flat[0].platform == "cpu":  # where it leaves the temporaries out
        peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    memory = Memory(int(peak), int(analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes))
    try:
        program = Program(executable.as_text())
    except jax.errors.JaxRuntimeError:  # libtpu newer than JAX, see LIBTPU
        program = None
    return Compiled(lowered, executable, memory, program, seconds, cpu)


def read_overflow(message: str) -> Overflow:
    """What a RESOURCE_EXHAUSTED error of the compiler says."""
    whole, temporaries = _OVERFLOW.search(message), _TEMPORARIES.search(message)
    found = whole or temporaries
    if found is None:
        return Overflow(None, None, " ".join(message.split())[:300])
    needs, limit = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    what = "needs" if whole else "its temporaries alone need"
    return Overflow(needs, limit, f"{what} {needs / GIB:.2f} GiB of {limit / GIB:.2f} GiB")


def held(step: Step) -> Mapping[str, int]:
    """{"parameters", "frozen", "optimizer", "batch"}: bytes of one chip that the step is given, from its shardings."""

    def size(tree: Any) -> int:
        return sum(
            leaf.dtype.itemsize * _count(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )

    state, frozen, batch = step.arguments
    return {
        "parameters": size(state.trainable),
        "frozen": size(frozen),
        "optimizer": size(state.opt_state),
        "batch": size(batch),
    }


def _count(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
