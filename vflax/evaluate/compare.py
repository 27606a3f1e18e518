"""Compare two models on the same questions: differences, how sure they are, and the questions that make them.

    python -m vflax.evaluate.compare A B [--json=OUT]

A and B are what vflax.evaluate wrote: its --out folders, or a task's folder of each. Of every task that both have:

score       the benchmark's own, and what holds 95 % of the differences when the same questions are drawn again for both
            (paired bootstrap, Efron and Tibshirani, 1993)
questions   their mean score in percent, likewise; and an exact sign test (McNemar, 1947): how often would one model be
            ahead on so many more of the units where they differ, were neither better? A unit is what belongs together,
            as the questions on one picture, since these are not independent.

"ahead" is on how many units A is, and B. With --json=OUT the questions on which either is better are listed there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vflax.errors import UserError
from vflax.evaluate.files import Row, json_lines, json_object, keyed, need
from vflax.evaluate.result import ROUNDS, interval, without_nan
from vflax.whole_file import replace

# What makes two questions the same one, beside their key.
_SAME = ("unit", "groups", "answer")
# Sums of tenths are not exact: what should be no gain may be 1e-17.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Change:
    """From a to b; low, high: what 95 % of the draws of the difference hold, None where a score file has no draws."""

    a: float
    b: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """Of B to A on a task, over the same questions.

    n, units: how many. score: the benchmark's own; questions: the mean of their scores, in percent.
    units_a, units_b: units on which only this one is ahead; p: of the sign test on these.
    better_a, better_b: the keys of questions on which it has the higher score.
    """

    task: str
    n: int
    units: int
    score: Change
    questions: Change
    units_a: int
    units_b: int
    p: float
    better_a: list[str]
    better_b: list[str]


def compare(a: Path, b: Path) -> list[Difference]:
    """All tasks that two runs have in common.

    Raises:
        UserError: no common task, or a task with other questions or another rule on either side.
    """
    found_a, found_b = _tasks(a), _tasks(b)
    common = [name for name in found_a if name in found_b]
    if not common:
        raise UserError(f"{a} has {', '.join(found_a)}, {b} has {', '.join(found_b)}: no task in common")
    return [_difference(name, found_a[name], found_b[name]) for name in common]


def _tasks(folder: Path) -> dict[str, Path]:
    """{task: the folder with its score}."""
    found: dict[str, Path] = {}
    for path in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
        file = path / "score.json"
        if file.exists():
            score = json_object(file)
            need(score, ("task", "mode", "score"), str(file))
            other = found.setdefault(score["task"], path)
            if other != path:
                raise UserError(f"{other} and {path} are both {score['task']}; say which one to compare")
    if not found:
        raise UserError(
            f"{folder}: no score.json in it or in its folders; python -m vflax.evaluate writes them"
        )
    return found


def _difference(task: str, a: Path, b: Path) -> Difference:
    scores = [json_object(folder / "score.json") for folder in (a, b)]
    if scores[0]["mode"] != scores[1]["mode"]:
        raise UserError(
            f"{task}: {a} is scored by rule {scores[0]['mode']!r}, {b} by {scores[1]['mode']!r}; score alike"
        )
    rows_a, rows_b = _verdicts(a), _verdicts(b)
    odd = sorted(rows_a.keys() ^ rows_b.keys())
    if odd:
        raise UserError(
            f"{task}: {len(odd):,} questions are on one side only, the first {odd[0]}; compare like with like"
        )
    for key, row in rows_a.items():
        for name in _SAME:
            if row[name] != rows_b[key][name]:
                raise UserError(
                    f"{task}: {key}: {name} is {row[name]!r} in {a} and {rows_b[key][name]!r} in {b}: two versions of "
                    "the benchmark; compare like with like"
                )
    of_a, of_b = (np.array([own[key]["score"] for key in rows_a], float) for own in (rows_a, rows_b))
    unit = np.unique([row["unit"] for row in rows_a.values()], return_inverse=True)[1]
    gains, sizes = np.bincount(unit, of_b - of_a), np.bincount(unit)
    units_a, units_b = int((gains < -_EQUAL).sum()), int((gains > _EQUAL).sum())
    return Difference(
        task, len(of_a), len(sizes),
        score=_change(scores[0]["score"], scores[1]["score"], _paired(scores)),
        questions=_change(100 * of_a.mean(), 100 * of_b.mean(), _drawn(gains, sizes)),
        units_a=units_a, units_b=units_b, p=sign_test(units_a, units_b),
        better_a=[key for key, one, other in zip(rows_a, of_a, of_b, strict=True) if one - other > _EQUAL],
        better_b=[key for key, one, other in zip(rows_a, of_a, of_b, strict=True) if other - one > _EQUAL],
    )  # fmt: skip


def _verdicts(folder: Path) -> dict[str, Row]:
    path = folder / "verdicts.jsonl"
    rows = json_lines(path)
    for number, row in enumerate(rows, 1):
        need(row, ("key", "score", *_SAME), f"{path}, line {number}")
    return keyed(rows, lambda row: row["key"], path)


def _change(a: float | None, b: float | None, draws: np.ndarray) -> Change:
    one, other = (float("nan") if value is None else float(value) for value in (a, b))
    low, high = interval(draws)
    return Change(one, other, other - one, *((None, None) if math.isnan(low) else (low, high)))


def _paired(scores: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[draws] differences of the benchmark's own score: each draw of result.draws takes the same units of the same
    questions, whoever answered them. Empty where a file has no draws."""
    one, other = (np.array(score.get("draws", ()), float) for score in scores)
    return other - one if one.shape == other.shape else np.empty(0)


def _drawn(gains: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[draws] mean difference of questions in percent, units drawn again; gains, sizes: of each unit."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(ROUNDS):
        own = rng.integers(0, len(sizes), len(sizes))
        found.append(100 * gains[own].sum() / sizes[own].sum())
    return np.array(found)


def sign_test(one: int, other: int) -> float:
    """The chance of a split at least as uneven, of one + other fair coins (two-sided, exact)."""
    count = one + other
    ways = tail = 1  # to choose k of them; for all k so far
    for k in range(min(one, other)):
        ways = ways * (count - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; status 1 where something is wrong, which is told."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.evaluate.compare", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    try:
        found = compare(args.a, args.b)
        if args.json:
            told = without_nan([asdict(one) for one in found])
            replace(args.json, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("", "A", "B", "B - A", "95 %", "ahead", "p", box=None)
    for one in found:
        table.add_row(f"{one.task} score", *_cells(one.score))
        table.add_row(
            f"{one.n:,} questions",
            *_cells(one.questions),
            f"{one.units_a:,} : {one.units_b:,}",
            f"{one.p:.2g}",
        )
    Console().print(table)
    return 0


def _cells(change: Change) -> tuple[str, ...]:
    within = "" if change.low is None else f"{change.low:+.2f} to {change.high:+.2f}"
    return f"{change.a:.2f}", f"{change.b:.2f}", f"{change.difference:+.2f}", within


if __name__ == "__main__":
    sys.exit(main())
