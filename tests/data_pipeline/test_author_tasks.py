"""data_pipeline/author: what a task file declares becomes instances worded as Vision-Flan does, each time the same."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.author.task import load_task_file
from tests.data_pipeline import author_files
from tests.data_pipeline.author_files import checked, declared, write_task
from vflax.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return author_files.pictures(tmp_path_factory.mktemp("data"), each=12)


def instances(path: Path, data: Path | None):
    [found] = checked(path, data)
    assert not found.faults
    return found.instances


# ---------------------------------------------------------------------------------------------------------
# Task files


def test_all_tasks_that_a_file_binds_are_its_tasks_in_order(tmp_path):
    path = tmp_path / "t.py"
    text = "from data_pipeline.author import *\n"
    text += f"b = {declared(name=repr('A+second'))}\na = {declared(name=repr('A+first'))}"
    path.write_text(text)
    assert [task.name for task in load_task_file(path).tasks] == ["A+second", "A+first"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", r"t.py, line 1: SyntaxError"),
        ("\n\nx = 1 / 0\n", r"t.py, line 3: ZeroDivisionError: division by zero"),
        (
            "from data_pipeline.author import Task\nt = Task(name='A+b')\n",
            r"t.py, line 2: TypeError: .*source",
        ),
        ("x = 1\n", r"t.py: it declares no task"),
        (
            f"from data_pipeline.author import *\na = {declared()}b = {declared()}",
            r"declared twice: ANIMALS\+animal",
        ),
    ],
)
def test_a_task_file_that_fails_is_told_with_its_line(tmp_path, text, message):
    path = tmp_path / "t.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_task_file(path)


def test_a_task_file_that_is_not_there_is_told_how_to_begin(tmp_path):
    with pytest.raises(UserError, match="author new writes one"):
        load_task_file(tmp_path / "t.py")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "'animal'"}, r"name='animal': expected DATASET\+task"),
        ({"name": "'A+b+c'"}, r"expected DATASET\+task"),
        ({"source": "'cats'"}, "source='cats': expected a source"),
        ({"instructions": "[]"}, "instructions=.*at least one"),
        ({"instructions": "['Look.', 'Look.']"}, "no two alike"),
        ({"instructions": "'Look.'"}, "instructions='Look.': expected a list of phrasings"),
        ({"output": "''"}, "output='': expected a text that is not empty"),
        ({"author": "' '"}, "author=' '"),
        ({"options": "4"}, "options=4: expected None, all_labels, sampled or of_field"),
        ({"fields": "{'a': 1}"}, "fields=.*function of the record"),
        ({"where": "'dog'"}, "where='dog': expected None, or a function"),
        ({"max_instances": "10_001"}, "from 1 to 10,000"),
        ({"seed": "-1"}, "seed=-1"),
        ({"output": "'{label'"}, "output: .*not a template"),
        ({"output": "'{label.upper}'"}, "{label.upper}: expected the name of a field"),
        ({"instructions": "['Is it a {}?']"}, r"instructions\[0\]: \{\}: expected the name"),
        ({"options": "sampled(1)"}, r"sampled\(1\): expected how many options"),
        ({"options": "of_field('')"}, r"of_field\(''\): expected the name of a field"),
    ],
)
def test_a_wrong_value_of_a_task_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_task_file(write_task(tmp_path / "t.py", **change))


def test_all_wrong_values_are_named_at_once(tmp_path):
    with pytest.raises(UserError, match=r"name='x'.*licence=''.*output: "):
        load_task_file(write_task(tmp_path / "t.py", name="'x'", licence="''", output="'{'"))


# ---------------------------------------------------------------------------------------------------------
# Words


def test_a_plain_prompt_is_the_instruction_with_the_picture_at_one_of_its_ends(tmp_path, data):
    found = instances(write_task(tmp_path / "t.py"), data)
    shapes = Counter(re.sub("Which animal is it[?]|Name the animal[.]", "I", item.human) for item in found)
    assert set(shapes) == {"<image>\nI", "I\n<image>"} and min(shapes.values()) > 5
    assert {item.answer for item in found} == {"cat", "dog", "owl"}


def test_each_phrasing_is_used(tmp_path, data):
    found = Counter(item.prompt for item in instances(write_task(tmp_path / "t.py"), data))
    assert set(found) == {"Which animal is it?", "Name the animal."} and min(found.values()) > 5


def test_input_follows_the_instruction_and_options_follow_it(tmp_path, data):
    path = write_task(
        tmp_path / "t.py",
        instructions="['Answer the question.']",
        input="'Which animal is in {{{file}}}?'",
        output="'It is a {label}.'",
        options="all_labels(shuffle=False)",
    )
    item = instances(path, data)[0]
    assert item.prompt == (
        "Answer the question.\n\nWhich animal is in {00.png}?\n"
        "Options: (a) It is a cat. (b) It is a dog. (c) It is a owl."
    )
    assert item.answer == "(a) It is a cat."


def test_options_without_letters_are_listed_and_the_answer_has_none(tmp_path, data):
    path = write_task(tmp_path / "t.py", options="all_labels(letters=False, shuffle=False)")
    item = instances(path, data)[0]
    assert item.prompt.endswith("\nOptions: cat, dog, owl") and item.answer == "cat"


def test_sampled_options_hold_the_right_one_anywhere_among_others(tmp_path, data):
    found = instances(write_task(tmp_path / "t.py", options="sampled(2)"), data)
    for item in found:
        letter, right = item.answer[1], item.answer[4:]
        assert f"({letter}) {right}" in item.prompt and item.prompt.count("(") == 2
    assert {item.answer[:3] for item in found} == {"(a)", "(b)"}
    others = {option for item in found for option in item.options if option != item.right}
    assert others == {"cat", "dog", "owl"}


def test_options_may_come_from_the_record(tmp_path, data):
    path = write_task(
        tmp_path / "t.py",
        fields="{'choices': lambda record: [record['label'], 'a fish']}",
        options="of_field('choices', shuffle=False)",
    )
    item = instances(path, data)[0]
    assert item.prompt.endswith("Options: (a) cat (b) a fish") and item.answer == "(a) cat"


def test_numbers_among_labels_stand_by_size(tmp_path, data):
    path = write_task(
        tmp_path / "t.py",
        fields="{'n': lambda record: int(record['file'][:2])}",
        output="'{n}'",
        options="all_labels(letters=False, shuffle=False)",
        where="lambda record: record['label'] != 'owl'",
    )
    assert instances(path, data)[0].options == tuple(map(str, range(12)))


def test_a_field_that_is_computed_sees_those_before_it(tmp_path, data):
    fields = "{'big': lambda r: r['label'].upper(), 'bigger': lambda r: r['big'] + '!'}"
    found = instances(write_task(tmp_path / "t.py", fields=fields, output="'{bigger}'"), data)
    assert found[0].answer == "CAT!"


def test_where_and_leave_out_decide_which_records_are_used(tmp_path, data):
    path = write_task(
        tmp_path / "t.py", where="lambda record: record['label'] != 'dog'", leave_out="['cat/00.png']"
    )
    [found] = checked(path, data)
    assert [item.key for item in found.instances][:2] == ["cat/01.png", "cat/02.png"]
    assert (found.facts["records"], found.facts["filtered"], found.facts["instances"]) == (36, 12, 23)
    assert "12 of 36 records are not taken by `where`" in found.notes


# ---------------------------------------------------------------------------------------------------------
# Draws


def test_the_same_file_gives_the_same_instances(tmp_path, data):
    path = write_task(tmp_path / "t.py", options="sampled(2)", max_instances="20")
    one, two = checked(path, data)[0], checked(path, data)[0]
    assert one.digest == two.digest
    assert [(i.human, i.answer) for i in one.instances] == [(i.human, i.answer) for i in two.instances]


def test_another_seed_draws_others(tmp_path, data):
    keys = [
        {
            item.key
            for item in instances(write_task(tmp_path / "t.py", max_instances="20", seed=str(seed)), data)
        }
        for seed in (0, 1)
    ]
    assert len(keys[0]) == len(keys[1]) == 20 and keys[0] != keys[1]


def test_a_record_that_is_gone_changes_no_other_instance(tmp_path, data):
    path = write_task(tmp_path / "t.py", options="sampled(2)")
    before = {item.key: (item.human, item.answer) for item in instances(path, data)}
    fewer = tmp_path / "fewer"
    shutil.copytree(data, fewer)
    (fewer / "cat" / "03.png").unlink()
    after = {item.key: (item.human, item.answer) for item in instances(path, fewer)}
    assert before.pop("cat/03.png") and after == before


def test_no_more_than_max_instances_are_kept_and_the_rest_is_told(tmp_path, data):
    [found] = checked(write_task(tmp_path / "t.py", max_instances="20"), data)
    assert len(found.instances) == 20
    assert "16 records are over max_instances=20 and were not drawn" in found.notes
    keys = [item.key for item in found.instances]
    assert keys == sorted(keys)
