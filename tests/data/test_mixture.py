"""vflax/data/mixture.py: what an epoch is made of."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from vflax.data.mixture import Mixture, MixtureRules, SourceSpec, check_mixture
from vflax.errors import UserError

TASKS_A = ["cat", "cat", "dog", "dog", "dog", "vqa+[a]", "vqa+b"] * 10  # 70 samples
TASKS_B = ["cat"] * 30


def mix(specs: list[SourceSpec], seed: int = 0, kept=None, tasks=None, rules_tasks=None, **rules) -> Mixture:
    tasks = tasks or [TASKS_A, TASKS_B][: len(specs)]
    kept = kept or [np.ones(len(names), bool) for names in tasks]
    return Mixture(specs, tasks, kept, rules=MixtureRules(tasks=rules_tasks, **rules), seed=seed)


def epoch_of(mixture: Mixture, epoch: int = 0) -> np.ndarray:
    [samples] = mixture.epoch(epoch)
    return samples


def tasks_of(samples: np.ndarray) -> Counter:
    return Counter((TASKS_A + TASKS_B)[i] for i in samples)


def test_by_default_an_epoch_holds_each_sample_of_each_source_once():
    mixture = mix([SourceSpec("a"), SourceSpec("b")])
    assert epoch_of(mixture, 0).tolist() == epoch_of(mixture, 5).tolist() == list(range(100))
    assert mixture.locate(69) == (0, 69)
    assert mixture.locate(70) == (1, 0)
    assert len(mixture) == 100


def test_dropped_samples_are_in_no_epoch():
    kept = np.ones(70, bool)
    kept[[3, 50]] = False
    assert set(range(70)) - set(epoch_of(mix([SourceSpec("a", weight=2.5)], kept=[kept]), 0).tolist()) == {
        3,
        50,
    }


def test_a_weight_gives_whole_copies_and_a_fresh_share_each_epoch():
    mixture = mix([SourceSpec("a", weight=2.5), SourceSpec("b")])
    first, second = (Counter(epoch_of(mixture, e).tolist()) for e in (0, 1))
    for counts in (first, second):
        a = [counts[i] for i in range(70)]
        assert Counter(a) == {2: 35, 3: 35}
        assert [counts[i] for i in range(70, 100)] == [1] * 30
    assert first != second


def test_a_weight_below_one_takes_a_share():
    epoch = epoch_of(mix([SourceSpec("a", weight=0.1)]), 0)
    assert len(epoch) == len(set(epoch.tolist())) == 7


def test_a_cap_keeps_so_many_of_each_task_the_same_in_every_epoch():
    mixture = mix([SourceSpec("a", cap=15), SourceSpec("b", cap=5)])
    epoch = epoch_of(mixture, 0)
    assert Counter(TASKS_A[i] for i in epoch if i < 70) == {"cat": 15, "dog": 15, "vqa+[a]": 10, "vqa+b": 10}
    assert sum(i >= 70 for i in epoch) == 5
    assert epoch.tolist() == epoch_of(mixture, 3).tolist()


def test_include_and_exclude_take_names_and_globs_and_a_name_with_brackets_is_a_name():
    assert set(tasks_of(epoch_of(mix([SourceSpec("a", include=("cat", "d*"))])))) == {"cat", "dog"}
    assert set(tasks_of(epoch_of(mix([SourceSpec("a", exclude=("vqa+*",))])))) == {"cat", "dog"}
    assert set(tasks_of(epoch_of(mix([SourceSpec("a", include=("vqa+[a]",))])))) == {"vqa+[a]"}
    both = SourceSpec("a", include=("*",), exclude=("dog", "vqa+b"))
    assert set(tasks_of(epoch_of(mix([both])))) == {"cat", "vqa+[a]"}


def test_an_unknown_task_is_refused_with_the_nearest_names():
    with pytest.raises(UserError, match=r"'dgo' \(nearest: dog\); 'zzz\*'"):
        mix([SourceSpec("a", include=("dgo",), exclude=("zzz*",))])


def test_a_source_that_is_not_strict_passes_over_names_that_it_does_not_hold():
    lenient = SourceSpec("a", exclude=("zzz*", "dog"), strict=False)
    assert set(tasks_of(epoch_of(mix([lenient])))) == {"cat", "vqa+[a]", "vqa+b"}


def test_a_budget_draws_one_subset_for_all_epochs_by_the_seed():
    specs = [SourceSpec("a"), SourceSpec("b")]
    mixture = mix(specs, budget=20)
    epoch = epoch_of(mixture, 0).tolist()
    assert len(set(epoch)) == 20
    assert (
        epoch == sorted(epoch) == epoch_of(mixture, 9).tolist() == epoch_of(mix(specs, budget=20), 0).tolist()
    )
    assert epoch != epoch_of(mix(specs, seed=1, budget=20), 0).tolist()
    assert any(i < 70 for i in epoch) and any(i >= 70 for i in epoch)


def test_a_fresh_mixture_gives_the_same_epochs_in_any_order_and_another_seed_others():
    specs = [SourceSpec("a", weight=1.3, cap=12), SourceSpec("b", weight=0.4)]
    one, two = mix(specs), mix(specs)
    forward = [epoch_of(one, e).tolist() for e in range(4)]
    assert [epoch_of(two, e).tolist() for e in (3, 2, 1, 0)] == forward[::-1]
    assert epoch_of(mix(specs, seed=1), 0).tolist() != forward[0]
    assert len({len(e) for e in forward}) == 1


def test_a_count_gives_so_many_samples_of_a_source_the_same_in_every_epoch():
    mixture = mix([SourceSpec("a", count=20), SourceSpec("b", count=75)])
    epoch = epoch_of(mixture)
    assert epoch.tolist() == epoch_of(mixture, 4).tolist()
    times = Counter(epoch.tolist())
    assert sum(i < 70 for i in epoch) == 20 and max(times[i] for i in range(70)) == 1
    assert Counter(times[i] for i in range(70, 100)) == {2: 15, 3: 15}  # two copies and a drawn half


def test_so_many_tasks_are_drawn_and_more_tasks_hold_the_fewer_ones():
    drawn = [_tasks_in(n, seed=0) for n in range(1, 13)]
    assert [len(names) for names in drawn] == list(range(1, 13))
    assert all(few < more for few, more in itertools.pairwise(drawn))
    assert _tasks_in(6, seed=1) != drawn[5]


def test_a_budget_spread_over_tasks_is_even_and_what_small_tasks_lack_goes_to_the_others():
    names = ["small"] * 5 + ["middle"] * 40 + ["large"] * 500
    mixture = mix([SourceSpec("a")], tasks=[names], budget=100, spread="tasks")
    samples = epoch_of(mixture)
    assert len(set(samples.tolist())) == 100
    assert Counter(names[i] for i in samples) == {"small": 5, "middle": 40, "large": 55}
    mixture = mix([SourceSpec("a")], tasks=[names], budget=10, spread="tasks")
    assert sorted(Counter(names[i] for i in epoch_of(mixture)).values()) == [3, 3, 4]


def test_a_budget_over_ten_tasks_and_over_all_holds_equally_many_samples():
    """Vision-Flan's Table 3 in small: few tasks with many instances against many tasks with few."""
    names = [f"t{i % 187}" for i in range(187 * 60)]
    few = epoch_of(mix([SourceSpec("a")], tasks=[names], rules_tasks=10, budget=500, spread="tasks"))
    many = epoch_of(mix([SourceSpec("a")], tasks=[names], rules_tasks=187, budget=500, spread="tasks"))
    assert len(few) == len(many) == 500
    assert set(Counter(names[i] for i in few).values()) == {50}
    assert set(Counter(names[i] for i in many).values()) == {2, 3}


