"""vflax/data/mixture.py: what an epoch is made of."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vflax.data.mixture import Mixture, SourceSpec
from vflax.errors import UserError

TASKS_A = ["cat", "cat", "dog", "dog", "dog", "vqa+[a]", "vqa+b"] * 10  # 70 samples
TASKS_B = ["cat"] * 30


def mix(specs: list[SourceSpec], seed: int = 0, budget: int | None = None, kept=None) -> Mixture:
    tasks = [TASKS_A, TASKS_B][: len(specs)]
    kept = kept or [np.ones(len(names), bool) for names in tasks]
    return Mixture(specs, tasks, kept, budget=budget, seed=seed)


def tasks_of(samples: np.ndarray) -> Counter:
    return Counter((TASKS_A + TASKS_B)[i] for i in samples)


def test_by_default_an_epoch_holds_each_sample_of_each_source_once():
    mixture = mix([SourceSpec("a"), SourceSpec("b")])
    assert mixture.epoch(0).tolist() == mixture.epoch(5).tolist() == list(range(100))
    assert mixture.locate(69) == (0, 69)
    assert mixture.locate(70) == (1, 0)
    assert len(mixture) == 100


def test_dropped_samples_are_in_no_epoch():
    kept = np.ones(70, bool)
    kept[[3, 50]] = False
    assert set(range(70)) - set(mix([SourceSpec("a", weight=2.5)], kept=[kept]).epoch(0).tolist()) == {3, 50}


def test_a_weight_gives_whole_copies_and_a_fresh_share_each_epoch():
    mixture = mix([SourceSpec("a", weight=2.5), SourceSpec("b")])
    first, second = (Counter(mixture.epoch(e).tolist()) for e in (0, 1))
    for counts in (first, second):
        a = [counts[i] for i in range(70)]
        assert Counter(a) == {2: 35, 3: 35}
        assert [counts[i] for i in range(70, 100)] == [1] * 30
    assert first != second


def test_a_weight_below_one_takes_a_share():
    epoch = mix([SourceSpec("a", weight=0.1)]).epoch(0)
    assert len(epoch) == len(set(epoch.tolist())) == 7


def test_a_cap_keeps_so_many_of_each_task_the_same_in_every_epoch():
    mixture = mix([SourceSpec("a", cap=15), SourceSpec("b", cap=5)])
    epoch = mixture.epoch(0)
    assert Counter(TASKS_A[i] for i in epoch if i < 70) == {"cat": 15, "dog": 15, "vqa+[a]": 10, "vqa+b": 10}
    assert sum(i >= 70 for i in epoch) == 5
    assert epoch.tolist() == mixture.epoch(3).tolist()


def test_include_and_exclude_take_names_and_globs_and_a_name_with_brackets_is_a_name():
    assert set(tasks_of(mix([SourceSpec("a", include=("cat", "d*"))]).epoch(0))) == {"cat", "dog"}
    assert set(tasks_of(mix([SourceSpec("a", exclude=("vqa+*",))]).epoch(0))) == {"cat", "dog"}
    assert set(tasks_of(mix([SourceSpec("a", include=("vqa+[a]",))]).epoch(0))) == {"vqa+[a]"}
    both = SourceSpec("a", include=("*",), exclude=("dog", "vqa+b"))
    assert set(tasks_of(mix([both]).epoch(0))) == {"cat", "vqa+[a]"}


def test_an_unknown_task_is_refused_with_the_nearest_names():
    with pytest.raises(UserError, match=r"'dgo' \(nearest: dog\); 'zzz\*'"):
        mix([SourceSpec("a", include=("dgo",), exclude=("zzz*",))])


def test_a_budget_draws_one_subset_for_all_epochs_by_the_seed():
    specs = [SourceSpec("a"), SourceSpec("b")]
    mixture = mix(specs, budget=20)
    epoch = mixture.epoch(0).tolist()
    assert len(set(epoch)) == 20
    assert epoch == sorted(epoch) == mixture.epoch(9).tolist() == mix(specs, budget=20).epoch(0).tolist()
    assert epoch != mix(specs, seed=1, budget=20).epoch(0).tolist()
    assert any(i < 70 for i in epoch) and any(i >= 70 for i in epoch)


def test_a_fresh_mixture_gives_the_same_epochs_in_any_order_and_another_seed_others():
    specs = [SourceSpec("a", weight=1.3, cap=12), SourceSpec("b", weight=0.4)]
    one, two = mix(specs), mix(specs)
    forward = [one.epoch(e).tolist() for e in range(4)]
    assert [two.epoch(e).tolist() for e in (3, 2, 1, 0)] == forward[::-1]
    assert mix(specs, seed=1).epoch(0).tolist() != forward[0]
    assert len({len(e) for e in forward}) == 1


@pytest.mark.parametrize(
    ("spec", "budget", "message"),
    [
        (SourceSpec("a", weight=0.0), None, "weight=0.0 of a"),
        (SourceSpec("a", cap=-1), None, "cap=-1 of a"),
        (SourceSpec("a"), 71, "data.budget=71: the sources give 70"),
        (SourceSpec("a", exclude=("*",)), None, "none is left"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_key(spec, budget, message):
    with pytest.raises(UserError, match=message):
        mix([spec], budget=budget)
