"""vflax/data/deal.py: every step, and every device's part of it, has as much to do as the next."""

from __future__ import annotations

import numpy as np
import pytest

from vflax.data.deal import Rows, Steps, deal, spread


def random_loads(seed: int, n: int) -> np.ndarray:
    """(images, samples, supervised) of rows, the last with a heavy tail."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, n)
    return np.stack([images, images + rng.integers(1, 3, n), rng.lognormal(4, 1, n).astype(int)], axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_each_step_gets_equally_many_rows_and_each_row_goes_to_one_step(seed):
    dealt = deal(random_loads(seed, 600), 20)
    assert dealt.shape == (20, 30)
    assert sorted(dealt.ravel().tolist()) == list(range(600))


@pytest.mark.parametrize("seed", range(3))
def test_steps_differ_far_less_than_in_random_order(seed):
    loads = random_loads(seed, 1600)
    loads = loads[np.argsort(-(loads / loads.mean(axis=0)).sum(axis=1))]
    even = loads[deal(loads, 50)].sum(axis=1).std(axis=0)
    chance = loads[np.random.default_rng(seed).permutation(1600).reshape(50, 32)].sum(axis=1).std(axis=0)
    assert (even < 0.15 * chance).all(), even / chance


def test_rows_are_dealt_in_whole_numbers_however_large():
    """A sum of floats would depend on the processor; a product of sums must not overflow."""
    loads = np.full((64, 3), 10**6)
    assert sorted(map(len, deal(loads, 4).tolist())) == [16] * 4
    loads[0] = 10**9
    assert sorted(deal(loads, 4).ravel().tolist()) == list(range(64))


def test_one_step_gets_all_and_no_step_nothing():
    assert deal(random_loads(0, 5), 1).tolist() == [[0, 1, 2, 3, 4]]
    assert deal(random_loads(0, 0), 0).shape == (0, 0)


def test_the_places_of_eight_rows_are_those_of_the_docstring():
    assert spread(8).tolist() == [0, 4, 6, 2, 3, 7, 5, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 43, 64, 100])
def test_places_are_a_permutation(n):
    assert sorted(spread(n).tolist()) == list(range(n))


@pytest.mark.parametrize("rows", [8, 12, 32, 36, 48, 60, 96])
def test_the_parts_of_any_number_of_devices_hold_nearly_equal_images(rows):
    """Bounded for every D that divides R, and on average a third of what a random order gives."""
    ours, chance = [], []
    for seed in range(20):
        rng = np.random.default_rng([rows, seed])
        images = np.sort(rng.integers(0, 7, rows))[::-1]
        laid = np.empty(rows, int)
        laid[spread(rows)] = images
        for devices in (d for d in range(2, rows) if rows % d == 0 and rows // d > 1):
            parts = laid.reshape(devices, -1).sum(axis=1)
            assert np.ptp(parts) <= 12, (rows, devices)  # twice the range of one row
            ours.append(np.ptp(parts))
            chance.append(np.ptp(rng.permutation(images).reshape(devices, -1).sum(axis=1)))
    assert np.mean(ours) < np.mean(chance) / 2


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
def test_the_parts_of_a_power_of_two_of_devices_differ_by_no_more_than_two_rows_do(devices):
    images = np.sort(np.random.default_rng(devices).integers(0, 7, 64))[::-1]
    laid = np.empty(64, int)
    laid[spread(64)] = images
    assert np.ptp(laid.reshape(devices, -1).sum(axis=1)) <= images.max() - images.min()


def window(first: int, count: int, images: int = 1) -> Rows:
    """Rows of one sample each, numbered from `first`."""
    loads = np.tile([images, 1, 5, 9, 0], (count, 1))
    return Rows([[first + i] for i in range(count)], loads)


def test_rows_that_make_no_whole_step_wait_for_the_next_window():
    steps = Steps(4, 0)
    steps.add(window(0, 6))
    assert len(steps.waiting) == 2
    steps.add(window(100, 3))
    assert len(steps.waiting) == 1
    samples, lengths = steps.finish()
    assert set(samples[:4].tolist()) <= set(range(6))
    assert len(set(samples[4:8].tolist()) & set(range(6))) == 2
    assert lengths[8:].sum() == 1 and len(lengths) == 12


def test_how_long_a_row_is_and_how_long_it_waited_do_not_decide_where_it_goes():
    def order(tokens: int, waited: int) -> list[int]:
        rows = window(0, 40)
        rows.loads[::3, 3:] = tokens, waited
        steps = Steps(4, 0)
        steps.add(rows)
        return steps.finish()[0].tolist()

    assert order(9, 0) == order(900, 1)


def test_a_partial_step_has_its_rows_spread_over_the_devices():
    steps = Steps(8, 0)
    steps.add(window(0, 4))
    _, lengths = steps.finish()
    assert lengths.reshape(4, 2).sum(axis=1).tolist() == [1, 1, 1, 1]


def test_the_key_decides_the_order():
    def order(key: int) -> list[int]:
        steps = Steps(4, key)
        steps.add(window(0, 40))
        return steps.finish()[0].tolist()

    assert order(1) == order(1) != order(2)
