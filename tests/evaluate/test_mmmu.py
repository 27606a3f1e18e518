"""MMMU: its scripts' numbers from every format, their draws too, and what is no MMMU."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate import tables
from vflax.errors import UserError
from vflax.evaluate import mmmu, mmmu_answers, mmmu_data
from vflax.evaluate.jobs import asks
from vflax.evaluate.predictions import Said
from vflax.evaluate.question import Question
from vflax.evaluate.tasks import TASKS

Row = dict[str, Any]


def multiple(
    key: str, answer: str, response: str | None, options: tuple[str, ...] = ("a cat", "a dog")
) -> Row:
    return {"id": key, "answer": answer, "response": response, "options": options}


def written(key: str, answer: str | list[str], response: str | None) -> Row:
    return {"id": key, "answer": answer, "response": response, "options": None}


# Art: right, right by the option's text, drawn. Math: right to two decimals, wrong.
ROWS = [
    multiple("validation_Art_1", "B", "It is (B)"),
    multiple("validation_Art_2", "A", "To me this looks like a cat."),
    multiple("validation_Art_10", "B", "no idea"),
    written("validation_Math_1", ["24/7", "3.429"], "The answer is 3.43."),
    written("validation_Math_2", "8", "x = 9"),
]
DRAWN = random.Random(42).choice(["A", "B"])
ART = 3 if DRAWN == "B" else 2


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def subject(row: Row) -> str:
    return "_".join(row["id"].split("_")[1:-1])


def output(row: Row) -> Row:
    letters = [chr(65 + place) for place in range(len(row["options"] or ()))]
    more = (
        {"all_choices": letters, "index2ans": dict(zip(letters, row["options"], strict=True))}
        if letters
        else {}
    )
    kind = "multiple-choice" if letters else "short-answer"
    return {
        "id": row["id"],
        "question_type": kind,
        "answer": row["answer"],
        **more,
        "response": row["response"],
    }


def write_official(folder: Path, rows: list[Row], name: str = "output.json") -> Path:
    for own in dict.fromkeys(map(subject, rows)):
        write_json(folder / own / name, [output(row) for row in rows if subject(row) == own])
    return folder


def write_total(path: Path, rows: list[Row]) -> Path:
    return write_json(path, {row["id"]: row["response"] for row in rows})


def write_llava(path: Path, rows: list[Row]) -> Path:
    return write_lines(
        path, [{"question_id": row["id"], "prompt": "", "text": row["response"]} for row in rows]
    )


def write_vflax(path: Path, rows: list[Row]) -> Path:
    return write_lines(path, [{"key": row["id"], "prediction": row["response"]} for row in rows])


def cells(rows: list[Row], columns: dict[str, list[str]]) -> list[list[str]]:
    head = ["index", "id", "question", "A", "B", "C", "answer", "category", "split", "prediction", *columns]
    found = [head]
    for number, row in enumerate(rows):
        options = [*(row["options"] or ()), "", "", ""][:3]
        split, extra = row["id"].split("_")[0], [values[number] for values in columns.values()]
        found.append([str(number), row["id"], "What?", *options, str(row["answer"]), subject(row), split,
                      row["response"] or "", *extra])  # fmt: skip
    return found


def write_table(path: Path, rows: list[Row], **columns: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(cells(rows, columns))
    return path


def write_objects(path: Path, rows: list[Row]) -> Path:
    """VLMEvalKit's table as JSON, in which an empty cell is NaN."""
    head, *lines = cells(rows, {})
    values = [{name: cell or float("nan") for name, cell in zip(head, line, strict=True)} for line in lines]
    return write_json(path, values)


