"""POPE: its tool's numbers from every format, and what is no POPE."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evaluate import tables
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


def write_with_ids(folder: Path, rows: list[tuple[Any, ...]]) -> Path:
    """As POPE's, but a row says which question it answers."""
    for split in pope.SPLITS:
        own = [{"question_id": row[1], "answer": row[5]} for row in rows if row[0] == split]
        write_lines(folder / f"model_coco_pope_{split}.json", own)
    return folder


def write_vlmevalkit(path: Path, rows: list[tuple[Any, ...]], **columns: list[str]) -> Path:
    """Splits share the questions that they have in common."""
    shared: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        shared.setdefault(row[2:], []).append(row[0])
    names = ["index", "image_path", "question", "answer", "category", "prediction", *columns]
    lines = [
        [
            f"{row[0]} {row[1]}", row[0], f"Is there a {row[1]} in the image?", row[2].capitalize(),
            ",".join(splits), row[3], *(own[number] for own in columns.values()),
        ]
        for number, (row, splits) in enumerate(shared.items())
    ]  # fmt: skip
    tables.write(path, names, lines)
    return path


def write_vflax(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    return write_lines(path, [{"key": f"{row[0]}/{row[1]}", "prediction": row[5]} for row in rows])


WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "llava": ("answers.jsonl", write_llava),
    "official": ("answers", write_official),
    "official with ids": ("answers", write_with_ids),
    "vlmevalkit": ("model_POPE.tsv", write_vlmevalkit),
    "vflax": ("own.jsonl", write_vflax),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_tools_numbers(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    predictions, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    format = writer.partition(" ")[0]
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


def test_what_vlmevalkit_has_extracted_counts_by_its_rule_alone(tmp_path: Path) -> None:
    # By row: cat yes (all splits), dog, cat b (random), bus "Well", car, cat b (popular), bus "Yes", cup, cat b, bus.
    extracted = ["Yes", "No", "No", "No", "No", "Yes", "Unknown", "No", "No", "No"]
    path = write_vlmevalkit(tmp_path / "a.json", ROWS, extracted=extracted)
    found = pope.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)
    # "Well" and "not that I see" were told by the judge, and the "Yes" to the bus was not read: TP 4, FP 0, FN 2.
    assert found.score == pytest.approx(100 * 2 * (4 / 6) / (1 + 4 / 6))
    assert (found.unparsed, found.metrics["accuracy"]) == (1, pytest.approx(100 * 9 / 12))
    assert found.printed["Overall Overall"] == str(found.score)
    assert found.printed["popular recall"] == "100.0"
    assert pope.score(path, "vlmevalkit", None, "official", custom=True).score == pytest.approx(
        100 * sum(F1.values()) / 3
    )


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "official"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.permutations(ROWS), released=st.permutations(ROWS), seed=st.integers(0, 2**16))
def test_no_order_of_rows_changes_a_number(
    writer: str, rows: list, released: list, seed: int, tmp_path: Path
) -> None:
    # The same answer to a question wherever it is asked: VLMEvalKit asks it once.
    said = [(*row[:5], random.Random(f"{seed} {row[2:5]}").choice(["Yes", "No", "Well"])) for row in rows]
    name, write = WRITERS[writer]
    format = writer.partition(" ")[0]
    mixed, data = write_release(tmp_path / "a", released), write_release(tmp_path / "b")
    shuffled = pope.score(write(tmp_path / name, said), format, mixed, "vlmevalkit", custom=True)
    straight = pope.score(write(tmp_path / name, sorted(said)), format, data, "vlmevalkit", custom=True)
    assert (shuffled.metrics, shuffled.intervals) == (straight.metrics, straight.intervals)
    assert (shuffled.unparsed, shuffled.printed) == (straight.unparsed, straight.printed)


