"""What a scorer finds: a verdict on every question, the numbers that follow, and how sure they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Of a bootstrap: how often questions are drawn again, and the share of the draws that an interval holds.
ROUNDS = 1000
SHARE = 0.95

Metrics = Callable[[np.ndarray], dict[str, float]]
"""[n] how often each verdict counts, integers -> {flat name: number}."""


@dataclass(frozen=True)
class Verdict:
    """What became of a question.

    key: names it in its benchmark.
    unit: what is drawn together, since its questions are not independent: a picture, or the key itself.
    groups: {kind: name}, what it is counted under, as {"split": "random"}.
    answer: the right one.
    prediction: what the model said; None: missing.
    parsed: what was read from that; None: nothing.
    score: from 0 to 1.
    why: in a few words.
    """

    key: str
    unit: str
    groups: Mapping[str, str]
    answer: str
    prediction: str | None
    parsed: str | None
    score: float
    why: str = ""


@dataclass(frozen=True)
class Score:
    """What a score file holds. Shares are in percent; MME's scores are sums of such.

    task, mode, format: of the benchmark, whose rule, of the predictions.
    n: questions; missing: without a prediction, counted as wrong; unparsed: with one that nothing was read from.
    score: the number that the benchmark is quoted by; headline: its name in metrics.
    metrics: {flat name: number}, that one among them.
    intervals: {the same names: [low, high]}, which hold 95 % of 1,000 bootstrap draws.
    groups: {kind: {name: {metric: number}}}.
    printed: {name: text}, as the benchmark's own tool prints it, digit for digit.
    manifest: what it was made from.
    draws: the score in each bootstrap draw; the n-th takes the same units, whoever answered.
    verdicts: on every question, in the benchmark's order; kept in a file of their own.
    """

    task: str
    mode: str
    format: str
    n: int
    missing: int
    unparsed: int
    score: float
    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    groups: dict[str, dict[str, dict[str, float]]]
    printed: dict[str, str]
    manifest: dict[str, Any] = field(default_factory=dict)
    draws: Sequence[float] = ()
    verdicts: Sequence[Verdict] = ()

    def as_json(self) -> dict[str, Any]:
        """Without verdicts; numbers that are none (0 of 0) are null."""
        whole = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        del whole["verdicts"]
        return without_nan(whole)


def make(
    task: str,
    mode: str,
    format: str,
    verdicts: Sequence[Verdict],
    metrics: Metrics,
    headline: str,
    *,
    groups: dict[str, dict[str, dict[str, float]]],
    printed: dict[str, str],
    manifest: dict[str, Any],
    strata: str | None = None,
) -> Score:
    """Count, compute, and draw.

    Args:
        task, mode, format, verdicts, groups, printed, manifest: of the score.
        metrics: computes all numbers.
        headline: the one of them that is the score.
        strata: a kind of groups; units are drawn within each, as the benchmark has so many of each.
    """
    found = metrics(np.ones(len(verdicts), np.int64))
    drawn = draws(verdicts, metrics, strata)
    return Score(
        task, mode, format, len(verdicts),
        missing=sum(v.prediction is None for v in verdicts),
        unparsed=sum(v.prediction is not None and v.parsed is None for v in verdicts),
        score=found[headline], headline=headline, metrics=found,
        intervals={name: interval(own) for name, own in drawn.items()}, groups=groups,
        printed=printed, manifest=manifest, draws=drawn[headline], verdicts=verdicts,
    )  # fmt: skip


def draws(
    verdicts: Sequence[Verdict], metrics: Metrics, strata: str | None = None, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Of every metric, what it is in each draw of a bootstrap (Efron, 1979) over units; the same draws for all who
    answered the same questions."""
    units = [f"{v.groups.get(strata, '')} {v.unit}" if strata else v.unit for v in verdicts]
    names, of_verdict = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    stratum = np.zeros(len(names), np.int64)
    if strata:
        kinds = {name: number for number, name in enumerate(sorted({v.groups[strata] for v in verdicts}))}
        stratum[of_verdict] = [kinds[v.groups[strata]] for v in verdicts]
    members = [np.flatnonzero(stratum == number) for number in range(stratum.max() + 1)]
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(rounds):
        counts = np.zeros(len(names), np.int64)
        for own in members:
            counts[own] = np.bincount(rng.integers(0, len(own), len(own)), minlength=len(own))
        for name, value in metrics(counts[of_verdict]).items():
            drawn.setdefault(name, []).append(value)
    return drawn


def interval(drawn: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Percentiles of draws, which hold the share SHARE of those that are numbers; NaN of none."""
    kept = np.asarray(drawn, float)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return float("nan"), float("nan")
    edge = 100 * (1 - SHARE) / 2
    low, high = np.percentile(kept, [edge, 100 - edge])
    return float(low), float(high)


def mean(scores: np.ndarray, counts: np.ndarray) -> float:
    """Of scores [n] that count so often [n], in percent; NaN of none."""
    total = counts.sum()
    return float(100 * (scores * counts).sum() / total) if total else float("nan")


def means_by(verdicts: Sequence[Verdict], kind: str) -> dict[str, dict[str, float]]:
    """{name: {n, accuracy in percent}} of the groups of a kind, in order of appearance."""
    found: dict[str, list[float]] = {}
    for verdict in verdicts:
        if kind in verdict.groups:
            found.setdefault(verdict.groups[kind], []).append(verdict.score)
    return {name: {"n": len(own), "accuracy": 100 * sum(own) / len(own)} for name, own in found.items()}


def without_nan(value: Any) -> Any:
    """For JSON, which has no number that is none: null in its place."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
