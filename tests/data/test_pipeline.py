"""vflax/data/pipeline.py: from config.data to batches."""

from __future__ import annotations

import collections
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.tfds_writer import write_dataset
from tests.data.whole_rows import step_rows
from vflax.config import load_config
from vflax.constants import IGNORE_LABEL
from vflax.data import lengths
from vflax.data.pipeline import Data, build_data
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.start import resolve_path
from vflax.tokenizer import load_tokenizer


def source(path, **changes) -> SimpleNamespace:
    values = {"path": str(path), "split": "train", "weight": 1.0, "count": 0, "cap": 0}
    values |= {"include": (), "exclude": (), "strict": True}
    return SimpleNamespace(**values | changes)


@pytest.fixture
def build(dataset, row_format):
    def build(sources=None, **changes) -> Data:
        config = {
            "sources": (source(dataset),) if sources is None else sources,
            "eval_split": "test",
            "order": "mixed",
            "tasks": 0,
            "budget": 0,
            "spread": "samples",
            "packing": True,
            "max_length": 256,
            "slots": 3,
            "supervised": 0,
            "max_problem_share": 0.0,
            "max_duplicate_share": 1.0,  # some tests ask what they train on
            "duplicate_distance": 4,
            "threads": 2,
        }
        arguments = {
            "tokenizer": row_format.tokenizer,
            "template": "vicuna_v1",
            "position": "front",
            "rules": row_format.rules,
            "num_image_tokens": 4,
            "samples": 8,
            "rows_multiple": 2,
            "seed": 0,
            "epochs": 3,
            "steps": 0,
            "process_index": 0,
            "process_count": 1,
            "show_progress": False,
        }
        config |= {key: value for key, value in changes.items() if key in config}
        arguments |= {key: value for key, value in changes.items() if key not in config}
        return build_data(SimpleNamespace(**config), str, **arguments)

    return build


def batches(iterator) -> list[dict[str, np.ndarray]]:
    found = list(iterator)
    iterator.close()
    return found


def count_samples(batch: dict[str, np.ndarray]) -> int:
    return int(batch["segments"].max(axis=1).sum())


def test_a_run_has_the_batches_that_the_plan_promised(build):
    data = build()
    found = batches(data.loader())
    assert len(found) == data.total_steps == sum(data.plan.steps_per_epoch(e) for e in range(3))
    assert all(len(batch["ids"]) == data.rows_per_step for batch in found)
    assert sum(map(count_samples, found)) == data.samples_seen(data.total_steps) == 3 * 40
    first_epoch = data.plan.steps_per_epoch(0)
    assert sum(map(count_samples, found[:first_epoch])) == 40
    assert (data.epoch_at(0), data.epoch_at(first_epoch), data.epoch_at(data.total_steps)) == (0.0, 1.0, 3.0)
    assert 0 < data.epoch_at(1) < 1


def test_the_loader_begins_at_any_step(build):
    data = build()
    whole, part = batches(data.loader()), batches(data.loader(4))
    for a, b in zip(whole[4:], part, strict=True):
        np.testing.assert_array_equal(a["ids"], b["ids"])


def test_steps_take_the_place_of_epochs(build):
    data = build(steps=7, epochs=1)
    assert data.total_steps == len(batches(data.loader())) == 7


def test_no_row_has_more_supervised_tokens_than_the_capacity(build):
    data = build()
    most = max((b["labels"] != IGNORE_LABEL).sum(axis=1).max() for b in batches(data.loader()))
    assert most <= data.capacity <= data.plan.capacity.tokens
    assert f"{data.capacity} supervised tokens" in data.describe()
    heldout = max((b["labels"] != IGNORE_LABEL).sum(axis=1).max() for b in data.heldout_batches())
    assert heldout <= data.heldout_capacity


def test_a_capacity_that_is_given_is_the_one_that_is_used(build):
    data = build(supervised=100)
    assert data.capacity == 100 != build().capacity
    most = max((b["labels"] != IGNORE_LABEL).sum(axis=1).max() for b in batches(data.loader()))
    assert most <= 100


