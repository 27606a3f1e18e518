"""ScienceQA: its tool's numbers and LLaVA's from every format, and what is no ScienceQA."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate import tables
from vflax.errors import UserError
from vflax.evaluate import scienceqa
from vflax.evaluate.scienceqa_ensemble import combined

Row = tuple[str, str, list[str], int, str, str | None, str, str, str]

# (pid, question, choices, answer, hint, image, subject, grade, what was said).
ROWS: list[Row] = [
    ("4", "Who?", ["she", "he"], 1, "", None, "language science", "grade11", "B"),
    ("5", "What?", ["tea", "ice", "oil"], 2, "Look.\nIt is.", "image.png", "natural science", "grade8", "C. oil"),
    ("11", "Where?", ["here", "there"], 0, "", "image.png", "social science", "grade3", "The answer is A."),
    ("15", "When?", ["now", "then"], 0, "Think.", None, "natural science", "grade6", "The answer is A"),
    ("22", "Why?", ["so", "thus"], 1, "", "image.png", "natural science", "grade7", "E"),
]  # fmt: skip
# Right by LLaVA's rule: 4, 5, 11. 15 lacks a character behind the letter, 22 has no fifth choice.
NUMBERS = {
    "accuracy": 60, "NAT": 100 / 3, "SOC": 100, "LAN": 100, "TXT": 50, "IMG": 200 / 3, "NO": 100, "G1-6": 50,
    "G7-12": 200 / 3,
}  # fmt: skip
PRINTED = {
    "natural": "33.33", "social": "100.00", "language": "100.00", "has_text": "50.00", "has_image": "66.67",
    "no_context": "100.00", "grade_1_6": "50.00", "grade_7_12": "66.67", "average": "60.00",
}  # fmt: skip


def problem(row: Row, split: str = "test") -> dict[str, Any]:
    keys = ("question", "choices", "answer", "hint", "image", "subject", "grade")
    return {**dict(zip(keys, row[1:8], strict=True)), "lecture": "", "solution": "", "split": split}


def write_release(folder: Path, rows: list[Row] = ROWS) -> Path:
    """With a question of train, and a minitest that is a part of test."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = {row[0]: problem(row) for row in rows} | {"1": problem(ROWS[0], "train")}
    pids = [row[0] for row in rows]
    splits = {"train": ["1"], "val": [], "test": pids, "minitest": pids[:2]}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def write_pictures(folder: Path) -> None:
    for row in ROWS:
        if row[5]:
            place = folder / "images" / "test" / row[0]
            place.mkdir(parents=True)
            (place / row[5]).write_bytes(f"picture of {row[0]}".encode())


def texts(rows: list[Row]) -> dict[str, str]:
    return {row[0]: row[8] for row in rows}


def write_llava(path: Path, rows: list[Row]) -> Path:
    lines = [
        {
            "question_id": row[0],
            "prompt": ("<image>\n" if row[5] else "") + row[1],
            "text": row[8],
            "metadata": {},
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_result(path: Path, rows: list[Row], indices: list[int] | None = None) -> Path:
    """By default with the indices that LLaVA's script finds."""
    found = [1, 2, 0, -1, -1] if indices is None else indices
    results = {row[0]: index for row, index in zip(rows, found, strict=False)}
    whole = {"acc": 60.0, "correct": 3, "count": 5, "results": results, "outputs": texts(rows)}
    path.write_text(json.dumps(whole, indent=2))
    return path


def write_output(path: Path, rows: list[Row]) -> Path:
    whole: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    for row, letter in zip(rows, ["B", "C", "A", "FAILED", "E"], strict=False):
        answer = "ABCDE"[row[3]]
        asked = ("<image>\n" if row[5] else "") + row[1]
        whole["correct" if letter == answer else "incorrect"].append(
            {"question_id": row[0], "parsed_ans": letter, "ground_truth": answer, "question": asked, "pred": row[8],
             "is_multimodal": "<image>" in asked}
        )  # fmt: skip
    path.write_text(json.dumps(whole, indent=2))
    return path


def write_texts(path: Path, rows: list[Row]) -> Path:
    path.write_text(json.dumps(texts(rows)))
    return path


def write_outputs(path: Path, rows: list[Row]) -> Path:
    path.write_text(json.dumps({"outputs": texts(rows)}))
    return path


def write_vflax(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps({"key": row[0], "prediction": row[8]}) + "\n" for row in rows))
    return path


def write_vlmevalkit(path: Path, rows: list[Row], **columns: list[str]) -> Path:
    """Of questions with a picture, which it numbers in its own way."""
    names = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "answer",
        "category",
        "split",
        "prediction",
        *columns,
    ]
    cells = [
        [
            number, row[1], row[4], *[*row[2], None][:3], "ABC"[row[3]], row[6].split()[0], "test", row[8],
            *(values[number] for values in columns.values()),
        ]
        for number, row in enumerate(row for row in rows if row[5])
    ]  # fmt: skip
    return tables.write(path, names, cells)