def test_in_sequence_each_source_is_a_group_of_its_own_and_an_empty_one_is_none():
    specs = [SourceSpec("a", weight=1.5), SourceSpec("b")]
    first, second = mix(specs, order="sequence").epoch(0)
    assert set(first.tolist()) == set(range(70)) and len(first) == 105
    assert second.tolist() == list(range(70, 100))
    specs = [SourceSpec("a", include=("vqa+b",)), SourceSpec("b")]
    groups = mix(specs, order="sequence", budget=1).epoch(0)
    assert [len(group) for group in groups] == [1]


def test_the_counts_tell_what_was_asked_for_and_what_there_is():
    kept = np.ones(70, bool)
    kept[[0, 1]] = False  # two cats
    rows = mix([SourceSpec("a", cap=15, weight=2.0, exclude=("vqa+b",))], kept=[kept]).counts()
    assert [(r.task, r.available, r.usable, r.asked, r.samples) for r in rows] == [
        ("cat", 20, 18, 30.0, 30),
        ("dog", 30, 30, 30.0, 30),
        ("vqa+[a]", 10, 10, 30.0, 20),
    ]


def test_the_counts_of_a_spread_budget_are_asked_evenly_over_sources_that_share_a_task():
    rows = mix([SourceSpec("a", include=("cat",)), SourceSpec("b")], budget=25, spread="tasks").counts()
    assert [(r.source, r.task, r.asked) for r in rows] == [(0, "cat", 10.0), (1, "cat", 15.0)]
    assert sum(r.samples for r in rows) == 25


