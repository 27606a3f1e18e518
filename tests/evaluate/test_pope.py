"""POPE: its tool's numbers from every format, and what is no POPE."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vflax.errors import UserError
from vflax.evaluate import pope

# (split, id, picture, thing, label, response).
# random: TP 1, FN 1, TN 1, FP 1; popular: TP 2, TN 1, FP 1; adversarial: TP 1, FN 1, TN 2.
ROWS: list[tuple[Any, ...]] = [
    ("random", 1, "a.jpg", "cat", "yes", "Yes"),
    ("random", 2, "a.jpg", "dog", "no", "No, there is none"),
    ("random", 3, "b.jpg", "cat", "yes", "There is no cat"),
    ("random", 4, "b.jpg", "bus", "no", "Well"),
    ("popular", 1, "a.jpg", "cat", "yes", "Yes"),
    ("popular", 2, "a.jpg", "car", "no", "no"),
    ("popular", 3, "b.jpg", "cat", "yes", "Yes"),
    ("popular", 4, "b.jpg", "bus", "no", "Yes"),
    ("adversarial", 1, "a.jpg", "cat", "yes", "Yes"),
    ("adversarial", 2, "a.jpg", "cup", "no", "not that I see"),
    ("adversarial", 3, "b.jpg", "cat", "yes", "No"),
    ("adversarial", 4, "b.jpg", "bus", "no", "No"),
]
F1 = {"random": 0.5, "popular": 0.8, "adversarial": 2 / 3}
START = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}


def asked(row: tuple[Any, ...]) -> str:
    return f"Is there a {row[3]} in the image?"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_release(folder: Path, rows: list[tuple[Any, ...]] = ROWS) -> Path:
    for split in pope.SPLITS:
        own = [
            {"question_id": row[1], "image": row[2], "text": asked(row), "label": row[4]}
            for row in rows
            if row[0] == split
        ]
        write_lines(folder / f"coco_pope_{split}.json", own)
    return folder


def write_llava(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    suffix = "\nAnswer the question using a single word or phrase."
    return write_lines(
        path,
        [
            {"question_id": START[row[0]] + row[1], "prompt": asked(row) + suffix, "text": row[5]}
            for row in rows
        ],
    )


def write_official(folder: Path, rows: list[tuple[Any, ...]]) -> Path:
    for split in pope.SPLITS:
        own = [{"question": asked(row).lower(), "answer": row[5]} for row in rows if row[0] == split]
        write_lines(folder / f"model_coco_pope_{split}.jsonl", own)
    return folder


def write_vlmevalkit(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    """Splits share the questions that they have in common."""
    shared: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        shared.setdefault(row[2:], []).append(row[0])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image_path", "question", "answer", "category", "prediction"])
        for number, (row, splits) in enumerate(shared.items()):
            question = f"Is there a {row[1]} in the image?"
            writer.writerow([number, row[0], question, row[2].capitalize(), ",".join(splits), row[3]])
    return path


def write_vflax(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    return write_lines(path, [{"key": f"{row[0]}/{row[1]}", "prediction": row[5]} for row in rows])


WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "llava": ("answers.jsonl", write_llava),
    "official": ("answers", write_official),
    "vlmevalkit": ("model_POPE.tsv", write_vlmevalkit),
    "vflax": ("own.jsonl", write_vflax),
}


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_tools_numbers(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    predictions, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    assert pope.recognise(predictions) == format
    found = pope.score(predictions, format, data, "official", custom=True)
    for split, f1 in F1.items():
        assert found.groups["split"][split]["f1"] == pytest.approx(100 * f1)
    assert found.score == pytest.approx(100 * sum(F1.values()) / 3)
    assert found.groups["split"]["random"] == {
        "n": 4, "f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_ratio": 50
    }  # fmt: skip
    assert found.printed["popular F1 score"] == "0.8"
    assert (
        found.printed["popular f1, acc, precision, recall, yes_ratio"] == "0.800, 0.750, 0.667, 1.000, 0.750"
    )
    assert (found.n, found.missing, found.unparsed) == (12, 0, 0)


def test_vlmevalkit_scores_all_splits_as_one_and_what_is_no_answer_is_wrong(tmp_path: Path) -> None:
    predictions, data = write_llava(tmp_path / "a.jsonl", ROWS), write_release(tmp_path / "data")
    found = pope.score(predictions, "llava", data, "vlmevalkit", custom=True)
    # "Well" and "not that I see" are neither; the latter would have been right. TP 4, FP 1, FN 2.
    assert found.unparsed == 2
    assert found.score == pytest.approx(100 * 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert found.metrics["accuracy"] == pytest.approx(100 * 7 / 12)


def test_no_everywhere_divides_by_nothing(tmp_path: Path) -> None:
    predictions = write_llava(tmp_path / "a.jsonl", [(*row[:5], "No") for row in ROWS])
    found = pope.score(predictions, "llava", write_release(tmp_path / "data"), "official", custom=True)
    assert (found.score, found.metrics["precision"], found.metrics["accuracy"]) == (0, 0, 50)


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows, data = list(ROWS), write_release(tmp_path / "data")
    random.Random(0).shuffle(rows)
    shuffled = pope.score(write_llava(tmp_path / "a.jsonl", rows), "llava", data, "official", custom=True)
    straight = pope.score(write_llava(tmp_path / "b.jsonl", ROWS), "llava", data, "official", custom=True)
    assert (shuffled.metrics, shuffled.intervals) == (straight.metrics, straight.intervals)


def test_a_question_without_prediction_is_wrong_and_counted(tmp_path: Path) -> None:
    predictions, data = write_llava(tmp_path / "a.jsonl", ROWS[1:]), write_release(tmp_path / "data")
    found = pope.score(predictions, "llava", data, "official", custom=True)
    assert (found.n, found.missing) == (12, 1)
    assert found.groups["split"]["random"]["recall"] == 0
    assert found.groups["split"]["random"]["accuracy"] == 25


def test_llavas_question_file_gives_ids_their_meaning(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    listed = [
        {"question_id": number, "image": row[2], "text": asked(row), "category": row[0]}
        for number, row in enumerate(ROWS)
    ]
    write_lines(data / "llava_pope_test.jsonl", listed)
    rows = [{"question_id": number, "text": row[5]} for number, row in enumerate(ROWS)]
    found = pope.score(write_lines(tmp_path / "a.jsonl", rows), "llava", data, "official", custom=True)
    assert found.score == pytest.approx(100 * sum(F1.values()) / 3)


def test_one_split_alone_is_scored_from_its_file(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data") / "coco_pope_popular.json"
    answers = write_official(tmp_path / "answers", ROWS) / "model_coco_pope_popular.jsonl"
    found = pope.score(answers, "official", data, "official", custom=True)
    assert (found.n, found.score) == (4, pytest.approx(80))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "answered twice"),
        (lambda rows: [("random", 9, *rows[0][2:]), *rows[1:]], "10000009 is none of this POPE"),
        (
            lambda rows: [(*rows[0][:3], "cow", *rows[0][4:]), *rows[1:]],
            "predictions for another version of POPE",
        ),
    ],
)
def test_predictions_that_do_not_fit_the_release_are_refused(
    change: Callable[[list], list], said: str, tmp_path: Path
) -> None:
    data = write_release(tmp_path / "data")
    with pytest.raises(UserError, match=said):
        pope.score(write_llava(tmp_path / "a.jsonl", change(ROWS)), "llava", data, "official", custom=True)


def test_official_answers_are_not_taken_by_position_alone(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    swapped = [ROWS[1], ROWS[0], *ROWS[2:]]
    with pytest.raises(UserError, match="is not what POPE asks there"):
        pope.score(write_official(tmp_path / "a", swapped), "official", data, "official", custom=True)
    with pytest.raises(UserError, match="which question is it"):
        pope.score(write_official(tmp_path / "b", ROWS[1:]), "official", data, "official", custom=True)


def test_a_release_of_another_size_is_named(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    with pytest.raises(UserError, match=r"4 questions, released were 2,910 \(e3e39262.*3,000 \(edebdda"):
        pope.load(data)


def test_a_missing_split_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pope, "_VERSIONS", {split: {4: "a test's"} for split in pope.SPLITS})
    data = write_release(tmp_path)
    assert len(pope.load(data)) == 12
    (data / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="lacks popular"):
        pope.load(data)


def test_a_part_of_vlmevalkits_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VLMEvalKit's POPE has 5,127"):
        pope.score(write_vlmevalkit(tmp_path / "a.tsv", ROWS), "vlmevalkit", None, "vlmevalkit")


@pytest.mark.real_data
def test_the_released_questions_answered_by_yes(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "benchmarks" / "pope"
    rows = [(q.groups["split"], int(q.key.split("/")[1]), q.unit, q.text) for q in pope.load(data)]
    lines = [
        {"question_id": START[split] + number, "prompt": text, "text": "Yes"}
        for split, number, _, text in rows
    ]
    found = pope.score(write_lines(tmp_path / "a.jsonl", lines), "llava", data, "llava")
    assert found.n == 8910
    assert found.printed["random F1 score"] == str(2 * (1500 / 2910) / (1500 / 2910 + 1))
    assert (
        found.printed["popular f1, acc, precision, recall, yes_ratio"] == "0.667, 0.500, 0.500, 1.000, 1.000"
    )
    assert "2,910 rows, commit e3e39262" in found.manifest["version"]