def write_workbook(path: Path, rows: list[Row], **columns: list[str]) -> Path:
    head, *lines = cells(rows, columns)
    return tables.write(path, head, lines)


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_release(folder: Path, rows: list[Row] = ROWS, split: str = "validation") -> Path:
    """As on the Hub: options and several answers are lists in text, open questions have options for show."""
    for own in dict.fromkeys(map(subject, rows)):
        mine = [row for row in rows if subject(row) == own]
        columns = {
            "id": [row["id"] for row in mine],
            "question": ["What is in <image 1>?"] * len(mine),
            "options": [str(list(row["options"] or ["?"])) for row in mine],
            "answer": [str(row["answer"]) for row in mine],
            "question_type": ["multiple-choice" if row["options"] else "open" for row in mine],
        }
        shown = [{"bytes": f"picture of {row['id']}".encode(), "path": f"{row['id']}_1.png"} for row in mine]
        path = folder / own / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = {"image_1": pa.array(shown, PICTURE), "image_2": pa.array([None] * len(mine), PICTURE)}
        pyarrow.parquet.write_table(pa.table({**columns, **pictures}), path, row_group_size=2)
    return folder


def write_answers(folder: Path, rows: list[Row] = ROWS) -> Path:
    kinds = {row["id"]: "multiple-choice" if row["options"] else "short-answer" for row in rows}
    write_json(
        folder / "answer_dict_val.json",
        {row["id"]: {"question_type": kinds[row["id"]], "ground_truth": row["answer"]} for row in rows},
    )
    return folder


def whole(of: tuple[str, ...] = ("Literature",), response: str = "A", answer: str = "A") -> list[Row]:
    return [multiple(f"validation_{own}_{number}", answer, response) for own in of for number in range(1, 31)]


WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "official": ("model", write_official),
    "llava": ("answers.jsonl", write_llava),
    "vlmevalkit": ("model_MMMU_DEV_VAL.tsv", write_table),
    "vflax": ("own.jsonl", write_vflax),
}


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_scripts_numbers(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    predictions, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    assert mmmu.recognise(predictions) == format
    found = mmmu.score(predictions, format, data, "official", custom=True)
    assert found.score == found.metrics["accuracy"] == pytest.approx(20 * (ART + 1))
    assert found.groups["subject"]["Art"] == {"n": 3, "accuracy": pytest.approx(100 * ART / 3)}
    assert found.groups["domain"]["Science"] == {"n": 2, "accuracy": 50}
    assert found.groups["type"]["open"] == {"n": 2, "accuracy": 50}
    assert (found.n, found.missing, found.unparsed) == (5, 0, 1)
    assert found.printed["Math"] == "0.5"
    assert found.printed["Overall"] == str(round((ART + 1) / 5, 3))


@pytest.mark.parametrize(
    "name", ["model_MMMU_DEV_VAL.tsv", "model_MMMU_DEV_VAL.xlsx", "model_MMMU_DEV_VAL.json"]
)
@pytest.mark.parametrize("of_folder", [True, False])
def test_vlmevalkits_table_is_found_in_its_folder_whatever_its_kind(
    name: str, of_folder: bool, tmp_path: Path
) -> None:
    write = {".tsv": write_table, ".xlsx": write_workbook, ".json": write_objects}[Path(name).suffix]
    path = write(tmp_path / name, ROWS)
    write_table(tmp_path / "model_MMMU_DEV_VAL_openai_result.tsv", ROWS)
    write_table(tmp_path / "model_MME.tsv", ROWS)
    (tmp_path / "model_MMMU_DEV_VAL_acc.csv").write_text("split,Overall\n")
    predictions = tmp_path if of_folder else path
    assert mmmu.recognise(predictions) == "vlmevalkit"
    found = mmmu.score(predictions, "vlmevalkit", None, "official", custom=True)
    assert found.score == pytest.approx(20 * (ART + 1))


@pytest.mark.parametrize("format", ["official", "vlmevalkit"])
def test_formats_with_answers_need_no_release(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    found = mmmu.score(write(tmp_path / name, ROWS), format, None, "official", custom=True)
    assert found.score == pytest.approx(20 * (ART + 1))


@pytest.mark.parametrize("write", [write_llava, write_vflax, write_total])
def test_others_do(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", ROWS)
    with pytest.raises(UserError, match="say --data=DIR of MMMU"):
        mmmu.score(path, str(mmmu.recognise(path)), None, "official", custom=True)


def test_answers_in_one_file_are_taken_as_they_stand(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "response": "B"}, {**ROWS[1], "response": "(A)"}, *ROWS[3:]]
    path, data = write_total(tmp_path / "total_val_output.json", rows), write_answers(tmp_path / "data", rows)
    assert mmmu.recognise(path) == "total"
    found = mmmu.score(path, "total", data, "official", custom=True)
    assert found.score == 50  # the first, and 3.43
    assert found.unparsed == 1
    assert "drawn" not in found.metrics
    assert (
        mmmu.score(path, "total", data, "strict", custom=True).groups["type"]["multiple-choice"]["accuracy"]
        == 100
    )


def test_draws_are_those_of_the_script_in_its_order(tmp_path: Path) -> None:
    keys = ["validation_Art_2", "validation_Art_10", "validation_Art_Theory_1", "validation_Music_1"]
    random.seed(42)
    rows = [multiple(key, random.choice(["A", "B", "C"]), "Who knows", ("cat", "dog", "cow")) for key in keys]
    random.Random(3).shuffle(rows)
    found = mmmu.score(write_official(tmp_path, rows), "official", None, "official", custom=True)
    assert found.score == found.metrics["drawn"] == 100
    assert found.metrics["accuracy_draws_wrong"] == 0
    assert found.unparsed == 4
    assert found.verdicts[0].why.startswith("no option; drew ")


def test_what_the_script_has_read_before_stands(tmp_path: Path) -> None:
    answers = iter("BAB")
    write_official(tmp_path, ROWS, "parsed_output.json")
    path = tmp_path / "Art" / "parsed_output.json"
    rows = [{**row, "parsed_pred": next(answers)} for row in json.loads(path.read_text())]
    write_json(path, rows)
    found = mmmu.score(tmp_path, "official", None, "official", custom=True)
    assert found.groups["subject"]["Art"]["accuracy"] == 100
    assert found.unparsed == 1


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows, data = list(ROWS), write_release(tmp_path / "data")
    random.Random(0).shuffle(rows)
    shuffled = mmmu.score(write_llava(tmp_path / "a.jsonl", rows), "llava", data, "llava", custom=True)
    straight = mmmu.score(write_llava(tmp_path / "b.jsonl", ROWS), "llava", data, "llava", custom=True)
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals


def test_a_question_without_prediction_is_wrong_and_counted(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    rows = [*ROWS[1:4], {**ROWS[4], "response": None}]
    found = mmmu.score(write_vflax(tmp_path / "a.jsonl", rows), "vflax", data, "official", custom=True)
    assert (found.n, found.missing) == (5, 2)
    assert found.groups["subject"]["Math"]["accuracy"] == 50
    assert found.printed["Math"] == "1.0"  # of the answers that are there, as the script counts


def test_without_a_release_the_rest_of_a_subject_is_missing_and_other_subjects_are_not(
    tmp_path: Path,
) -> None:
    found = mmmu.score(write_official(tmp_path, whole()[:24]), "official", None, "official")
    assert (found.n, found.missing, found.score) == (30, 6, 80)
    assert found.manifest["subjects"] == 1


def test_a_limit_takes_the_first_of_each_subject(tmp_path: Path) -> None:
    rows = [*whole(("Art",))[:10], *whole(("Art",), "B")[10:], *whole(("Math",), "B")]
    found = mmmu.score(write_official(tmp_path, rows), "official", None, "official", limit=12)
    assert (found.n, found.score) == (24, pytest.approx(1000 / 24))
    assert found.groups["subject"]["Art"] == {"n": 12, "accuracy": pytest.approx(1000 / 12)}


def test_a_table_is_printed_as_the_script_prints_it(tmp_path: Path) -> None:
    rows = [
        *whole(("Literature",))[:20],
        *whole(("Literature",), "B")[20:],
        *whole(("History", "Biology"), "B"),
    ]
    found = mmmu.score(write_official(tmp_path, rows), "official", None, "official")
    assert {name: value for name, value in found.printed.items() if value != "0"} == {
        "Overall-Science": "0.0", "Biology": "0.0", "Overall-Humanities and Social Science": "0.333", "History": "0.0",
        "Literature": "0.667", "Overall": "0.222",
    }  # fmt: skip


def test_outputs_from_before_the_release_have_other_numbers(tmp_path: Path) -> None:
    rows = [{**output(row), "No": str(7 * number)} for number, row in enumerate(whole())]
    for row in rows:
        del row["id"]
    path = write_json(tmp_path / "Electronics" / "output.json", rows)
    assert mmmu.recognise(path) == "official"
    for predictions in (path, path.parent, tmp_path):
        found = mmmu.score(predictions, "official", None, "official")
        assert found.groups["subject"] == {"Electronics": {"n": 30, "accuracy": 100}}


def test_a_list_in_text_is_one_answer_for_the_script_and_several_in_the_release(tmp_path: Path) -> None:
    rows = [written("validation_Math_1", "['24/7', '3.429']", "3.43")]
    path, data = write_official(tmp_path / "model", rows), write_release(tmp_path / "data", rows)
    assert mmmu.score(path, "official", None, "official", custom=True).score == 0
    assert mmmu.score(path, "official", data, "official", custom=True).score == 100


def test_options_are_those_that_came_with_the_answers(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data", [multiple("validation_Art_1", "B", "")])
    rows = [multiple("validation_Art_1", "B", "To me this looks like a cow.", ("a cat", "a cow"))]
    path = write_official(tmp_path / "model", rows)
    assert mmmu.score(path, "official", data, "official", custom=True).metrics["accuracy_draws_wrong"] == 100


def test_a_folder_as_mmmus_examples_has_both_and_the_whole_counts(tmp_path: Path) -> None:
    write_official(tmp_path, whole())
    assert mmmu.recognise(tmp_path) == "official"
    write_total(tmp_path / "total_val_output.json", whole(("Art",), "B"))
    assert mmmu.recognise(tmp_path) == "total"
    data = write_answers(tmp_path / "data", whole(("Art",)))
    assert mmmu.score(tmp_path, "total", data, "official", custom=True).score == 0
    assert mmmu.score(tmp_path, "official", None, "official").score == 100


# --- other rules -----------------------------------------------------------------------------------------------------


def test_rules_differ(tmp_path: Path) -> None:
    rows = [
        multiple("validation_Art_1", "A", "A."),
        multiple("validation_Art_2", "A", "A cat"),  # read as a letter by MMMU, as a text by VLMEvalKit
        multiple("validation_Art_3", "A", "Between (B) and (A)"),
        written("validation_Math_1", "8", "so it is 8"),
        written("validation_Math_2", "8", "8.00"),
        written("validation_Math_3", "no", "nothing"),
    ]
    path = write_official(tmp_path, rows)
    right = {
        mode: [v.score for v in mmmu.score(path, "official", None, mode, custom=True).verdicts]
        for mode in mmmu.MODES
    }
    assert right["official"] == right["llava"] == [1, 1, 1, 1, 1, 1]
    assert right["strict"] == [1, 0, 0, 0, 1, 0]
    assert right["vlmevalkit"] == [1, 1, 0, 1, 1, 1]


def test_vlmevalkit_makes_a_choice_of_an_open_question(tmp_path: Path) -> None:
    rows = [
        written("validation_Math_1", "8", "A"),
        written("validation_Math_2", "8", "other answers"),
        # A right answer that is a letter stays what is looked for, as in validation_Basic_Medical_Science_10.
        written("validation_Math_3", "C", "C"),
        written("validation_Math_4", "C", "c"),
        written("validation_Math_5", "B", "B"),
    ]
    found = mmmu.score(write_table(tmp_path / "a.tsv", rows), "vlmevalkit", None, "vlmevalkit", custom=True)
    assert [v.parsed for v in found.verdicts] == ["A", "B", "A", "A", "B"]
    assert [v.score for v in found.verdicts] == [1, 0, 0, 0, 1]


def test_for_vlmevalkit_the_hits_of_a_file_count(tmp_path: Path) -> None:
    rows = [
        multiple(f"validation_Art_{n}", "A", text) for n, text in ((1, "the pet"), (2, "B"), (3, "the pet"))
    ]
    path = write_table(tmp_path / "a.tsv", rows, hit=["1", "True", "0.0"])
    found = mmmu.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)
    assert [v.score for v in found.verdicts] == [1, 1, 0]
    assert found.unparsed == 1
    assert mmmu.score(path, "vlmevalkit", None, "strict", custom=True).score == 0


def test_a_hit_is_0_or_1(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv", ROWS[:1], hit=["0.5"])
    with pytest.raises(UserError, match=r"validation_Art_1: hit is '0\.5', expected 0 or 1"):
        mmmu.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)


def test_a_letter_that_mmmus_script_read_is_no_hit(tmp_path: Path) -> None:
    write_official(tmp_path, ROWS[:1], "parsed_output.json")
    path = tmp_path / "Art" / "parsed_output.json"
    write_json(path, [{**row, "parsed_pred": "A"} for row in json.loads(path.read_text())])
    assert mmmu.score(path, "official", None, "vlmevalkit", custom=True).score == 100


def test_vlmevalkit_loses_an_option_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    rows = [multiple("validation_Art_1", "C", "C", ("a cat", "a dog", "None"))]
    path = write_workbook(tmp_path / "a.xlsx", rows)
    assert mmmu.recognise(path) == "vlmevalkit"
    assert mmmu.score(path, "vlmevalkit", None, "vlmevalkit", custom=True).score == 0
    assert mmmu.score(path, "vlmevalkit", None, "official", custom=True).score == 100


def test_the_dev_split_of_a_table_is_told_apart(tmp_path: Path) -> None:
    rows = [
        *whole(("Art",)),
        *(multiple(f"dev_Art_{number}", "A", "AB"[number > 2]) for number in range(1, 6)),
    ]
    path, data = write_table(tmp_path / "a.tsv", rows), write_release(tmp_path / "data", whole(("Art",)))
    for of in (None, data):
        found = mmmu.score(path, "vlmevalkit", of, "vlmevalkit", custom=True)
        assert (found.n, found.score) == (30, 100)
        assert found.groups["split"] == {
            "validation": {"n": 30, "accuracy": 100}, "dev": {"n": 5, "accuracy": 40}
        }  # fmt: skip
        assert found.printed["Art & Design"] == found.printed["Overall"] == "1.0"
        assert found.printed["dev Overall"] == "0.4"


def test_a_table_without_ids_names_its_questions_by_split_subject_and_index(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv", whole(("Art_Theory",)))
    path.write_text(path.read_text().replace("\tid\t", "\tname\t"))
    found = mmmu.score(path, "vlmevalkit", None, "official")
    assert (found.n, found.missing, found.score) == (30, 0, 100)
    assert found.groups["subject"] == {"Art_Theory": {"n": 30, "accuracy": 100}}


# --- the parser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"), ("B", "B"), ("B.", "B"), ("B.'", None), ("The answer is B.", "B"), ("A or B", "B"),
        ("(A), not B", "A"), ("(B) but rather (A)", "A"), ("B) a dog", None), ("a dog", None), ("b", None),
        ("there is a CAT behind a dog", "B"), ("there is nothing to be seen here", None), ("", None),
    ],
)  # fmt: skip
def test_an_option_is_found_as_the_script_finds_it(text: str, letter: str | None) -> None:
    assert mmmu_answers.choice(text, {"A": "a cat", "B": "a dog"}) == letter


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8", [8.0]),
        ("The answer is 1,234.5 so x = 3.", [3.0]),
        # The numbers in 1,000 and 2e3 are some too.
        ("Area is 1,000\nFinal answer is 2e3 V", [1000.0, "2e3 v", 0.0, 2000.0, 3.0]),
        ("V", [" v", "v "]),
        ("I can say nothing", ["i can say nothing"]),
        ("x = ", ["x ="]),
        ("", [""]),
    ],
)
def test_what_an_open_answer_may_mean(text: str, found: list[str | float]) -> None:
    assert mmmu_answers.open_answers(text) == found


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("3.43", ["24/7", "3.429"], True), ("3.42", ["3.429"], False), ("2,000,000", ["2000000"], True),
        ("It is in Tampa, Florida", ["Tampa"], True), ("B", ["B"], True), ("AB", ["B"], False),
        ("it is B", ["B"], True), ("cab", ["B"], False),
    ],
)  # fmt: skip
def test_an_open_answer_is_right_if_it_has_a_right_one_in_it(
    text: str, answers: list[str], right: bool
) -> None:
    assert mmmu_answers.right(mmmu_answers.open_answers(text), answers) is right