def test_the_counts_of_each_source_with_a_count_add_up_to_it():
    rows = mix([SourceSpec("a", count=35), SourceSpec("b")]).counts()
    assert sum(r.asked for r in rows if r.source == 0) == pytest.approx(35)
    assert sum(r.samples for r in rows if r.source == 0) == 35


def test_a_task_is_short_where_its_samples_run_out_and_not_by_chance_of_a_draw():
    def short(spec: SourceSpec, kept=None, **rules) -> list[tuple[str, int]]:
        return [(r.task, r.samples) for r in mix([spec], kept=kept and [kept], **rules).counts() if r.short]

    for seed in range(5):  # some tasks then have fewer than their share, by chance
        drawn = mix([SourceSpec("a")], seed, budget=30).counts()
        assert any(r.samples < r.asked - 1 for r in drawn) or seed
        assert not any(r.short for r in drawn)
    assert short(SourceSpec("a", weight=0.3)) == short(SourceSpec("a", count=25)) == []
    assert short(SourceSpec("a", cap=15)) == [("vqa+[a]", 10), ("vqa+b", 10)]
    assert short(SourceSpec("a"), budget=50, spread="tasks") == [("vqa+[a]", 10), ("vqa+b", 10)]
    assert short(SourceSpec("a"), budget=40, spread="tasks") == []
    assert short(SourceSpec("a"), [name != "vqa+b" or i > 6 for i, name in enumerate(TASKS_A)]) == [
        ("vqa+b", 9)
    ]


def test_what_no_seed_makes_good_is_refused_without_knowing_what_can_be_used():
    specs = [SourceSpec("a", include=("dog",)), SourceSpec("b")]
    check_mixture(
        specs, [TASKS_A, TASKS_B], MixtureRules(tasks=1)
    )  # the draw decides whether one of them is empty
    check_mixture(specs, [TASKS_A, TASKS_B], MixtureRules(tasks=2, budget=60))
    for rules, message in (
        (MixtureRules(tasks=3), "data.tasks=3: the sources hold 2"),
        (MixtureRules(budget=61), "data.budget=61: the sources give 60"),
    ):
        with pytest.raises(UserError, match=message):
            check_mixture(specs, [TASKS_A, TASKS_B], rules)


def _tasks_in(count: int, seed: int) -> set[str]:
    names = [f"t{i % 12}" for i in range(120)]
    return {names[i] for i in epoch_of(mix([SourceSpec("a")], seed, tasks=[names], rules_tasks=count))}


@pytest.mark.parametrize(
    ("spec", "rules", "message"),
    [
        (SourceSpec("a", weight=0.0), {}, "weight=0.0 of a"),
        (SourceSpec("a", cap=-1), {}, "cap=-1 of a"),
        (SourceSpec("a", count=-1), {}, "count=-1 of a"),
        (SourceSpec("a", count=5, weight=2.0), {}, "weight=2.0 and count=5 of a: give one of the two"),
        (SourceSpec("a"), {"budget": 71}, "data.budget=71: the sources give 70"),
        (SourceSpec("a"), {"rules_tasks": 5}, "data.tasks=5: the sources hold 4 tasks"),
        (SourceSpec("a"), {"spread": "tasks"}, "give data.budget too"),
        (SourceSpec("a"), {"spread": "evenly", "budget": 3}, "data.spread='evenly'"),
        (SourceSpec("a"), {"order": "shuffle"}, "data.order='shuffle': expected one of mixed, sequence"),
        (SourceSpec("a", exclude=("*",)), {}, "none is left"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_key(spec, rules, message):
    with pytest.raises(UserError, match=message):
        mix([spec], **rules)
