"""data_pipeline/author accept: two people who did not write the task, the same samples, 18 of 20."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_pipeline.author.__main__ import main
from data_pipeline.author.accept import accepted, record_path
from data_pipeline.author.task import load_task_file
from tests.data_pipeline import author_files
from tests.data_pipeline.author_files import checked, declared, write_review, write_task


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return author_files.pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def file(tmp_path) -> Path:
    return write_task(tmp_path / "t.py")


def reviews(file: Path, data: Path, *people: tuple[str, dict[str, list[int]]]) -> list[str]:
    paths = (
        write_review(file.parent / f"review{n}.json", file, data, *person) for n, person in enumerate(people)
    )
    return [f"--review={path}" for path in paths]


def record(file: Path) -> dict:
    return json.loads(record_path(file).read_text())["tasks"]


def test_two_good_reviews_accept_the_task_and_the_record_says_who_and_how(file, data, capsys):
    given = reviews(file, data, ("Bo Third", {"solved": [3], "right": [3]}), ("Ann Other", {"clear": [3, 4]}))
    assert main(["accept", str(file), *given]) == 0
    kept = record(file)["ANIMALS+animal"]
    assert kept["reviewers"][0] == {
        "name": "Ann Other", "solved": 20, "clear": 18, "right": 20, "enough": 20, "called_wrong": [],
    }  # fmt: skip
    assert kept["reviewers"][1]["called_wrong"] and kept["reviewers"][1]["solved"] == 19
    assert kept["agreement"] == {"solved": 0.95, "clear": 0.9, "right": 0.95, "enough": 1.0}
    assert kept["file"] == load_task_file(file).digest
    assert "Ann Other solved 20 of 20, Bo Third solved 19 of 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("people", "message"),
    [
        ([("Ann", {"solved": [1, 2, 3]}), ("Bo", {})], "Ann: 17 of 20 were solved; 18 are needed"),
        ([("Ann", {"clear": [1, 2, 3]}), ("Bo", {})], "Ann: 17 of 20 had a clear instruction"),
        ([("Ann", {}), ("Bo", {"enough": [1, 2, 3]})], "Bo: 17 of 20 had a picture that was enough"),
        ([("Ann", {"right": [5]}), ("Bo", {"right": [5, 6]})], "two reviewers call the key wrong of "),
        ([("Ann", {})], "1 reviewer; two different ones are needed"),
        ([("Ann", {}), ("ann ", {})], "1 reviewer; two different ones are needed"),
        ([("Ann", {}), ("Bo", {}), ("BO", {})], "two reviews are by one person"),
        ([("Ann", {}), ("ann  AUTHOR", {})], "ann  AUTHOR wrote the task"),
    ],
)
def test_what_falls_short_is_not_accepted_and_says_why(file, data, people, message, capsys):
    assert main(["accept", str(file), *reviews(file, data, *people)]) == 1
    assert f"ANIMALS+animal is not accepted: {message}" in capsys.readouterr().err
    assert not record_path(file).exists()


def test_different_samples_called_wrong_by_one_reviewer_each_are_no_obstacle(file, data):
    given = reviews(file, data, ("Ann", {"right": [5]}), ("Bo", {"right": [6]}))
    assert main(["accept", str(file), *given]) == 0


def test_each_of_several_authors_is_refused(tmp_path, data, capsys):
    file = write_task(tmp_path / "t.py", author="'Ann Author, Bo Second'")
    assert main(["accept", str(file), *reviews(file, data, ("Bo Second", {}), ("Cy", {}))]) == 1
    assert "Bo Second wrote the task" in capsys.readouterr().err


def test_reviews_of_an_older_task_file_are_refused(file, data, capsys):
    given = reviews(file, data, ("Ann", {}), ("Bo", {}))
    file.write_text(file.read_text() + "# a thought\n")
    assert main(["accept", str(file), *given]) == 1
    assert "is of another version of t.py" in capsys.readouterr().err


def test_reviews_of_different_data_are_refused(file, data, tmp_path, capsys):
    other = author_files.pictures(tmp_path / "other", each=11)
    given = [
        f"--review={write_review(tmp_path / 'a.json', file, data, 'Ann')}",
        f"--review={write_review(tmp_path / 'b.json', file, other, 'Bo')}",
    ]
    assert main(["accept", str(file), *given]) == 1
    assert "the reviews are of different data" in capsys.readouterr().err


def test_an_acceptance_holds_until_the_file_or_the_data_change(file, data, tmp_path):
    def why(data):
        return accepted(load_task_file(file), checked(file, data)[0])[1]

    assert why(data).endswith("does not name it; have it reviewed (review, accept), or say --unreviewed")
    main(["accept", str(file), *reviews(file, data, ("Ann", {}), ("Bo", {}))])
    assert why(data) == ""
    assert why(author_files.pictures(tmp_path / "other", each=11)).startswith("its instances are not those")
    file.write_text(file.read_text() + "# a thought\n")
    assert why(data) == "t.py changed since it was accepted; have it reviewed again"


def test_tasks_of_a_file_are_accepted_one_by_one(tmp_path, data, capsys):
    file = tmp_path / "t.py"
    second = declared(name="'ANIMALS+second'")
    file.write_text(f"from data_pipeline.author import *\n\nfirst = {declared()}\nsecond = {second}")
    first = [write_review(tmp_path / f"{name}.json", file, data, name) for name in ("Ann", "Bo")]
    assert main(["accept", str(file), *(f"--review={path}" for path in first)]) == 0
    assert list(record(file)) == ["ANIMALS+animal"]
    changed = [json.loads(path.read_text()) | {"task": "ANIMALS+second"} for path in first]
    for path, value in zip(first, changed, strict=True):
        path.write_text(json.dumps(value))
    assert main(["accept", str(file), *(f"--review={path}" for path in first)]) == 0
    assert list(record(file)) == ["ANIMALS+animal", "ANIMALS+second"]


def test_what_is_good_enough_is_kept_where_another_task_is_refused(tmp_path, data, capsys):
    file = tmp_path / "t.py"
    second = declared(name="'ANIMALS+second'")
    file.write_text(f"from data_pipeline.author import *\n\nfirst = {declared()}\nsecond = {second}")
    paths = [write_review(tmp_path / f"{name}.json", file, data, name) for name in ("Ann", "Bo")]
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(json.loads(paths[0].read_text()) | {"task": "ANIMALS+second"}))
    assert main(["accept", str(file), *(f"--review={path}" for path in [*paths, alone])]) == 1
    told = capsys.readouterr()
    assert "ANIMALS+animal is accepted" in told.out and "ANIMALS+second is not accepted" in told.err
    assert list(record(file)) == ["ANIMALS+animal"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reviewer": ""}, "reviewer='': expected a name"),
        ({"tool": "else"}, "tool='else': expected data_pipeline.author"),
        ({"samples": []}, r"samples=\[\]: expected a list of 20"),
        ({"samples": [{"id": "a"}] * 20}, r"samples\[0\].key is missing"),
        ({"task": "ANIMALS+other"}, r"of task ANIMALS\+other; .*t.py declares ANIMALS\+animal"),
    ],
)
def test_a_damaged_review_is_refused_by_file_and_key(file, data, tmp_path, change, message, capsys):
    path = write_review(tmp_path / "a.json", file, data, "Ann")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["accept", str(file), f"--review={path}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {path}: ")
    assert re.search(message, told)


def test_a_sample_that_stands_twice_is_refused(file, data, tmp_path, capsys):
    path = write_review(tmp_path / "a.json", file, data, "Ann")
    value = json.loads(path.read_text())
    value["samples"][1] = value["samples"][0]
    path.write_text(json.dumps(value))
    assert main(["accept", str(file), f"--review={path}"]) == 1
    assert "two samples have one id" in capsys.readouterr().err


def test_a_damaged_record_is_told(file, data, capsys):
    record_path(file).write_text('{"tasks": {"ANIMALS+animal": {"file": 3}}}')
    assert main(["accept", str(file), *reviews(file, data, ("Ann", {}), ("Bo", {}))]) == 1
    assert "not what `accept` writes; delete it" in capsys.readouterr().err