@settings(deadline=None)
@given(
    st.text(),
    st.none() | st.dictionaries(st.sampled_from("ABCDE"), st.text(), min_size=1),
    st.text(),
    st.none() | st.sampled_from(["A", "1"]),
)
def test_no_answer_breaks_a_rule(
    text: str, options: dict[str, str] | None, answer: str, before: str | None
) -> None:
    question = Question("k", "", answer, {}, "k", options=options)
    said = Said("k", text, extracted=before)
    for rule in (
        mmmu_answers.official,
        mmmu_answers.letters_alone,
        mmmu_answers.strict,
        mmmu_answers.vlmevalkit,
    ):
        parsed, right, why = rule(question, said, random.Random(0))
        assert isinstance(right, bool)
        assert isinstance(why, str)
        assert parsed is None or isinstance(parsed, str)


@settings(deadline=None)
@given(st.text().map(lambda text: f"[{text}") | st.lists(st.text() | st.integers()).map(str))
def test_no_text_breaks_the_reading_of_lists(text: str) -> None:
    assert all(isinstance(part, str) for part in mmmu_answers.literal_list(text))


def test_options_are_never_run(tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert mmmu_answers.literal_list(f"[open({str(path)!r}, 'w')]") == []
    assert not path.exists()


# --- the release -----------------------------------------------------------------------------------------------------


def released() -> list[Row]:
    rows = whole(tuple(mmmu_data.SUBJECTS))
    return [*rows[:847], *(written(row["id"], "8", "8") for row in rows[847:])]


def test_the_whole_release_is_loaded_in_the_scripts_order(tmp_path: Path) -> None:
    questions = mmmu.load(write_release(tmp_path, released()))
    assert len(questions) == 900
    assert [q.key for q in questions[:3]] == [f"validation_Accounting_{number}" for number in (1, 2, 3)]
    assert questions[0].options == {"A": "a cat", "B": "a dog"}
    assert questions[-1].options is None
    assert questions[0].groups == {"domain": "Business", "subject": "Accounting", "type": "multiple-choice"}


def test_answers_alone_are_a_release_for_answers_in_one_file(tmp_path: Path) -> None:
    data = write_answers(tmp_path / "repository" / "mmmu", released()).parent
    path = write_total(tmp_path / "total.json", released()[:450])
    for of in (data, data / "mmmu", data / "mmmu" / "answer_dict_val.json"):
        found = mmmu.score(path, "total", of, "official")
        assert (found.n, found.missing, found.score) == (900, 450, 50)


def test_answers_alone_do_not_do_where_options_are_needed(tmp_path: Path) -> None:
    data = write_answers(tmp_path / "data")
    with pytest.raises(
        UserError, match="validation_Art_1: its options are not there, and mode official reads"
    ):
        mmmu.score(write_llava(tmp_path / "a.jsonl", ROWS), "llava", data, "official", custom=True)
    # The folders have them.
    found = mmmu.score(write_official(tmp_path / "model", ROWS), "official", data, "official", custom=True)
    assert found.score == pytest.approx(20 * (ART + 1))


def test_a_table_of_vlmevalkit_is_a_release_too(tmp_path: Path) -> None:
    write_table(
        tmp_path / "MMMU_DEV_VAL.tsv", ROWS, image=["QQ==", "['QQ==', 'Qg==']", "QQ==", "QQ==", "QQ=="]
    )
    questions = mmmu.load(tmp_path, custom=True)
    assert [picture.read() for picture in questions[1].pictures] == [b"A", b"B"]
    path = write_vflax(tmp_path / "own.jsonl", ROWS)
    assert mmmu.score(path, "vflax", tmp_path, "official", custom=True).score == pytest.approx(20 * (ART + 1))


def test_pictures_are_read_when_asked_for(tmp_path: Path) -> None:
    questions = mmmu.load(write_release(tmp_path), custom=True)
    for question in questions:
        (picture,) = question.pictures
        assert picture.name == f"{question.key}_1.png"
        assert picture.read() == f"picture of {question.key}".encode()


def test_the_test_split_is_asked_but_not_scored(tmp_path: Path) -> None:
    rows = [multiple("test_Art_1", "?", "A")]
    questions = mmmu.load(write_release(tmp_path / "data", rows, "test"), custom=True, split="test")
    assert questions[0].answer == "?"
    with pytest.raises(UserError, match="test_Art_1: the right answers of the test split are not public"):
        mmmu.score(write_official(tmp_path / "model", rows), "official", None, "official")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "Sociology: 29 questions, released were 30"),
        (lambda rows: rows[30:], "Accounting: 0 questions"),
        (
            lambda rows: [*rows[:-1], multiple("validation_Sociology_30", "A", "A")],
            "multiple-choice: 848 questions",
        ),
        (lambda rows: [*rows[:-1], rows[0]], "validation_Accounting_1 is there twice"),
        (
            lambda rows: [*rows, multiple("validation_Magic_1", "A", "A")],
            "no subject of MMMU is called 'Magic'",
        ),
    ],
)
def test_another_release_is_refused(
    change: Callable[[list[Row]], list[Row]], said: str, tmp_path: Path
) -> None:
    write_answers(tmp_path, released())
    assert len(mmmu.load(tmp_path)) == 900
    rows = change(released())
    (tmp_path / "answer_dict_val.json").unlink()
    write_table(tmp_path / "MMMU_DEV_VAL.tsv", rows)
    with pytest.raises(UserError, match=said):
        mmmu.load(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no MMMU\. Expected SUBJECT/validation"):
        mmmu.load(tmp_path)
    path = tmp_path / "Art" / "validation-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"validation-00000-of-00001\.parquet: not readable as parquet"):
        mmmu.load(tmp_path)
    pyarrow.parquet.write_table(pa.table({"id": ["validation_Art_1"]}), path)
    with pytest.raises(UserError, match="lacks question, options"):
        mmmu.load(tmp_path)
    row = {"id": "validation_Art_1", "question": "?", "options": "a, b", "answer": "A"}
    pyarrow.parquet.write_table(pa.Table.from_pylist([{**row, "question_type": "multiple-choice"}]), path)
    with pytest.raises(UserError, match="validation_Art_1: the options are 'a, b', expected a list"):
        mmmu.load(tmp_path)


# --- predictions that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "expected a JSON object with something in it"),
        ("[1]", "expected a JSON object with something in it"),
        ('{"validation_Art_1": "A"', "not readable as JSON"),
        ('{"validation_Art_1": "A", "validation_Art_1": "B"}', "validation_Art_1 is there twice"),
        ('{"validation_Art_1": ["A"]}', "validation_Art_1: expected one answer, as text"),
        ('{"validation_Art_77": "A"}', "validation_Art_77: no question of this MMMU"),
    ],
)
def test_a_file_of_answers_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path, data = tmp_path / "total.json", write_answers(tmp_path / "data")
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        mmmu.score(path, "total", data, "official", custom=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [], "output.json: empty"),
        (lambda rows: [*rows, rows[0]], "validation_Literature_1 is there twice"),
        (lambda rows: [*rows, {**rows[0], "id": "validation_Literature_31"}], "Literature has 31 questions"),
        (lambda rows: [{**rows[0], "id": "validation_Magic_1"}], "no subject of MMMU is called 'Magic'"),
        (lambda rows: [{"id": "validation_Literature_1"}], "row 1: lacks question_type, answer, response"),
        (
            lambda rows: [{**rows[0], "index2ans": {"A": "a"}}],
            "row 1: index2ans does not have a text for each letter",
        ),
        (
            lambda rows: [{**rows[0], "index2ans": None}],
            "row 1: index2ans does not have a text for each letter",
        ),
    ],
)
def test_an_output_that_is_none_is_refused(
    change: Callable[[list[Row]], list[Row]], said: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "Literature" / "output.json", change([output(row) for row in whole()]))
    with pytest.raises(UserError, match=said):
        mmmu.score(tmp_path, "official", None, "official")


