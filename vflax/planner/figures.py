"""What a compiled training step says of a run: memory, work, traffic, time and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vflax import aot, freeze, jaxpr_flops, kept, memory, sharding
from vflax.constants import GIB
from vflax.flops import train_step_flops
from vflax.memory import kept_width
from vflax.models.attention import writes_scores
from vflax.models.llava import LlavaConfig
from vflax.planner.workload import Workload
from vflax.step import ModelShapes

# Share of a chip's peak that a splash kernel is taken to reach; the compiler says nothing of its time.
KERNEL_SHARE = 0.4

_LIMITS = (
    "Memory, collective bytes and cycles are the TPU compiler's own; nothing was run.",
    "Cycles are its cost model's: time spent waiting for the network, for the host and for data is not in them, nor "
    "are Pallas kernels. So times are lower bounds, and rates and MFU are ceilings.",
    f"Splash attention is counted by its products at {KERNEL_SHARE:.0%} of the chip's peak, an assumption.",
)
_BETWEEN_SLICES = (
    "Between slices: the bytes are what a chip hands to its host for the others. The time that these take on the data "
    "center's network is in no figure, so several slices look better than they are."
)


def limits(slices: int) -> tuple[str, ...]:
    """What a person has to know of the figures; `slices`: of the target that has most of them."""
    return _LIMITS if slices == 1 else (*_LIMITS, _BETWEEN_SLICES)


def launch_estimate(
    config: ConfigDict, model: LlavaConfig, shapes: ModelShapes, mesh: Mesh, work: Workload, remat: str
) -> int:
    """Bytes of a chip by the formula that launch goes by before it allocates anything (checks.check_fits)."""
    with jax.set_mesh(mesh):  # whose platform decides on attention
        scores = writes_scores(config.attention, config.data.max_length)
    sizes = memory.estimate(
        model, shapes.abstract, shapes.shardings, shapes.verdict,
        rows=work.rows // work.accumulation // sharding.batch_shards(mesh), max_length=config.data.max_length,
        capacity=work.capacity, slots=config.data.slots, accumulation=work.accumulation, dtype=config.dtype,
        moment_dtype=config.optimizer.moment_dtype, remat=remat, scores=scores,
    )  # fmt: skip
    return sizes["total"]


def refusal(estimate: int, limit: int | None) -> str | None:
    """Why launch would not start a step of that `launch_estimate`, whatever the compiler says of it; None: it would."""
    if limit is None or estimate <= limit * memory.USABLE:
        return None
    return (
        f"launch would refuse it: it estimates {estimate / GIB:.2f} GiB and plans with {memory.USABLE:.0%} of a chip's "
        f"{limit / GIB:.2f} GiB"
    )


def describe(
    config: ConfigDict,
    model: LlavaConfig,
    target: aot.Target,
    step: aot.Step,
    compiled: aot.Compiled | aot.Overflow,
    work: Workload,
    price: float | None = None,
) -> dict[str, Any]:
    """All figures of a plan as JSON types; bytes, operations and cycles are per chip, what is unknown is None.

    Args:
        config: of the run.
        model: its sizes.
        target: what was compiled for.
        step: the traced step.
        compiled: what came of it.
        work: what a step holds.
        price: of a chip for an hour.
    """
    shards = sharding.batch_shards(step.mesh)
    activations = kept.activations(step.traced.jaxpr) // shards
    # The trace has heads and columns whole; of them a chip keeps its own part along tensor.
    if whole := kept_width(model.decoder, config.remat):
        own = kept_width(model.decoder, config.remat, step.mesh.shape["tensor"])
        activations = activations * own // whole
    counted = jaxpr_flops.count(step.traced.jaxpr)
    useful = train_step_flops(
        model, step.model.abstract, step.model.verdict, tokens=work.tokens, supervised=work.supervised,
        context=work.context, images=work.images,
    )  # fmt: skip
    estimate = launch_estimate(config, model, step.model, step.mesh, work, config.remat)
    limit = target.slice.generation.hbm if target.slice else None
    result: dict[str, Any] = {
        "topology": target.name,
        "chips": target.chips,
        "mesh": dict(step.mesh.shape),
        "stage": config.stage,
        "variant": config.variant,
        "remat": config.remat,
        "attention": config.attention,
        "rows_per_chip": work.rows // work.accumulation // shards,
        "accumulation": work.accumulation,
        "max_length": config.data.max_length,
        "capacity": work.capacity,
        "samples_per_step": work.samples,
        "tokens_per_step": work.tokens,
        "steps": work.steps,
        "flops": {
            "model": useful / target.chips,
            "hardware": counted.total / target.chips,
            "kernels": counted.in_kernels / target.chips,
            "notes": counted.notes,
        },
        "refused": refusal(estimate, limit),
        **_memory(limit, estimate, aot.held(step), activations, compiled),
    }
    if isinstance(compiled, aot.Compiled):
        result["compile"] = {"seconds": compiled.seconds, "cpu_seconds": compiled.cpu_seconds}
        result |= _speed(config, model, target, step, compiled, work, result["flops"], price)
    return result


def _memory(
    limit: int | None,
    estimate: int,
    held: Mapping[str, int],
    activations: int,
    compiled: aot.Compiled | aot.Overflow,
) -> dict[str, Any]:
    if isinstance(compiled, aot.Overflow):
        reason = f"does not fit: {compiled.message}"
        known = {
            "limit": limit,
            "estimate": estimate,
            "needs": compiled.needs,
            **held,
            "activations": activations,
        }
        return {"fits": False, "reason": reason, "memory": known}
    peak = compiled.memory.peak
    rest = max(0, peak - sum(held.values()))
    return {
        "fits": limit is None or peak <= limit,
        "reason": None,
        "memory": {
            "limit": limit,
            "estimate": estimate,
            "peak": peak,
            **held,
            "activations": min(activations, rest),
            "temporaries": max(0, rest - activations),
            "host": compiled.memory.host,
        },
    }


def _speed(
    config: ConfigDict,
    model: LlavaConfig,
    target: aot.Target,
    step: aot.Step,
    compiled: aot.Compiled,
    work: Workload,
    flops: Mapping[str, Any],
    price: float | None,
) -> dict[str, Any]:
    program = compiled.program
    if program is None:
        return {"collectives": None, "reason": aot.NO_TIMES}
    result: dict[str, Any] = {"collectives": program.collective_bytes()}
    if target.slice is None:
        return result
    generation = target.slice.generation
    per_cycle = generation.peak / generation.clock
    cycles, kernels = program.cycles, flops["kernels"] / (per_cycle * KERNEL_SHARE)
    seconds = (cycles + kernels) / generation.clock
    dense = dense_flops(model, step, work.rows, config.data.max_length)
    hours = work.steps * seconds / 3600 if work.steps else None
    return result | {
        "cycles": cycles,
        "kernel_cycles": kernels,
        "mfu_ceiling": dense / target.chips / (cycles * per_cycle) if dense else None,
        "mfu_ceiling_with_kernels": dense / target.chips / ((cycles + kernels) * per_cycle)
        if dense
        else None,
        "useful_share": flops["model"] / ((cycles + kernels) * per_cycle),
        "seconds_per_step": seconds,
        "tokens_per_s": work.tokens / seconds,
        "samples_per_s": work.samples / seconds,
        "hours": hours,
        "chip_hours": hours * target.chips if hours is not None else None,
        "cost": hours * target.chips * price if hours is not None and price is not None else None,
    }


def dense_flops(model: LlavaConfig, step: aot.Step, rows: int, length: int) -> float | None:
    """6 N for each position and causal attention over whole rows: what an MFU is usually held against.

    N are the decoder's kernels, the vocabulary's included. The tower, the bridge and the borders between samples are
    left out. None where not all of the decoder learns, for which the formula does not hold.
    """
    kernels = [
        path for path in step.model.abstract if path.startswith("decoder/") and path.endswith("/kernel")
    ]
    if any(step.model.verdict[path] != freeze.TRAINABLE for path in kernels):
        return None
    count = sum(math.prod(step.model.abstract[path].shape) for path in kernels)
    decoder = model.decoder
    attention = 6.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim * length
    return rows * length * (6.0 * count + attention)
