"""data_pipeline/author check: each fault is found, named, and at the records that have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.author.__main__ import main
from data_pipeline.author.checks import Checked
from tests.data_pipeline import author_files
from tests.data_pipeline.author_files import checked, png, write_task


@pytest.fixture
def data(tmp_path) -> Path:
    return author_files.pictures(tmp_path / "data")


def faults(found: Checked) -> dict[str, list[str]]:
    return {fault.kind: fault.keys for fault in found.faults}


def test_a_sound_task_has_no_fault_and_its_figures_are_right(tmp_path, data):
    [found] = checked(write_task(tmp_path / "t.py", options="all_labels()"), data)
    assert found.is_fit
    facts = found.facts
    assert (facts["instances"], facts["pictures"], facts["labels"]) == (30, 30, 3)
    assert facts["answers"] == {"cat": 10, "dog": 10, "owl": 10}
    assert sum(facts["right_option"].values()) == 30 and set(facts["right_option"]) == {0, 1, 2}
    assert facts["answer_words"] == {"least": 2, "median": 2, "most": 2}
    assert facts["smallest"] == facts["largest"] == (8, 6)


def test_unreadable_pictures_are_named(tmp_path, data):
    (data / "cat" / "04.png").write_bytes(png(4)[:100])
    (data / "dog" / "05.png").write_bytes(b"<html>")
    (data / "owl" / "06.png").write_bytes(b"")
    [found] = checked(write_task(tmp_path / "t.py"), data)
    keys = [key for fault in found.faults for key in fault.keys if fault.kind == "unreadable_picture"]
    assert sorted(keys) == ["cat/04.png", "dog/05.png", "owl/06.png"]
    assert {fault.kind for fault in found.faults} == {"unreadable_picture"}
    left_out = write_task(tmp_path / "t.py", leave_out=repr(keys))
    assert checked(left_out, data)[0].is_fit


def test_a_picture_that_is_not_there_is_named_by_its_path(tmp_path, data, capsys):
    rows = (f"{animal}/{n:02}.png,{animal}\n" for animal in ("cat", "dog", "owl") for n in range(10))
    (data / "list.csv").write_text("file,label\n" + "".join(rows))
    file = write_task(tmp_path / "t.py", source="table('list.csv', image='file')")
    missing = data / "cat" / "04.png"
    missing.unlink()
    [found] = checked(file, data)
    [fault] = [fault for fault in found.faults if fault.kind == "unreadable_picture"]
    assert (fault.detail, fault.others) == ("No such file or directory", [str(missing)])
    assert main(["check", str(file), f"--data={data}"]) == 1
    said = capsys.readouterr().out
    assert f"{fault.keys[0]}: {missing}" in said and "leave_out takes the keys" in said


def test_a_duplicate_is_named_with_what_it_is_like(tmp_path, data):
    (data / "cat" / "99.png").write_bytes((data / "cat" / "00.png").read_bytes())
    [found] = checked(write_task(tmp_path / "t.py"), data)
    [fault] = found.faults
    assert (fault.kind, fault.keys, fault.others) == ("duplicate_instance", ["cat/99.png"], ["cat/00.png"])


def test_the_same_picture_with_another_answer_is_a_contradiction(tmp_path, data):
    (data / "owl" / "99.png").write_bytes((data / "cat" / "00.png").read_bytes())
    assert faults(checked(write_task(tmp_path / "t.py"), data)[0]) == {"contradiction": ["owl/99.png"]}


def test_the_same_picture_with_another_question_is_neither(tmp_path, data):
    (data / "owl" / "99.png").write_bytes((data / "cat" / "00.png").read_bytes())
    assert checked(write_task(tmp_path / "t.py", input="'File {file}.'"), data)[0].is_fit


def test_an_answer_that_the_input_gives_away_is_a_fault(tmp_path, data):
    path = write_task(tmp_path / "t.py", input="'It is in the folder {label}.'")
    [fault] = checked(path, data)[0].faults
    assert fault.kind == "answer_in_prompt" and len(fault.keys) == 30
    assert fault.detail == "100.0% of the prompts name the answer, and no other one"


def test_an_instruction_that_gives_the_answer_away_is_a_fault(tmp_path, data):
    path = write_task(tmp_path / "t.py", instructions="['Is it a {label}?']")
    assert list(faults(checked(path, data)[0])) == ["answer_in_prompt"]


def test_a_question_that_names_all_answers_gives_none_away(tmp_path, data):
    path = write_task(
        tmp_path / "t.py",
        fields="{'question': lambda r: 'Is it a cat, or a %s?' % ('dog' if r['label'] == 'cat' else r['label'])}",
        input="'{question}'",
    )
    assert checked(path, data)[0].is_fit


def test_an_instruction_that_lists_the_labels_gives_none_away(tmp_path, data):
    assert checked(write_task(tmp_path / "t.py", instructions="['Is it a cat, dog or owl?']"), data)[0].is_fit


def test_a_word_that_only_contains_the_answer_gives_nothing_away(tmp_path, data):
    path = write_task(tmp_path / "t.py", fields="{'q': lambda r: r['label'] + 's?'}", input="'{q}'")
    assert checked(path, data)[0].is_fit


def test_a_long_answer_in_the_prompt_is_a_fault(tmp_path, data):
    sentence = "lambda r: 'One can see that an animal of this kind sits here: ' + r['label']"
    path = write_task(tmp_path / "t.py", fields=f"{{'s': {sentence}}}", input="'{s}'", output="'{s}'")
    assert list(faults(checked(path, data)[0])) == ["answer_in_prompt"]


@pytest.mark.parametrize(
    ("change", "kind", "detail"),
    [
        ({"fields": "{'a': lambda r: ''}", "output": "'{a} '"}, "empty_answer", "no text"),
        ({"fields": "{'a': lambda r: None}", "input": "'{a}'"}, "empty_field", "input: {a} has no value"),
        ({"fields": "{'a': lambda r: r['b']}"}, "function_failed", "fields['a']: KeyError: 'b'"),
        ({"where": "lambda r: r['b']"}, "function_failed", "where: KeyError: 'b'"),
        ({"output": "'{label:d}'"}, "template_failed", "output: Unknown format code 'd'"),
        ({"instructions": "['Look at <image>.']"}, "image_marker", "instructions: <image> is written there"),
        ({"options": "sampled(4)"}, "options", "3 options, expected at least 4"),
        (
            {"fields": "{'o': lambda r: 'cat'}", "options": "of_field('o')"},
            "options",
            "is a str, expected a list",
        ),
        (
            {"fields": "{'o': lambda r: ['x', 'y']}", "options": "of_field('o')"},
            "options",
            "none of the options",
        ),
        (
            {"fields": "{'o': lambda r: [r['label'], r['label'].upper()]}", "options": "of_field('o')"},
            "options",
            "two options are alike but for capitals",
        ),
        (
            {"output": "'{label} {file}'", "options": "all_labels()"},
            "options",
            "30 options, and 26 letters; say sampled(4), or letters=False",
        ),
    ],
)
def test_what_is_wrong_with_each_record_is_a_fault_that_names_it(tmp_path, data, change, kind, detail):
    [found] = checked(write_task(tmp_path / "t.py", **change), data)
    first = found.faults[0]
    assert first.kind == kind and detail in first.detail and len(first.keys) == 30
    assert "too_few" in faults(found)


def test_a_field_that_no_record_has_is_told_with_those_that_there_are(tmp_path, data, capsys):
    path = write_task(tmp_path / "t.py", output="'{breed}'")
    assert main(["check", str(path), f"--data={data}"]) == 1
    assert "records have no field {breed} of output; they have label, file" in capsys.readouterr().err


def test_an_unknown_key_in_leave_out_is_a_fault(tmp_path, data):
    path = write_task(tmp_path / "t.py", leave_out="['cat/77.png']")
    assert faults(checked(path, data)[0]) == {"leave_out": ["cat/77.png"]}


def test_fewer_instances_than_a_review_needs_are_a_fault(tmp_path, data):
    [fault] = checked(write_task(tmp_path / "t.py", max_instances="19"), data)[0].faults
    assert (fault.kind, fault.detail) == ("too_few", "19 instances; a review needs 20")


def test_one_answer_for_all_is_a_fault(tmp_path, data):
    [fault] = checked(write_task(tmp_path / "t.py", output="'an animal'"), data)[0].faults
    assert fault.kind == "one_answer"


def test_a_class_that_is_very_frequent_and_a_long_prompt_are_notes(tmp_path):
    data = author_files.pictures(tmp_path / "data", each=40, classes=("cat",))
    for name, source in (("dog", 90), ("owl", 91), ("fox", 92)):
        (data / name).mkdir()
        (data / name / "00.png").write_bytes(png(source))
    [found] = checked(write_task(tmp_path / "t.py", instructions=f"['{'x' * 2001}']"), data)
    assert found.is_fit
    assert found.notes[0].startswith("93% of the answers are 'cat'")
    assert found.notes[1].startswith("the longest prompt has 2,001 characters")


# ---------------------------------------------------------------------------------------------------------
# The command


def test_check_prints_the_figures_and_ends_with_0(tmp_path, data, capsys):
    path = write_task(tmp_path / "t.py", options="all_labels()")
    assert main(["check", str(path), f"--data={data}"]) == 0
    out = capsys.readouterr().out
    assert "ANIMALS+animal: 30 instances, 30 pictures, 30 records" in out
    assert "answers   3: 'cat' 33.3%, 'dog' 33.3%, 'owl' 33.3%" in out
    assert "fit for review" in out and "FAULT" not in out


def test_check_names_faults_and_ends_with_1_and_the_report_has_every_key(tmp_path, data, capsys):
    for n in range(10):
        (data / "owl" / f"{n:02d}.png").write_bytes(b"")
    path = write_task(tmp_path / "t.py")
    assert main(["check", str(path), f"--data={data}", f"--report={tmp_path / 'r.json'}"]) == 1
    told = capsys.readouterr()
    assert "FAULT     unreadable_picture: empty file (0 bytes)" in told.out and "owl/04.png" in told.out
    assert "owl/05.png" not in told.out and "... 10 in all; --report=FILE names them" in told.out
    assert "error: not fit for review: ANIMALS+animal" in told.err
    [report] = json.loads((tmp_path / "r.json").read_text())
    assert report["faults"][0]["keys"] == [f"owl/{n:02d}.png" for n in range(10)] and report["fit"] is False


def test_of_faults_that_are_all_different_the_first_are_printed(tmp_path, data, capsys):
    path = write_task(tmp_path / "t.py", fields="{'n': lambda r: int(r['label'] + r['file'])}")
    assert main(["check", str(path), f"--data={data}"]) == 1
    out = capsys.readouterr().out
    assert out.count("invalid literal for int") == 5
    assert "FAULT     function_failed: ... 30 different ones in all" in out


def test_records_without_a_field_are_none_that_is_lost(tmp_path):
    """A constant answer is a fault of its own; that there are no instances would be another."""
    for n in range(20):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    path = write_task(tmp_path / "t.py", source="pictures('.', path='*')", output="'noise'")
    [found] = checked(path, tmp_path)
    assert len(found.instances) == 20 and list(faults(found)) == ["one_answer"]


def test_missing_data_is_an_error_in_words(tmp_path, capsys):
    assert main(["check", str(write_task(tmp_path / "t.py")), f"--data={tmp_path / 'no'}"]) == 1
    assert capsys.readouterr().err.startswith("error: --data=")


# ---------------------------------------------------------------------------------------------------------
# New


def test_new_writes_a_file_that_only_lacks_what_a_person_knows(tmp_path, capsys):
    path = tmp_path / "my flowers.py"
    assert main(["new", str(path)]) == 0
    assert len(path.read_text().splitlines()) < 30
    assert main(["check", str(path)]) == 1
    told = capsys.readouterr().err
    assert "MY_FLOWERS+image_classification" in told and "licence=''" in told and "author=''" in told
    filled = path.read_text().replace('=""', '="x"')
    path.write_text(filled)
    data = author_files.pictures(tmp_path / "data" / "train").parent
    assert main(["check", str(path), f"--data={data}"]) == 0


def test_new_does_not_write_over_a_file(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("mine")
    assert main(["new", str(tmp_path / "mine")]) == 1
    assert path.read_text() == "mine" and "there is one already" in capsys.readouterr().err


@pytest.mark.parametrize("example", ["charts", "cifar10", "mnist", "omniglot"])
def test_an_example_is_copied_whole_and_is_short(tmp_path, example):
    from data_pipeline.author import examples

    path = tmp_path / "copy.py"
    assert main(["new", str(path), f"--example={example}"]) == 0
    text = path.read_text()
    assert text == (Path(examples.__file__).parent / f"{example}.py").read_text()
    assert len(text.splitlines()) < 30
