"""MME: its tool's numbers from every format, and what is no MME."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evaluate import tables
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
# Of a picture's questions, in the order of their texts.
KEYS = dict(
    zip(
        (row[:3] for row in ROWS),
        ("color/1#2", "color/1#1", "color/2#2", "color/2#1", "OCR/a b#1", "OCR/a b#2"),
        strict=True,
    )
)
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
    names = ["index", "category", "image_path", "question", "answer", "prediction", *columns]
    lines: list[list[object]] = [
        [
            number,
            row[0],
            f"{row[0]}/{row[1]}",
            row[2] + ASKED,
            *row[3:],
            *(own[number] for own in columns.values()),
        ]
        for number, row in enumerate(rows)
    ]
    tables.write(path, names, lines)
    return path


def write_vflax(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join(json.dumps({"key": KEYS[row[:3]], "prediction": row[4]}) + "\n" for row in rows))
    return path


WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "tool": ("tool", write_tool),
    "llava": ("answers.jsonl", write_llava),
    "vlmevalkit": ("model_MME.tsv", write_vlmevalkit),
    "vflax": ("own.jsonl", write_vflax),
}
TABLES = ("model_MME.tsv", "model_MME.xlsx", "model_MME.json")


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


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_vlmevalkit_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / name, ROWS)
    assert mme.recognise(path) == "vlmevalkit"
    assert mme.score(path, "vlmevalkit", None, "official", custom=True).score == PERCEPTION


def test_others_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say --data=DIR of MME"):
        mme.score(write_llava(tmp_path / "a.jsonl", ROWS), "llava", None, "official", custom=True)


def test_rules_differ_on_words_around_the_answer(tmp_path: Path) -> None:
    rows = [(*row[:4], f"I would say {row[3].lower()}") for row in ROWS]
    path = write_tool(tmp_path, rows)
    scores = {mode: mme.score(path, "tool", None, mode, custom=True).score for mode in mme.MODES}
    assert scores == {"official": 0, "llava": 0, "vlmevalkit": 400, "strict": 0}


def test_what_vlmevalkit_has_extracted_counts_by_its_rule_alone(tmp_path: Path) -> None:
    extracted = ["Yes", "No", "Yes", "No", "Unknown", ""]
    path = write_vlmevalkit(tmp_path / "a.tsv", ROWS, extracted=extracted)
    found = mme.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)
    assert found.groups["subtask"]["color"]["acc"] == 100  # row 3: "It is", and the judge said Yes
    assert (
        found.groups["subtask"]["OCR"]["acc"] == 0
    )  # row 5: Unknown; row 6: "yes" is read from the prediction
    assert mme.score(path, "vlmevalkit", None, "official", custom=True).score == PERCEPTION


def test_each_rule_prints_as_its_tool_does(tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / "a.tsv", [*ROWS, *[("code_reasoning", *row[1:]) for row in ROWS[:2]]])
    official = mme.score(path, "vlmevalkit", None, "official", custom=True).printed
    assert official == {
        "Perception total score": "175.0", "Cognition total score": "200.0", "color score": "125.0",
        "OCR score": "50.0", "code_reasoning score": "200.0",
    }  # fmt: skip
    assert mme.score(path, "vlmevalkit", None, "vlmevalkit", custom=True).printed == {
        "perception": "175.0", "reasoning": "200.0", "color": "125.0", "OCR": "50.0", "code_reasoning": "200.0"
    }  # fmt: skip


def test_a_question_without_prediction_is_wrong_and_counted(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    found = mme.score(write_llava(tmp_path / "a.jsonl", ROWS[1:]), "llava", data, "official", custom=True)
    assert (found.n, found.missing) == (6, 1)
    assert found.groups["subtask"]["color"] == {"n": 4, "acc": 50, "acc_plus": 0, "score": 50, "other": 2}


@pytest.mark.parametrize("format", WRITERS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.permutations(ROWS), released=st.permutations(ROWS), seed=st.integers(0, 2**16))
def test_no_order_of_rows_changes_a_number(
    format: str, rows: list, released: list, seed: int, tmp_path: Path
) -> None:
    said = [(*row[:4], random.Random(f"{seed} {row[:3]}").choice(["Yes", "No", "Well"])) for row in rows]
    name, write = WRITERS[format]
    data = write_tool(tmp_path / "data", released)
    straight = mme.score(
        write(tmp_path / name, sorted(said)),
        format,
        write_tool(tmp_path / "b", ROWS),
        "official",
        custom=True,
    )
    shuffled = mme.score(write(tmp_path / name, said), format, data, "official", custom=True)
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals
    assert (shuffled.unparsed, shuffled.printed) == (straight.unparsed, straight.printed)


@pytest.mark.parametrize("format", WRITERS)
def test_duplicates_and_nothing_are_refused(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    data = write_release(tmp_path / "data")
    with pytest.raises(UserError, match="twice"):
        mme.score(write(tmp_path / name, [*ROWS, ROWS[3]]), format, data, "official", custom=True)
    for path in tmp_path.glob("tool/*.txt"):
        path.write_text("")
    nothing = tmp_path / "tool" if format == "tool" else write(tmp_path / name, [])
    with pytest.raises(UserError, match=r"empty|no predictions in it"):
        mme.score(nothing, format, data, "official", custom=True)


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
        (lambda rows: [row[:4] for row in rows], "line 1: 3 parts between tabs"),  # the template
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


def test_null_is_no_prediction(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a.jsonl", [(*ROWS[0][:4], None), *ROWS[1:]])
    found = mme.score(path, "llava", write_release(tmp_path / "data"), "official", custom=True)
    assert found.missing == 1  # and not "None", which begins with "no"


def test_only_files_of_subtasks_are_read_in_a_folder(tmp_path: Path) -> None:
    write_tool(tmp_path, ROWS)
    (tmp_path / "readme.txt").write_text("how to")
    with pytest.raises(UserError, match=r"count: 0 pictures, released were 30; .*OCR: 1|OCR: 1 pictures"):
        mme.score(tmp_path, "tool", None, "official")


def test_a_release_is_found_in_what_it_is_unpacked_to(tmp_path: Path) -> None:
    data = tmp_path / "MME_Benchmark_release_version"
    write_release(data / "MME_Benchmark")
    (data / "eval_tool").mkdir()
    assert len(mme.load(tmp_path, custom=True)) == len(mme.load(data, custom=True)) == 6


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
    for data in (tmp_path, path):
        questions = mme.load(data, custom=True)
        assert [q.pictures[0].read() for q in questions] == [b"A", b"A", b"B", b"B", b"C", b"C"]


def test_a_damaged_picture_of_a_table_is_named_with_its_row(tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / "MME.tsv", ROWS, image=["QQ==", "0", "Q", "2", "Qw==", "4"])
    broken = mme.load(path, custom=True)[2].pictures[0]
    with pytest.raises(UserError, match=r"MME\.tsv, row [45]: its picture is no base64"):
        broken.read()


def test_llavas_prompt_asks_for_a_word(tmp_path: Path) -> None:
    question = mme.load(write_release(tmp_path), custom=True)[0]
    assert mme.prompt(question, "llava") == "Is it blue?\nAnswer the question using a single word or phrase."
    assert mme.prompt(question, "plain") == "Is it blue? Please answer yes or no."


# Of 2 P questions on P pictures, those with yes on the first P // 2 pictures are answered by no, all others rightly:
# 100 (2 P - P // 2) / 2 P + 100 (P - P // 2) / P.
@pytest.mark.real_data
@pytest.mark.parametrize("name", ["tool", "llava.jsonl", "own.jsonl", *TABLES])
def test_the_released_questions_in_every_format(name: str, shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "benchmarks" / "mme"
    rows = []
    for path in data.glob("*.txt"):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
        for number, (picture, question, answer) in enumerate(lines):
            wrong = answer == "Yes" and number // 2 < len(lines) // 2 // 2
            rows.append((path.stem, picture, question, answer, "No" if wrong else f"{answer}."))
    path = tmp_path / name
    if name == "tool":
        path.mkdir()
        for subtask in {row[0] for row in rows}:
            own = ["\t".join(row[1:]) + "\n" for row in rows if row[0] == subtask]
            (path / f"{subtask}.txt").write_text("".join(own), encoding="utf-8")
    elif name == "llava.jsonl":
        write_llava(
            path,
            [(*row[:2], row[2].replace("Please answer yes or no.", "").strip(), *row[3:]) for row in rows],
        )
    elif name == "own.jsonl":
        keys = {(q.unit, q.text): q.key for q in mme.load(data)}
        lines = [
            {"key": keys[f"{row[0]}/{row[1].split('.')[0]}", row[2]], "prediction": row[4]} for row in rows
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        names = ["index", "category", "image_path", "question", "answer", "prediction"]
        tables.write(path, names, [[n, row[0], f"{row[0]}/{row[1]}", *row[2:]] for n, row in enumerate(rows)])
    with_answers = name == "tool" or name in TABLES
    for mode in mme.MODES:
        found = mme.score(path, mme.recognise(path) or "", None if with_answers else data, mode)
        assert found.n == 2374
        # 147 pictures of posters, and an even number elsewhere.
        assert found.metrics["posters"] == pytest.approx(100 * (221 / 294 + 74 / 147))
        assert found.metrics["perception"] == pytest.approx(9 * 125 + 125.510204, abs=1e-6)
        assert found.metrics["cognition"] == 500
