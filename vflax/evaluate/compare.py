"""Compare two models on the same questions: differences, how sure they are, and the questions that make them.

    python -m vflax.evaluate.compare A B [--json=OUT]

A and B are what vflax.evaluate wrote: its --out folders, or a task's folder of each. For every task that both have, the
same questions are drawn again (paired bootstrap, Efron and Tibshirani, 1993) and the scores' differences taken; and on
questions that one of the two got right, an exact sign test (McNemar, 1947) asks whether that could be chance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vflax.errors import UserError
from vflax.evaluate.files import json_lines, json_value, keyed, need
from vflax.evaluate.result import ROUNDS, SHARE


@dataclass(frozen=True)
class Difference:
    """Of B to A on a task, over the same questions.

    mean_a, mean_b: of the questions' scores, in percent; difference: B - A; low, high: what 95 % of the draws hold.
    only_a, only_b: questions that only one has fully right; p: of the sign test on these.
    score_a, score_b: the benchmark's own, for reading beside published ones.
    """

    task: str
    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float
    score_a: float | None
    score_b: float | None


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
    paths = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = {
        json_value(path / "score.json")["task"]: path for path in paths if (path / "score.json").exists()
    }
    if not found:
        raise UserError(
            f"{folder}: no score.json in it or in its folders; python -m vflax.evaluate writes them"
        )
    return found


def _difference(task: str, a: Path, b: Path) -> Difference:
    scores = [json_value(folder / "score.json") for folder in (a, b)]
    if scores[0]["mode"] != scores[1]["mode"]:
        raise UserError(
            f"{task}: {a} is scored by rule {scores[0]['mode']!r}, {b} by {scores[1]['mode']!r}; score alike"
        )
    rows: list[dict[str, dict[str, Any]]] = []
    for folder in (a, b):
        path = folder / "verdicts.jsonl"
        lines = json_lines(path)
        need(lines[0], ("key", "unit", "answer", "score"), str(path))
        rows.append(keyed(lines, lambda row: row["key"], path))
    if rows[0].keys() != rows[1].keys():
        other = sorted(rows[0].keys() ^ rows[1].keys())
        raise UserError(
            f"{task}: {len(other):,} questions are on one side only, the first {other[0]}; compare like with like"
        )
    keys = list(rows[0])
    of_a, of_b = (np.array([own[key]["score"] for key in keys], float) for own in rows)
    units = np.unique([rows[0][key]["unit"] for key in keys], return_inverse=True)[1]
    low, high = _interval(of_b - of_a, units)
    only_a, only_b = (int(((x == 1) & (y < 1)).sum()) for x, y in ((of_a, of_b), (of_b, of_a)))
    return Difference(
        task, len(keys), 100 * of_a.mean(), 100 * of_b.mean(), 100 * (of_b - of_a).mean(), low, high, only_a, only_b,
        sign_test(only_a, only_b), scores[0]["score"], scores[1]["score"],
    )  # fmt: skip


def _interval(differences: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """Of the mean difference, in percent, units drawn again."""
    sums, sizes = np.bincount(units, differences), np.bincount(units)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(ROUNDS):
        own = rng.integers(0, len(sums), len(sums))
        drawn.append(100 * sums[own].sum() / sizes[own].sum())
    edge = 100 * (1 - SHARE) / 2
    low, high = np.percentile(drawn, [edge, 100 - edge])
    return float(low), float(high)


def sign_test(one: int, other: int) -> float:
    """The chance of a split at least as uneven, of one + other fair coins (two-sided, exact)."""
    count, few = one + other, min(one, other)
    tail = sum(math.comb(count, k) for k in range(few + 1))
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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    table = Table("task", "n", "A", "B", "B - A", "95 %", "only A right", "only B right", "p", box=None)
    for one in found:
        table.add_row(
            one.task, f"{one.n:,}", f"{one.mean_a:.2f}", f"{one.mean_b:.2f}", f"{one.difference:+.2f}",
            f"{one.low:+.2f} to {one.high:+.2f}", str(one.only_a), str(one.only_b), f"{one.p:.3g}",
        )  # fmt: skip
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
