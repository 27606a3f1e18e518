"""From finished cells to numbers and verdicts: what STUDY/result.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vflax.study import statistics
from vflax.study.grid import Claim, Difference, Metric, NoWorse, Run, Study, Trend
from vflax.study.measures import value_of

SHOWN, NOT_SHOWN, OPPOSITE = "shows it", "does not show it", "shows the opposite"
CANNOT, UNFINISHED = "cannot", "unfinished"

Measures = Mapping[tuple[str, int], Mapping[str, float]]  # {(arm, seed): {measure: value}}


def build(study: Study, measures: Measures) -> dict[str, Any]:
    """The result as JSON types; what is unknown is None.

    Args:
        study: the grid.
        measures: of each finished cell.
    """
    values = {metric.name: _values(study, metric, measures) for metric in study.metrics}
    return {
        "study": study.name,
        "variant": study.variant,
        "title": study.title,
        "question": study.question,
        "axis": study.axis,
        "notes": list(study.notes),
        "seeds": study.seeds,
        "cells": {"wanted": len(study.cells), "finished": len(measures)},
        "arms": [asdict(arm) for arm in study.arms],
        "metrics": [_metric(study, metric, values[metric.name]) for metric in study.metrics],
        "claims": _claims(study, values, len(measures) == len(study.cells)),
        "seconds": sum(own.get("seconds", 0.0) for own in measures.values()),
    }


def _values(study: Study, metric: Metric, measures: Measures) -> dict[str, dict[int, float]]:
    """{arm: {seed: value}}."""
    found: dict[str, dict[int, float]] = {arm.name: {} for arm in study.arms}
    for (arm, seed), own in measures.items():
        if (value := value_of(metric, own)) is not None:
            found[arm][seed] = value
    return found


def _metric(study: Study, metric: Metric, values: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    arms = {}
    for arm in study.arms:
        own = values[arm.name]
        arms[arm.name] = _finite(asdict(statistics.estimate(_of_distinct_runs(study, arm.name, own)))) | {
            "values": {str(seed): value for seed, value in sorted(own.items())}
        }
    return {
        "name": metric.name,
        "label": metric.label,
        "better": metric.better,
        "floor": metric.floor,
        "arms": arms,
        "paper": dict(metric.paper),
        "paper_label": metric.paper_label,
    }


def _of_distinct_runs(study: Study, arm: str, values: Mapping[int, float]) -> list[float]:
    """An arm's values; one where several seeds share a run, which says nothing of chance."""
    runs: list[Run] = []
    found = []
    for cell in study.cells:
        if cell.arm == arm and cell.seed in values and cell.run not in runs:
            runs.append(cell.run)
            found.append(values[cell.seed])
    return found


def _claims(
    study: Study, values: Mapping[str, Mapping[str, Mapping[int, float]]], finished: bool
) -> list[dict[str, Any]]:
    found = [_tested(study, claim, values, finished) for claim in study.claims]
    # Of one study; what is not tested does not count.
    ps = [math.nan if claim["p"] is None else claim["p"] for claim in found]
    for claim, p in zip(found, statistics.holm(ps), strict=True):
        claim["p_holm"] = None if math.isnan(p) else p
    return found


def _tested(
    study: Study, claim: Claim, values: Mapping[str, Mapping[str, Mapping[int, float]]], finished: bool
) -> dict[str, Any]:
    test = claim.test
    told: dict[str, Any] = {
        "text": claim.text, "source": claim.source, "test": test.says if test else "",
        "metric": test.metric if test else "", "n": 0, "mean": None, "low": None, "high": None, "p": None,
    }  # fmt: skip
    if test is None:
        return told | {"verdict": CANNOT, "why": claim.why_not}
    own = values[test.metric]
    if isinstance(test, Trend):
        xs = {arm.name: arm.x for arm in study.arms if arm.x and arm.name in _arms_of(study, test)}
        change = statistics.slope({x: own[name] for name, x in xs.items()})
    else:
        other = values[(isinstance(test, Difference) and test.against) or test.metric]
        change = statistics.difference(own[test.arm], other[test.other])
    told |= _finite(asdict(change) | {"p": _p(test, change)})
    if not finished:
        return told | {"verdict": UNFINISHED, "why": "some cells are not run yet"}
    if not any(own.values()):
        return told | {"verdict": CANNOT, "why": f"no cell has measured {test.metric}"}
    if not change.n:
        return told | {"verdict": CANNOT, "why": f"no seed has {test.metric} in all arms of the claim"}
    if math.isnan(change.low):
        return told | {"verdict": CANNOT, "why": "one seed says nothing of chance: give more seeds"}
    if why := _at_the_floor(study, test, own):
        return told | {"p": None, "verdict": CANNOT, "why": why}
    verdict, why = _verdict(test, change)
    return told | {"verdict": verdict, "why": why}


def _at_the_floor(
    study: Study, test: Difference | Trend | NoWorse, values: Mapping[str, Mapping[int, float]]
) -> str:
    """Why a claim cannot be decided where no arm of it does what is asked; empty: one does.

    A difference between arms that are all no better than one same answer is one of habits, such as how often a model
    says no word that is asked for, and not of what they can do.
    """
    [floor] = [metric.floor for metric in study.metrics if metric.name == test.metric]
    if floor is None:
        return ""
    for arm in _arms_of(study, test):
        found = statistics.estimate(_of_distinct_runs(study, arm, values[arm]))
        if (found.mean if math.isnan(found.low) else found.low) > floor:
            return ""
    return f"no arm is beyond doubt above {floor:g}, which one same answer to everything gets"


def _arms_of(study: Study, test: Difference | Trend | NoWorse) -> list[str]:
    if isinstance(test, Trend):
        return [arm.name for arm in study.arms if arm.x and (not test.arms or arm.name in test.arms)]
    return [test.arm, test.other]


def _verdict(test: Difference | Trend | NoWorse, change: statistics.Estimate) -> tuple[str, str]:
    """By the interval alone: it must lie on one side of what the claim draws as its line."""
    if isinstance(test, NoWorse):
        if change.low > -test.margin:
            return SHOWN, f"the whole interval lies above -{test.margin:g}"
        if change.high < -test.margin:
            return OPPOSITE, f"the whole interval lies below -{test.margin:g}"
        return NOT_SHOWN, f"the interval reaches below -{test.margin:g}"
    sign = test.sign if isinstance(test, Trend) else 1
    least = 0.0 if isinstance(test, Trend) else test.least
    low, high = (change.low, change.high) if sign > 0 else (-change.high, -change.low)
    if low > least:
        return SHOWN, "the whole interval lies on the claim's side"
    if high < -least:
        return OPPOSITE, "the whole interval lies on the other side"
    return NOT_SHOWN, "the interval holds no difference as well as one: it may be chance"


def _p(test: Difference | Trend | NoWorse, change: statistics.Estimate) -> float:
    """Of a true value on the line that the claim draws: below 0.05 where the interval lies on one side of it."""
    if isinstance(test, Trend) or math.isnan(change.low):
        return change.p
    if isinstance(test, NoWorse):
        return statistics.p_at(change, -test.margin)
    if abs(change.mean) < test.least:
        return 1.0  # less than the claim asks for, on either side
    return statistics.p_at(change, math.copysign(test.least, change.mean))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
