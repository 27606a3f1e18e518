"""Score a file of predictions: no model, no network, no JAX.

    python -m vflax.evaluate.score --task=pope --predictions=answers.jsonl --data=DIR --json=pope.json

The rule is that of the benchmark's authors unless --mode names another; docs/evaluate.md has a table of them. The
result is a score file (numbers, intervals, groups, what it was made from), and with --verdicts a line for each
question.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import vflax
from vflax.errors import UserError
from vflax.evaluate.result import Score
from vflax.evaluate.tasks import TASKS, format_of
from vflax.whole_file import replace


def score(
    task: str,
    predictions: Path,
    *,
    format: str | None = None,
    data: Path | None = None,
    mode: str | None = None,
    custom: bool = False,
    limit: int | None = None,
) -> Score:
    """Score predictions by a benchmark's rule.

    Args:
        task: a name of `TASKS`.
        predictions: a file or folder.
        format: of it; None: as it shows.
        data: the benchmark as released; None where the predictions have the right answers with them.
        mode: whose rule; None: the authors'.
        custom: `data` is a set of one's own in the benchmark's format.
        limit: of each group only so many pictures; see `vflax.evaluate.question.limited`.

    Raises:
        UserError: naming file, key and remedy.
    """
    module = TASKS[task]
    for name, value, known in (("format", format, module.FORMATS), ("mode", mode, module.MODES)):
        if value is not None and value not in known:
            listed = "".join(f"\n  {key}: {line}" for key, line in known.items())
            raise UserError(f"--{name}={value}: not one of {task}'s:{listed}")
    for name, path in (("predictions", predictions), ("data", data)):
        if path is not None and not path.exists():
            raise UserError(f"--{name}={path}: not there")
        if path is not None and path.is_dir() and not any(path.iterdir()):
            raise UserError(f"--{name}={path}: empty")
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit}: expected 1 or more")
    rule = mode or next(iter(module.MODES))
    shown = format or format_of(module, predictions)
    found = module.score(predictions, shown, data, rule, custom=custom, limit=limit)
    manifest = {"predictions": str(predictions), "data": data and str(data), "vflax": vflax.__version__}
    return dataclasses.replace(found, manifest={**manifest, **found.manifest})


def show(found: Score, console: Console) -> None:
    """The numbers, for a person; names, which may be anybody's own, as they are."""
    console.print(
        f"[bold]{found.task}[/bold] {found.score:.2f}   ({found.mode} rule, {found.n:,} questions, {found.missing:,} "
        f"missing, {found.unparsed:,} unparsed)"
    )
    flat = Table("", "", "95 %", box=None)
    for name, value in found.metrics.items():
        if "/" not in name:
            low, high = found.intervals[name]
            flat.add_row(Text(name), f"{value:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(flat)
    for kind, groups in found.groups.items():
        columns = list(dict.fromkeys(key for own in groups.values() for key in own))
        shown = Table(kind, *columns, box=None)
        for name, own in groups.items():
            shown.add_row(Text(name), *(_cell(own.get(key)) for key in columns))
        console.print(shown)


def _cell(value: float | None) -> str:
    """Whole numbers whole, others to two places; empty where a group has none."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def write(found: Score, score_file: Path | None, verdicts: Path | None) -> None:
    """A score file, and a line for each question.

    Raises:
        UserError: a place that cannot be written to.
    """
    for path, text in (
        (score_file, json.dumps(found.as_json(), indent=1, ensure_ascii=False, allow_nan=False)),
        (verdicts, "\n".join(json.dumps(dataclasses.asdict(v), ensure_ascii=False) for v in found.verdicts)),
    ):
        if path is not None:
            replace(path, text + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; status 1 where something is wrong, which is told."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.evaluate.score", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE_OR_DIR")
    parser.add_argument("--format", help="of the predictions; default: as it shows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the benchmark as released")
    parser.add_argument("--mode", help="whose rule; default: the authors'")
    parser.add_argument("--custom", action="store_true", help="--data is a set of your own in this format")
    parser.add_argument("--limit", type=int, metavar="N", help="of each group only the first N pictures")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the score here")
    parser.add_argument("--verdicts", type=Path, metavar="OUT", help="write a line for each question here")
    args = parser.parse_args(argv)
    try:
        found = score(
            args.task,
            args.predictions,
            format=args.format,
            data=args.data,
            mode=args.mode,
            custom=args.custom,
            limit=args.limit,
        )
        write(found, args.json, args.verdicts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(found, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
