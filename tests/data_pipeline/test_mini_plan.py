"""The mini dataset's samples, before pictures are drawn: balance, truth, format, what is held out."""

from __future__ import annotations

import collections
import random

import pytest
from sklearn.datasets import load_digits

from data_pipeline.mini.captions import caption, plural
from data_pipeline.mini.long_answers import MIN_WORDS, PROMPTS, SENTENCE_PROMPTS
from data_pipeline.mini.plan import Item, make_plan
from data_pipeline.mini.scenes import KINDS, Sampler, original_held_out
from data_pipeline.mini.tasks import TASKS


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_plan(load_digits().target)


def _stage1(items: list[Item], split: str) -> dict[str, list[Item]]:
    by_task = collections.defaultdict(list)
    for item in items:
        if item.stage == "stage1" and item.split == split:
            by_task[item.task].append(item)
    return by_task


def test_the_plan_is_the_same_every_time(items: list[Item]) -> None:
    assert make_plan(load_digits().target) == items


def test_there_are_at_least_20_tasks_with_25_held_out_samples_each(items: list[Item]) -> None:
    held_out = _stage1(items, "test")
    assert len(held_out) >= 20
    assert {len(members) for members in held_out.values()} == {25}
    assert held_out.keys() == _stage1(items, "train").keys()


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_of_a_task_is_equally_frequent(items: list[Item], split: str) -> None:
    for task in TASKS:
        counts = collections.Counter(item.answer for item in _stage1(items, split)[task.name])
        every = [counts[answer] for answer in task.answers]
        assert sum(every) == sum(counts.values()), f"{task.name} gives answers that it does not list"
        assert max(every) - min(every) <= 1, task.name


def test_guessing_the_commonest_answer_is_right_in_at_most_a_fifth(items: list[Item]) -> None:
    shares = []
    for members in _stage1(items, "test").values():
        counts = collections.Counter(item.answer for item in members)
        shares.append(max(counts.values()) / len(members))
    assert sum(shares) / len(shares) <= 0.2


def test_no_scene_of_a_held_out_sample_is_in_training_of_any_stage(items: list[Item]) -> None:
    keys = {split: {item.scene.key for item in items if item.split == split} for split in ("train", "test")}
    assert keys["train"] and keys["test"]
    assert not keys["train"] & keys["test"]


def test_no_handwritten_original_is_on_both_sides(items: list[Item]) -> None:
    used = collections.defaultdict(set)
    for item in items:
        used[item.split] |= set(item.scene.values.get("originals", ()))
    assert not used["train"] & used["test"]
    assert len(used["test"]) >= 100
    assert len(used["train"]) >= 1000


def test_digits_of_both_sides_make_no_scene() -> None:
    labels = load_digits().target
    sampler = Sampler(random.Random(0), labels)
    scene = sampler.draw("digits", held_out=False)
    other = next(i for i in range(len(labels)) if original_held_out(i))
    scene.values["originals"][0] = other
    with pytest.raises(ValueError, match="both sides"):
        _ = scene.held_out


def test_wishes_that_no_scene_fulfils_are_refused() -> None:
    sampler = Sampler(random.Random(0), load_digits().target)
    with pytest.raises(ValueError, match="have no"):
        sampler.draw("single", held_out=False, wings=2)
    scene = sampler.draw("single", held_out=False)
    with pytest.raises(ValueError, match="no held-out scene"):
        sampler.draw("single", held_out=True, **scene.values)


def test_ids_are_unique_and_name_the_task(items: list[Item]) -> None:
    for stage in ("stage0", "stage1", "stage2"):
        ids = [item.id for item in items if item.stage == stage]
        assert len(set(ids)) == len(ids)
    for item in items:
        annotation = item.annotation()
        assert annotation["id"].startswith("mini_")
        assert annotation["id"].removeprefix("mini_").rpartition("+")[0] == annotation["task_name"]
        assert annotation["task_name"].count("+") == 1


def test_samples_have_the_form_of_the_vision_flan_release(items: list[Item]) -> None:
    ends, starts = 0, 0
    for item in items:
        annotation = item.annotation()
        assert list(annotation) == ["id", "image", "task_name", "conversations"]
        human, answer = annotation["conversations"]
        assert (human["from"], answer["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1
        ends += human["value"].endswith("\n<image>")
        starts += human["value"].startswith("<image>\n")
    assert ends + starts == len(items)
    assert min(ends, starts) > len(items) / 3


def test_stage_1_answers_have_at_most_three_words_where_no_sentence_is_asked_for(items: list[Item]) -> None:
    short = [item.answer for item in items if item.stage == "stage1" and item.task not in SENTENCE_PROMPTS]
    assert max(len(answer.split()) for answer in short) <= 3


@pytest.mark.parametrize("name", SENTENCE_PROMPTS)
def test_generation_tasks_are_answered_with_one_sentence_about_every_kind_of_scene(
    items: list[Item], name: str
) -> None:
    asked = _stage1(items, "train")[name]
    answers = [item.answer for item in asked]
    assert all(answer.endswith(".") and answer.count(". ") == 0 for answer in answers)
    assert min(len(answer.split()) for answer in answers) >= 5
    assert len(set(answers)) > 30
    assert {item.scene.kind for item in asked} == set(KINDS) - {"mosaic", "scatter"}


def test_stage_2_answers_are_long_and_their_prompts_are_never_those_of_stage_1(items: list[Item]) -> None:
    answers = [item.answer for item in items if item.stage == "stage2"]
    assert min(len(answer.split()) for answer in answers) >= MIN_WORDS
    assert len(set(answers)) > 0.95 * len(answers)
    prompts = {prompt for group in PROMPTS.values() for prompt in group}
    assert prompts == {item.human.replace("<image>", "").strip() for item in items if item.stage == "stage2"}
    assert not prompts & {
        item.human.replace("<image>", "").strip() for item in items if item.stage == "stage1"
    }


def test_stage_0_shows_every_kind_of_scene_and_the_others_all_that_are_asked_about(items: list[Item]) -> None:
    few = set(KINDS) - {"mosaic", "scatter"}
    shown = {"stage0": set(KINDS), "stage1": few, "stage2": few}
    for stage, kinds in shown.items():
        assert {item.scene.kind for item in items if item.stage == stage} == kinds


def test_captions_name_what_stage_1_asks_for(items: list[Item]) -> None:
    """The answer to a question about a scene stands in every caption of that scene."""
    rng = random.Random(0)
    for item in items:
        if item.stage != "stage1" or item.task in SENTENCE_PROMPTS or item.answer in ("yes", "no"):
            continue
        for _ in range(3):
            words = caption(item.scene, rng).replace(",", "").replace(".", "").replace(";", "").split()
            singular = [w for w in words] + [s for s in item.answer.split() if plural(s, 2) in words]
            assert set(item.answer.split()) <= set(singular), (item.task, item.answer, words)


def test_every_phrasing_of_every_task_occurs(items: list[Item]) -> None:
    by_task = _stage1(items, "train")
    for task in TASKS:
        assert 3 <= len(task.questions) <= 6
        asked = [item.human for item in by_task[task.name]]
        for question in task.questions:
            beginning = question.split("{")[0]
            assert sum(beginning in text for text in asked) > len(asked) / 10, (task.name, question)
