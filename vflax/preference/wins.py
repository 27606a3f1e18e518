"""Who wins how often: of each two models, over all questions and by kind and category, with a tie as half a win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from vflax.evaluate.compare import sign_test
from vflax.preference.questions import TIE, ChatQuestion
from vflax.preference.saving import markdown_table, number, with_interval
from vflax.preference.shares import Measure

_Row = Mapping[str, Any]


def win_rate(scores: np.ndarray) -> dict[str, Any]:
    """Of one model, with a bootstrap's interval over questions.

    Args:
        scores: float [n], 1 where it wins, 0 where the other does, a half for a tie, NaN where there is no verdict.
    """
    there = np.isfinite(scores)
    return Measure(np.where(there, scores, 0.0), there.astype(float)).measured().as_json()


def by_groups(scores: np.ndarray, questions: Sequence[ChatQuestion]) -> dict[str, dict[str, dict[str, Any]]]:
    """{kind or category: {name: win rate}} of scores [n]."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for by in ("kind", "category"):
        names = np.array([getattr(question, by) for question in questions])
        own = {name: win_rate(scores[names == name]) for name in dict.fromkeys(names.tolist()) if name}
        if own:
            found[by] = own
    return found


def pair_tally(rows: Sequence[_Row], questions: Sequence[ChatQuestion]) -> dict[str, Any]:
    """Of two models, in the questions' order.

    Args:
        rows: of verdicts.jsonl, see `vflax.preference.judge.judge`; all of one a and b.

    Returns:
        a, b, n; same: answers that nobody was asked about; unread: without a verdict; wins_a, wins_b, ties; win_rate of
        a; p: of the sign test (two-sided, exact) on the wins; of what was asked and read, how often both orders agree
        (consistent), and how often the first or the second place was preferred in both (first_place, second_place);
        groups.
    """
    a, b = rows[0]["a"], rows[0]["b"]
    verdicts = Counter(row["verdict"] for row in rows)
    read = [row["orders"] for row in rows if not row["same"] and None not in row["orders"]]
    scores = np.array([{a: 1.0, b: 0.0, TIE: 0.5, None: np.nan}[row["verdict"]] for row in rows])
    return {
        "a": a, "b": b, "n": len(rows), "same": sum(row["same"] for row in rows), "unread": verdicts[None],
        "wins_a": verdicts[a], "wins_b": verdicts[b], "ties": verdicts[TIE],
        "win_rate": win_rate(scores), "p": sign_test(verdicts[a], verdicts[b]),
        "asked": len(read), "consistent": sum(one == other for one, other in read),
        "first_place": read.count([a, b]), "second_place": read.count([b, a]),
        "groups": by_groups(scores, questions),
    }  # fmt: skip


def tally(rows: Sequence[_Row], names: Sequence[str], questions: Sequence[ChatQuestion]) -> dict[str, Any]:
    """Of each two of the models (`pairs`), and all together.

    Returns:
        pairs; matrix: {model: {other: its win rate against it}}; mean: {model: mean of these}; None without verdicts.
    """
    pairs = [
        pair_tally([row for row in rows if (row["a"], row["b"]) == (a, b)], questions)
        for a, b in combinations(names, 2)
    ]
    matrix: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for pair in pairs:
        rate = pair["win_rate"]["value"]
        matrix[pair["a"]][pair["b"]] = rate
        matrix[pair["b"]][pair["a"]] = None if rate is None else 1 - rate
    means: dict[str, float | None] = {}
    for name, own in matrix.items():
        there = [rate for rate in own.values() if rate is not None]
        means[name] = sum(there) / len(there) if there else None
    return {"pairs": pairs, "matrix": matrix, "mean": means}


def markdown(found: Mapping[str, Any]) -> str:
    """judge.md."""
    judge = found["judge"]
    seen = "It saw the pictures" if judge["pictures"] else "It was told references in place of the pictures"
    lines = [
        "# Preference of a judge\n",
        f"{judge['judge']} ({', '.join(judge['versions']) or 'never asked'}) at {judge['base_url']}, temperature "
        f"{judge['temperature']}, {judge['date'] or 'no date'}. {seen}, and was asked about each pair in both orders. "
        "A tie is half a win; numbers in brackets hold 95 %.\n",
    ]
    for pair in found["pairs"]:
        lines += [
            f"## {pair['a']} against {pair['b']}\n",
            f"{pair['a']} wins {with_interval(pair['win_rate'], percent=True)}: {pair['wins_a']} wins, {pair['ties']} "
            f"ties, {pair['wins_b']} losses; sign test p = {pair['p']:.2g}. Of {pair['n']:,} questions {pair['same']} "
            f"have the same answer twice, and {pair['unread']} no verdict that could be read.\n",
            f"Of {pair['asked']} pairs that were asked, both orders agree on {pair['consistent']}; the first place was "
            f"preferred twice in {pair['first_place']}, the second in {pair['second_place']}.\n",
        ]
        for by, own in pair["groups"].items():
            rows = [[name, f"{cell['n']:g}", with_interval(cell, percent=True)] for name, cell in own.items()]
            lines.append(markdown_table([by, "n", f"{pair['a']} wins"], rows))
    if len(found["matrix"]) > 2:
        names = list(found["matrix"])
        rows = [
            [name, *(number(found["matrix"][name].get(other), percent=True) for other in names),
             number(found["mean"][name], percent=True)]
            for name in names
        ]  # fmt: skip
        lines += ["## All\n", markdown_table(["wins against", *names, "mean"], rows)]
    return "\n".join(lines)
