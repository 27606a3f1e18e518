"""Count what raters said on a page of `page`: who wins how often, and how far raters agree.

    python -m vflax.preference aggregate ratings-anna-*.json ratings-ben-*.json --key=page.key.json --out=DIR

DIR gets aggregate.json and aggregate.md: win rates with a tie as half a win, of each rater and of all; agreement
between raters (percentage, Cohen's kappa, Krippendorff's alpha); how often each said the same of the pairs that came
twice; and, with --judge=DIR of `judge`, agreement with the judge.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vflax.constants import EXIT_DONE
from vflax.errors import UserError
from vflax.evaluate.compare import sign_test
from vflax.preference.agreement import agreement, kappa
from vflax.preference.questions import TIE, ChatQuestion
from vflax.preference.ratings import Key, Rated, read_judge, read_key, read_ratings
from vflax.preference.saving import markdown_table, number, save_json, with_interval
from vflax.preference.wins import by_groups, win_rate
from vflax.whole_file import replace


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add = parser.add_argument
    add("ratings", nargs="+", type=Path, metavar="RATINGS.json", help="what raters saved on the page")
    add("--key", required=True, type=Path, metavar="KEY.json", help="of that page")
    add("--judge", type=Path, metavar="DIR", help="what the judge command wrote of the same answers")
    add("--out", required=True, type=Path, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Count and write; status 0."""
    key = read_key(args.key)
    raters: dict[str, Rated] = {}
    for path in args.ratings:
        rated = read_ratings(path, key, args.key)
        if rated.name in raters:
            raise UserError(f"{path}: ratings of {rated.name} are there twice; keep the later file")
        raters[rated.name] = rated
    judged = read_judge(args.judge, key, list(key.models)) if args.judge else None
    found = aggregate(key, list(raters.values()), judged)
    replace(args.out / "aggregate.md", markdown(found))
    save_json(args.out / "aggregate.json", found)
    print(markdown(found))
    return EXIT_DONE


def aggregate(key: Key, raters: Sequence[Rated], judged: Mapping[str, str] | None) -> dict[str, Any]:
    """All numbers, as aggregate.json has them.

    Returns:
        page; models: a and b; items: pairs; ratings: of these; win_rate of a: the mean over pairs of the mean of their
        ratings; wins_a, wins_b, ties: of pairs, by that mean; p: of the sign test on these; groups; raters: of each its
        ratings, win_rate, repeats and how many of them are consistent, how often Answer 1 and Answer 2 were preferred,
        seconds (median); agreement; judge (None without one): agreement with each rater and with the majority.
    """
    a, b = key.models
    once = [item for item, facts in key.items.items() if not facts["repeats"]]
    questions = [
        ChatQuestion(facts["question_id"], "", kind=facts["kind"], category=facts["category"])
        for facts in (key.items[item] for item in once)
    ]
    points = {a: 1.0, b: 0.0, TIE: 0.5}
    scores = np.array([[points.get(own.preferred.get(item, ""), np.nan) for item in once] for own in raters])
    there = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        means = np.where(there, scores, 0.0).sum(0) / there.sum(0)  # [items]; NaN where nobody has rated
    by_item = {
        own.name: {i: p for i, p in own.preferred.items() if not key.items[i]["repeats"]} for own in raters
    }
    wins_a, wins_b = int((means > 0.5).sum()), int((means < 0.5).sum())
    return {
        "page": key.page, "models": {"a": a, "b": b}, "items": len(once), "ratings": int(there.sum()),
        "win_rate": win_rate(means), "wins_a": wins_a, "wins_b": wins_b, "ties": int((means == 0.5).sum()),
        "p": sign_test(wins_a, wins_b), "groups": by_groups(means, questions),
        "raters": {own.name: _of_rater(own, key, row) for own, row in zip(raters, scores, strict=True)},
        "agreement": agreement(by_item),
        "judge": None if judged is None else _with_judge(key, once, by_item, means, judged),
    }  # fmt: skip