def test_held_out_batches_hold_each_held_out_sample_once(build, dataset):
    data = build(samples=4)
    assert data.has_heldout
    found = list(data.heldout_batches())
    assert sum(map(count_samples, found)) == 10
    again = list(data.heldout_batches())
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(found, again, strict=True))


def test_a_held_out_split_that_is_sorted_by_length_is_mixed_so_that_long_ones_meet_short_ones(
    build, tmp_path, make_example
):
    held_out = [make_example(i, words=2 if i < 40 else 45) for i in range(80)]
    write_dataset(tmp_path / "d", {"train": held_out, "test": held_out})
    data = build([source(tmp_path / "d")], slots=6, epochs=1)
    lengths = [
        np.unique(row[row > 0], return_counts=True)[1]
        for b in data.heldout_batches()
        for row in b["segments"]
    ]
    assert sum(map(len, lengths)) == 80
    mixed = [np.ptp(counts) > 20 for counts in lengths if len(counts) > 1]
    assert np.mean(mixed) > 0.5
    assert data.heldout_stats == data.stats  # the same samples, shuffled by the same seed


def test_held_out_batches_are_as_large_as_a_micro_batch(build):
    data = build(samples=8, accumulation=2, rows_multiple=4)
    assert data.rows_per_step % 4 == 0
    for batch in data.heldout_batches():
        assert len(batch["ids"]) % 2 == 0
        assert count_samples(batch) <= 4


def test_held_out_rows_of_two_hosts_are_those_of_one(build):
    whole = list(build().heldout_batches())
    parts = [list(build(process_index=i, process_count=2).heldout_batches()) for i in range(2)]
    for one, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(one["ids"], np.concatenate([first["ids"], second["ids"]]))


def test_without_a_held_out_split_there_is_none(build, tmp_path, mixed_examples):
    write_dataset(tmp_path / "d", {"train": mixed_examples})
    without = build([source(tmp_path / "d")])
    assert not without.has_heldout
    assert "held out: nothing" in without.describe() and "of the splits train none" in without.describe()
    assert not build(eval_split="").has_heldout
    assert build(eval_split="").heldout_questions(3) == []
    with pytest.raises(ValueError, match="has_heldout"):
        next(build(eval_split="").heldout_batches())


def test_questions_are_the_same_few_of_each_task_every_time(build):
    data = build()
    questions = data.heldout_questions(2)
    assert [(q.sample_id, q.task) for q in questions] == [
        (q.sample_id, q.task) for q in build().heldout_questions(2)
    ]
    tasks = [q.task for q in questions]
    assert sorted(tasks) == ["task0"] * 2 + ["task1"] * 2 + ["task2"] * 2
    assert len(data.heldout_questions(100)) == 10


def test_task_filters_hold_for_held_out_samples_too(build, dataset):
    data = build([source(dataset, include=("task0", "task1"), exclude=("task1",))])
    assert {q.task for q in data.heldout_questions(9)} == {"task0"}
    assert sum(map(count_samples, data.heldout_batches())) == len(data.heldout_questions(9))


def test_some_of_the_held_out_tasks_can_be_evaluated_alone(build):
    whole, part = build(), build(evaluate_tasks=(("task*",), ("task1",)))
    assert part.heldout_tasks == [task for task in whole.heldout_tasks if task != "task1"]
    assert {q.task for q in part.heldout_questions(1)} == set(part.heldout_tasks)
    assert part.identity() == whole.identity(), "what is learned is the same"
    held = sum(map(count_samples, part.heldout_batches()))
    assert f"held out: of the tasks that config.evaluate leaves, {held} samples" in part.describe()
    none = build(evaluate_tasks=((), ("*",)))
    assert not none.has_heldout and "config.evaluate.include and exclude leave none" in none.why_no_heldout
    with pytest.raises(UserError, match=r"config\.evaluate: include and exclude name tasks .*'tusk1'"):
        build(evaluate_tasks=((), ("tusk1",)))


