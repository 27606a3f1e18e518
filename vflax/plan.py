"""Will it fit, how fast, what does it cost: a run's own training step, compiled for slices that are not here.

    python -m vflax.plan --config=configs/stage1.py:13b --topology=v5e-16,v4-32,2xv5e-256 [--price=1.20] [--json=FILE]
    python -m vflax.plan --config=configs/stage1.py:7b --topology=v5e-16 --search --budget-minutes=30
    python -m vflax.plan --config=configs/stage1.py:7b --topology=v5e-8 --decode --decode-rows=8

Any machine with a CPU will do; nothing is downloaded, no array is made. A slice is named as it is booked (v4 and v5p
count cores), or by its shape, v5e:2x4; cpu:N means N devices of this machine. docs/plan.md is the page on it.
Exit status: 0 a plan was made, and on at least one slice it fits and launch would start it; 1 on none, or an error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from vflax.config_flag import CONFIG, parser
from vflax.errors import UserError

_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "Slices, with commas: v5e-16, v4-32, 2xv5e-256, v5e:2x4, cpu:8."
)
_ROWS = flags.DEFINE_integer(
    "rows-per-chip", None, "Rows that a chip computes at a time, in place of those that batch.samples makes."
)
_PER_ROW = flags.DEFINE_float(
    "samples-per-row", None, "Samples of a row, in place of what packing reaches, or is taken to."
)
_SAMPLES = flags.DEFINE_integer("samples", None, "Samples of an epoch, in place of the data's own.")
_SUPERVISED = flags.DEFINE_integer(
    "supervised", None, "Supervised tokens that a row has room for, in place of what the data needs."
)
_PRICE = flags.DEFINE_float("price", None, "USD for a chip and an hour.")
_JSON = flags.DEFINE_string("json", None, "Write all figures to this file.")
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try rows per chip, remat policies and meshes for what is fastest and fits."
)
_MINUTES = flags.DEFINE_float("budget-minutes", 30.0, "With --search: minutes for each slice.")
_SAVE = flags.DEFINE_string(
    "save", None, "Write the compiled step to this file, for launch --config.compiled=FILE."
)
_DECODE = flags.DEFINE_bool(
    "decode", False, "Plan answers (prompt read, tokens written) in place of training."
)
_DECODE_ROWS = flags.DEFINE_integer("decode-rows", 8, "With --decode: prompts that are answered at a time.")
_PROMPT = flags.DEFINE_integer(
    "prompt-tokens", 1024, "With --decode: tokens of a prompt, its image included."
)
_NEW = flags.DEFINE_integer("new-tokens", 256, "With --decode: tokens of an answer.")
_FLAGS = [
    "config",
    "topology",
    "rows-per-chip",
    "samples-per-row",
    "samples",
    "supervised",
    "price",
    "json",
    "search",
    "budget-minutes",
    "save",
    "decode",
    "decode-rows",
    "prompt-tokens",
    "new-tokens",
]


def main(argv: Sequence[str]) -> None:
    """Plan for every slice, print, and write what is asked for."""
    logging.set_verbosity(logging.WARNING)
    try:
        if not CONFIG.value or not _TOPOLOGY.value:
            raise UserError("--config and --topology must be given, see --help")
        for flag, path in (("json", _JSON.value), ("save", _SAVE.value)):
            if path is not None:
                _check_writable(flag, Path(path))
        sys.exit(_plan(CONFIG.value, _TOPOLOGY.value))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _plan(config: Any, names: Sequence[str]) -> int:
    # After the flags: importing JAX takes seconds, and must find the environment as aot wants it.
    from rich.console import Console

    from vflax import aot
    from vflax import config as configs
    from vflax.known_models import model_of
    from vflax.planner import figures, show
    from vflax.planner.workload import Given

    if _DECODE.value and (_SAVE.value or _SEARCH.value):
        raise UserError("--decode goes with neither --save nor --search")
    if _SAVE.value and (_SEARCH.value or len(names) > 1):
        raise UserError("--save writes one program: name one --topology, without --search")
    configs.check_values(config)
    console = Console()
    model, sizes = model_of(config)
    show.say(console, sizes)
    if _DECODE.value:
        return _decode(config, model, sizes, names, console)
    given = Given(_ROWS.value, _PER_ROW.value, _SAMPLES.value, _SUPERVISED.value)
    targets = [aot.find_target(name) for name in names]  # all names are read before anything is compiled
    if _SEARCH.value:
        plans = [plan for target in targets for plan in _search(config, model, target, given, console)]
    else:
        plans = [_one(config, model, target, given, console) for target in targets]
    if plans:  # a search may have found nothing worth compiling
        console.print(show.table(plans, f"stage {config.stage} ({config.variant})"))
    for plan in plans:
        for line in [plan["reason"], plan["refused"], *plan["flops"]["notes"]]:
            if line:
                show.say(console, f"{plan['topology']}: {line}")
    limits = figures.limits(max(target.slices for target in targets))
    for line in limits:
        show.say(console, line)
    if _JSON.value:
        _write_json(Path(_JSON.value), {"sizes": sizes, "plans": plans, "limits": limits})
    return 0 if any(plan["fits"] and not plan["refused"] for plan in plans) else 1


def _one(config: Any, model: Any, target: Any, given: Any, console: Any) -> dict[str, Any]:
    from vflax import aot, saved_program, sharding
    from vflax import config as configs
    from vflax.models import lora
    from vflax.planner import figures, show
    from vflax.planner.workload import find_workload

    mesh, note = aot.make_mesh(config, target)
    work = find_workload(config, model, sharding.batch_shards(mesh), given)
    for line in (*work.said, note):
        if line:
            show.say(console, f"{target.name}: {line}")
    step = aot.trace_step(
        config, model, lora.read(configs.plain(config.lora)), mesh,
        aot.Work(work.rows // work.accumulation, work.capacity, work.steps or 1),
    )  # fmt: skip
    compiled = aot.compile_traced(step.traced, mesh)
    plan = figures.describe(config, model, target, step, compiled, work, _PRICE.value)
    if _SAVE.value and isinstance(compiled, aot.Compiled):
        saved_program.save(Path(_SAVE.value), compiled.lowered, compiled.executable, mesh, plan)
        show.say(console, f"saved: start the run with --config.compiled={_SAVE.value}")
        if target.slice is not None:
            show.say(
                console, "loading a program on a TPU is unverified; launch compiles where it does not work"
            )
    return plan


def _decode(config: Any, model: Any, sizes: str, names: Sequence[str], console: Any) -> int:
    """Answers in place of training."""
    from vflax import aot
    from vflax.planner import decode, figures, show

    request = decode.Request(_DECODE_ROWS.value, _PROMPT.value, _NEW.value)
    targets = [aot.find_target(name) for name in names]
    plans = [decode.describe(config, model, target, request, _PRICE.value) for target in targets]
    console.print(
        show.table(plans, f"greedy answers of {config.variant} in {config.dtype}", show.DECODE_LINES)
    )
    for line in [f"{plan['topology']}: {plan['reason']}" for plan in plans if plan["reason"]]:
        show.say(console, line)
    limits = figures.limits(max(target.slices for target in targets))
    for line in limits:
        show.say(console, line)
    if _JSON.value:
        _write_json(Path(_JSON.value), {"sizes": sizes, "decode": plans, "limits": limits})
    return 0 if any(plan["fits"] for plan in plans) else 1


def _search(config: Any, model: Any, target: Any, given: Any, console: Any) -> list[dict[str, Any]]:
    """The plan of the best candidate with the config's own batch, and of the best one of all where it is another."""
    from vflax.planner import figures, search, show

    def tell(text: str) -> None:
        show.say(console, f"{target.name}: {text}")

    found = search.search(config, model, target, given, _MINUTES.value, tell, _PRICE.value)
    if found.refused:
        least = min(found.refused, key=lambda candidate: candidate.estimate)
        why = figures.refusal(least.estimate, target.slice.generation.hbm)
        tell(f"{len(found.refused)} not compiled, for launch would refuse them; of the smallest: {why}")
    tell(
        f"{len(found.tried)} compiled, {found.pruned} ruled out by formula"
        + (f", {len(found.left)} not reached in {_MINUTES.value:g} minutes" if found.left else "")
    )
    plans = []
    for same_batch, what in ((True, "with the config's own batch"), (False, "of all")):
        best = found.best(same_batch=same_batch)
        if best is None:
            tell(f"best {what}: none fits")
        elif best[1] not in plans:
            tell(f"best {what}: {' '.join(best[0].flags(config)) or 'the config as it is'}")
            plans.append(best[1])
    return plans or [plan for _, plan in found.tried[-1:]]


