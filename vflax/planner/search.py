"""Which rows per chip, rematerialisation and mesh suit a slice best, as far as a time limit lets one find out.

Each candidate is first weighed by formulas (vflax/memory.py for its memory, work per token for its speed). Launch goes
by that of the memory, too: those that it would refuse to start are never compiled, the others in the order of the
speed that they promise. What the compiler says of one corrects the formula for those of its kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from vflax import aot, sharding
from vflax import config as configs
from vflax.constants import GIB
from vflax.errors import UserError
from vflax.models import lora
from vflax.models.layers import REMAT_POLICIES
from vflax.models.llava import LlavaConfig
from vflax.planner import figures
from vflax.planner.workload import Given, Workload, find_workload, on
from vflax.step import shape_model

# Rows per chip that are tried beyond those of the config's own batch, in multiples of them.
_LARGER = (2, 4, 8)
_TENSOR = (1, 2, 4)
_DATA = (1, 2, 4)  # inside a slice
# Forward and backward passes over the layers: three without recomputation, four with all of it, of which attention's
# kernel is a tenth; what goes to the host and back is waited for now and then.
_PASSES = {
    "none": 3.0, "dots": 3.1, "dots_no_batch": 3.2, "attention": 3.9, "full": 4.0, "offload_attention": 4.1,
    "offload": 4.2,
}  # fmt: skip
# A formula may be this much too high after it has been corrected by a compilation.
_CORRECTED = 0.95


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run the step.

    Attributes:
        mesh: sizes of data, fsdp and tensor.
        remat: a policy.
        work: the step on it.
        same_batch: whether it learns from as many samples a step as the config says.
        estimate: bytes of a chip, by launch's formula.
    """

    mesh: tuple[int, int, int]
    remat: str
    work: Workload
    same_batch: bool
    estimate: int

    @property
    def rows(self) -> int:
        """Of a chip, at a time."""
        return self.work.rows // (self.work.accumulation * self.mesh[0] * self.mesh[1])

    @property
    def burden(self) -> float:
        """Time per token by rule of thumb, for the order alone: passes, small products, exchange along tensor and,
        once a step, along data."""
        data, _, tensor = self.mesh
        exchange = (1 + 0.1 * (tensor - 1)) * (1 + 0.002 * (data - 1))
        filled = self.work.planned / self.work.rows
        return _PASSES[self.remat] * (1 + 0.1 / self.rows) * exchange / filled

    def flags(self, config: ConfigDict) -> list[str]:
        """What of the config it changes, as flags of launch."""
        data, fsdp, tensor = self.mesh
        wanted = {
            "mesh.data": data,
            "mesh.fsdp": fsdp,
            "mesh.tensor": tensor,
            "remat": self.remat,
            "batch.accumulation": self.work.accumulation,
        }
        if not self.same_batch:
            wanted["batch.samples"] = round(self.work.samples)
        now = configs.flatten(configs.plain(config))
        now |= {
            f"mesh.{axis}": size
            for axis, size in zip(sharding.AXES, self.mesh, strict=True)
            if now[f"mesh.{axis}"] == -1
        }
        return [f"--config.{key}={value}" for key, value in wanted.items() if now[key] != value]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        tried: (candidate, plan) in the order of compilation.
        left: candidates that time did not reach.
        pruned: how many the formulas ruled out, once they were corrected.
        refused: those that launch would refuse to start.
    """

    tried: list[tuple[Candidate, dict[str, Any]]]
    left: list[Candidate]
    pruned: int
    refused: list[Candidate]

    def best(self, *, same_batch: bool) -> tuple[Candidate, dict[str, Any]] | None:
        """The one that fits with the most tokens a second; of those with the config's batch, or of all.

        Where the plans have no times, the one that the formula takes for the fastest.
        """
        fitting = [
            (candidate, plan)
            for candidate, plan in self.tried
            if plan["fits"] and (candidate.same_batch or not same_batch)
        ]
        return max(
            fitting, key=lambda entry: (entry[1].get("tokens_per_s", 0.0), -entry[0].burden), default=None
        )


def search(
    config: ConfigDict,
    model: LlavaConfig,
    target: aot.Target,
    given: Given,
    minutes: float,
    tell: Callable[[str], None],
    price: float | None = None,
) -> Result:
    """Try candidates until all are done, the next one would, judged by the slowest so far, end too late, or Ctrl-C.

    Args:
        config, model, target, given, price: of the plan.
        minutes: to spend; the first candidate is compiled in any case.
        tell: is told what happens.

    Raises:
        UserError: nothing to search for, or no candidate.
    """
    if target.slice is None:
        raise UserError(
            f"--search: {target.name} has no limit of memory and no cycles to search by; name a slice"
        )
    began, limit = time.monotonic(), target.slice.generation.hbm
    found = sorted(_candidates(config, model, target, given), key=lambda c: (not c.same_batch, c.burden))
    if not found:
        raise UserError(f"--search: no mesh of {target.chips} chips holds this model and its rows")
    waiting = [candidate for candidate in found if figures.refusal(candidate.estimate, limit) is None]
    refused = [candidate for candidate in found if figures.refusal(candidate.estimate, limit) is not None]
    ratio: dict[str, float] = {}
    too_large: list[Candidate] = []
    tried: list[tuple[Candidate, dict[str, Any]]] = []
    pruned, slowest = 0, 0.0

    def hopeless(candidate: Candidate) -> bool:
        if any(_is_larger(candidate, other) for other in too_large):
            return True
        factor = ratio.get(candidate.remat, 1.0) * _CORRECTED
        return candidate.estimate * factor > limit

    while waiting:
        candidate = waiting.pop(0)
        if hopeless(candidate):
            pruned += 1
            continue
        spent = time.monotonic() - began
        if tried and spent + slowest > minutes * 60:
            waiting.insert(0, candidate)
            break
        start = time.monotonic()
        try:
            plan = _compile(config, model, target, candidate, price)
        except KeyboardInterrupt:  # what was found so far is worth having
            waiting.insert(0, candidate)
            break
        slowest = max(slowest, time.monotonic() - start)
        tried.append((candidate, plan))
        peak = plan["memory"].get("peak")
        if plan["fits"] and peak:
            ratio[candidate.remat] = peak / candidate.estimate
        else:
            too_large.append(candidate)
        tell(_line(candidate, plan))
    left = [candidate for candidate in waiting if not hopeless(candidate)]
    return Result(tried, left, pruned + len(waiting) - len(left), refused)


def _line(candidate: Candidate, plan: dict[str, Any]) -> str:
    peak = plan["memory"].get("peak")
    said = f"{peak / GIB:.2f} GiB" if peak else plan["reason"]
    speed = ""
    if plan["fits"]:
        found = plan.get("tokens_per_s")
        speed = f", {found:,.0f} tokens/s at most" if found else ", no times"
    data, fsdp, tensor = candidate.mesh
    batch = "" if candidate.same_batch else f" (batch.samples={round(candidate.work.samples)})"
    return (
        f"mesh {data} x {fsdp} x {tensor}, {candidate.rows} rows per chip x {candidate.work.accumulation}, remat "
        f"{candidate.remat}{batch}: about {candidate.estimate / GIB:.2f} GiB by formula, compiled {said}{speed}"
    )


def _is_larger(candidate: Candidate, other: Candidate) -> bool:
    """Whether it needs at least as much as another one of its policy that did not fit: with more of it along data, a
    chip holds more of the model."""
    same = candidate.mesh[2] == other.mesh[2] and candidate.remat == other.remat
    return (
        same
        and candidate.mesh[0] >= other.mesh[0]
        and candidate.rows >= other.rows
        and candidate.work.accumulation >= other.work.accumulation
    )


def _candidates(
    config: ConfigDict, model: LlavaConfig, target: aot.Target, given: Given
) -> Iterator[Candidate]:
    adapters = lora.read(configs.plain(config.lora))
    first: Workload | None = None
    for sizes in _meshes(config, target):
        try:
            mesh = sharding.make_mesh(*sizes, target.devices)
            shapes = shape_model(config, model, adapters, mesh)
        except UserError:
            continue  # a mesh that launch would refuse: over hosts, or leaving too much unsharded
        shards = sharding.batch_shards(mesh)
        if first is None:
            first = find_workload(config, model, shards, given)
        for work, same in _works(config, first, shards, given):
            for remat in REMAT_POLICIES:
                estimate = figures.launch_estimate(config, model, shapes, mesh, work, remat)
                yield Candidate(sizes, remat, work, same, estimate)


def _meshes(config: ConfigDict, target: aot.Target) -> list[tuple[int, int, int]]:
    """(data, fsdp, tensor): the config's own, where it is one for the target, and those that are tried beside it."""
    found: list[tuple[int, int, int]] = []
    with contextlib.suppress(UserError):
        own = aot.make_mesh(config, target)[0].shape
        found.append((own["data"], own["fsdp"], own["tensor"]))
    for tensor, data in itertools.product(_TENSOR, _DATA):
        rest, left = divmod(target.chips, tensor * data * target.slices)
        if left == 0:
            found.append((data * target.slices, rest, tensor))
    return list(dict.fromkeys(found))


