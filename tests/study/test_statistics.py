"""Intervals, slopes and adjusted p-values against scipy and worked examples of their authors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vflax.study import statistics

# Hours of sleep that one drug gave each patient more than the other: Student's own example (1908).
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_the_interval_and_p_are_those_of_students_example():
    found = statistics.estimate(SLEEP)
    assert found.n == 10
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.p == pytest.approx(0.002833, abs=1e-6)


@pytest.mark.parametrize("at", [0.0, 1.0, 2.5])
def test_p_of_another_truth_is_scipys(at: float):
    expected = stats.ttest_1samp(SLEEP, at).pvalue
    assert statistics.p_at(statistics.estimate(SLEEP), at) == pytest.approx(expected)


def test_one_value_has_a_mean_and_nothing_more():
    found = statistics.estimate([3.0])
    assert (found.n, found.mean) == (1, 3.0)
    assert all(math.isnan(value) for value in (found.low, found.high, found.p))
    assert math.isnan(statistics.p_at(found, 0.0))


def test_no_value_has_no_mean():
    found = statistics.estimate([])
    assert found.n == 0
    assert math.isnan(found.mean)
    assert math.isnan(statistics.p_at(found, 0.0))


def test_equal_values_are_certain():
    assert statistics.estimate([2.0, 2.0, 2.0]) == statistics.Estimate(3, 2.0, 2.0, 2.0, 0.0)
    assert statistics.estimate([0.0, 0.0]).p == 1.0
    assert [statistics.p_at(statistics.estimate([2.0, 2.0]), at) for at in (2.0, 1.0)] == [1.0, 0.0]


def test_cells_are_paired_by_seed_and_a_seed_that_one_arm_lacks_does_not_count():
    one, other = {1: 10.0, 2: 31.0, 3: 22.0, 4: 0.0}, {3: 20.0, 2: 30.0, 1: 8.0, 5: 99.0}
    found = statistics.difference(one, other)
    assert found == statistics.estimate([2.0, 1.0, 2.0])
    paired = stats.ttest_rel([10.0, 31.0, 22.0], [8.0, 30.0, 20.0])
    assert found.p == pytest.approx(paired.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval()))


def test_a_slope_is_the_rise_with_each_doubling():
    line = {x: {1: 3.0 * np.log2(x), 2: 3.0 * np.log2(x) + 7, 3: 3.0 * np.log2(x) - 2} for x in (40, 10, 20)}
    assert statistics.slope(line).mean == pytest.approx(3.0)


def test_a_slope_is_least_squares_seed_by_seed():
    curves = {8.0: {1: 40.0, 2: 38.0}, 16.0: {1: 47.0, 2: 45.0}, 34.0: {1: 50.0, 2: 54.0}}
    xs = np.log2([8, 16, 34])
    lines = [stats.linregress(xs, [curves[x][seed] for x in curves]).slope for seed in (1, 2)]
    found = statistics.slope(curves)
    expected = statistics.estimate(lines)
    assert (found.n, found.mean, found.low) == (2, pytest.approx(expected.mean), pytest.approx(expected.low))


def test_a_seed_that_one_x_lacks_has_no_slope():
    curves = {1.0: {1: 0.0, 2: 0.0}, 2.0: {1: 1.0}, 4.0: {1: 2.0, 2: 9.0}}
    found = statistics.slope(curves)
    assert (found.n, found.mean) == (1, pytest.approx(1.0))
    assert statistics.slope({1.0: {1: 0.0}, 2.0: {2: 1.0}}).n == 0


def test_holms_p_values_are_those_of_the_worked_example():
    # Smallest times 4, next times 3, ..., and none below the one before it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_no_p_value_is_above_one_and_what_is_not_tested_does_not_count():
    found = statistics.holm([0.6, math.nan, 0.02, 0.7])
    assert math.isnan(found[1])
    assert [found[i] for i in (0, 2, 3)] == pytest.approx([1.0, 0.06, 1.0])
    assert statistics.holm([]) == []