def test_each_held_out_sample_s_task_is_told_in_the_order_of_the_rows_of_all_hosts(build):
    data = build()
    counts = collections.Counter()
    for number, batch in enumerate(data.heldout_batches()):
        tasks = data.heldout_batch_tasks(number)
        assert [len(row) for row in tasks] == batch["segments"].max(axis=1).tolist()
        counts.update(task for row in tasks for task in row)
    [part] = data.preflight.of("held out")
    assert counts == collections.Counter(part.source.tasks)


def test_the_identity_follows_everything_that_is_learned_and_nothing_else(build, dataset, tmp_path):
    def identity(*args, **kw) -> dict[str, str]:
        return build(*args, **kw).identity()

    base = identity()
    assert base == json.loads(json.dumps(base))
    for same in ({"rows_multiple": 8}, {"threads": 5}, {"epochs": 4}, {"eval_split": ""}):
        assert identity(**same) == base
    changes = {
        "plan": [
            {"seed": 1}, {"samples": 7}, {"slots": 2}, {"packing": False}, {"order": "sequence"},
            {"max_length": 250}, {"budget": 20}, {"supervised": 100}, {"tasks": 2},
            {"budget": 20, "spread": "tasks"},
        ],
        "rendering": [{"template": "llava_v1"}, {"position": "inline"}],
        "samples": [{"sources": [source(dataset, split="test")]}, {"sources": [source(dataset, cap=3)]},
                    {"sources": [source(dataset, count=7)]}],
    }  # fmt: skip
    for key, several in changes.items():
        for change in several:
            assert identity(**change)[key] != base[key], change
    assert build().identity() == build().identity() != build(seed=1).identity()


def test_moving_the_data_does_not_change_its_identity(build, tmp_path, mixed_examples, dataset):
    write_dataset(tmp_path / "moved", {"train": mixed_examples})
    assert build([source(tmp_path / "moved")]).identity() == build().identity()


def test_two_sources_are_mixed(build, dataset, tmp_path, make_example):
    write_dataset(tmp_path / "b", {"train": [make_example(500 + i, images=0) for i in range(6)]})
    data = build([source(dataset, cap=2), source(tmp_path / "b", weight=1.5)], epochs=1)
    assert data.stats.samples == 3 * 2 + 6 + 3
    assert sum(map(count_samples, batches(data.loader()))) == 15


def test_the_description_says_what_was_asked_and_what_was_planned(build, tmp_path, make_example):
    long = make_example(0, words=600) | {"id": "novel"}
    write_dataset(tmp_path / "d", {"train": [make_example(i) for i in range(1, 60)] + [long]})
    data = build([source(tmp_path / "d")], max_problem_share=0.1, epochs=1)
    text = data.describe()
    assert "60 samples an epoch" in text
    assert f"{tmp_path / 'd'} (split train), training: 60 of 60 samples, 3 tasks" in text
    assert f"preflight, {tmp_path / 'd'} (split train), training: 1 truncated: novel" in text
    assert f"batch.samples=8, planned {data.stats.samples_per_step:.2f} samples" in text
    assert f"{data.stats.images_per_step:.1f} images" in text
    used = data.plan.rows_per_step / data.rows_per_step
    assert f"filled {used * data.stats.fill:.1%}" in text
    assert f"{used * data.stats.supervised_fill:.1%} of the supervised" in text
    assert abs(data.stats.samples_per_step / 8 - 1) <= 0.02


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"rows_multiple": 16},
            "make batch.samples a multiple of 16, or this number smaller with mesh.tensor",
        ),
        ({"samples": 9, "packing": False, "rows_multiple": 8}, "make batch.samples a multiple of 8"),
    ],
)
def test_empty_rows_count_in_the_fills_and_how_to_fill_them_is_said(build, changes, remedy):
    data = build(**changes)
    rows, computed = data.plan.rows_per_step, data.rows_per_step
    assert computed % changes["rows_multiple"] == 0 and computed - rows > 0.1 * computed
    text = data.describe()
    assert f"(and {computed - rows} empty rows, for the devices)" in text
    assert f"filled {data.stats.fill * rows / computed:.1%} of the tokens" in text
    assert f"{data.stats.slot_fill * rows / computed:.1%} of the image slots" in text
    assert f"{data.stats.supervised_fill * rows / computed:.1%} of the supervised" in text
    assert f"  {1 - rows / computed:.0%} of the rows that the devices compute are empty" in text
    assert remedy in text