WRITERS: dict[str, tuple[str, str, Callable[..., Path]]] = {
    "llava": ("answers.jsonl", "llava", write_llava),
    "llava's output": ("answers_output.jsonl", "llava", write_output),
    "official": ("answers_result.json", "official", write_result),
    "texts": ("texts.json", "texts", write_texts),
    "outputs": ("gpt4.json", "texts", write_outputs),
    "vflax": ("own.jsonl", "vflax", write_vflax),
}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["official", "llava"])
@pytest.mark.parametrize("what", WRITERS)
def test_every_format_gives_the_tools_numbers(what: str, mode: str, tmp_path: Path) -> None:
    name, format, write = WRITERS[what]
    predictions, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    assert scienceqa.recognise(predictions) == format
    found = scienceqa.score(predictions, format, data, mode, custom=True)
    assert found.metrics == pytest.approx(NUMBERS)
    assert PRINTED.items() <= found.printed.items()
    assert (found.printed["Accuracy"], found.printed["IMG-Accuracy"]) == ("60.00%", "66.67%")
    assert (found.n, found.missing) == (5, 0)
    assert found.groups["context"]["IMG"] == {"n": 3, "accuracy": pytest.approx(200 / 3)}
    assert found.manifest["split"] == "test"


@pytest.mark.parametrize("what", WRITERS)
def test_llavas_score_is_of_questions_with_a_picture_where_prompts_tell(what: str, tmp_path: Path) -> None:
    name, format, write = WRITERS[what]
    predictions, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    scores = {
        mode: scienceqa.score(predictions, format, data, mode, custom=True).score
        for mode in ("official", "llava")
    }
    told = format in ("llava", "vflax")
    assert scores == {"official": 60, "llava": pytest.approx(200 / 3 if told else 60)}


def test_llavas_score_is_of_all_where_no_prompt_has_a_picture(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a", ROWS)
    path.write_text(path.read_text().replace("<image>", ""))
    found = scienceqa.score(path, "llava", write_release(tmp_path / "data"), "llava", custom=True)
    assert (found.score, "IMG-Accuracy" in found.printed) == (60, False)


def test_the_strict_rule_wants_the_letter_alone(tmp_path: Path) -> None:
    rows = [(*row[:8], said) for row, said in zip(ROWS, ["(B)", "**C**", "A. here", "A", "E"], strict=True)]
    data = write_release(tmp_path / "data")
    found = scienceqa.score(write_llava(tmp_path / "a", rows), "llava", data, "strict", custom=True)
    assert [v.parsed for v in found.verdicts] == ["B", "C", None, "A", None]
    assert (found.score, found.unparsed) == (60, 2)


def test_vlmevalkits_rule_is_of_questions_with_a_picture(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    rows = [*ROWS[:4], (*ROWS[4][:8], "It is thus")]
    found = scienceqa.score(write_llava(tmp_path / "a", rows), "llava", data, "vlmevalkit", custom=True)
    assert [(v.key, v.parsed) for v in found.verdicts] == [("5", "C"), ("11", "A"), ("22", "B")]
    assert (found.score, found.printed["Overall"]) == (100, "1.0")


@pytest.mark.parametrize("suffix", ["tsv", "xlsx", "json"])
def test_vlmevalkits_table_needs_no_release(suffix: str, tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / f"a.{suffix}", ROWS)
    assert scienceqa.recognise(path) == "vlmevalkit"
    for data in (None, tmp_path):
        found = scienceqa.score(path, "vlmevalkit", data, "vlmevalkit", custom=True)
        assert (found.n, found.unparsed, found.printed["Overall"]) == (3, 1, "0.6666666666666666")
        assert found.groups["category"] == {
            "natural": {"n": 2, "accuracy": 50}, "social": {"n": 1, "accuracy": 100}
        }  # fmt: skip
    assert scienceqa.score(path, "vlmevalkit", None, "official", custom=True).metrics["IMG"] == found.score


def test_vlmevalkits_hits_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / "a.tsv", ROWS, hit=["0", "1", "1"])
    found = scienceqa.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)
    assert [(v.parsed, v.score) for v in found.verdicts] == [(None, 0), ("A", 1), ("B", 1)]
    strict = scienceqa.score(path, "vlmevalkit", None, "strict", custom=True)
    assert strict.score == 0


