"""vflax/data/packing.py: every sample once, no row too full, the same rows always."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import numpy as np
import pytest

from vflax.data.packing import TOLERANCE, PackPlan, permutation
from vflax.errors import UserError


def make(seed: int = 0, n: int = 500, **changes) -> tuple[PackPlan, np.ndarray, np.ndarray]:
    """A plan over random lengths: images of 50 tokens, texts of 5 to 150, a fifth of the samples without image."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 1, 1, 2], n)
    tokens = images * 50 + rng.integers(5, 150, n)
    settings = {"samples": 16, "max_length": 260, "slots": 3, "packing": True, "seed": seed} | changes
    return PackPlan(tokens, images, **settings), tokens, images


def epoch(plan: PackPlan, number: int = 0) -> list[list[list[int]]]:
    start = sum(plan.steps_per_epoch(e) for e in range(number))
    return [plan.step(start + i) for i in range(plan.steps_per_epoch(number))]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [sample for step in steps for row in step for sample in row]


CASES = [
    {},
    {"packing": False},
    {"order": "sequential"},
    {"samples": 1},
    {"samples": 7, "slots": 2},
    {"samples": 64, "max_length": 800, "slots": 12},
    {"samples": 500},
    {"samples": 900},  # fewer samples than a batch
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_sample_appears_exactly_once_in_each_epoch(seed, changes):
    plan, tokens, _ = make(seed, **changes)
    for number in range(3):
        assert sorted(flat(epoch(plan, number))) == list(range(len(tokens)))


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_no_row_holds_more_tokens_or_images_than_it_can(seed, changes):
    plan, tokens, images = make(seed, **changes)
    for step in epoch(plan, 1):
        assert len(step) == plan.rows_per_step
        for row in step:
            assert tokens[row].sum() <= plan.max_length
            assert images[row].sum() <= plan.slots


@pytest.mark.parametrize("changes", CASES)
def test_no_step_holds_more_than_the_asked_samples_and_the_mean_is_within_two_percent(changes):
    plan, tokens, _ = make(**changes)
    counts = [sum(map(len, step)) for step in epoch(plan)]
    assert max(counts) <= plan.samples
    if len(counts) > 1:
        assert np.mean(counts[:-1]) >= (1 - TOLERANCE) * plan.samples
    ideal = math.ceil(len(tokens) / plan.samples)
    assert ideal <= len(counts) <= ideal * (1 + TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_one_row_less_would_not_keep_up(seed):
    plan, _, _ = make(seed, samples=32)
    assert plan.rows_per_step > 1
    orders = [plan._order(e).tolist() for e in range(4)]
    assert not all(plan._keeps_up(order, plan.rows_per_step - 1) for order in orders)


def test_a_long_epoch_keeps_up_over_its_whole_length():
    """The search looks at the first 64 steps; here the long samples come after them."""
    tokens = np.concatenate([np.full(1000, 20), np.full(1000, 120)])
    plan = PackPlan(
        tokens,
        np.zeros(2000, int),
        samples=10,
        max_length=128,
        slots=1,
        packing=True,
        seed=0,
        order="sequential",
    )
    counts = [sum(map(len, step)) for step in epoch(plan)]
    assert np.mean(counts[:-1]) >= 9.8
    assert plan.rows_per_step == 10


def test_samples_that_all_fit_make_as_many_steps_as_in_the_papers():
    plan, _, _ = make(n=1000, samples=128, max_length=4000, slots=60)
    assert plan.steps_per_epoch(0) == math.ceil(1000 / 128)
    assert [sum(map(len, step)) for step in epoch(plan)] == [128] * 7 + [104]


def test_without_packing_every_sample_has_a_row_of_its_own():
    plan, _, _ = make(n=50, packing=False)
    assert plan.rows_per_step == 16
    steps = epoch(plan)
    assert [sorted(map(len, step), reverse=True) for step in steps] == [[1] * 16] * 3 + [[1, 1] + [0] * 14]


def test_a_fresh_plan_asked_in_any_order_gives_the_same_rows():
    plan, _, _ = make(n=300)
    total = plan.total_steps(epochs=6)
    forward = [plan.step(i) for i in range(total)]
    fresh, _, _ = make(n=300)
    order = np.random.default_rng(0).permutation(total)
    assert {i: fresh.step(i) for i in order.tolist()} == dict(enumerate(forward))
    assert fresh.row(total - 1, 0) == forward[-1][0]


def test_a_pickled_plan_gives_the_same_rows():
    plan, _, _ = make()
    expected = plan.step(20)
    assert pickle.loads(pickle.dumps(plan)).step(20) == expected


def test_epochs_and_seeds_differ_in_their_order():
    plan, _, _ = make()
    _, tokens, images = make()
    other = PackPlan(tokens, images, samples=16, max_length=260, slots=3, packing=True, seed=1)
    assert flat(epoch(plan, 0)) != flat(epoch(plan, 1))
    assert flat(epoch(plan, 0)) != flat(epoch(other, 0))


def test_sequential_order_takes_the_samples_as_they_lie():
    plan, _, _ = make(n=64, order="sequential", max_length=4000, slots=60)
    taken = [sorted(sample for row in step for sample in row) for step in epoch(plan, 1)]
    assert taken == [list(range(i, i + 16)) for i in range(0, 64, 16)]


def test_what_finds_no_room_comes_first_in_the_next_step():
    """Two rows of 10 for four samples a step: 6 + 6 leave no room for the third 6."""
    tokens = np.array([6, 6, 6, 3, 3, 3, 3, 3])
    plan = PackPlan(
        tokens, np.zeros(8, int), samples=4, max_length=10, slots=1, packing=True, seed=0, order="sequential"
    )
    plan.rows_per_step = 2
    assert plan.step(0) == [[0, 3], [1]]
    assert plan.step(1) == [[2, 4], [5, 6]]
    assert plan.step(2) == [[7], []]


def test_the_order_of_an_epoch_is_pinned():
    """Resuming needs the same permutation from every version of NumPy: this one must never change."""
    assert permutation(10, 1, 42, 0).tolist() == [1, 3, 5, 8, 4, 9, 7, 2, 6, 0]


def test_repeats_of_a_mixture_are_packed_as_often_as_they_occur():
    plan, _, _ = make(n=60, epoch_samples=lambda e: np.array([0, 0, 0, 5, 7 + e] + [9] * 40, dtype=np.int32))
    assert Counter(flat(epoch(plan, 0))) == {0: 3, 5: 1, 7: 1, 9: 40}
    assert Counter(flat(epoch(plan, 1))) == {0: 3, 5: 1, 8: 1, 9: 40}


def test_steps_are_found_in_their_epochs():
    plan, _, _ = make(n=100)
    per_epoch = [plan.steps_per_epoch(e) for e in range(3)]
    fresh, _, _ = make(n=100)
    assert fresh.locate(sum(per_epoch)) == (3, 0)
    assert fresh.locate(sum(per_epoch) - 1) == (2, per_epoch[2] - 1)
    assert fresh.locate(0) == (0, 0)
    assert fresh.total_steps(epochs=3) == sum(per_epoch)
    assert fresh.total_steps(steps=5) == 5
    assert fresh.samples_before(sum(per_epoch)) == 300
    assert fresh.samples_before(1) == sum(map(len, fresh.step(0)))


def test_the_statistics_are_those_of_the_rows():
    plan, tokens, images = make(n=200)
    steps = epoch(plan)
    counts = [sum(map(len, step)) for step in steps]
    rows = len(steps) * plan.rows_per_step
    stats = plan.stats()
    assert (stats.samples, stats.steps) == (200, len(steps))
    assert stats.samples_per_step == pytest.approx(np.mean(counts[:-1]))
    assert stats.images_per_step == pytest.approx(images.sum() / len(steps))
    assert stats.tokens_per_step == pytest.approx(tokens.sum() / len(steps))
    assert stats.fill == pytest.approx(tokens.sum() / (rows * plan.max_length))
    assert stats.slot_fill == pytest.approx(images.sum() / (rows * plan.slots))


def test_the_largest_sum_of_a_row_is_found():
    plan, _, _ = make(n=120)
    values = np.random.default_rng(3).integers(0, 9, 120)
    total = plan.total_steps(epochs=2)
    assert plan.max_per_row(values, total) == max(
        values[row].sum() for i in range(total) for row in plan.step(i) if row
    )


def test_a_sample_longer_than_a_row_is_refused_by_number():
    with pytest.raises(ValueError, match="sample number 1 has 11 tokens, a row has 10"):
        PackPlan(np.array([5, 11]), np.zeros(2, int), samples=1, max_length=10, slots=1, packing=True, seed=0)


def test_more_images_than_slots_name_the_key_and_the_number_to_set():
    with pytest.raises(UserError, match=r"data.slots=1, but 2 samples .* up to 4. Set data.slots=4"):
        PackPlan(np.full(3, 5), np.array([1, 2, 4]), samples=1, max_length=10, slots=1, packing=True, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "batch.samples=0"),
        ({"order": "random"}, "data.order='random'"),
        ({"n": 0}, "not one sample"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_run_has_epochs_or_steps_but_not_both():
    plan, _, _ = make()
    for wrong in ({}, {"epochs": 1, "steps": 2}):
        with pytest.raises(UserError, match="exactly one"):
            plan.total_steps(**wrong)


def test_a_sample_that_only_a_later_epoch_holds_is_checked_before_the_first():
    lengths, images = np.full(4, 5), np.array([1, 1, 1, 5])
    options = {"samples": 1, "max_length": 10, "slots": 3, "packing": True, "seed": 0}
    with pytest.raises(UserError, match=r"data.slots=3, but 1 samples .* up to 5"):
        PackPlan(lengths, images, **options, epoch_samples=lambda e: np.array([e % 4]), pool=np.arange(4))
