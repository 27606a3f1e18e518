"""Intervals of shares and of paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from vflax.preference.shares import Measure, difference, wilson


def share(*values: float) -> Measure:
    return Measure(np.array(values), np.ones(len(values)), True)


def test_wilsons_interval_is_that_of_a_known_example() -> None:
    """Newcombe (Statistics in Medicine, 1998), table I, method 3: 81 of 263, and 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_a_ratio_counts_only_where_it_applies() -> None:
    found = Measure(np.array([1.0, 0.0, 0.0]), np.array([2.0, 2.0, 0.0])).measured()
    assert (found.value, found.count, found.n) == (0.25, 1, 4)
    assert 0 == found.low < 0.25 < found.high == 0.5


def test_of_nothing_there_is_no_value() -> None:
    found = Measure(np.zeros(3), np.zeros(3), True).measured()
    assert (found.value, found.low, found.high) == (None, None, None)


def test_a_difference_is_paired() -> None:
    """Two models that differ by the same on each question differ by exactly that, however hard questions are."""
    hard = np.arange(20.0)
    found = difference(Measure(hard, np.ones(20)), Measure(hard + 3, np.ones(20)))
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


def test_an_interval_of_a_difference_holds_nothing_where_models_are_alike() -> None:
    one, other = share(*[1, 0] * 20), share(*[0, 1] * 20)
    found = difference(one, other)
    assert found.low < found.value == 0 < found.high