def test_a_choice_that_pandas_lost_can_be_the_right_one(tmp_path: Path) -> None:
    """VLMEvalKit has an empty cell where the choice is "None"."""
    rows = [(*ROWS[1][:2], ["tea", "ice", ""], 2, *ROWS[1][4:8], "C")]
    found = scienceqa.score(
        write_vlmevalkit(tmp_path / "a.tsv", rows), "vlmevalkit", None, "official", custom=True
    )
    assert found.score == 100


def test_llavas_output_needs_no_release(tmp_path: Path) -> None:
    path = write_output(tmp_path / "a.jsonl", ROWS)
    for mode in ("official", "llava"):
        found = scienceqa.score(path, "llava", None, mode, custom=True)
        assert found.metrics == {"accuracy": 60, "IMG": pytest.approx(200 / 3)}
        assert found.printed["IMG-Accuracy"] == "66.67%"
    assert [v.key for v in found.verdicts] == ["4", "5", "11", "15", "22"]
    with pytest.raises(UserError, match="needs the choices"):
        scienceqa.score(path, "llava", None, "vlmevalkit", custom=True)


def test_llavas_output_tells_what_was_not_answered(tmp_path: Path) -> None:
    path = write_output(tmp_path / "a.jsonl", ROWS)
    whole = json.loads(path.read_text())
    whole["incorrect"][0] |= {"question": "Unknown", "pred": "FAILED"}
    path.write_text(json.dumps(whole))
    found = scienceqa.score(path, "llava", write_release(tmp_path / "data"), "llava", custom=True)
    assert (found.missing, found.metrics["accuracy"]) == (1, 60)


@pytest.mark.parametrize("write", [write_llava, write_result, write_texts, write_outputs, write_vflax])
def test_others_do(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", ROWS)
    format = scienceqa.recognise(path)
    assert format
    with pytest.raises(UserError, match="say --data=DIR of ScienceQA"):
        scienceqa.score(path, format, None, "official", custom=True)


def test_a_folder_is_its_only_file(tmp_path: Path) -> None:
    folder, data = tmp_path / "gpt3", write_release(tmp_path / "data")
    folder.mkdir()
    with pytest.raises(UserError, match=r"expected one file of scienceqa .* found none"):
        scienceqa.recognise(folder)
    write_result(folder / "final_test_QCM-ALE_2_seed_3.json", ROWS)
    assert scienceqa.recognise(folder) == "official"
    assert scienceqa.score(folder, "official", data, "official", custom=True).score == 60
    write_llava(folder / "answers.jsonl", ROWS)
    with pytest.raises(UserError, match=r"found answers\.jsonl, final_test.*; name the file"):
        scienceqa.score(folder, "official", data, "official", custom=True)


def test_stored_results_count_in_official_and_texts_in_llava(tmp_path: Path) -> None:
    """As of a script that drew 0 and 1 at random where it read nothing, and again for what it stored as acc."""
    path = write_result(tmp_path / "a.json", ROWS, [1, 2, 0, 0, 1])
    data = write_release(tmp_path / "data")
    official = scienceqa.score(path, "official", data, "official", custom=True)
    assert (official.score, official.unparsed) == (100, 0)
    assert official.printed["acc in the file"] == "60.0"
    assert official.manifest["stored"] == {"acc": 60.0, "correct": 3, "count": 5}
    assert scienceqa.score(path, "official", data, "llava", custom=True).score == 60


def test_results_alone_are_enough_for_official(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"results": {"4": "1", "5": 2, "11": 7, "15": -1, "22": 1}}))
    data = write_release(tmp_path / "data")
    found = scienceqa.score(path, "official", data, "official", custom=True)
    assert [v.parsed for v in found.verdicts] == ["B", "C", "H", None, "B"]
    assert found.score == 60
    with pytest.raises(UserError, match="no outputs to read them from; say --mode=official"):
        scienceqa.score(path, "official", data, "llava", custom=True)


