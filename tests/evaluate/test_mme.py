"""MME: its tool's numbers from every format, and what is no MME."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.evaluate import mme
from vflax.evaluate.files import table

# (subtask, picture, question, answer, response): acc of color 3/4, acc+ 1/2; of OCR 1/2 and 0.
ROWS = [
    ("color", "1.jpg", "Is it red?", "Yes", "Yes"),
    ("color", "1.jpg", "Is it blue?", "No", "No, it is red"),
    ("color", "2.jpg", "Is it red?", "Yes", "It is"),
    ("color", "2.jpg", "Is it green?", "No", "no"),
    ("OCR", "a b.png", 'Is the word "x"?', "Yes", "Yes"),
    ("OCR", "a b.png", 'Is the word "y"?', "No", "yes"),
]
ASKED = " Please answer yes or no."
PERCEPTION = 75 + 50 + 50 + 0


def write_tool(folder: Path, rows: list[tuple[str, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for subtask in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == subtask]
        lines = "".join("\t".join((row[1], row[2] + ASKED, *row[3:])) + "\n" for row in own)
        (folder / f"{subtask}.txt").write_text(lines)
    return folder


def write_release(folder: Path, rows: list[tuple[str, ...]] = ROWS) -> Path:
    """As MME_Benchmark_release_version: color with everything in one folder, OCR in two."""
    for subtask, picture, question, answer, _ in rows:
        inner = ("images", "questions_answers_YN") if subtask == "OCR" else ("", "")
        pictures, texts = (folder / subtask / name for name in inner)
        pictures.mkdir(parents=True, exist_ok=True)
        texts.mkdir(parents=True, exist_ok=True)
        (pictures / picture).write_bytes(b"picture of " + picture.encode())
        with (texts / f"{Path(picture).stem}.txt").open("a") as file:
            file.write(f"{question}{ASKED}\t{answer}\n")
    return folder


def write_llava(path: Path, rows: list[tuple[str, ...]]) -> Path:
    lines = [
        {
            "question_id": f"{subtask}/images/{picture}" if subtask == "OCR" else f"{subtask}/{picture}",
            "prompt": f"{question}\nAnswer the question using a single word or phrase.", "text": response,
        }
        for subtask, picture, question, _, response in rows
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_vlmevalkit(path: Path, rows: list[tuple[str, ...]], **columns: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["index", "category", "image_path", "question", "answer", "prediction", *columns])
        for number, (subtask, picture, question, answer, response) in enumerate(rows):
            extra = [values[number] for values in columns.values()]
            writer.writerow(
                [number, subtask, f"{subtask}/{picture}", question + ASKED, answer, response, *extra]
            )
    return path


def write_vflax(path: Path, rows: list[tuple[str, ...]]) -> Path:
    keys = ["color/1#1", "color/1#2", "color/2#1", "color/2#2", "OCR/a b#1", "OCR/a b#2"]
    lines = [
        json.dumps({"key": key, "prediction": row[4]}) + "\n" for key, row in zip(keys, rows, strict=True)
    ]
    path.write_text("".join(lines))
    return path


WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "tool": ("tool", write_tool),
    "llava": ("answers.jsonl", write_llava),
    "vlmevalkit": ("model_MME.tsv", write_vlmevalkit),
    "vflax": ("own.jsonl", write_vflax),
}


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_tools_numbers(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    predictions, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    assert mme.recognise(predictions) == format
    found = mme.score(predictions, format, data, "official", custom=True)
    assert found.score == found.metrics["perception"] == PERCEPTION
    assert found.groups["subtask"]["color"] == {"n": 4, "acc": 75, "acc_plus": 50, "score": 125, "other": 1}
    assert found.groups["subtask"]["OCR"]["acc_plus"] == 0
    assert (found.n, found.missing, found.unparsed) == (6, 0, 1)
    assert found.printed["color score"] == "125.0"


@pytest.mark.parametrize("format", ["tool", "vlmevalkit"])
def test_formats_with_answers_need_no_release(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    assert mme.score(write(tmp_path / name, ROWS), format, None, "official", custom=True).score == PERCEPTION


def test_others_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say --data=DIR of MME"):
        mme.score(write_llava(tmp_path / "a.jsonl", ROWS), "llava", None, "official", custom=True)


def test_rules_differ_on_words_around_the_answer(tmp_path: Path) -> None:
    rows = [(*row[:4], f"I would say {row[3].lower()}") for row in ROWS]
    path = write_tool(tmp_path, rows)
    scores = {mode: mme.score(path, "tool", None, mode, custom=True).score for mode in mme.MODES}
    assert scores == {"official": 0, "llava": 0, "vlmevalkit": 400, "strict": 0}


def test_vlmevalkits_judge_is_asked_only_where_words_do_not_tell(tmp_path: Path) -> None:
    extracted = ["No", "Unknown", "Yes", "No", "Yes", "No"]
    path = write_vlmevalkit(tmp_path / "a.tsv", ROWS, extracted=extracted)
    found = mme.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)
    assert found.groups["subtask"]["color"]["acc"] == 100  # row 3: "It is", and the judge said Yes
    assert found.groups["subtask"]["OCR"]["acc"] == 50  # row 6: "yes" stands


def test_a_question_without_prediction_is_wrong_and_counted(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    found = mme.score(write_llava(tmp_path / "a.jsonl", ROWS[1:]), "llava", data, "official", custom=True)
    assert (found.n, found.missing) == (6, 1)
    assert found.groups["subtask"]["color"] == {"n": 4, "acc": 50, "acc_plus": 0, "score": 50, "other": 2}


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows, data = list(ROWS), write_release(tmp_path / "data")
    random.Random(0).shuffle(rows)
    shuffled = mme.score(write_llava(tmp_path / "a.jsonl", rows), "llava", data, "official", custom=True)
    straight = mme.score(write_llava(tmp_path / "b.jsonl", ROWS), "llava", data, "official", custom=True)
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals


def test_yes_everywhere_has_no_picture_right(tmp_path: Path) -> None:
    found = mme.score(
        write_tool(tmp_path, [(*row[:4], "Yes") for row in ROWS]), "tool", None, "official", custom=True
    )
    assert found.metrics["yes_ratio"] == 100
    assert found.metrics["total"] == 100
    assert found.intervals["color"] == (50, 50)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "is there twice"),
        (lambda rows: rows[:-1], "OCR/a b has 1"),
        (lambda rows: [(*rows[0][:3], "Maybe", "Yes"), *rows[1:]], "'Maybe', expected Yes or No"),
        (lambda rows: [(*rows[0][:4], "Yes\tindeed"), *rows[1:]], "line 1: 5 parts between tabs"),
    ],
)
def test_what_is_no_mme_is_refused(change: Callable[[list], list], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        mme.score(write_tool(tmp_path, change(ROWS)), "tool", None, "official", custom=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "answered twice"),
        (lambda rows: [("color", "9.jpg", *rows[0][2:]), *rows[1:]], "no question of this MME"),
    ],
)
def test_predictions_that_do_not_fit_the_release_are_refused(
    change: Callable[[list], list], said: str, tmp_path: Path
) -> None:
    data = write_release(tmp_path / "data")
    with pytest.raises(UserError, match=said):
        mme.score(write_llava(tmp_path / "a.jsonl", change(ROWS)), "llava", data, "official", custom=True)


def test_another_right_answer_than_the_releases_is_refused(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    rows = [(*ROWS[0][:3], "No", "Yes"), *ROWS[1:]]
    with pytest.raises(UserError, match="the right answer is 'No' there and 'yes' in the data"):
        mme.score(write_tool(tmp_path / "tool", rows), "tool", data, "official", custom=True)


def test_a_part_of_the_release_is_named_unless_it_is_ones_own(tmp_path: Path) -> None:
    data = write_release(tmp_path / "MME_Benchmark_release_version")
    with pytest.raises(UserError, match=r"color: 2 pictures, released were 30.*--custom"):
        mme.load(data)
    assert len(mme.load(tmp_path, custom=True)) == 6


def test_a_release_has_its_pictures(tmp_path: Path) -> None:
    questions = mme.load(write_release(tmp_path), custom=True)
    assert questions[0].pictures[0].read() == b"picture of 1.jpg"
    (tmp_path / "color" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"no picture 1\.jpg"):
        mme.load(tmp_path, custom=True)


def test_a_repeated_picture_of_a_table_is_that_of_another_row(tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / "MME.tsv", ROWS, image=["QQ==", "0", "Qg==", "2", "Qw==", "4"])
    assert table(path)[1]["image"] == "0"
    questions = mme.load(tmp_path, custom=True)
    assert [q.pictures[0].read() for q in questions] == [b"A", b"A", b"B", b"B", b"C", b"C"]


def test_llavas_prompt_asks_for_a_word(tmp_path: Path) -> None:
    question = mme.load(write_release(tmp_path), custom=True)[0]
    assert mme.prompt(question, "llava") == "Is it red?\nAnswer the question using a single word or phrase."
    assert mme.prompt(question, "plain") == "Is it red? Please answer yes or no."


@pytest.mark.real_data
def test_the_released_questions_answered_by_yes(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "benchmarks" / "mme"
    questions = mme.load(data)
    assert len(questions) == 2374
    for path in data.glob("*.txt"):
        lines = [line for line in path.read_text().split("\n") if line]
        (tmp_path / path.name).write_text("".join(f"{line}\tYes\n" for line in lines))
    found = mme.score(tmp_path, "tool", data, "official")
    # Each picture has one question with yes and one with no.
    assert (found.metrics["perception"], found.metrics["cognition"]) == (500, 200)
    right = tmp_path / "right.jsonl"
    lines = [
        json.dumps({"question_id": q.unit + ".jpg", "prompt": mme.prompt(q, "llava"), "text": q.answer})
        for q in questions
    ]
    right.write_text("\n".join(lines))
    assert mme.score(right, "llava", data, "llava").metrics["total"] == 2800