def test_another_right_answer_than_the_releases_is_refused(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    path = write_official(tmp_path / "model", [{**ROWS[0], "answer": "A"}, *ROWS[1:]])
    with pytest.raises(UserError, match="the right answer is 'A' there and 'B' in the data"):
        mmmu.score(path, "official", data, "official", custom=True)


def test_answers_twice_are_refused(tmp_path: Path) -> None:
    path, data = write_llava(tmp_path / "a.jsonl", [*ROWS, ROWS[0]]), write_release(tmp_path / "data")
    with pytest.raises(UserError, match="validation_Art_1: answered twice"):
        mmmu.score(path, "llava", data, "official", custom=True)


def test_a_folder_or_file_of_something_else_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "Art").mkdir()
    assert mmmu.recognise(tmp_path) is None
    assert mmmu.recognise(write_json(tmp_path / "a.json", ["A"])) is None
    with pytest.raises(UserError, match=r"no SUBJECT/output\.json in it"):
        mmmu.score(tmp_path, "official", None, "official")
    with pytest.raises(UserError, match=r"expected one file in it that is called total\*\.json, found none"):
        mmmu.score(tmp_path, "total", None, "official")


def test_two_files_of_answers_in_a_folder_are_asked_about(tmp_path: Path) -> None:
    for name in ("total_val_output.json", "total_test_output.json"):
        write_total(tmp_path / name, ROWS)
    assert mmmu.recognise(tmp_path) == "total"
    with pytest.raises(UserError, match=r"total_test_output\.json, total_val_output\.json; name the file"):
        mmmu.score(tmp_path, "total", None, "official")


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_llava_is_shown_the_first_picture_alone(tmp_path: Path) -> None:
    write_table(tmp_path / "MMMU_DEV_VAL.tsv", ROWS, image=["QQ==", "['QQ==', 'Qg==']", "", "QQ==", "QQ=="])
    questions = mmmu.load(tmp_path, custom=True)
    assert [[p.name for p in mmmu.pictures(q, "llava")] for q in questions[:3]] == [
        ["validation_Art_1_1"], ["validation_Art_2_1"], [],
    ]  # fmt: skip
    assert len(mmmu.pictures(questions[1], "vlmevalkit")) == len(mmmu.pictures(questions[1], "plain")) == 2
    assert [len(ask.pictures) for ask in asks(TASKS["mmmu"], questions[:3], "llava", 8)] == [1, 1, 0]


