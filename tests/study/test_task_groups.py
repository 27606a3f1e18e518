"""Every task is of one kind, and what is listed are tasks that there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.studies import task_groups
from data_pipeline.mini.long_answers import SENTENCE_PROMPTS
from data_pipeline.mini.tasks import TASKS
from vflax.errors import UserError

KINDS = ("vision_flan", "mini")


def _names(kind: str) -> list[str]:
    return [name for tasks in task_groups.groups(kind).values() for name in tasks]


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_in_one_group_and_there_once(kind: str):
    assert tuple(task_groups.groups(kind)) == task_groups.GROUPS
    assert len(set(_names(kind))) == len(_names(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_novel_tasks_are_of_the_groups_and_leave_as_many_others(kind: str):
    novel = task_groups.novel(kind)
    assert set(novel) <= set(_names(kind)) and len(set(novel)) == len(novel)
    assert 0 < 2 * len(novel) <= len(_names(kind))


def test_all_built_in_tasks_of_stage_1_have_a_group_and_no_others():
    short = {task.name for task in TASKS}
    assert set(_names("mini")) == short | set(SENTENCE_PROMPTS)
    assert set(task_groups.groups("mini")["generation"]) == set(SENTENCE_PROMPTS)


def test_novel_built_in_tasks_are_on_pictures_that_other_tasks_have_too():
    novel = set(task_groups.novel("mini"))
    others = {task.kind for task in TASKS if task.name not in novel}
    assert {task.kind for task in TASKS if task.name in novel} <= others
    assert len({name.partition("+")[0] for name in novel}) >= 4


@pytest.mark.real_data
def test_all_tasks_of_vision_flans_samples_have_a_group(shared_data: Path):
    samples = json.loads((shared_data / "vision-flan-samples" / "annotation.json").read_text("utf-8"))
    assert {sample["task_name"] for sample in samples} == set(_names("vision_flan")) - {
        "WIT+detailed_description"
    }


def test_the_file_says_whose_reading_it_is_by_which_rules_and_holds_nothing_but_names():
    file = json.loads(Path(task_groups.__file__).with_name("vision_flan_tasks.json").read_text("utf-8"))
    assert set(file) == {"about", "rules", "tasks"} and "our own reading" in " ".join(file["about"])
    assert set(file["rules"]) == {*task_groups.GROUPS, "novel"}
    assert all(" " not in name for name in _names("vision_flan"))


def test_other_data_has_no_groups():
    with pytest.raises(UserError, match=r"'llava'; there are those of vision_flan and mini"):
        task_groups.groups("llava")
    with pytest.raises(UserError, match=r"'llava'"):
        task_groups.novel("llava")