def test_llavas_result_is_llavas_format_too(tmp_path: Path) -> None:
    path, data = write_result(tmp_path / "a.json", ROWS), write_release(tmp_path / "data")
    assert scienceqa.score(path, "llava", data, "llava", custom=True).score == 60
    with pytest.raises(UserError, match="--format=texts, but it is official"):
        scienceqa.score(path, "texts", data, "llava", custom=True)


def test_a_question_without_prediction_is_wrong_and_counted(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    found = scienceqa.score(write_llava(tmp_path / "a", ROWS[2:]), "llava", data, "llava", custom=True)
    assert (found.n, found.missing, found.metrics["accuracy"]) == (5, 2, 20)
    assert found.score == found.metrics["IMG"] == pytest.approx(100 / 3)
    # LLaVA's script does not know that the question it has no answer to has a picture.
    assert found.printed["IMG-Accuracy"] == "50.00%"


def test_a_prediction_of_nothing_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_id": "4", "text": null}\n{"question_id": "5", "text": ""}')
    found = scienceqa.score(path, "llava", write_release(tmp_path / "data"), "llava", custom=True)
    assert (found.missing, found.unparsed, found.manifest["split"]) == (1 + 3, 1, "test")


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows, data = list(ROWS), write_release(tmp_path / "data")
    random.Random(0).shuffle(rows)
    found = [
        scienceqa.score(write_llava(tmp_path / "a", own), "llava", data, "official", custom=True)
        for own in (rows, ROWS)
    ]
    assert found[0].metrics == found[1].metrics
    assert found[0].intervals == found[1].intervals


def test_the_split_is_the_one_that_is_predicted(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    splits = [
        scienceqa.score(write_llava(tmp_path / "a", rows), "llava", data, "official", custom=True).manifest[
            "split"
        ]
        for rows in (ROWS[:2], ROWS[:1], ROWS[:3])
    ]
    assert splits == ["minitest", "test", "test"]


def test_a_limit_counts_each_subject(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    path = write_llava(tmp_path / "a", ROWS)
    found = scienceqa.score(path, "llava", data, "official", custom=True, limit=1)
    assert [v.key for v in found.verdicts] == ["4", "5", "11"]


# --- with GPT-4 -------------------------------------------------------------------------------------------------------

OURS = {
    "4": "The answer is B.",
    "5": "The answer is A.",
    "11": "The answer is A.",
    "15": "no",
    "22": "The answer is B.",
}
GPT4 = {"4": "The answer is A.", "5": "The answer is C.", "11": "I see no picture.", "15": "The answer is A.",
        "22": "The answer is B. The answer is A."}  # fmt: skip
REQUERY = {"4": "The answer is B.", "5": "Hard to say."}


def write_ensemble(folder: Path, **members: dict[str, str]) -> Path:
    folder.mkdir()
    for name, said in members.items():
        if name == "gpt4":
            (folder / "gpt4.json").write_text(json.dumps({"outputs": said}))
        else:
            rows = [{"question_id": pid, "prompt": "", "text": text} for pid, text in said.items()]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_gpt4_answers_where_it_can(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "both", ours=OURS, gpt4=GPT4)
    assert scienceqa.recognise(folder) == "ensemble"
    found = scienceqa.score(folder, "ensemble", write_release(tmp_path / "data"), "llava", custom=True)
    # Right: ours 4, 11, 22; GPT-4 5, 15, of which 11 and 22 are ours to answer; only 4 is lost.
    assert {name: found.metrics[name] for name in ("ours", "gpt4", "complement", "upper_bound", "gpt4_failed")} == {
        "ours": 60, "gpt4": 40, "complement": 80, "upper_bound": 100, "gpt4_failed": 40
    }  # fmt: skip
    assert (found.score, found.metrics["accuracy"], found.metrics["LAN"]) == (80, 80, 0)
    assert found.printed["GPT-4-OursVisual-Correct"] == found.printed["Accuracy"] == "80.00%"
    assert found.printed["GPT-4 NO-ANS (RANDOM)"] == "40.00%"
    assert [v.why for v in found.verdicts][:3] == ["gpt4: read A", "gpt4: read C", "ours: read A"]


def test_the_judge_decides_where_it_was_asked_and_we_elsewhere(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "both", ours=OURS, gpt4=GPT4, requery=REQUERY)
    found = scienceqa.score(folder, "ensemble", write_release(tmp_path / "data"), "official", custom=True)
    # 4 by the judge, 11 and 22 by us; 5, where the judge has no answer, is ours and wrong, and so is 15.
    assert (found.score, found.metrics["judge"], found.metrics["complement"]) == (60, 60, 80)
    assert found.printed["Requery-Correct"] == "60.00%"
    assert [v.score for v in found.verdicts] == [1, 0, 1, 0, 1]


def test_what_gpt4_was_given_at_random_is_no_answer(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "both", ours=OURS, gpt4=GPT4)
    whole = {"results": {"4": 0, "5": 2, "11": 1, "15": 0, "22": 1}, "outputs": GPT4}
    (folder / "gpt4.json").write_text(json.dumps(whole))
    found = scienceqa.score(folder, "ensemble", write_release(tmp_path / "data"), "official", custom=True)
    assert (found.metrics["gpt4"], found.metrics["gpt4_failed"], found.metrics["complement"]) == (60, 40, 80)


def test_gpt4_names_its_answer_or_gave_none(tmp_path: Path) -> None:
    """A letter in front is none, unless the rule is another than that of LLaVA's scripts."""
    gpt4 = {"5": "C", "11": "B. there, but no: The answer is A."}
    folder = write_ensemble(tmp_path / "both", ours=OURS, gpt4=gpt4)
    data = write_release(tmp_path / "data")
    rights = {
        mode: scienceqa.score(folder, "ensemble", data, mode, custom=True).metrics["gpt4"]
        for mode in ("llava", "strict")
    }
    assert rights == {"llava": 20, "strict": 20}
    found = scienceqa.score(folder, "ensemble", data, "llava", custom=True)
    assert [v.why for v in found.verdicts][1:3] == ["ours: read A", "gpt4: read A"]


def test_letters_are_combined_where_the_first_are_missing() -> None:
    ours = {"1": "A", "2": "B", "3": None, "4": "A"}
    assert combined({"1": "C", "2": None}, ours) == {"1": "C", "2": "B", "3": None, "4": "A"}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"ours": OURS}, "has ours of them; expected a folder of ours"),
        ({"ours": OURS, "gpt4": GPT4, "requery": {"99": "A"}}, "99: no question of test, to which 5 of 6"),
    ],
)
def test_ensembles_that_are_none_are_refused(members: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "both", **members)
    with pytest.raises(UserError, match=said):
        scienceqa.score(folder, "ensemble", write_release(tmp_path / "data"), "official", custom=True)


