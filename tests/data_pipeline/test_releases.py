"""data_pipeline/releases: every release format row by row, each fault named, nothing kept."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from etils.epath import testing as epath_testing

from data_pipeline.convert import convert
from data_pipeline.records import Problem, RawSample
from data_pipeline.releases import FORMATS, OPTIONS, open_release
from tests.data_pipeline import release_files
from tests.data_pipeline.release_files import (
    FORMAT_OF,
    KINDS,
    OPTIONS_OF,
    finding_of,
    reason_of,
    write_release,
)
from vflax.errors import UserError

READER_REASONS = ("broken_record", "not_a_caption")
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]


def reasons(kind: str, expected: dict[str, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for fault, count in expected.items():
        if reason := reason_of(kind, fault):
            found[reason] += count
    return found


def write(folder: Path, rows: Any, name: str = "some.json") -> Path:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def read_one(folder: Path, row: Any, format: str, **options: str) -> RawSample | Problem:
    """The row as a sample, in a file whose first row is faultless."""
    good = {"id": "good", "task_name": "t", "conversations": TURNS}
    first, second = open_release(write(folder, [good, row]), format, **options)
    assert isinstance(first, RawSample)
    return second


def refuse(path: Path, format: str, message: str, **options: str) -> None:
    with pytest.raises(UserError, match=message):
        open_release(path, format, **options)


# ---------------------------------------------------------------------------------------------------------
# Every kind of release


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_release_comes_once_and_those_without_use_are_told(tmp_path, kind):
    annotations, _, expected = write_release(tmp_path, kind)
    rows = list(open_release(annotations, FORMAT_OF[kind], **OPTIONS_OF[kind]))
    assert [row.number for row in rows] == list(range(50))
    found = Counter(row.reason for row in rows if isinstance(row, Problem))
    wanted = reasons(kind, expected)
    assert found == {reason: wanted[reason] for reason in READER_REASONS if wanted[reason]}


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_converted_release_exactly_the_faulty_rows_are_missing_and_what_is_odd_is_named(tmp_path, kind):
    annotations, images, expected = write_release(tmp_path / "in", kind)
    report = convert(
        FORMAT_OF[kind], annotations, images, tmp_path / "out", workers=1, show_progress=False,
        **OPTIONS_OF[kind],
    )  # fmt: skip
    assert report["reasons"] == reasons(kind, expected)
    findings = Counter()
    for fault, count in expected.items():
        if kind_of_finding := finding_of(kind, fault):
            findings[kind_of_finding] += count
    assert report["findings"] == findings
    assert report["read"] == 50
    assert report["written"] == 50 - sum(reasons(kind, expected).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_holds_each_of_its_faults_and_is_the_same_each_time(tmp_path, kind):
    def written() -> tuple[dict[str, int], dict[Path, bytes]]:
        _, _, expected = write_release(tmp_path / "release", kind)
        found = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        shutil.rmtree(tmp_path / "release")
        return expected, found

    expected, found = written()
    assert set(release_files._faults(kind)) <= set(expected)
    assert (expected, found) == written()


@pytest.mark.parametrize(
    ("kind", "look"),
    [("mix665k", "several_turns"), ("vision_flan", "inline_options"), ("vision_flan", "unlettered_options")],
)
def test_faultless_rows_look_as_those_of_the_release_do(tmp_path, kind, look):
    _, _, expected = write_release(tmp_path, kind)
    assert expected[look] >= 5


def test_words_of_the_tokenizer_and_long_answers_are_kept_as_they_stand(tmp_path):
    rows = list(open_release(write_release(tmp_path, "llava_instruct")[0], "llava"))
    answers = [
        row.conversations[-1]["value"] for row in rows if isinstance(row, RawSample) and row.conversations
    ]
    assert {"An <unk> bus.", "<s> A bus.", "A bus and a dog. " * 1000} <= set(answers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_can_be_gone_through_again(tmp_path, kind):
    release = open_release(write_release(tmp_path, kind)[0], FORMAT_OF[kind])
    assert list(release) == list(release)


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_is_recognised(tmp_path, kind):
    release = open_release(write_release(tmp_path, kind)[0], "auto", **OPTIONS_OF[kind])
    # Nothing tells a caption with its instruction from a short conversation; llava reads both alike.
    alike = {"plain_558k": "llava", "plain_595k": "llava"}
    assert release.format == alike.get(kind, FORMAT_OF[kind])


def test_a_release_tells_its_files_and_its_name(tmp_path):
    annotations, _, _ = write_release(tmp_path / "a", "mix665k")
    release = open_release(str(annotations), "llava")
    assert (release.files, release.name) == ([epath.Path(annotations)], "llava_v1_5_mix665k")
    problems, _, _ = write_release(tmp_path / "b", "scienceqa_CQM-A")
    files = open_release(epath.Path(problems), "scienceqa").files
    assert files == [epath.Path(problems), epath.Path(problems.parent / "pid_splits.json")]


def test_a_file_in_a_bucket_is_read_there(tmp_path):
    problems, _, _ = write_release(tmp_path / "bucket", "scienceqa_QCM-LEA")

    def local(original, path, *args):
        return original(str(path).replace("gs://bucket", str(tmp_path / "bucket")), *args)

    with epath_testing.mock_epath(open=local, exists=local, isdir=local):
        release = open_release("gs://bucket/problems.json", "auto")
        assert str(release.files[1]) == "gs://bucket/pid_splits.json"
        rows = list(release)
    assert rows == list(open_release(problems, "scienceqa"))


# ---------------------------------------------------------------------------------------------------------
# LLaVA and Vision-Flan


def test_samples_keep_their_conversations_as_they_stand(tmp_path):
    annotations, _, _ = write_release(tmp_path, "vision_flan")
    records = json.loads(annotations.read_text())
    rows = list(open_release(annotations, "vision_flan"))
    for record, row in itertools.islice(zip(records, rows, strict=True), 10):
        assert row == RawSample(
            row.number, record["id"], record["task_name"], (record["image"],), record["conversations"]
        )


@pytest.mark.real_data
def test_real_samples_are_read_as_they_stand(shared_data):
    path = shared_data / "vision-flan-samples/annotation.json"
    release = open_release(path, "auto")
    assert release.format == "vision_flan"
    assert list(release) == [
        RawSample(i, record["id"], record["task_name"], (record["image"],), record["conversations"])
        for i, record in enumerate(json.loads(path.read_text()))
    ]


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({}, ()),
        ({"image": None}, ()),
        ({"image": []}, ()),
        ({"image": "a/b.jpg"}, ("a/b.jpg",)),
        ({"image": ["a.jpg", "b.jpg"]}, ("a.jpg", "b.jpg")),
        ({"images": ["a.jpg", "b.jpg"], "model": "gpt-4"}, ("a.jpg", "b.jpg")),
        ({"images": "a.jpg", "image": None}, ("a.jpg",)),
        ({"image": "a.jpg", "images": ["b.jpg"]}, ("a.jpg",)),
    ],
)
def test_a_sample_has_none_one_or_several_pictures(tmp_path, fields, files):
    row = read_one(tmp_path, {"id": "x", "conversations": TURNS, **fields}, "llava")
    assert row == RawSample(1, "x", "some", files, TURNS)


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"image": 7}, "image: expected a path or a list of paths"),
        ({"image": ""}, "image: expected a path"),
        ({"image": ["a.jpg", None]}, "image: expected a path"),
        ({"image": {"bytes": "x"}}, "image: expected a path"),
        ({"images": [7]}, "images: expected a path"),
        ({"image": float("nan")}, "image: expected a path"),
        ({"id": None}, "id: expected"),
        ({"id": ""}, "id: expected"),
        ({"id": True}, "id: expected"),
        ({"id": 1.5}, "id: expected"),
        ({"id": [], "image": 7}, "id: expected a text or a number; image: expected"),
    ],
)
def test_a_record_that_is_none_is_told_with_all_that_is_wrong(tmp_path, fields, detail):
    row = read_one(tmp_path, {"id": "x", "conversations": TURNS, **fields}, "llava")
    assert isinstance(row, Problem) and row.reason == "broken_record"
    assert detail in row.detail


def test_what_is_wrong_with_a_record_of_the_earlier_schema_is_told_by_its_own_keys(tmp_path):
    fields = {"instance_id": None, "img_path": 7, "task_name": "t", "prompt": "What?", "target": "A bus."}
    row = read_one(tmp_path, fields, "vision_flan")
    assert isinstance(row, Problem)
    assert (
        row.detail == "instance_id: expected a text or a number; img_path: expected a path or a list of paths"
    )


def test_ids_may_be_numbers_and_come_again(tmp_path):
    rows = open_release(write(tmp_path, [{"id": 0, "conversations": TURNS}] * 2), "llava")
    assert [row.id for row in rows] == ["0", "0"]


def test_tasks_may_be_the_image_folders_of_a_mixture(tmp_path):
    annotations, _, _ = write_release(tmp_path, "mix665k")
    rows = list(open_release(annotations, "llava", task_from="image_folder"))[:10]
    tasks = ["coco", "gqa", "ocr_vqa", "textvqa", "vg", "text", "gqa", "ocr_vqa", "textvqa", "vg"]
    assert [row.task for row in rows] == tasks
    assert {row.task for row in open_release(annotations, "llava")} <= {"llava_v1_5_mix665k", ""}


@pytest.mark.parametrize(
    ("image", "task"),
    [
        ("a.jpg", "some"),
        ("../a.jpg", "some"),
        ("/a/b.jpg", "some"),
        ("./vg/b.jpg", "vg"),
        (["x/1", "y/2"], "x"),
    ],
)
def test_a_path_without_a_folder_has_the_task_of_the_file(tmp_path, image, task):
    row = read_one(
        tmp_path, {"id": "x", "image": image, "conversations": TURNS}, "llava", task_from="image_folder"
    )
    assert row.task == task


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({"caption": "raw", "blip_caption": "blip"}, "raw"),
        ({"blip_caption": "blip", "url": "http://x"}, "blip"),
        ({"caption": None, "blip_caption": "blip"}, "blip"),
        ({"caption": ""}, ""),
    ],
)
def test_a_caption_answers_its_picture(tmp_path, fields, caption):
    [row] = open_release(write(tmp_path, [{"id": "x", "image": "a.jpg", **fields}]), "llava_plain")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    assert row == RawSample(0, "x", "some", ("a.jpg",), turns)


def test_a_conversation_is_no_caption(tmp_path):
    row = read_one(tmp_path, {"id": "x", "image": "a.jpg", "conversations": TURNS * 2}, "llava_plain")
    detail = "expected two turns, the second a caption, found 4; --format=llava takes them"
    assert row == Problem(1, "x", "some", "a.jpg", "not_a_caption", detail)


EARLIER = {
    "instance_id": "vision-flan_D+t+7",
    "img_path": "a.jpg",
    "prompt": "What is it?",
    "target": "A bus.",
    "dataset_name": "D",
    "task_name": "t",
}


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({}, "What is it?\n<image>"),
        ({"img_path": None}, "What is it?"),
        ({"input_text": "Look!"}, "What is it?\nLook!\n<image>"),
        ({"input_text": "is it"}, "What is it?\n<image>"),
        ({"options": ["bus", "dog"]}, "What is it?\n\nOptions: (a) bus (b) dog\n<image>"),
        ({"options": ["What", "is"]}, "What is it?\n<image>"),
        ({"options": "(a) bus"}, "What is it?\n\nOptions: (a) bus\n<image>"),
        ({"options": ""}, "What is it?\n<image>"),
        ({"options": [], "input_text": ""}, "What is it?\n<image>"),
        ({"prompt": None, "instruction": "Say it."}, "Say it.\n<image>"),
    ],
)
def test_the_earlier_schema_makes_a_question_of_its_parts(tmp_path, fields, question):
    [row] = open_release(write(tmp_path, [EARLIER | fields]), "vision_flan")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A bus."}]
    files = () if fields.get("img_path", "a.jpg") is None else ("a.jpg",)
    assert row == RawSample(0, "vision-flan_D+t+7", "D+t", files, turns)


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"dataset_name": None}, "t"),
        ({"task_name": "D+t"}, "D+t"),
        ({"dataset_name": "ok_vqa", "task_name": "ok_vqa"}, "ok_vqa"),
        ({"task_name": None}, "D+t"),
        ({"task_name": None, "instance_id": "a+b+c+1"}, "a+b+c"),
    ],
)
def test_the_earlier_schema_names_the_task_as_the_release_does(tmp_path, fields, task):
    [row] = open_release(write(tmp_path, [EARLIER | fields]), "vision_flan")
    assert row.task == task


# ---------------------------------------------------------------------------------------------------------
# ScienceQA

PROBLEM = {
    "question": "Which  one barks?",
    "choices": ["dog", "cat"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "subject": "natural science",
    "lecture": "Dogs bark.",
    "solution": "It is\nthe dog.",
    "split": "train",
}


def science(folder: Path, problem: Any = PROBLEM, splits: Any = None) -> Path:
    splits = splits or {"train": ["3"], "val": ["4"], "minival": ["4"], "test": ["5"], "minitest": ["5"]}
    problems = {"3": problem, "4": {**PROBLEM, "split": "val"}, "5": {**PROBLEM, "split": "test"}}
    write(folder, splits, "pid_splits.json")
    return write(folder, problems, "problems.json")


@pytest.mark.parametrize(
    ("style", "changes", "question", "answer"),
    [
        (
            "QCM-LEA",
            {},
            "Which one barks?\nContext: N/A\nOptions: (A) dog (B) cat\n<image>",
            "Dogs bark. It is\nthe dog. The answer is A.",
        ),
        (
            "CQM-A",
            {"hint": "Listen. ", "answer": 1},
            "Context: Listen.\nQuestion: Which one barks?\nOptions: (A) dog (B) cat\n<image>",
            "The answer is B.",
        ),
        ("QCM-LEA", {"image": None, "lecture": "", "solution": None}, None, "The answer is A."),
        ("QCM-LEA", {"lecture": ""}, None, "It is\nthe dog. The answer is A."),
        ("QCM-ELA", {}, None, "It is\nthe dog. Dogs bark. The answer is A."),
        ("QCM-LA", {}, None, "Dogs bark. The answer is A."),
        ("QCM-EA", {}, None, "It is\nthe dog. The answer is A."),
        ("QCM-AL", {}, None, "The answer is A. BECAUSE: Dogs bark."),
        ("QCM-AE", {}, None, "The answer is A. BECAUSE: It is\nthe dog."),
        ("QCM-AE", {"solution": ""}, None, "The answer is A."),
        ("CQM-ALE", {}, None, "The answer is A. BECAUSE: Dogs bark. It is\nthe dog."),
    ],
)
def test_a_problem_is_worded_as_its_style_says(tmp_path, style, changes, question, answer):
    [row] = open_release(science(tmp_path, PROBLEM | changes), "scienceqa", style=style)
    human, gpt = row.conversations
    assert (human["from"], gpt["from"], gpt["value"]) == ("human", "gpt", answer)
    if question:
        assert human["value"] == question
    assert human["value"].endswith("\n<image>") == bool(row.files)


def test_a_problem_has_its_picture_under_its_split_and_its_subject_as_task(tmp_path):
    [row] = open_release(science(tmp_path), "scienceqa", split="minival")
    assert (row.id, row.task, row.files) == ("4", "scienceqa+natural_science", ("val/4/image.png",))
    unnamed = {key: value for key, value in PROBLEM.items() if key not in ("split", "subject")}
    [row] = open_release(science(tmp_path, unnamed), "scienceqa")
    assert (row.task, row.files) == ("scienceqa", ("train/3/image.png",))


def test_the_problems_of_one_split_are_read_in_the_order_of_the_file(tmp_path):
    path = science(tmp_path, splits={"train": ["5", "3"], "test": ["4"]})
    assert [(row.number, row.id) for row in open_release(path, "scienceqa")] == [(0, "3"), (1, "5")]


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"answer": 2}, "answer=2: expected the place of one of 2 choices"),
        ({"answer": -1}, "answer=-1: expected a whole number"),
        ({"answer": "A"}, "answer='A': expected a whole number"),
        ({"choices": []}, "expected the place of one of 0 choices"),
        ({"choices": ["x"] * 27}, "27 choices"),
        ({"choices": "dog"}, "choices='dog': expected a list"),
        ({"question": None}, "question=None: expected text"),
        ({"image": 5, "hint": 5}, "hint=5: expected text, or null; image=5"),
    ],
)
def test_a_broken_problem_is_told_by_its_pid(tmp_path, changes, detail):
    path = science(tmp_path, PROBLEM | changes)
    [row] = open_release(path, "scienceqa")
    assert isinstance(row, Problem) and (row.id, row.reason) == ("3", "broken_record")
    assert detail in row.detail


def test_problems_need_their_splits(tmp_path):
    path = science(tmp_path)
    (tmp_path / "pid_splits.json").unlink()
    refuse(path, "auto", r"pid_splits\.json: there is no such file.*beside problems\.json")


@pytest.mark.parametrize("splits", [{"test": ["3"]}, {"train": "3"}, {"train": [3]}, {"train": []}])
def test_a_split_without_pids_is_refused(tmp_path, splits):
    refuse(
        science(tmp_path, splits=splits),
        "scienceqa",
        r"pid_splits\.json: expected a list of pids under 'train'",
    )


# ---------------------------------------------------------------------------------------------------------
# Wrong arguments and files


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("lava", {}, r"--format=lava: expected one of auto, .*did you mean llava\?"),
        (
            "auto",
            {"style": "CQM-A"},
            r"--style=CQM-A: only --format=scienceqa has it, and .* is read as llava",
        ),
        ("llava", {"split": "val"}, r"--source_split=val: only --format=scienceqa has it"),
        ("llava", {"task_from": "folder"}, r"--task_from=folder: expected one of file, image_folder"),
        ("vision_flan", {"task_from": "file"}, r"'task_name'.*Try --format=llava"),
        ("llava", {"colour": "red"}, r"colour=red: expected one of the options task_from, style, split"),
        (
            "scienceqa",
            {},
            r"problems\.json, an object of problems by their pid; found a list.*Try --format=llava",
        ),
    ],
)
def test_a_wrong_format_or_option_is_refused(tmp_path, format, options, message):
    refuse(write(tmp_path, [{"id": 1, "conversations": TURNS}]), format, message, **options)


def test_an_option_that_is_not_given_has_its_default(tmp_path):
    path = science(tmp_path)
    given = open_release(path, "scienceqa", style=None, split=None, task_from=None)
    assert list(given) == list(open_release(path, "scienceqa", style="QCM-LEA", split="train"))
    assert all(option.default in option.choices for option in OPTIONS.values())
    assert {format for option in OPTIONS.values() for format in option.formats} <= set(FORMATS)


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (
            '[{"question_id": 1, "text": "x"}]',
            "auto",
            r"keys found: question_id, text\..*nearest is llava.*'id'",
        ),
        (
            '[{"id": 1, "image": "x"}]',
            "auto",
            r"vision_flan has id, task_name, conversations.*no sample has the key",
        ),
        ('[{"id": 1, "image": "x", "caption": "y"}]', "llava", r"'conversations'.*Try --format=llava_plain"),
        ('[1, "x"]', "auto", r"keys found: none"),
        (
            '[{"id": 1, "instruction": "x", "output": "y"}]',
            "auto",
            r"nearest is llava, but no sample has the key 'conversations'",
        ),
        ("[]", "auto", r"expected a JSON array of samples, found an empty one"),
        ('{"data": [{"id": 1}], "info": 2}', "auto", r"found an object with the keys data, info"),
        ('{"data": [{"id": 1}]}', "llava", r"found an object with the keys data"),
        ('{"data": [{"id": 1}]}', "scienceqa", r"found an object with the keys data"),
        (
            '{"a": 1, "data": ["' + "x" * (3 << 20) + '"]}',
            "scienceqa",
            r"found an object with the keys a, data",
        ),
        ('{"1": {"question": "x"}}', "auto", r"found an object with the keys 1"),
        ('{"1": {"question": "x", "choices": [], "answer": 0}}', "llava", r"Try --format=scienceqa"),
        ("7", "auto", r"expected a JSON array of samples, found 7"),
        ("{}", "auto", r"found an empty one"),
    ],
)
def test_a_file_of_another_form_is_refused_with_what_it_holds(tmp_path, content, format, message):
    refuse(write(tmp_path, content), format, message)


@pytest.mark.parametrize("path", ["nowhere.json", "."])
def test_no_such_file(tmp_path, path):
    refuse(
        tmp_path / path, "auto", rf"--annotations={re.escape(str(tmp_path / path))}: there is no such file"
    )


def test_a_key_that_only_later_records_have_is_looked_for_among_the_first_thousand(tmp_path):
    rows = [{"id": i, "conversations": TURNS} for i in range(1000)]
    rows[999]["task_name"] = "t"
    assert sum(isinstance(row, RawSample) for row in open_release(write(tmp_path, rows), "vision_flan")) == 1
    del rows[999]["task_name"]
    rows.append({**rows[0], "task_name": "t"})
    refuse(write(tmp_path, rows), "vision_flan", r"'task_name'.*Try --format=llava")


def test_a_download_that_ends_late_raises_after_the_rows_before(tmp_path):
    text = json.dumps([{"id": i, "conversations": TURNS} for i in range(2000)], indent=1)
    release = open_release(write(tmp_path, text[: text.index('"id": 1500')]), "llava")
    rows = []
    with pytest.raises(UserError, match=r"some\.json: not valid JSON: .* in line \d+, column \d+"):
        for row in release:
            rows.append(row)
    assert len(rows) == 1500


MEMORY = """
import sys
from data_pipeline.releases import open_release

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])

rows = iter(open_release(sys.argv[1], "vision_flan"))
for _ in range(20_000):
    next(rows)
early = peak()
print(sum(1 for _ in rows) + 20_000, peak() - early)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("name", ["many.json", "many.jsonl"])
def test_memory_does_not_grow_with_the_rows(tmp_path, name):
    """200,000 rows of 350 bytes: lists of them would take hundreds of megabytes, a set of their ids 20."""
    row = '{"id": "vision-flan_D+t+%d", "image": "D+t_%d.jpg", "task_name": "D+t", "conversations": %s}'
    turns = json.dumps([{"from": "human", "value": "<image>\n" + "word " * 30}, TURNS[1]])
    lines = (row % (i, i, turns) for i in range(200_000))
    path = tmp_path / name
    with open(path, "w") as file:
        file.write("[" if name == "many.json" else "")
        file.write(",\n".join(lines) + "]" if name == "many.json" else "\n".join(lines))
    result = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    rows, grown_kb = map(int, result.stdout.split())
    assert rows == 200_000
    assert grown_kb < 4096
