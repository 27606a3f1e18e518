"""vflax/data/fill.py: rows that hold every sample once and little room."""

from __future__ import annotations

import numpy as np
import pytest

from vflax.data.fill import Capacity, fill_rows


def first_fit(tokens: np.ndarray, size: int, slots: int) -> int:
    """Rows of first fit in decreasing order, by its definition."""
    rows: list[list[int]] = []
    for length in sorted(tokens.tolist(), reverse=True):
        for row in rows:
            if sum(row) + length <= size and len(row) < slots:
                row.append(length)
                break
        else:
            rows.append([length])
    return len(rows)


def zeros(tokens) -> np.ndarray:
    return np.zeros(len(tokens), int)


def test_the_drawing_of_the_docstring_is_what_it_does():
    tokens = np.array([9, 8, 8, 7, 6, 6, 6, 5, 5])
    rows = fill_rows(tokens, zeros(tokens), zeros(tokens), Capacity(20, 0, 20), aim=3)
    assert [tokens[row].tolist() for row in rows] == [[9, 5, 6], [8, 6, 6], [8, 5, 7]]
    assert len(fill_rows(tokens, zeros(tokens), zeros(tokens), Capacity(20, 0, 20), aim=1)) == 4


@pytest.mark.parametrize("seed", range(30))
def test_every_sample_lies_in_one_row_and_no_row_holds_too_much(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 300))
    capacity = Capacity(int(rng.integers(40, 200)), int(rng.integers(0, 5)), int(rng.integers(5, 60)))
    tokens = rng.integers(1, capacity.tokens + 1, n)
    images = rng.integers(0, capacity.images + 1, n)
    supervised = rng.integers(0, capacity.supervised + 1, n)
    for aim in (1, 2, 3, 7):
        rows = fill_rows(tokens, images, supervised, capacity, aim)
        assert sorted(i for row in rows for i in row) == list(range(n))
        for row in rows:
            assert tokens[row].sum() <= capacity.tokens
            assert images[row].sum() <= capacity.images
            assert supervised[row].sum() <= capacity.supervised


@pytest.mark.parametrize("seed", range(5))
def test_an_aim_of_one_needs_as_many_rows_as_first_fit_in_decreasing_order(seed):
    tokens = np.random.default_rng(seed).integers(5, 60, 200)
    rows = fill_rows(tokens, np.ones(200, int), zeros(tokens), Capacity(100, 4, 100), aim=1)
    assert len(rows) == first_fit(tokens, 100, 4)


def test_four_samples_to_a_row_fill_it_where_first_fit_in_decreasing_order_cannot():
    """Images of 576 tokens and texts of 128 on average: long ones spent on one another leave rows of short ones."""
    rng = np.random.default_rng(0)
    tokens = 576 + np.maximum(1, rng.lognormal(4.74, 0.474, 4000).astype(int))
    rows = fill_rows(tokens, np.ones(4000, int), zeros(tokens), Capacity(2816, 4, 2816), aim=4)
    assert tokens.sum() / (len(rows) * 2816) > 0.99
    assert tokens.sum() / (first_fit(tokens, 2816, 4) * 2816) < 0.94


def test_samples_that_supervise_too_much_for_each_other_are_kept_apart():
    rows = fill_rows(np.full(200, 1), zeros(range(200)), np.full(200, 6), Capacity(100, 0, 11), aim=50)
    assert [len(row) for row in rows] == [1] * 200


def test_a_sample_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        fill_rows(np.array([5, 11]), np.zeros(2, int), np.zeros(2, int), Capacity(10, 0, 10), aim=1)