def test_ensembles_have_one_file_of_each_and_need_the_release(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "both", ours=OURS, gpt4=GPT4)
    with pytest.raises(UserError, match="say --data=DIR of ScienceQA"):
        scienceqa.score(folder, "ensemble", None, "official")
    (folder / "ours.json").write_text("{}")
    with pytest.raises(UserError, match=r"ours\.jsonl and ours\.json"):
        scienceqa.score(folder, "ensemble", tmp_path, "official")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question_id": "4", "text": "B"}\n{"question_id": "4", "text": "B"}', "4: answered twice"),
        ('{"question_id": "4", "text": "B"}\n{"question_id": "9", "text": "B"}', "9: no question of test"),
        ('{"question_id": "4", "text": "B"}\n{"question_id": "1", "text": "B"}', "1: no .* of test, to which 1 of 2"),
        ('{"question_id": "4"}', "line 1: lacks text"),
        ('{"4": "B", "4": "A"}', "4 is there twice"),
        ('{"results": {"4": "B"}}', "results, 4: 'B', expected the index"),
        ('{"results": {"4": 1.5}}', "results, 4: 1.5, expected the index"),
        ('{"results": {"4": 1}, "outputs": {"5": "B"}}', "of different questions"),
        ('{"results": {}}', "no predictions"),
        ('{"outputs": {}}', "no predictions"),
        ('{"correct": [1], "incorrect": []}', "correct, 1: lacks question_id"),
        ("{}", "empty"),
        ("", "empty"),
        ('{"4": "B", ', "line 1: not readable as JSON"),
    ],
)  # fmt: skip
def test_broken_or_foreign_predictions_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path, data = tmp_path / "a.json", write_release(tmp_path / "data")
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        scienceqa.score(path, scienceqa.recognise(path) or "", data, "official", custom=True)