def _works(config: ConfigDict, first: Workload, shards: int, given: Given) -> Iterator[tuple[Workload, bool]]:
    """(the step with so many rows at a time, whether it is the config's batch)."""
    if given.rows_per_chip is not None:
        yield on(first, shards, first.accumulation, given.rows_per_chip), True
        return
    whole = on(first, shards, 1)
    accumulation = 1
    while accumulation <= whole.rows // shards:
        yield on(first, shards, accumulation), True
        accumulation *= 2
    for times in _LARGER:
        larger = on(first, shards, 1, times * whole.rows // shards)
        # As many steps as the config says, however much is learned in one.
        yield dataclasses.replace(larger, steps=config.steps or larger.steps), False


def _compile(
    config: ConfigDict, model: LlavaConfig, target: aot.Target, candidate: Candidate, price: float | None
) -> dict[str, Any]:
    changed = config.copy_and_resolve_references()
    changed.remat, changed.batch.accumulation = candidate.remat, candidate.work.accumulation
    work = candidate.work
    mesh = sharding.make_mesh(*candidate.mesh, target.devices)
    step = aot.trace_step(
        changed, model, lora.read(configs.plain(config.lora)), mesh,
        aot.Work(work.rows // work.accumulation, work.capacity, work.steps or 1),
    )  # fmt: skip
    plan = figures.describe(changed, model, target, step, aot.compile_traced(step.traced, mesh), work, price)
    jax.clear_caches()  # of a program that is not run again
    return plan
