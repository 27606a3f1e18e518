"""vflax/data/packing.py: every sample once, no row too full, the same rows always."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.data.whole_rows import step_rows
from vflax.config import load_config
from vflax.data import packing
from vflax.data.draw import Draw, permutation
from vflax.data.packing import PLAN_VERSION, SUPERVISED_COST, SUPERVISED_UNIT, TOLERANCE, PackPlan, smallest
from vflax.errors import UserError


def make(seed: int = 0, n: int = 500, **changes) -> tuple[PackPlan, np.ndarray, np.ndarray]:
    """A plan over random lengths: images of 50 tokens, texts of 5 to 150, a fifth of the samples without image."""
    tokens, images, supervised = lengths(seed, n)
    settings = {"samples": 16, "max_length": 260, "slots": 3, "packing": True, "seed": seed} | changes
    return PackPlan(tokens, images, supervised, **settings), tokens, images


def lengths(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, images, supervised): a quarter of the text at most is supervised."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 1, 1, 2], n)
    text = rng.integers(5, 150, n)
    return images * 50 + text, images, rng.integers(1, 2 + text // 4)


def epoch(plan: PackPlan, number: int = 0) -> list[list[list[int]]]:
    start = sum(plan.steps_per_epoch(e) for e in range(number))
    return [step_rows(plan, start + i) for i in range(plan.steps_per_epoch(number))]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [sample for step in steps for row in step for sample in row]


CASES = [
    {},
    {"packing": False},
    {"samples": 1},
    {"samples": 7, "slots": 2},
    {"samples": 64, "max_length": 800, "slots": 12},
    {"samples": 500},
    {"samples": 900},  # fewer samples than a batch
    {"samples": 48, "n": 1500, "max_length": 450, "slots": 4},  # several windows
    {"supervised_capacity": 40},
    {"epoch_samples": lambda e: [np.arange(0, 300), np.arange(300, 303), np.arange(303, 500)]},
    {"samples": 48, "epoch_samples": lambda e: [np.arange(0, 340), np.arange(340, 500)]},
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_every_sample_appears_exactly_once_in_each_epoch(seed, changes):
    plan, tokens, _ = make(seed, **changes)
    for number in range(2):
        assert sorted(flat(epoch(plan, number))) == list(range(len(tokens)))


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_no_row_holds_more_tokens_images_or_supervised_tokens_than_it_can(seed, changes):
    plan, tokens, images = make(seed, **changes)
    supervised = lengths(seed, len(tokens))[2]
    assert plan.capacity.supervised <= plan.capacity.tokens
    for step in epoch(plan, 1):
        assert len(step) == plan.rows_per_step
        for row in step:
            assert tokens[row].sum() <= plan.capacity.tokens
            assert images[row].sum() <= plan.capacity.images
            assert supervised[row].sum() <= plan.capacity.supervised


@pytest.mark.parametrize("changes", CASES)
def test_the_mean_of_samples_per_step_is_within_two_percent_and_only_the_last_step_is_partial(changes):
    plan, tokens, _ = make(**changes)
    counts = [sum(map(len, step)) for step in epoch(plan)]
    if len(counts) > 1:
        assert abs(np.mean(counts[:-1]) / plan.samples - 1) <= TOLERANCE
        assert min(counts[:-1]) >= 0.6 * plan.samples
    ideal = math.ceil(len(tokens) / plan.samples)
    assert len(counts) <= ideal * (1 + TOLERANCE)


@pytest.mark.parametrize("seed", range(30))
def test_random_data_is_packed_without_a_loss_or_a_repeat(seed):
    """Sizes, capacities, groups and repeats drawn at random; counted over three epochs."""
    rng = np.random.default_rng([7, seed])
    n = int(rng.integers(1, 400))
    length, slots = int(rng.integers(20, 400)), int(rng.integers(0, 6))
    tokens, images = rng.integers(1, length + 1, n), rng.integers(0, slots + 1, n)
    supervised = np.minimum(rng.integers(1, 60, n), tokens)
    drawn = [rng.integers(0, n, int(rng.integers(1, 300))) for _ in range(int(rng.integers(1, 5)))]
    plan = PackPlan(
        tokens, images, supervised, samples=int(rng.integers(1, 70)), max_length=length, slots=slots,
        supervised_capacity=int(rng.choice([0, 60, 90])), packing=bool(rng.integers(0, 8)), seed=seed,
        epoch_samples=lambda e: drawn,
    )  # fmt: skip
    wanted = Counter(np.concatenate(drawn).tolist())
    group_of = [{*group.tolist()} for group in drawn]
    for number in range(3):
        steps = epoch(plan, number)
        assert Counter(flat(steps)) == wanted
        for row in (row for step in steps for row in step if row):
            assert tokens[row].sum() <= length and images[row].sum() <= slots
            assert supervised[row].sum() <= plan.capacity.supervised
            assert any(set(row) <= group for group in group_of)


@pytest.mark.parametrize("seed", range(4))
def test_one_row_less_would_not_keep_up(seed):
    plan, _, _ = make(seed, samples=32)
    assert plan.rows_per_step > 1
    assert not all(plan._keeps_up(plan._pack(e, plan.rows_per_step - 1)) for e in range(4))


def test_data_sorted_by_length_is_packed_as_if_it_were_mixed():
    """Short and long ones halved need 5.8 rows for 10 samples; one after the other they would need 10."""
    tokens = np.concatenate([np.full(1000, 20), np.full(1000, 120)])
    none = np.zeros(2000, int)
    plan = PackPlan(tokens, none, none + 1, samples=10, max_length=128, slots=1, packing=True, seed=0)
    counts = [sum(map(len, step)) for step in epoch(plan)]
    assert np.mean(counts[:-1]) >= 9.8
    assert plan.rows_per_step in (6, 7)


@pytest.mark.parametrize("wanted", [*range(1, 20), 100, 1000])
@pytest.mark.parametrize("start", [1, 5])
def test_the_smallest_number_that_is_enough_is_found_in_few_trials(start, wanted):
    asked: list[int] = []

    def enough(rows: int) -> bool:
        asked.append(rows)
        return rows >= wanted

    assert smallest(start, enough) == max(start, wanted)
    # Doubled steps up to it, halves back.
    assert len(asked) == len(set(asked)) <= 3 + 2 * math.log2(max(1, wanted - start))
    passed = [rows for rows in asked if rows >= wanted]
    assert passed == sorted(passed, reverse=True)  # the plans that are kept are those of the last


def test_a_number_of_rows_that_is_far_from_the_guess_is_found(monkeypatch):
    """The guess is made from a trial; here it is that of one row. The plans that are kept are those of the result."""
    expected, _, _ = make(samples=64)
    assert expected.rows_per_step > 16
    monkeypatch.setattr(
        PackPlan, "_best_aim", lambda self, trial, real=PackPlan._best_aim: (real(self, trial)[0], 2)
    )
    plan, _, _ = make(samples=64, supervised_capacity=expected.capacity.supervised)
    assert plan.rows_per_step == expected.rows_per_step
    assert len(plan._epoch(0).starts) == plan._epoch(0).steps * plan.rows_per_step + 1


def real_like(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image of 576 tokens each; texts with a mean of 128 and a 90th percentile of 210; few are supervised."""
    rng = np.random.default_rng(seed)
    text = np.maximum(20, rng.lognormal(4.74, 0.474, n).astype(int))
    return 576 + text, np.ones(n, int), np.minimum(text - 10, rng.geometric(1 / 25, n))