@pytest.mark.parametrize("text", ['{"4": 1}', '[{"other": 1}]', '{"outputs": [1]}'])
def test_what_is_none_of_the_formats_is_not_recognised(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert scienceqa.recognise(tmp_path / "a.json") is None


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"hit": ["0", "2", "1"]}, "1: hit is '2'"),
        ({"answer": ["C", "F", "B"]}, "1: the answer is 'F', expected one of A, B, C"),
    ],
)
def test_a_damaged_table_is_refused(columns: dict[str, list[str]], said: str, tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / "a.json", ROWS, **columns)
    with pytest.raises(UserError, match=said):
        scienceqa.score(path, "vlmevalkit", None, "vlmevalkit", custom=True)


def test_a_part_of_a_split_is_named_unless_it_is_ones_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 questions, splits have \[2017, 2097, 6218\]"):
        scienceqa.score(write_vlmevalkit(tmp_path / "a.tsv", ROWS), "vlmevalkit", None, "vlmevalkit")
    with pytest.raises(UserError, match=r"5 questions, splits have \[4241, 12726\]"):
        scienceqa.score(write_output(tmp_path / "a.json", ROWS), "llava", None, "llava")


def test_another_right_answer_than_the_releases_is_refused(tmp_path: Path) -> None:
    path = write_output(tmp_path / "a.json", [(*ROWS[0][:3], 0, *ROWS[0][4:]), *ROWS[1:]])
    with pytest.raises(UserError, match="the right answer is 'A' there and 'B' in the data"):
        scienceqa.score(path, "llava", write_release(tmp_path / "data"), "llava", custom=True)


# --- the release ------------------------------------------------------------------------------------------------------


