"""data_pipeline/author export: accepted tasks become a release that data_pipeline.convert takes, the same each time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_pipeline.author import examples
from data_pipeline.author.__main__ import main
from data_pipeline.convert import convert
from tests.data_pipeline import author_files
from tests.data_pipeline.author_files import declared, png, write_review, write_task
from vflax.data.source import open_source


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return author_files.pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def file(tmp_path, data) -> Path:
    """A task file that is accepted."""
    path = write_task(tmp_path / "t.py", options="all_labels()")
    accept(path, data)
    return path


def accept(path: Path, data: Path) -> None:
    paths = [write_review(path.parent / f"{name}.json", path, data, name) for name in ("Ann", "Bo")]
    assert main(["accept", str(path), *(f"--review={review}" for review in paths)]) == 0


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def annotations(out: Path, name: str = "annotation.json") -> list[dict]:
    return json.loads((out / name).read_text())


def test_a_release_has_vision_flans_form(file, data, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(file), f"--data={data}", f"--out={out}", "--held-out=6"]) == 0
    train, test = annotations(out), annotations(out, "annotation_test.json")
    assert (len(train), len(test)) == (24, 6)
    for row in (*train, *test):
        assert list(row) == ["id", "image", "task_name", "conversations"]
        assert row["task_name"] == "ANIMALS+animal"
        key = row["id"].removeprefix("ANIMALS+animal+")
        assert (
            row["image"] == f"ANIMALS/{key}"
            and (out / "images" / row["image"]).read_bytes() == (data / key).read_bytes()
        )
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1 and gpt["value"][4:] == key.split("/")[0]
    assert len({row["id"] for row in (*train, *test)}) == 30


def test_the_metadata_tell_the_tasks_and_their_review(file, data, tmp_path):
    out = tmp_path / "out"
    main(["export", str(file), f"--data={data}", f"--out={out}", "--held-out=0.1", "--seed=3"])
    found = json.loads((out / "metadata.json").read_text())
    assert (found["held_out"], found["seed"]) == (0.1, 3)
    task = found["tasks"]["ANIMALS+animal"]
    assert task["instances"] == {"train": 27, "test": 3}
    assert task["instructions"] == ["Which animal is it?", "Name the animal."] and task["output"] == "{label}"
    assert (task["licence"], task["citation"], task["author"]) == ("CC0-1.0", "drawn", "Ann Author")
    assert (
        task["options"] == "all labels, lettered, shuffled"
        and task["source"] == "pictures('.', path='{label}/{file}')"
    )
    assert task["reviewed"] and [one["name"] for one in task["review"]["reviewers"]] == ["Ann", "Bo"]
    assert task["file"] == {"name": "t.py", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_the_same_command_gives_the_same_bytes_and_replaces_what_it_wrote(file, data, tmp_path):
    out = tmp_path / "out"
    command = ["export", str(file), f"--data={data}", f"--out={out}"]
    main(command)
    first = digests(out)
    (out / "images" / "stray.png").write_bytes(b"x")
    assert main(command) == 0 and digests(out) == first


def test_convert_takes_a_release_without_a_word(file, data, tmp_path):
    out = tmp_path / "out"
    main(["export", str(file), f"--data={data}", f"--out={out}", "--held-out=6"])
    for split, name in (("train", "annotation.json"), ("test", "annotation_test.json")):
        report = convert(
            "vision_flan",
            out / name,
            out / "images",
            tmp_path / "tfds",
            split=split,
            workers=1,
            show_progress=False,
        )
        assert not report["quarantined"] and not report["findings"]
    assert len(open_source(tmp_path / "tfds", "train")) == 24
    sample = open_source(tmp_path / "tfds", "test")[0]
    assert (
        sample.task == "ANIMALS+animal" and sample.images[0] == (data / sample.id.split("+")[2]).read_bytes()
    )


def test_a_picture_is_held_out_of_every_task_that_has_it(tmp_path, data):
    """The second task has two thirds of the pictures, and its first six in the order of the seed are others."""
    file = tmp_path / "t.py"
    where = "lambda record: record['label'] != 'cat'"
    second = declared(name="'ANIMALS+other'", instructions="['Cat or dog?', 'What?']", where=where)
    file.write_text(f"from data_pipeline.author import *\n\nfirst = {declared()}\nsecond = {second}")
    out = tmp_path / "out"
    main(["export", str(file), f"--data={data}", f"--out={out}", "--held-out=6", "--unreviewed"])
    train, test = annotations(out), annotations(out, "annotation_test.json")
    assert not {row["image"] for row in train} & {row["image"] for row in test}
    by_task = [row["task_name"] for row in test]
    assert by_task.count("ANIMALS+other") == 6 and by_task.count("ANIMALS+animal") >= 6


def test_copies_of_a_picture_under_two_names_are_held_out_together(tmp_path):
    data = author_files.pictures(tmp_path / "data")
    for n in range(10):
        (data / "cat" / f"copy{n}.png").write_bytes((data / "cat" / f"{n:02d}.png").read_bytes())
    file = write_task(tmp_path / "t.py", input="'Of the file {file}.'")
    out = tmp_path / "out"
    main(["export", str(file), f"--data={data}", f"--out={out}", "--held-out=15", "--unreviewed"])
    contents = [
        {(out / "images" / row["image"]).read_bytes() for row in annotations(out, name)}
        for name in ("annotation.json", "annotation_test.json")
    ]
    assert not contents[0] & contents[1] and len(contents[1]) == 15


def test_another_seed_holds_out_other_pictures(file, data, tmp_path):
    held = []
    for seed in (0, 1):
        main(
            [
                "export",
                str(file),
                f"--data={data}",
                f"--out={tmp_path / 'out'}",
                "--held-out=6",
                f"--seed={seed}",
            ]
        )
        held.append({row["id"] for row in annotations(tmp_path / "out", "annotation_test.json")})
    assert len(held[0]) == len(held[1]) == 6 and held[0] != held[1]


def test_nothing_held_out_is_no_second_file(file, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(file), f"--data={data}", f"--out={out}", "--held-out=0"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["annotation.json", "images", "metadata.json"]
    assert "--split=test" not in capsys.readouterr().out


def test_a_picture_without_a_suffix_gets_that_of_what_it_is(tmp_path):
    lines = "def noise(data):\n    from tests.data_pipeline.author_files import png\n"
    lines += "    for n in range(20):\n        yield dict(picture=png(n), label=str(n % 2))\n"
    file = write_task(tmp_path / "t.py", before=lines, source="generated(noise)")
    out = tmp_path / "out"
    assert main(["export", str(file), f"--out={out}", "--unreviewed"]) == 0
    assert (out / "images" / "ANIMALS" / "00007.png").read_bytes() == png(7)


# ---------------------------------------------------------------------------------------------------------
# Refused


def test_a_task_that_nobody_reviewed_is_not_exported_unless_it_is_said(tmp_path, data, capsys):
    file, out = write_task(tmp_path / "t.py"), tmp_path / "out"
    command = ["export", str(file), f"--data={data}", f"--out={out}"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "ANIMALS+animal: not accepted: " in said and "--unreviewed" in said and not out.exists()
    assert main([*command, "--unreviewed"]) == 0
    task = json.loads((out / "metadata.json").read_text())["tasks"]["ANIMALS+animal"]
    assert task["reviewed"] is False and task["review"] is None
    assert "NOT REVIEWED" in capsys.readouterr().out


def test_a_changed_task_file_is_not_exported_and_what_was_exported_stays(file, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(file), f"--data={data}", f"--out={out}"]
    main(command)
    before = digests(out)
    file.write_text(file.read_text() + "# a thought\n")
    assert main(command) == 1
    assert "t.py changed since it was accepted" in capsys.readouterr().err
    assert digests(out) == before


def test_a_task_with_faults_is_not_exported_whoever_reviewed_it(tmp_path, data, capsys):
    file = write_task(tmp_path / "t.py", output="'{file}'", input="'{file}'")
    assert main(["export", str(file), f"--data={data}", f"--out={tmp_path / 'out'}", "--unreviewed"]) == 1
    assert "ANIMALS+animal: it has faults (answer_in_prompt)" in capsys.readouterr().err


def test_one_name_in_two_files_is_refused(file, data, tmp_path, capsys):
    other = write_task(tmp_path / "u.py")
    command = ["export", str(file), str(other), f"--data={data}", f"--out={tmp_path / 'out'}", "--unreviewed"]
    assert main(command) == 1
    assert "ANIMALS+animal: two task files declare it" in capsys.readouterr().err


def test_two_pictures_under_one_name_are_refused(tmp_path, data, capsys):
    author_files.pictures(tmp_path / "both" / "one")
    author_files.pictures(tmp_path / "both" / "two", each=12)
    (tmp_path / "both" / "two" / "cat" / "00.png").write_bytes(png(99))
    files = [
        write_task(tmp_path / f"{name}.py", name=f"'ANIMALS+{name}'", source=f"pictures('{name}')")
        for name in ("one", "two")
    ]
    command = [
        "export",
        *map(str, files),
        f"--data={tmp_path / 'both'}",
        f"--out={tmp_path / 'out'}",
        "--unreviewed",
    ]
    assert main(command) == 1
    assert "two pictures are called ANIMALS/cat/00.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.5", "--held-out=1.5: expected a share below 1, or a whole number"),
        ("some", "--held-out=some: expected a share"),
        ("-1", "--held-out=-1: expected a share"),
        ("nan", "--held-out=nan: expected a share"),
        ("30", "ANIMALS+animal has nothing left to train on, of 30 instances"),
    ],
)
def test_a_held_out_part_that_makes_no_sense_is_refused(file, data, tmp_path, value, message, capsys):
    assert (
        main(["export", str(file), f"--data={data}", f"--out={tmp_path / 'out'}", f"--held-out={value}"]) == 1
    )
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_replaced(file, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert main(["export", str(file), f"--data={data}", f"--out={out}"]) == 1
    assert (out / "thesis.txt").read_text() == "mine"
    assert "did not write; name a new folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# The examples


def test_the_charts_are_drawn_without_data_and_exported(tmp_path):
    text = (Path(examples.__file__).parent / "charts.py").read_text()
    file, out = tmp_path / "charts.py", tmp_path / "out"
    file.write_text(text.replace("range(2000)", "range(60)"))
    assert main(["export", str(file), f"--out={out}", "--held-out=10", "--unreviewed"]) == 0
    train = annotations(out)
    assert len(train) == 100 and len({row["image"] for row in train}) == 50
    assert {row["task_name"] for row in train} == {"BARS+tallest", "BARS+count"}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("example", "tasks", "answers"),
    [
        ("mnist", ["MNIST+digit_recognition", "MNIST+even_or_odd"], 10),
        ("cifar10", ["CIFAR10+object_classification", "CIFAR10+animal_or_vehicle"], 10),
        ("omniglot", ["OMNIGLOT+alphabet_classification"], 8),
    ],
)
def test_an_example_works_on_the_real_set(example, tasks, answers, tmp_path, shared_data):
    text = (Path(examples.__file__).parent / f"{example}.py").read_text()
    file, out = tmp_path / f"{example}.py", tmp_path / "out"
    file.write_text(text.replace('author="vflax"', 'author="vflax", max_instances=200'))
    command = ["export", str(file), f"--data={shared_data}", f"--out={out}", "--held-out=20", "--unreviewed"]
    assert main(command) == 0
    train = annotations(out)
    assert list(dict.fromkeys(row["task_name"] for row in train)) == tasks
    first = [row for row in train if row["task_name"] == tasks[0]]
    assert len({row["conversations"][1]["value"].split(") ", 1)[-1] for row in first}) == answers
    report = convert(
        "vision_flan",
        out / "annotation.json",
        out / "images",
        tmp_path / "tfds",
        workers=1,
        show_progress=False,
    )
    assert report["written"] == len(train) and not report["findings"]