def test_prompts(tmp_path: Path) -> None:
    questions = mmmu.load(write_release(tmp_path), custom=True)
    choice, written = questions[0], questions[-1]
    assert mmmu.prompt(choice, "llava") == (
        "What is in <image 1>?\n(A) a cat\n(B) a dog\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert mmmu.prompt(written, "llava") == (
        "What is in <image 1>?\nAnswer the question using a single word or phrase."
    )
    assert mmmu.prompt(choice, "plain") == "What is in <image 1>?\n(A) a cat\n(B) a dog"
    assert mmmu.prompt(choice, "vlmevalkit") == (
        "Question: What is in <image 1>?\nOptions:\nA. a cat\nB. a dog\n"
        "Please select the correct answer from the options above. \n"
    )
    assert mmmu.prompt(written, "vlmevalkit") == "Question: What is in <image 1>?\n"
    bare = mmmu.load(write_answers(tmp_path / "answers"), custom=True)[0]
    with pytest.raises(UserError, match=r"answer_dict_val\.json has no questions"):
        mmmu.prompt(bare, "llava")


def test_a_null_answer_of_llava_s_is_missing(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a.jsonl", ROWS)
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**first, "text": None}, *others)))
    write_release(tmp_path / "data")
    found = mmmu.score(path, "llava", tmp_path / "data", "official", custom=True)
    assert found.missing == 1
