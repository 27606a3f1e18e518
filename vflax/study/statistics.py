"""Means over seeds, and tests that pair cells by their seed.

Student's t throughout: a handful of seeds is what there is, and its interval is as wide as that deserves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, NaN where one value says nothing of its spread.

    n: values. mean; low, high: what holds the true mean in 95 % of such experiments. p: two-sided, of a mean of 0.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def estimate(values: Sequence[float]) -> Estimate:
    """Student's interval and test (1908) of the mean of independent values."""
    n = len(values)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(1, mean, math.nan, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    if error == 0:
        return Estimate(n, mean, mean, mean, 0.0 if mean else 1.0)
    edge = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Estimate(n, mean, mean - edge, mean + edge, p)


def p_at(found: Estimate, value: float) -> float:
    """Two-sided p of a true mean of `value`; below 0.05 where the interval does not hold it."""
    error = (found.high - found.low) / 2 / float(stats.t.ppf((1 + LEVEL) / 2, max(1, found.n - 1)))
    if error == 0:
        return float(found.mean == value)
    return float(2 * stats.t.sf(abs(found.mean - value) / error, found.n - 1))


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate:
    """Of two arms, {seed: value} each, over the seeds that both have."""
    return estimate([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def slope(curves: Mapping[float, Mapping[int, float]]) -> Estimate:
    """Rise of a metric with each doubling of x: a least-squares line through each seed's points, one value a seed.

    Args:
        curves: {x above 0: {seed: value}}; only seeds that every x has.
    """
    xs = np.log2(sorted(curves))
    seeds = set.intersection(*(set(own) for own in curves.values())) if curves else set()
    lines = [np.polyfit(xs, [curves[x][seed] for x in sorted(curves)], 1)[0] for seed in sorted(seeds)]
    return estimate([float(line) for line in lines])


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that one false alarm among all of them is as rare as of one (Holm, 1979).

    What is NaN stays so and does not count.
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    found, highest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(order) - rank)))
        found[i] = highest
    return found