def _of_rater(rated: Rated, key: Key, scores: np.ndarray) -> dict[str, Any]:
    again = {
        item: facts["repeats"]
        for item, facts in key.items.items()
        if facts["repeats"] and item in rated.choices and facts["repeats"] in rated.choices
    }
    return {
        "ratings": int(np.isfinite(scores).sum()),
        "win_rate": win_rate(scores),
        "repeats": len(again),
        "consistent": sum(rated.preferred[item] == rated.preferred[first] for item, first in again.items()),
        "first_place": sum(choice == "first" for choice in rated.choices.values()),
        "second_place": sum(choice == "second" for choice in rated.choices.values()),
        "seconds": median(rated.seconds),
    }


def _with_judge(
    key: Key,
    once: Sequence[str],
    by_item: Mapping[str, Mapping[str, str]],
    means: np.ndarray,
    judged: Mapping[str, str],
) -> dict[str, Any]:
    """Agreement of a judge with each rater and with the majority, which is a model or a tie: {name: {n, share, kappa}};
    share and kappa are None of nothing."""
    a, b = key.models
    majority = {
        item: a if mean > 0.5 else b if mean < 0.5 else TIE
        for item, mean in zip(once, means.tolist(), strict=True)
        if np.isfinite(mean)
    }
    found = {}
    for name, own in {"majority": majority, **by_item}.items():
        common = [
            (said, judged[q]) for i, said in own.items() if (q := key.items[i]["question_id"]) in judged
        ]
        same = sum(said == verdict for said, verdict in common)
        found[name] = {
            "n": len(common),
            "share": same / len(common) if common else None,
            "kappa": kappa([said for said, _ in common], [verdict for _, verdict in common]),
        }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """aggregate.md."""
    a, b = found["models"]["a"], found["models"]["b"]
    head = [
        "rater",
        "ratings",
        f"{a} wins",
        "same of what came twice",
        "Answer 1 : Answer 2",
        "seconds, median",
    ]
    rows = [
        [
            name, str(own["ratings"]), with_interval(own["win_rate"], percent=True),
            f"{own['consistent']} of {own['repeats']}", f"{own['first_place']} : {own['second_place']}",
            number(own["seconds"]),
        ]
        for name, own in found["raters"].items()
    ]  # fmt: skip
    agreed = found["agreement"]
    lines = [
        f"# {a} against {b}\n",
        f"{a} wins {with_interval(found['win_rate'], percent=True)}: {found['wins_a']} wins, {found['ties']} ties, "
        f"{found['wins_b']} losses by the mean of each pair's ratings; sign test p = {found['p']:.2g}. "
        f"{found['ratings']} ratings of {found['items']} pairs. A tie is half a win; numbers in brackets hold 95 %.\n",
        markdown_table(head, rows),
    ]
    for by, own in found["groups"].items():
        cells = [[name, f"{cell['n']:g}", with_interval(cell, percent=True)] for name, cell in own.items()]
        lines.append(markdown_table([by, "n", f"{a} wins"], cells))
    if agreed["pairs"]:
        lines += [
            "## Agreement\n",
            f"Raters agree in {number(agreed['share'], percent=True)} of pairs of ratings; Krippendorff's alpha is "
            f"{number(agreed['alpha'])}, over {agreed['items']} pairs that two or more have rated.\n",
            markdown_table(
                ["raters", "pairs", "agree", "Cohen's kappa"],
                [
                    [
                        f"{one['a']}, {one['b']}",
                        str(one["n"]),
                        number(one["share"], percent=True),
                        number(one["kappa"]),
                    ]
                    for one in agreed["pairs"]
                ],
            ),
        ]
    if found["judge"]:
        lines += [
            "## With the judge\n",
            markdown_table(
                ["", "pairs", "agree", "Cohen's kappa"],
                [
                    [name, str(own["n"]), number(own["share"], percent=True), number(own["kappa"])]
                    for name, own in found["judge"].items()
                ],
            ),
        ]
    return "\n".join(lines)