@pytest.mark.parametrize("multiple", [4, 8])
def test_the_rows_that_are_advised_fill_the_devices_and_cut_no_sample(
    build, tmp_path, make_example, multiple
):
    write_dataset(tmp_path / "d", {"train": [make_example(i, words=1 + i % 5) for i in range(80)]})
    before = build([source(tmp_path / "d")], rows_multiple=multiple)
    assert before.plan.rows_per_step == 3
    [advised] = re.findall(r"with data.max_length=(\d+) and data.slots=(\d+) a step", before.describe())
    length, slots = map(int, advised)
    after = build([source(tmp_path / "d")], rows_multiple=multiple, max_length=length, slots=slots)
    assert after.plan.rows_per_step == after.rows_per_step == multiple
    assert "are empty" not in after.describe()


def test_few_empty_rows_ask_for_no_advice(build):
    data = build(samples=19, packing=False, rows_multiple=20)
    assert data.rows_per_step - data.plan.rows_per_step == 1
    assert "empty rows" in data.describe() and "are empty" not in data.describe()
    data = build(rows_multiple=1)
    assert data.rows_per_step == data.plan.rows_per_step
    assert "empty" not in data.describe() and f"filled {data.stats.fill:.1%}" in data.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 60}, "more than data.max_problem_share=0.0: truncated: 17"),
        ({"slots": 1}, r"too_many_images: 1\d \(s\d+, s\d+, s\d+ and \d+ more\)\. .*data\.slots for those"),
        ({"supervised": 9}, "data.supervised=9, but .* Set data.supervised="),
        ({"order": "random"}, "data.order='random': expected one of mixed, sequence"),
        ({"sources": ()}, "data.sources is empty"),
        ({"sources": (source("/nowhere"),)}, r"data.sources\[0\]: /nowhere: there is no such directory"),
        ({"epochs": 0}, "expected at least one step or one epoch"),
        ({"process_count": 3}, "do not divide among 3 processes"),
    ],
)
def test_data_that_cannot_be_used_as_asked_is_refused_by_key(build, changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_other_sources_can_be_asked_too_without_being_part_of_the_held_out_loss(build, dataset):
    other = SimpleNamespace(path=str(dataset), split="train", include=("task1",), exclude=())
    data, plain = build(evaluate_sources=(other,)), build()
    more = data.heldout_questions(2)[len(plain.heldout_questions(2)) :]
    assert more and {q.task for q in more} == {"task1"}
    assert len(list(data.heldout_batches())) == len(list(plain.heldout_batches()))


def questions(path, **changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{"path": str(path), "split": "train", "include": (), "exclude": (), "strict": True} | changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spread": "task"}, r"data\.spread='task'"),
        ({"spread": "tasks"}, "give data.budget too"),
        ({"order": "shuffle"}, "data.order='shuffle'"),
        ({"tasks": 4}, "data.tasks=4: the sources hold 3 tasks"),
        ({"budget": 41}, "data.budget=41: the sources give 40"),
        ({"sources": {"weight": 2.0, "count": 5}}, "weight=2.0 and count=5"),
        ({"sources": {"include": ("tusk0",)}}, r"data\.sources\[0\]: include and exclude name .*'tusk0'"),
        (
            {"evaluate_sources": {"exclude": ("tusk0",)}},
            r"evaluate\.sources\[0\]: include and exclude .*'tusk0'",
        ),
        ({"evaluate_sources": {"split": "tset"}}, r"evaluate\.sources\[0\]: .* there is no split 'tset'"),
    ],
)
def test_what_can_be_told_wrong_without_measuring_is_refused_before_any(
    build, dataset, monkeypatch, changes, message
):
    monkeypatch.setattr(lengths, "measure", None)  # would fail if it were called
    changes = dict(changes)
    for key, make in (("sources", source), ("evaluate_sources", questions)):
        if key in changes:
            changes[key] = (make(dataset, **changes[key]),)
    with pytest.raises(UserError, match=message):
        build(**changes)


