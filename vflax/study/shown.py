"""A result in words: what its page, its Markdown and its plots' captions say, as texts in the order of reading."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vflax.goodput import duration
from vflax.study.result import CANNOT, NOT_SHOWN, OPPOSITE, SHOWN, UNFINISHED
from vflax.study.statistics import LEVEL

# {verdict: (a sign for those who see no colours, the class of its colour in report.css.j2 of vflax.evaluate)}
VERDICTS = {
    SHOWN: ("✓", "right"),
    NOT_SHOWN: ("≈", "partly"),
    OPPOSITE: ("✗", "wrong"),
    CANNOT: ("?", "missing"),
    UNFINISHED: ("…", "missing"),
}
_BETTER = {"higher": "higher is better", "lower": "lower is better", "": ""}


def study(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is said of a study.

    Args:
        result: what vflax.study.result.build gives.
    """
    cells = result["cells"]
    metrics = result["metrics"]
    places = {metric["name"]: _decimals(metric) for metric in metrics}
    facts = [f"{cells['finished']} of {cells['wanted']} cells are finished",
             f"{_count(len(result['arms']), 'arm')} x {_count(len(result['seeds']), 'seed')}"]  # fmt: skip
    if result["seconds"]:
        facts.append(f"{duration(result['seconds'])} of training")
    measured = [metric for metric in metrics if any(own["n"] for own in metric["arms"].values())]
    return {
        "name": result["study"],
        "variant": result["variant"],
        "title": result["title"],
        "question": result["question"],
        "notes": result["notes"],
        "facts": ", ".join(facts),
        "finished": cells["finished"] == cells["wanted"],
        "claims": [_claim(claim, places.get(claim["metric"], 1)) for claim in result["claims"]],
        "plots": [
            {
                "file": file,
                "alt": _caption(metric, result["arms"]),
                "wide": bool(metric["paper"]),
                "metric": metric,
            }
            for file, metric in zip(_files(measured), measured, strict=True)
        ],
        "columns": [{"label": m["label"], "better": _better(m), "paper": _paper(m)} for m in measured],
        "rows": [
            {"arm": arm["name"], "cells": [_cell(m, arm["name"], len(result["seeds"])) for m in measured]}
            for arm in result["arms"]
        ],
        "seeds": _seeds(result, measured),
        "unmeasured": [metric["label"] for metric in metrics if metric not in measured],
    }


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """ "5 claims: 3 ✓ shows it, 2 ? cannot"."""
    counts = {verdict: sum(claim["verdict"] == verdict for claim in claims) for verdict in VERDICTS}
    ends = ", ".join(
        f"{count} {VERDICTS[verdict][0]} {verdict}" for verdict, count in counts.items() if count
    )
    doubtful = sum(claim["doubtful"] for claim in claims)
    but = f"; of these verdicts {doubtful} may be chance among so many tests (p, Holm)" if doubtful else ""
    return f"{_count(len(claims), 'claim')}: {ends}{but}" if claims else "no claims"


def _claim(claim: Mapping[str, Any], places: int) -> dict[str, Any]:
    mark, tint = VERDICTS[claim["verdict"]]
    why = claim["why"]
    doubtful = (
        claim["verdict"] in (SHOWN, OPPOSITE) and claim["p_holm"] is not None and claim["p_holm"] > 1 - LEVEL
    )
    if doubtful:
        why += "; but among all tests of the study one such may well be chance (Holm)"
    return {
        "text": claim["text"],
        "source": claim["source"],
        "test": claim["test"],
        "verdict": claim["verdict"],
        "mark": mark,
        "tint": tint,
        "doubtful": doubtful,
        "why": why,
        "difference": "" if claim["mean"] is None else f"{claim['mean']:+,.{places}f}",
        "interval": _between(claim, places, "+"),
        "p": _p(claim["p"]),
        "p_holm": _p(claim["p_holm"]),
    }


def _cell(metric: Mapping[str, Any], arm: str, seeds: int) -> dict[str, str]:
    """Of a table: the mean, half its interval, over how many seeds where some lack, and the paper's number."""
    own, places = metric["arms"][arm], _decimals(metric)
    half = None if own["high"] is None else own["high"] - own["mean"]
    paper = metric["paper"].get(arm)
    return {
        "mean": "" if own["mean"] is None else f"{own['mean']:,.{places}f}",
        "half": "" if half is None else f"± {half:,.{places}f}",
        "some": _some(own, seeds),
        "paper": "" if paper is None else f"{paper:,g}" if abs(paper) < 1000 else f"{paper:,.1f}",
    }


def _some(own: Mapping[str, Any], seeds: int) -> str:
    """Over how many seeds or runs a mean is, where not over a run of each seed."""
    known = len(own["values"])
    if known not in (0, seeds):
        return f"{known} of {seeds} seeds"
    return f"{_count(own['n'], 'run')} for all seeds" if own["n"] < known else ""


def _seeds(result: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm and seed of which something is known."""
    rows = []
    for arm in result["arms"]:
        for seed in result["seeds"]:
            found = [metric["arms"][arm["name"]]["values"].get(str(seed)) for metric in measured]
            texts = [
                "" if v is None else f"{v:,.{_decimals(m)}f}" for v, m in zip(found, measured, strict=True)
            ]
            if any(texts):
                rows.append({"arm": arm["name"], "seed": str(seed), "cells": texts})
    return rows


def _caption(metric: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    """What a plot shows, for those who do not see it."""
    places = _decimals(metric)
    points = []
    for arm in arms:
        own = metric["arms"][arm["name"]]
        if own["n"]:
            within = _between(own, places)
            points.append(f"{arm['name']} {own['mean']:,.{places}f}" + (f" ({within})" if within else ""))
    return f"{metric['label']}: {'; '.join(points)}"


def _better(metric: Mapping[str, Any]) -> str:
    floor = "" if metric["floor"] is None else f"{metric['floor']:g}: one same answer to everything"
    return "; ".join(filter(None, (_BETTER[metric["better"]], floor)))


def _paper(metric: Mapping[str, Any]) -> str:
    return f"the paper: {metric['paper_label'] or metric['label']}" if metric["paper"] else ""


def _files(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names for the plots; no two are one."""
    found: list[str] = []
    for metric in metrics:
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", metric["name"]).strip("_") or "metric"
        twins = sum(
            file == f"{name}.png" or re.fullmatch(rf"{name}-\d+\.png", file) is not None for file in found
        )
        found.append(f"{name}-{twins + 1}.png" if twins else f"{name}.png")
    return found


def _decimals(metric: Mapping[str, Any]) -> int:
    """Places after the point: two figures of the usual half interval, or of how far the values lie apart."""
    arms = metric["arms"].values()
    scales = [
        own["high"] - own["mean"] for own in arms if own["high"] is not None and own["high"] > own["mean"]
    ]
    values = [value for own in arms for value in own["values"].values()]
    scale = median(scales) if scales else max(values) - min(values) if values else 0.0
    if scale == 0:
        return 1 if not values or abs(values[0]) >= 10 else 3
    return min(4, max(1, 1 - math.floor(math.log10(scale))))


def _between(estimate: Mapping[str, Any], places: int, sign: str = "") -> str:
    if estimate["low"] is None:
        return ""
    return f"{estimate['low']:{sign},.{places}f} to {estimate['high']:{sign},.{places}f}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