@pytest.mark.parametrize(("length", "slots"), [(2816, 4), (2944, 4)])
def test_rows_are_as_full_as_lengths_and_slots_allow(length, slots):
    tokens, images, supervised = real_like(8000)
    plan = PackPlan(
        tokens, images, supervised, samples=128, max_length=length, slots=slots, packing=True, seed=0
    )
    assert plan.stats().fill > min(1, tokens.mean() * slots / length) - 0.015


@pytest.mark.parametrize(
    ("recipe", "text", "rows"),
    [
        ("stage1.py", (128, 65), 32),
        ("stage2.py:13b-per-device", (199, 51), 32),
        ("stage2.py:7b", (199, 51), 4),
        ("finetune.py", (128, 65), 4),
    ],
)
def test_the_rows_of_a_recipe_divide_among_the_devices_that_its_comment_names(recipe, text, rows):
    """Texts of Vision-Flan, and of LLaVA's GPT-4 data: mean and standard deviation of the tokens."""
    config = load_config(f"configs/{recipe}")
    mean, deviation = text
    tokens = 576 + np.random.default_rng(0).gamma((mean / deviation) ** 2, deviation**2 / mean, 2000).astype(
        int
    )
    plan = PackPlan(
        tokens, np.ones(2000, int), tokens // 9, samples=config.batch.samples, seed=config.seed,
        max_length=config.data.max_length, slots=config.data.slots, packing=config.data.packing,
    )  # fmt: skip
    assert plan.rows_per_step == rows