@pytest.fixture
def uneven(tmp_path, make_example):
    """In the training split 20 samples of the task good and 5 of the task bad, which are too long; in the other split
    one of each."""
    good = [make_example(i, task="good") for i in range(21)]
    bad = [make_example(30 + i, task="bad", words=600) for i in range(6)]
    write_dataset(tmp_path / "uneven", {"train": good[:20] + bad[:5], "test": good[20:] + bad[5:]})
    return tmp_path / "uneven"


def test_only_what_is_used_counts_for_the_share_of_problems(build, uneven):
    assert build([source(uneven, exclude=("bad",))]).stats.samples == 20
    with pytest.raises(UserError) as refused:
        build([source(uneven, exclude=("good",))], max_problem_share=0.5)
    assert "5 of 5 samples would be dropped or truncated, 100.0%" in str(refused.value)
    assert "truncated: 5 (s30, s31, s32 and 2 more)" in str(refused.value)
    assert "leave the worst tasks out with data.sources[k].exclude" in str(refused.value)


def test_what_a_launch_says_of_a_split_is_what_it_uses_of_it(build, uneven):
    text = build(
        [source(uneven, exclude=("bad",))], evaluate_sources=(questions(uneven),), max_problem_share=0.3
    ).describe()
    assert f"{uneven} (split train), training: 20 of 20 samples, 1 tasks" in text
    assert f"{uneven} (split test), held out: 1 of 1 samples, 1 tasks" in text
    assert f"{uneven} (split train), asked: 25 of 25 samples, 2 tasks" in text
    assert text.count("truncated") == 1
    assert f"preflight, {uneven} (split train), asked: 5 truncated: s30, s31, s32 and 2 more" in text


def test_samples_with_more_images_than_a_row_holds_are_dropped_by_name(build, tmp_path, make_example):
    several = [make_example(i, images=1 + (i == 7)) for i in range(30)]
    write_dataset(tmp_path / "d", {"train": several, "test": [make_example(40, images=2), make_example(41)]})
    data = build([source(tmp_path / "d")], slots=1, max_problem_share=0.5, epochs=1)
    assert data.stats.samples == sum(map(count_samples, batches(data.loader()))) == 29
    assert sum(map(count_samples, data.heldout_batches())) == 1
    assert [question.sample_id for question in data.heldout_questions(5)] == ["s41"]
    text = data.describe()
    assert "training: 1 too_many_images (dropped): s7" in text
    assert "held out: 1 too_many_images (dropped): s40" in text
    [row] = [row for row in data.task_counts() if row.task == "task1"]
    assert (row.available, row.usable) == (10, 9)


def test_the_tasks_that_are_drawn_are_those_that_are_held_out(build, dataset):
    data = build(tasks=1)
    [drawn] = {row.task for row in data.task_counts()}
    held = data.heldout_questions(100)
    assert {question.task for question in held} == {drawn} and 0 < len(held) < 10
    assert sum(map(count_samples, data.heldout_batches())) == len(held)
    assert f"held out: of the tasks that data.tasks=1 drew, {len(held)} samples" in data.describe()
    asked = build(tasks=1, evaluate_sources=(questions(dataset),)).heldout_questions(100)[len(held) :]
    assert {question.task for question in asked} == {"task0", "task1", "task2"}


