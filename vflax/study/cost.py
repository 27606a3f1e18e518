"""What a study will cost, before it starts: the planner's figures for each launch that is still to be run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vflax import config as configs
from vflax.study.grid import Run
from vflax.study.recipe import config_of, placed

# On a CPU the compiler tells no time: it is work over measured speed, of which small models reach such a share.
CPU_SHARE = 0.25


@dataclass(frozen=True)
class Cost:
    """Of some launches.

    Attributes:
        launches, steps, samples: how many.
        hours: of training, on one slice, one after the other; None where a run's length is not known.
        chip_hours, price: likewise; price in USD, None where none was given.
        said: what has to be known of these figures.
    """

    launches: int
    steps: int | None
    samples: float | None
    hours: float | None
    chip_hours: float | None
    price: float | None
    said: tuple[str, ...]


def estimate(
    runs: Sequence[Run], topology: str, price: float | None, say: Callable[[str], None], work: str = ""
) -> Cost:
    """By the planner (docs/plan.md): each different program is compiled for the slice once.

    Args:
        runs: the launches.
        topology: a slice as `vflax.plan --topology` names it; "cpu": this machine.
        price: of a chip for an hour.
        say: gets a line for each program that is compiled, which may take minutes.
        work: what {work} stands for in the runs' changes.

    Raises:
        UserError: an unknown slice, or a run that the planner refuses.
    """
    seconds: list[float | None] = []
    steps: list[int | None] = []
    samples, said, chips = 0.0, dict[str, None](), 1
    speeds: dict[str, float | None] = {}
    for run in runs:
        config = _planned(dataclasses.replace(run, changes=placed(run.changes, work)))
        step, chips, speed = (_on_cpu if topology == "cpu" else _on_slice)(config, topology, speeds, say, run)
        steps.append(step.steps)
        samples += (step.steps or 0) * step.samples
        seconds.append(step.steps * speed if step.steps is not None and speed is not None else None)
        if not step.measured:
            said |= dict.fromkeys(step.said)
    known = [value for value in seconds if value is not None]
    hours = sum(known) / 3600 if len(known) == len(runs) else None
    said |= dict.fromkeys(
        [
            f"CPU: operations at {CPU_SHARE:.0%} of a measured matrix product, an assumption; starting and "
            "evaluating come on top"
        ]
        if topology == "cpu"
        else ["times are the compiler's, lower bounds; starting, compiling and evaluating come on top"]
    )
    return Cost(
        len(runs), sum(s for s in steps if s is not None) if None not in steps else None,
        samples if None not in steps else None, hours, None if hours is None else hours * chips,
        None if hours is None or price is None else hours * chips * price, tuple(said),
    )  # fmt: skip


def _planned(run: Run) -> Any:
    """Its config; what starts from another run has that one's model, which need not be there yet."""
    config = config_of(run)
    first = next(run.chain())
    if first is not run:
        start = config_of(first)
        config.init, config.tokenizer, config.model = start.init, start.tokenizer, start.model
    return config


def _on_cpu(
    config: Any, _topology: str, speeds: dict[str, float | None], _say: Callable[[str], None], _run: Run
) -> tuple[Any, int, float | None]:
    import jax

    from vflax import aot, sharding
    from vflax.flops import device_peak, train_step_flops
    from vflax.known_models import model_of
    from vflax.models import lora
    from vflax.planner.workload import Given, find_workload
    from vflax.step import shape_model

    model, _ = model_of(config)
    mesh, _ = aot.make_mesh(config, aot.find_target("cpu:1"))
    work = find_workload(config, model, sharding.batch_shards(mesh), Given())
    peak = speeds.get("peak") or device_peak(jax.local_devices()[0])[0]
    speeds["peak"] = peak
    shapes = shape_model(config, model, lora.read(configs.plain(config.lora)), mesh)
    flops = train_step_flops(
        model, shapes.abstract, shapes.verdict, tokens=work.tokens, supervised=work.supervised, context=work.context,
        images=work.images,
    )  # fmt: skip
    return work, 1, flops / (peak * CPU_SHARE)


def _on_slice(
    config: Any, topology: str, speeds: dict[str, float | None], say: Callable[[str], None], run: Run
) -> tuple[Any, int, float | None]:
    from vflax import aot, sharding
    from vflax.known_models import model_of
    from vflax.models import lora
    from vflax.planner import figures
    from vflax.planner.workload import Given, find_workload

    model, _ = model_of(config)
    target = aot.find_target(topology)
    mesh, _ = aot.make_mesh(config, target)
    work = find_workload(config, model, sharding.batch_shards(mesh), Given())
    shape = json.dumps(
        [
            run.config,
            configs.plain(config.freeze),
            configs.plain(config.lora),
            config.optimizer.moment_dtype,
            work.rows,
            work.accumulation,
            work.capacity,
            config.data.max_length,
        ]
    )
    if shape not in speeds:
        say(f"compiling {run.config} for {topology} ...")
        step = aot.trace_step(
            config, model, lora.read(configs.plain(config.lora)), mesh,
            aot.Work(work.rows // work.accumulation, work.capacity, work.steps or 1),
        )  # fmt: skip
        plan = figures.describe(config, model, target, step, aot.compile_traced(step.traced, mesh), work)
        speeds[shape] = plan.get("seconds_per_step") if plan["fits"] and not plan["refused"] else None
        if speeds[shape] is None:
            say(f"{run.config} on {topology}: {plan['reason'] or plan['refused']}")
    return work, target.chips, speeds[shape]