def test_a_release_of_another_size_is_named(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    with pytest.raises(
        UserError, match=r"test has 5 questions, 3 with a picture; released were 4,241 and 2,017"
    ):
        scienceqa.load(data)
    assert len(scienceqa.load(data, custom=True)) == 5
    assert [q.key for q in scienceqa.load(data, custom=True, split="minitest")] == ["4", "5"]


def test_a_release_lies_in_the_folder_or_where_its_repository_has_it(tmp_path: Path) -> None:
    write_release(tmp_path / "data" / "scienceqa")
    assert len(scienceqa.load(tmp_path, custom=True)) == 5
    with pytest.raises(UserError, match=r"no problems\.json"):
        scienceqa.load(tmp_path / "data" / "scienceqa" / "images", custom=True)


def test_without_pid_splits_a_problems_own_split_counts(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    (data / "pid_splits.json").unlink()
    assert [q.key for q in scienceqa.load(data, custom=True)] == ["4", "5", "11", "15", "22"]
    assert [q.key for q in scienceqa.load(data, custom=True, split="train")] == ["1"]


def test_a_release_has_all_its_pictures_or_none(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    assert not any(question.pictures for question in scienceqa.load(data, custom=True))
    write_pictures(data)
    found = {q.key: q.pictures for q in scienceqa.load(data, custom=True)}
    assert [key for key, pictures in found.items() if pictures] == ["5", "11", "22"]
    assert found["5"][0].read() == b"picture of 5"
    assert found["5"][0].name == "test/5/image.png"
    (data / "images" / "test" / "5" / "image.png").unlink()
    with pytest.raises(UserError, match=r"5/image\.png: not there; fetch ScienceQA's test\.zip again"):
        scienceqa.load(data, custom=True)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("problems.json", {"5": 1}, r"problems\.json: 5: lacks question"),
        ("problems.json", {"5": {"question": ""}}, "5: lacks choices, answer"),
        ("problems.json", {"5": problem((*ROWS[1][:3], 3, *ROWS[1][4:]))}, "5: the answer is 3"),
        ("problems.json", {"5": problem((*ROWS[1][:3], "C", *ROWS[1][4:]))}, "5: the answer is 'C'"),  # type: ignore[arg-type]
        ("pid_splits.json", {"test": ["4", "4"]}, "test is empty or has a question twice"),
        ("pid_splits.json", {"test": []}, "test is empty"),
        ("pid_splits.json", {"test": ["4", "6", "7"]}, "lacks 2 questions of test, 6, 7"),
        ("pid_splits.json", {"test": "4"}, "test: expected a list of questions"),
    ],
)  # fmt: skip
def test_a_broken_release_is_refused(file: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_release(tmp_path) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        scienceqa.load(tmp_path, custom=True)


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split dev; it has train, val, test, minitest"):
        scienceqa.load(write_release(tmp_path), custom=True, split="dev")


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "hinted", "bare"),
    [
        ("llava", "Context: Look.\nIt is.\nWhat?\nA. tea\nB. ice\nC. oil\n", "Who?\nA. she\nB. he\n"),
        ("qcm_lea", "What?\nContext: Look.\nIt is.\nOptions: (A) tea (B) ice (C) oil",
         "Who?\nContext: N/A\nOptions: (A) she (B) he"),
        ("plain", "Question: What?\nContext: Look.\nIt is.\nOptions: (A) tea (B) ice (C) oil\nAnswer:",
         "Question: Who?\nContext: N/A\nOptions: (A) she (B) he\nAnswer:"),
        ("vlmevalkit", "Hint: Look.\nIt is.\nQuestion: What?\nOptions:\nA. tea\nB. ice\nC. oil\n",
         "Question: Who?\nOptions:\nA. she\nB. he\n"),
    ],
)  # fmt: skip
def test_prompts(style: str, hinted: str, bare: str, tmp_path: Path) -> None:
    request = {
        "llava": "Answer with the option's letter from the given choices directly.",
        "vlmevalkit": "Please select the correct answer from the options above. \n",
    }.get(style, "")
    questions = scienceqa.load(write_release(tmp_path), custom=True)
    assert scienceqa.prompt(questions[1], style) == hinted + request
    assert scienceqa.prompt(questions[0], style) == bare + request


# --- any text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", scienceqa.MODES)
@given(said=st.text(), scheme=st.sampled_from(["{}", "The answer is {}.", "{}. ", "\n{}"]))
@settings(deadline=None, max_examples=40)
def test_no_string_breaks_a_parser(
    tmp_path_factory: pytest.TempPathFactory, mode: str, said: str, scheme: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = write_release(folder / "data")
    path = write_texts(folder / "a.json", [(*ROWS[1][:8], scheme.format(said))])
    found = scienceqa.score(path, "texts", data, mode, custom=True)
    assert sum(verdict.score for verdict in found.verdicts) in (0, 1)
    assert found.missing == found.n - 1


@given(content=st.one_of(st.binary(max_size=40), st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.dictionaries(
        st.sampled_from(["results", "outputs", "correct", "incorrect", "4", "key", "question_id", "text"]), inner)
    | st.lists(inner, max_size=2), max_leaves=6,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_any_file_is_scored_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    path, data = folder / "a.json", write_release(folder / "data")
    path.write_bytes(content)
    try:
        format = scienceqa.recognise(path)
        if format is not None:
            scienceqa.score(path, format, data, "official", custom=True)
    except UserError:
        pass