@pytest.mark.parametrize(
    ("task", "changes", "why"),
    [
        ("x", {"include": ("task0",)}, "include and exclude leave none of its samples"),
        ("x", {"tasks": 1}, "it holds none of the tasks that data.tasks drew"),
        ("task0", {"slots": 0}, "the preflight drops all that include and exclude leave of it"),
    ],
)
def test_a_held_out_split_of_which_nothing_is_left_is_said_to_be_there(
    build, tmp_path, make_example, task, changes, why
):
    training = [make_example(i, images=0, task=f"task{i % 2}") for i in range(12)]
    write_dataset(tmp_path / "d", {"train": training, "test": [make_example(20, task=task)]})
    own = {key: value for key, value in changes.items() if key == "include"}
    rest = {key: value for key, value in changes.items() if key != "include"}
    data = build([source(tmp_path / "d", **own)], **rest, max_problem_share=1.0)
    assert not data.has_heldout and not data.has_questions
    assert data.why_no_heldout == f"the split data.eval_split='test' is there, but {why}"
    assert (
        f"held out: nothing, so no held-out loss and no best checkpoint: {data.why_no_heldout}"
        in data.describe()
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_tiny_recipes_fill_their_rows(stage):
    """On the built-in data, which is made where it is not there yet."""
    config = load_config(f"configs/stage{stage}.py:tiny")
    data = build_data(
        config.data,
        resolve_path,
        tokenizer=load_tokenizer(resolve_path("mini:tokenizer")),
        template=config.template,
        position=config.image.position,
        rules=ImageRules(config.image.mode, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        num_image_tokens=16,
        samples=config.batch.samples,
        rows_multiple=8,
        seed=config.seed,
        epochs=1,
        steps=0,
        process_index=0,
        process_count=1,
        show_progress=False,
    )
    assert data.stats.fill >= 0.95
    assert data.rows_per_step == data.plan.rows_per_step == 8


def test_sources_in_sequence_are_learned_one_after_the_other(build, dataset, tmp_path, make_example):
    other = tmp_path / "other"
    write_dataset(other, {"train": [make_example(500 + i) for i in range(24)]})
    data = build([source(dataset), source(other)], order="sequence", epochs=1)
    order = [
        number for step in range(data.total_steps) for row in step_rows(data.plan, step) for number in row
    ]
    assert sorted(order) == list(range(64))
    # Steps are whole but for the last, so the two may meet in one step, and nowhere else.
    steps = [
        {number >= 40 for row in step_rows(data.plan, step) for number in row}
        for step in range(data.total_steps)
    ]
    assert sum(len(sources) == 2 for sources in steps) <= 1
    assert [max(sources) for sources in steps] == sorted(max(sources) for sources in steps)
    assert order != sorted(order)


def test_a_run_prints_what_its_mixture_realises_beside_what_was_asked_for(build, dataset):
    assert "asked for" not in build().describe()
    text = build([source(dataset, cap=20)]).describe()
    assert "an epoch holds 3 tasks with 13 to 14 samples each" in text
    assert "40 samples an epoch, 60 asked for; 3 tasks have fewer than asked for: task0 14 of 20" in text


def test_the_mixture_is_the_same_for_any_number_of_hosts_and_after_a_restart(build, dataset):
    options = {"sources": [source(dataset, weight=0.7)], "tasks": 2, "budget": 12, "spread": "tasks"}
    whole = batches(build(**options).loader())
    parts = [batches(build(**options, process_index=i, process_count=2).loader(start=2)) for i in range(2)]
    for step, (first, second) in enumerate(zip(*parts, strict=True), start=2):
        for name, value in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), value)


def test_the_ids_of_a_step_s_samples_are_told_in_the_order_of_each_host_s_batch(build):
    data = build(rows_multiple=8, accumulation=2)
    step, batch = 1, batches(data.loader(1))[0]
    ids = data.sample_ids(step)
    assert [len(row) for row in ids] == batch["segments"].max(axis=1).tolist()
    assert sum(len(row) for row in ids) == len({name for row in ids for name in row})
    hosts = [
        build(rows_multiple=8, accumulation=2, process_index=i, process_count=2).sample_ids(step)
        for i in range(2)
    ]
    part = len(hosts[0]) // 2
    assert [*hosts[0][:part], *hosts[1][:part], *hosts[0][part:], *hosts[1][part:]] == ids
