"""How far raters agree: percentage, Cohen's kappa of two, Krippendorff's alpha of any number.

A rating is the name of what was preferred, of no order. Raters need not have rated the same items.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from sklearn.metrics import cohen_kappa_score

Ratings = Mapping[str, str]
"""{item: what one rater preferred}."""


def agreement(raters: Mapping[str, Ratings]) -> dict[str, Any]:
    """Of raters by name.

    Returns:
        pairs: of each two that have items in common {a, b, n, share (of items on which they agree), kappa};
        share: of all pairs of ratings of one item; alpha; items: that two or more have rated. None where nothing is.
    """
    pairs = []
    agreed = compared = 0
    for a, b in combinations(raters, 2):
        common = [item for item in raters[a] if item in raters[b]]
        if not common:
            continue
        same = sum(raters[a][item] == raters[b][item] for item in common)
        agreed, compared = agreed + same, compared + len(common)
        pairs.append(
            {
                "a": a, "b": b, "n": len(common), "share": same / len(common),
                "kappa": kappa([raters[a][item] for item in common], [raters[b][item] for item in common]),
            }
        )  # fmt: skip
    counts = Counter(item for own in raters.values() for item in own)
    return {
        "pairs": pairs,
        "share": agreed / compared if compared else None,
        "alpha": alpha(raters.values()),
        "items": sum(count > 1 for count in counts.values()),
    }


def kappa(one: list[str], other: list[str]) -> float | None:
    """Cohen's kappa (1960) of two raters; None where both have one and the same name for everything, or nothing."""
    if not one or len({*one, *other}) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that one of the two has never used
        return float(cohen_kappa_score(one, other))


def alpha(raters: Iterable[Ratings]) -> float | None:
    """Krippendorff's alpha for nominal data ("Computing Krippendorff's Alpha-Reliability", 2011, section C):

        alpha = 1 - (n - 1) (n - sum_c o_cc) / (n (n - 1) - sum_c n_c (n_c - 1)), with the matrix of coincidences
        o_ck = sum over items of (pairs of a c and a k in it) / (ratings of it - 1), n_c its sums, n the sum of all,

    over items with two ratings or more. None where there are none, or only one name was ever given.
    """
    rated: dict[str, Counter[str]] = {}
    for own in raters:
        for item, name in own.items():
            rated.setdefault(item, Counter())[name] += 1
    paired = [counts for counts in rated.values() if counts.total() > 1]
    totals: Counter[str] = Counter()
    matches = 0.0
    for counts in paired:
        totals.update(counts)
        matches += sum(count * (count - 1) for count in counts.values()) / (counts.total() - 1)
    n = totals.total()
    by_chance = n * (n - 1) - sum(count * (count - 1) for count in totals.values())
    if not by_chance:
        return None
    return 1 - (n - 1) * (n - matches) / by_chance