def _check_writable(flag: str, path: Path) -> None:
    """Before an hour of compiling, not after it.

    Raises:
        UserError: with the flag and the remedy, where the file could not be written.
    """
    if not path.parent.is_dir():
        raise UserError(
            f"--{flag}={path}: there is no folder {path.parent}; make it, or name a file elsewhere"
        )
    if path.is_dir():
        raise UserError(f"--{flag}={path} is a folder; name a file in it")
    try:
        if path.exists():
            path.open("ab").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(
            f"--{flag}={path} cannot be written ({error.strerror}); name a file in a folder of your own"
        ) from None


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}") from None


def _prepare(argv: Sequence[str]) -> None:
    """Set what JAX reads when it is imported; of the flags only --topology matters, for cpu:N."""
    from vflax.planner.environment import ENVIRONMENT, local_devices

    os.environ.update(ENVIRONMENT)
    given = " ".join(argv).replace("--topology ", "--topology=").split()
    names = [name for arg in given if arg.startswith("--topology=") for name in arg[11:].split(",")]
    count = max((local_devices(name) or 0 for name in names), default=0)
    if count and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flag]))


def cli() -> None:
    """Entry point."""
    _prepare(sys.argv)
    app.run(main, flags_parser=parser(__doc__, _FLAGS))


if __name__ == "__main__":
    cli()