@pytest.mark.parametrize("writer", WRITERS)
def test_duplicates_and_nothing_are_refused(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    data, format = write_release(tmp_path / "data"), writer.partition(" ")[0]
    # Of texts alone there is one too many; of others a question is answered twice.
    again = (*ROWS[3][:5], "Yes")
    with pytest.raises(UserError, match=r"answered twice|which question is it"):
        pope.score(write(tmp_path / name, [*ROWS, again]), format, data, "official", custom=True)
    with pytest.raises(UserError, match="empty"):
        pope.score(write(tmp_path / name, []), format, data, "official", custom=True)


def test_null_is_no_prediction(tmp_path: Path) -> None:
    rows, data = [(*ROWS[0][:5], None), *ROWS[1:]], write_release(tmp_path / "data")
    for format, path in (
        ("llava", write_llava(tmp_path / "a.jsonl", rows)),
        ("official", write_official(tmp_path / "b", rows)),
    ):
        found = pope.score(path, format, data, "official", custom=True)
        assert (found.missing, found.groups["split"]["random"]["recall"]) == (1, 0)  # and not "None", a yes


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


def test_answers_without_questions_must_be_all_of_them(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    rows = [{"question_id": START[row[0]] + row[1], "text": row[5]} for row in ROWS]
    found = pope.score(write_lines(tmp_path / "a.jsonl", rows), "llava", data, "official", custom=True)
    assert found.score == pytest.approx(100 * sum(F1.values()) / 3)
    with pytest.raises(UserError, match="11 answers to 12 questions, and without prompt nothing shows"):
        pope.score(write_lines(tmp_path / "b.jsonl", rows[1:]), "llava", data, "official", custom=True)
    with pytest.raises(UserError, match="which question is it"):
        pope.score(write_with_ids(tmp_path / "c", ROWS[1:]), "official", data, "official", custom=True)


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
@pytest.mark.parametrize("writer", ["llava", "official", "official with ids", "vlmevalkit", "vflax"])
def test_the_released_questions_in_every_format(writer: str, shared_data: Path, tmp_path: Path) -> None:
    """The first 300 of each split's 1,500 questions with yes, the same in all of them, are answered by no, all others
    rightly: precision 1, recall 0.8."""
    data = shared_data / "benchmarks" / "pope"
    rows = []
    for split in pope.SPLITS:
        left = 300
        for line in (data / f"coco_pope_{split}.json").read_text().splitlines():
            row = json.loads(line)
            said = row["label"].capitalize()
            if said == "Yes" and left:
                said, left = "No", left - 1
            rows.append((split, row["question_id"], row["image"], row["text"], row["label"], said))
    name, _ = WRITERS[writer]
    path, format = tmp_path / name, writer.partition(" ")[0]
    if writer.startswith("official"):
        for split in pope.SPLITS:
            names = ("question_id", "answer") if "ids" in writer else ("question", "answer")
            own = [
                dict(zip(names, (row[1] if "ids" in writer else row[3], row[5]), strict=True))
                for row in rows
                if row[0] == split
            ]
            write_lines(path / f"model_{split}.jsonl", own)
    elif writer == "llava":
        ids = [START[row[0]] + row[1] for row in rows]
        write_lines(
            path,
            [
                {"question_id": id, "prompt": row[3], "text": row[5]}
                for id, row in zip(ids, rows, strict=True)
            ],
        )
    elif writer == "vflax":
        write_lines(path, [{"key": f"{row[0]}/{row[1]}", "prediction": row[5]} for row in rows])
    else:
        shared: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            shared.setdefault(row[2:], []).append(row[0])
        tables.write(
            path,
            ["index", "image_path", "question", "answer", "category", "prediction"],
            [
                [n, *row[:2], row[2].capitalize(), ",".join(own), row[3]]
                for n, (row, own) in enumerate(shared.items())
            ],
        )
    assert pope.recognise(path) == format
    # Splits of this version share fewer questions than those of VLMEvalKit's table: 5,043 rows, not 5,127.
    for mode in pope.MODES:
        found = pope.score(path, format, data, mode, custom=writer == "vlmevalkit")
        assert (found.n, found.missing, found.unparsed) == (8910, 0, 0)
        assert found.score == pytest.approx(100 * 8 / 9)
        assert found.metrics["random/accuracy"] == pytest.approx(100 * 2610 / 2910)
        assert found.metrics["overall/yes_ratio"] == pytest.approx(100 * 3600 / 8910)
    assert (
        pope.score(path, format, data, "llava", custom=True).printed[
            "popular f1, acc, precision, recall, yes_ratio"
        ]
        == "0.889, 0.900, 1.000, 0.800, 0.400"
    )
    assert "2,910 rows, commit e3e39262" in found.manifest["version"]
