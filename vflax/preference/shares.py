"""Numbers with their intervals: shares, means and ratios over questions, of one model or the difference of two.

A measure of n questions is two arrays, `of` and `per`: its value is the sum of the first over the sum of the second. So
a mean has per = 1, a share of what applies has per = 0 where it does not, and a rate per mention has the mentions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from vflax.evaluate.result import ROUNDS, SHARE, interval


@dataclass(frozen=True)
class Measured:
    """value: None of nothing; low, high: hold it in 95 % of such samples; count, n: the two sums."""

    value: float | None
    low: float | None
    high: float | None
    count: float
    n: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measure:
    """of, per: float [n]; is_share: each question counts 0 or 1 of at most 1."""

    of: np.ndarray
    per: np.ndarray
    is_share: bool = False

    def at(self, chosen: np.ndarray) -> Measure:
        """Of the questions where bool [n] is true."""
        return Measure(self.of[chosen], self.per[chosen], self.is_share)

    @property
    def value(self) -> float | None:
        return _ratio(float(self.of.sum()), float(self.per.sum()))

    def measured(self) -> Measured:
        """With Wilson's interval (1927) where it is a share, else a bootstrap's over questions (Efron, 1979)."""
        count, n = float(self.of.sum()), float(self.per.sum())
        if self.is_share and n:
            return Measured(count / n, *wilson(round(count), round(n)), count, n)
        return Measured(self.value, *percentiles(self.drawn()), count, n)

    def drawn(self) -> np.ndarray:
        """float [ROUNDS]: its value in each draw of the questions; the same draws for all measures of as many."""
        counts = draws(len(self.of))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (counts @ self.of) / (counts @ self.per)


def difference(one: Measure, other: Measure) -> Measured:
    """Of `other` to `one` over the same questions, with a paired bootstrap's interval (Efron and Tibshirani, 1993).
    count: of questions with something of either; n: of them all."""
    low, high = percentiles(other.drawn() - one.drawn())
    a, b = one.value, other.value
    applies = float(((one.per > 0) | (other.per > 0)).sum())
    return Measured(None if a is None or b is None else b - a, low, high, applies, float(len(one.of)))


def wilson(count: int, n: int) -> tuple[float, float]:
    """The score interval of a share of n."""
    found = stats.binomtest(count, n).proportion_ci(SHARE, method="wilson")
    return float(found.low), float(found.high)


def draws(n: int) -> np.ndarray:
    """int [ROUNDS, n]: how often each of n comes in each draw; always the same ones."""
    if not n:
        return np.zeros((ROUNDS, 0), np.int64)
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=ROUNDS)


def percentiles(drawn: np.ndarray) -> tuple[float | None, float | None]:
    """Of `result.interval`; (None, None) where none of the draws is a number."""
    low, high = interval(drawn)
    return (None, None) if np.isnan(low) else (low, high)


def _ratio(count: float, n: float) -> float | None:
    return count / n if n else None