@pytest.mark.parametrize(("samples", "rows"), [(8, 8), (16, 8), (64, 16), (64, 32), (128, 32), (128, 48)])
def test_the_size_for_so_many_rows_makes_so_many_or_few_less_and_cuts_no_sample(samples, rows):
    lengths = tokens, _, _ = real_like(2000)
    settings = {"samples": samples, "packing": True, "seed": 0}
    found = PackPlan(*lengths, max_length=2944, slots=4, **settings).size_for(rows)
    assert found is not None and found[0] >= tokens.max()
    better = PackPlan(*lengths, max_length=found[0], slots=found[1], **settings)
    assert 0.9 * rows <= better.rows_per_step <= rows


def test_there_is_no_size_for_more_rows_than_the_longest_sample_allows():
    tokens = np.array([20] * 99 + [500])
    plan = PackPlan(
        tokens,
        np.zeros(100, int),
        np.ones(100, int),
        samples=8,
        max_length=600,
        slots=0,
        packing=True,
        seed=0,
    )
    assert plan.size_for(8) is None


def test_every_step_has_as_many_images_and_supervised_tokens_as_the_next():
    tokens, images, supervised = real_like(20_000)
    images = np.random.default_rng(1).choice([0, 1, 2], 20_000)
    tokens = tokens + 576 * (images - 1)
    plan = PackPlan(tokens, images, supervised, samples=128, max_length=2944, slots=5, packing=True, seed=0)
    steps = epoch(plan)[:-1]
    order = np.random.default_rng(2).permutation(20_000)[: 156 * 128].reshape(156, 128)
    for values, share in ((images, 0.25), (supervised, 0.5)):
        ours = np.array([sum(values[row].sum() for row in step) for step in steps])
        assert ours.std() < share * values[order].sum(axis=1).std()


def test_a_step_mixes_tasks_whose_lengths_differ_nearly_as_a_random_one_does():
    """Rows are filled by length, and here a task is known by it: yet no more than two samples of a row are of one task,
    which makes the spread of task counts 1 + 2 / 4 times that of a random step of rows of four."""
    rng = np.random.default_rng(0)
    tasks = rng.integers(0, 20, 20_000)
    tokens = 64 + np.maximum(2, rng.normal(10 + 5 * tasks, 3).astype(int))
    ones = np.ones(len(tasks), int)
    plan = PackPlan(tokens, ones, ones, samples=64, max_length=512, slots=4, packing=True, seed=0)

    def spread(step: list[int]) -> float:
        """Chi-square of the task counts over degrees of freedom: 1 on average for samples drawn at random."""
        counts, expected = np.bincount(tasks[step], minlength=20), len(step) * np.bincount(tasks) / len(tasks)
        return float(((counts - expected) ** 2 / expected).sum() / 19)

    steps = [flat([step]) for step in epoch(plan)[:-1]]
    random = np.array_split(rng.permutation(len(tasks)), len(steps))
    assert np.mean([spread(step) for step in steps]) < 1.5 * np.mean([spread(step) for step in random])


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_parts_of_a_step_that_go_to_devices_hold_nearly_equal_images(devices):
    rng = np.random.default_rng(3)
    images = rng.choice([0, 1, 2, 4], 4000)
    tokens = images * 50 + rng.integers(5, 150, 4000)
    plan = PackPlan(tokens, images, tokens // 9, samples=64, max_length=660, slots=8, packing=True, seed=0)
    assert plan.rows_per_step == 16
    ours, chance = [], []
    for step in epoch(plan)[:-1]:
        counts = np.array([images[row].sum() for row in step])
        ours.append(np.ptp(counts.reshape(devices, -1).sum(axis=1)))
        chance.append(np.ptp(rng.permutation(counts).reshape(devices, -1).sum(axis=1)))
    assert np.mean(ours) < 0.7 * np.mean(chance)
    assert max(ours) <= 8  # what one row may hold


def test_small_batches_have_exactly_the_asked_samples_in_the_rows_that_they_need():
    """Eight samples of a third of a row each need three rows, whichever eight they are."""
    tokens, images, supervised = real_like(2000)
    plan = PackPlan(tokens, images, supervised, samples=8, max_length=2176, slots=3, packing=True, seed=0)
    counts = np.array([sum(map(len, step)) for step in epoch(plan)[:-1]])
    assert plan.rows_per_step == 3
    assert counts.max() == 8 and (counts == 8).mean() > 0.9


def test_a_group_begins_where_the_one_before_it_ends_and_shares_at_most_a_step_with_it():
    groups = [np.arange(0, 230), np.arange(230, 500)]
    plan, _, _ = make(epoch_samples=lambda e: groups)
    shared = 0
    seen_second = False
    for step in epoch(plan):
        members = [{i < 230 for i in row} for row in step if row]
        assert all(len(kinds) == 1 for kinds in members)
        kinds = set.union(*members)
        shared += len(kinds) == 2
        seen_second |= False in kinds
        assert not (seen_second and kinds == {True})
    assert shared <= 1


def test_the_samples_that_a_window_leaves_come_in_the_next():
    """None is put off to the end of the epoch, however badly it fits."""
    tokens = np.where(np.arange(20_000) % 50 == 0, 160, 55)  # 160 leaves room for one of 55, and a rest of 5
    none = np.zeros(20_000, int)
    plan = PackPlan(tokens, none, none + 1, samples=64, max_length=220, slots=0, packing=True, seed=0)
    steps = epoch(plan)
    long = np.array([sum((tokens[row] == 160).sum() for row in step) for step in steps[:-1]])
    halves = long[: len(long) // 2].sum(), long[len(long) // 2 :].sum()
    assert 0.8 < halves[0] / halves[1] < 1.25


def test_partners_change_from_epoch_to_epoch():
    plan, _, _ = make(n=400)
    pairs = [
        {tuple(sorted((a, b))) for step in epoch(plan, e) for row in step for a in row for b in row if a < b}
        for e in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.1 * len(pairs[0])


def test_the_chosen_limit_on_supervised_tokens_costs_next_to_no_row():
    tokens, images, supervised = real_like(4000)
    settings = {"samples": 64, "max_length": 2944, "slots": 4, "packing": True, "seed": 0}
    chosen = PackPlan(tokens, images, supervised, **settings)
    free = PackPlan(tokens, images, supervised, supervised_capacity=2944, **settings)
    capacity = chosen.capacity.supervised
    assert supervised.max() <= capacity < 0.2 * 2944 and capacity % SUPERVISED_UNIT == 0
    assert chosen.stats().fill > (1 - 2 * SUPERVISED_COST) * free.stats().fill
    assert chosen.stats().supervised_fill > free.stats().supervised_fill


def test_no_chosen_limit_is_under_what_one_sample_needs_or_over_the_row():
    tokens, none = np.array([50] * 30 + [100]), np.zeros(31, int)
    for longest, expected in ((33, 64), (97, 100)):
        supervised = np.array([1] * 30 + [longest])
        plan = PackPlan(tokens, none, supervised, samples=4, max_length=100, slots=0, packing=False, seed=0)
        assert plan.capacity.supervised == expected


def test_more_supervised_tokens_than_the_limit_name_the_key_and_the_number_to_set():
    with pytest.raises(
        UserError, match=r"data.supervised=9, but 2 samples .* up to 40. Set data.supervised=40"
    ):
        PackPlan(
            np.full(3, 50), np.zeros(3, int), np.array([9, 10, 40]), samples=1, max_length=100, slots=0,
            supervised_capacity=9, packing=True, seed=0,
        )  # fmt: skip


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
    plan, _, _ = make(n=200)
    total = plan.total_steps(epochs=5)
    forward = [step_rows(plan, i) for i in range(total)]
    fresh, _, _ = make(n=200)
    order = np.random.default_rng(0).permutation(total)
    assert {i: step_rows(fresh, i) for i in order.tolist()} == dict(enumerate(forward))
    assert fresh.row(total - 1, 0) == forward[-1][0]


@pytest.fixture
def planned(monkeypatch) -> list[int]:
    """Every epoch that is planned, in turn."""
    epochs: list[int] = []

    def pack(self, epoch, rows, real=PackPlan._pack):
        epochs.append(epoch)
        return real(self, epoch, rows)

    monkeypatch.setattr(PackPlan, "_pack", pack)
    return epochs


def test_each_epoch_of_a_run_is_planned_once_and_none_that_nobody_enters(planned):
    plan, _, _ = make(n=100)
    trials = max(planned) + 1
    planned.clear()
    total = plan.total_steps(epochs=7)
    for step in range(total):
        plan.row(step, 0)
    assert plan.samples_before(total) == 700
    assert sum(plan.steps_per_epoch(e) for e in range(7)) == total
    assert planned == list(range(trials, 7))


def test_the_plans_that_are_kept_have_a_limit_and_are_made_again_beyond_it(planned, monkeypatch):
    plan, _, _ = make(n=100, packing=False)
    monkeypatch.setattr(packing, "_KEPT_SAMPLES", 250)  # two epochs
    first = step_rows(plan, 0)
    for number in range(4):
        plan.row(plan._begin(number), 0)
    assert planned == [0, 1, 2, 3]
    assert step_rows(plan, 0) == first
    assert planned == [0, 1, 2, 3, 0]
    plan.row(plan._begin(3), 0)
    assert planned == [0, 1, 2, 3, 0]
    assert plan.total_steps(epochs=4) == 4 * 7  # counted before, though two of the plans are gone
    assert planned == [0, 1, 2, 3, 0]


def test_who_reads_an_epoch_does_not_wait_for_the_plan_of_the_next(monkeypatch):
    plan, _, _ = make(n=100, packing=False)
    expected = step_rows(plan, 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow(self, epoch, rows, real=PackPlan._pack):
        begun.set()
        assert go_on.wait(10)
        return real(self, epoch, rows)

    monkeypatch.setattr(PackPlan, "_pack", slow)
    with ThreadPoolExecutor(2) as threads:
        try:
            ahead = threads.submit(step_rows, plan, 7)
            assert begun.wait(10)
            read = threads.submit(
                lambda: (step_rows(plan, 1), plan.steps_per_epoch(0), plan.samples_before(7))
            )
            assert read.result(timeout=5) == (expected, 7, 100)
            assert not ahead.done()
        finally:
            go_on.set()
        assert ahead.result() == step_rows(plan, 7)


def test_threads_that_need_the_same_epoch_plan_it_once(planned):
    plan, _, _ = make(n=100, packing=False)
    planned.clear()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda step: step_rows(plan, step), [20] * 16))
    assert all(rows == found[0] for rows in found)
    assert planned == [0, 1, 2]


def test_epochs_and_seeds_differ_in_their_order():
    plan, _, _ = make()
    _, tokens, images = make()
    other = PackPlan(
        tokens, images, lengths(0, 500)[2], samples=16, max_length=260, slots=3, packing=True, seed=1
    )
    assert flat(epoch(plan, 0)) != flat(epoch(plan, 1))
    assert flat(epoch(plan, 0)) != flat(epoch(other, 0))


def test_the_order_of_an_epoch_is_pinned():
    """Resuming needs the same permutation from every version of NumPy: this one must never change."""
    assert permutation(10, Draw.ORDER, 42, 0).tolist() == [1, 3, 5, 8, 4, 9, 7, 2, 6, 0]


def test_what_is_drawn_keeps_its_number():
    """Another number draws others, and a run that goes on would repeat and miss samples."""
    assert {draw.name: draw.value for draw in Draw} == {
        "ORDER": 1, "CAP": 2, "WEIGHT": 3, "BUDGET": 4, "QUESTIONS": 5, "TASKS": 6, "COUNT": 7,
        "ROWS": 11, "STEPS_OF_ROWS": 12, "STEPS_OF_SAMPLES": 13,
    }  # fmt: skip
    assert permutation(50, Draw.CAP, 0).tolist() == permutation(50, 2, 0).tolist()
    assert len({tuple(permutation(50, draw, 0).tolist()) for draw in Draw}) == len(Draw)


def test_the_rows_of_a_plan_are_pinned():
    """Raise PLAN_VERSION with these digests: a run that goes on with other rows would repeat and miss samples."""
    found = []
    for samples, exact in ((8, True), (64, False)):  # samples are dealt to steps, or rows are
        plan = PackPlan(*pinned_lengths(), samples=samples, max_length=2048, slots=3, packing=True, seed=0)
        assert plan._pace(plan._orders(1)[0], plan.rows_per_step).exact == exact
        rows = plan._epoch(1)
        digest = hashlib.sha256(rows.order.astype("<i4").tobytes() + rows.starts.astype("<i8").tobytes())
        found.append(digest.hexdigest()[:16])
    assert (PLAN_VERSION, found) == (2, ["3f69f6984d4de019", "3fcf108dcd2c59c4"])


def pinned_lengths() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, images, supervised) of 5,000 samples, by a rule instead of a random generator, which may change."""
    i = np.arange(5000)
    text = 40 + i * i % 97 + 300 * (i % 31 == 0)
    return 576 + text, np.ones(5000, int), 5 + i * 7 % 40


def test_repeats_of_a_mixture_are_packed_as_often_as_they_occur():
    plan, _, _ = make(
        n=60, epoch_samples=lambda e: [np.array([0, 0, 0, 5, 7 + e] + [9] * 40, dtype=np.int32)]
    )
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
    assert fresh.samples_before(0) == 0
    assert fresh.samples_before(per_epoch[0]) == 100
    assert fresh.samples_before(sum(per_epoch)) == 300
    assert fresh.samples_before(sum(per_epoch) + 1) == 300 + sum(map(len, step_rows(fresh, sum(per_epoch))))
    assert fresh.samples_before(1) == sum(map(len, step_rows(fresh, 0)))


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
    per_step = np.array([sum(images[row].sum() for row in step) for step in steps])
    assert stats.images_spread == pytest.approx(per_step[:-1].std())
    assert stats.fill == pytest.approx(tokens.sum() / (rows * plan.capacity.tokens))
    assert stats.slot_fill == pytest.approx(images.sum() / (rows * plan.capacity.images))
    supervised = lengths(0, 200)[2]
    assert stats.supervised_fill == pytest.approx(supervised.sum() / (rows * plan.capacity.supervised))


def test_a_sample_longer_than_a_row_is_refused_by_number():
    with pytest.raises(ValueError, match="sample number 1 has 11 tokens, a row has 10"):
        PackPlan(
            np.array([5, 11]),
            np.zeros(2, int),
            np.ones(2, int),
            samples=1,
            max_length=10,
            slots=1,
            packing=True,
            seed=0,
        )


def test_more_images_than_slots_name_the_key_and_the_number_to_set():
    with pytest.raises(UserError, match=r"data.slots=1, but 2 samples .* up to 4. Set data.slots=4"):
        PackPlan(
            np.full(3, 5),
            np.array([1, 2, 4]),
            np.ones(3, int),
            samples=1,
            max_length=10,
            slots=1,
            packing=True,
            seed=0,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "batch.samples=0"),
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
    tokens, images, ones = np.full(4, 5), np.array([1, 1, 1, 5]), np.ones(4, int)
    options = {"samples": 1, "max_length": 10, "slots": 3, "packing": True, "seed": 0}
    with pytest.raises(UserError, match=r"data.slots=3, but 1 samples .* up to 5"):
        PackPlan(
            tokens, images, ones, **options, epoch_samples=lambda e: [np.array([e % 4])], pool=np.arange(4)
        )
