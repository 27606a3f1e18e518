"""MMBench: circular evaluation from every format, and what is no MMBench."""

from __future__ import annotations

import base64
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
from vflax.evaluate import mmbench, mmbench_data
from vflax.evaluate.predictions import Said
from vflax.evaluate.question import Question

NAMES = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "split")
Row = dict[str, Any]


def passes(index: int, question: str, hint: str, groups: tuple[str, str, str], *rows: str) -> list[Row]:
    """Rows of a question: "A|B|C|D > answer > prediction" each."""
    found = []
    for number, row in enumerate(rows):
        options, answer, prediction = row.split(" > ")
        cells = [*options.split("|"), "", "", ""][:4]
        values = (number * 1_000_000 + index, question, hint, *cells, answer, *groups)
        found.append({**dict(zip(NAMES, values, strict=True)), "prediction": prediction})
    return found


# Right are: 1 in both passes; 2 in two of three; 7, of which the last option stays, in two of three.
ROWS = [
    *passes(
        1, "What colour?", "", ("image_style", "coarse_perception", "dev"),
        "red|blue > A > A",
        "blue|red > B > It is red.",
    ),
    *passes(
        2, "How many?", "Count them.", ("future_prediction", "logic_reasoning", "dev"),
        "None|two|three > B > B",
        "two|three|None > A > C",
        "three|None|two > C > C",
    ),
    *passes(
        7, "Who?", "", ("social_relation", "relation_reasoning", "test"),
        "Ann|Bob|Eve|all of them > C > C",
        "Bob|Eve|Ann|all of them > B > B.",
        "Eve|Ann|Bob|all of them > A > I do not know",
    ),
]  # fmt: skip
PICTURE = base64.b64encode(b"a picture of something" * 5).decode()


def of(rows: list[Row], *names: str) -> list[Row]:
    """The rows with these columns alone."""
    return [{name: row[name] for name in names} for row in rows]


def write_table(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".json":
        rows = [{**row, "D": row.get("D") or None} for row in rows]
    return tables.write(path, list(rows[0]), [list(row.values()) for row in rows])


def write_release(folder: Path, rows: list[Row] = ROWS) -> Path:
    """As MMBench's TSV; passes after the first have its picture."""
    own = [
        {**row, "image": PICTURE if row["index"] < 1_000_000 else str(row["index"] % 1_000_000)}
        for row in of(rows, *NAMES)
    ]
    write_table(folder / "MMBench_DEV_EN.tsv", own)
    return folder


def write_llava(path: Path, rows: list[Row]) -> Path:
    lines = []
    for row in rows:
        options = [row[letter] for letter in "ABCD" if row[letter]]
        shown = options[: options.index("None")] if "None" in options else options
        line = {"question_id": row["index"], "round_id": 0, "prompt": row["question"], "text": row["prediction"],
                "options": shown, "option_char": list("ABCD")[: len(shown)]}  # fmt: skip
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def write_vflax(path: Path, rows: list[Row]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"key": str(row["index"]), "prediction": row["prediction"]}) + "\n" for row in rows
        )
    )
    return path


FILES: dict[str, tuple[str, Callable[[Path, list[Row]], Path]]] = {
    "model_MMBench_DEV_EN.tsv": ("vlmevalkit", write_table),
    "model_MMBench_DEV_EN.xlsx": ("vlmevalkit", write_table),
    "model_MMBench_DEV_EN.json": ("vlmevalkit", write_table),
    "answers.jsonl": ("llava", write_llava),
    "own.jsonl": ("vflax", write_vflax),
}


def score(path: Path, mode: str = "official", data: Path | None = None, custom: bool = True) -> Any:
    format = mmbench.recognise(path)
    assert format is not None
    return mmbench.score(path, format, data, mode, custom=custom)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    format, write = FILES[name]
    path, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    assert mmbench.recognise(path) == format
    found = score(path, data=data)
    assert found.score == found.metrics["circular"] == pytest.approx(100 / 3)
    assert (found.metrics["first_pass"], found.metrics["every_pass"]) == (100, 75)
    assert (found.n, found.missing, found.unparsed) == (8, 0, 1)
    assert found.groups["split"] == {
        "dev": {"n": 2, "circular": 50, "first_pass": 100},
        "test": {"n": 1, "circular": 0, "first_pass": 100},
    }
    assert {key: own["circular"] for key, own in found.groups["l2-category"].items()} == {
        "CP": 100, "LR": 0, "RR": 0,
    }  # fmt: skip
    assert found.groups["category"]["image_style"] == {"n": 1, "circular": 100, "first_pass": 100}
    assert found.manifest["questions"] == 3


def test_shares_are_printed_as_in_vlmevalkits_tables(tmp_path: Path) -> None:
    rows = [*ROWS, *passes(9, "?", "", ("ocr", "coarse_perception", "dev"), "a b|c d > A > B")]
    found = score(write_table(tmp_path / "a.tsv", rows))
    assert found.printed == {
        "dev Overall": "0.3333333333333333", "dev CP": "0.5", "dev LR": "0.0", "dev future_prediction": "0.0",
        "dev image_style": "1.0", "dev ocr": "0.0", "vanilla_0_dev Overall": "0.6666666666666666",
        "vanilla_dev Overall": "0.6666666666666666",
        "test Overall": "0.0", "test RR": "0.0", "test social_relation": "0.0", "vanilla_0_test Overall": "1.0",
        "vanilla_test Overall": "0.6666666666666666",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".tsv", ".xlsx", ".json"])
def test_a_table_with_answers_needs_no_release(suffix: str, tmp_path: Path) -> None:
    assert score(write_table(tmp_path / f"a{suffix}", ROWS)).score == pytest.approx(100 / 3)


def test_the_table_that_llavas_converter_makes_has_no_categories(tmp_path: Path) -> None:
    rows = of(ROWS, "index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    path = write_table(tmp_path / "llava-v1.5-13b.xlsx", rows)
    found = mmbench.score(path, "llava", None, "llava", custom=True)
    assert found.score == pytest.approx(100 / 3)
    assert list(found.groups) == ["split"]
    assert score(path, data=write_release(tmp_path / "data")).groups["l2-category"]["CP"]["circular"] == 100


@pytest.mark.parametrize("name", ["answers.jsonl", "own.jsonl"])
def test_other_formats_need_the_release(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say --data=DIR of MMBench"):
        score(FILES[name][1](tmp_path / name, ROWS))


def test_a_table_without_answers_needs_it_too(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv", of(ROWS, "index", "question", "A", "B", "C", "D", "prediction"))
    with pytest.raises(UserError, match=r"say --data=DIR of MMBench\. Of a test split only its server"):
        score(path)
    assert score(path, data=write_release(tmp_path / "data")).score == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("mode", "circular"), [("official", 100), ("llava", 0), ("vlmevalkit", 0), ("strict", 100)]
)
def test_pandas_loses_an_option_called_none(mode: str, circular: float, tmp_path: Path) -> None:
    rows = passes(
        3, "Which?", "", ("ocr", "coarse_perception", "dev"), "None|two > A > A", "two|None > B > B"
    )
    assert score(write_table(tmp_path / "a.tsv", rows), mode).score == circular


def test_an_answer_called_none_is_text_only_where_pandas_did_not_read_it(tmp_path: Path) -> None:
    rows = passes(3, "Which?", "", ("ocr", "coarse_perception", "dev"), "None|two > A > None")
    path = write_table(tmp_path / "a.tsv", rows)
    assert (score(path).score, score(path).unparsed) == (100, 0)
    assert (score(path, "vlmevalkit").score, score(path, "vlmevalkit").unparsed) == (0, 1)


def test_strict_takes_letters_alone(tmp_path: Path) -> None:
    found = score(write_table(tmp_path / "a.tsv", ROWS), "strict")
    assert (found.score, found.unparsed) == (0, 2)
    assert found.metrics["first_pass"] == 100


def test_a_refusal_is_read_and_wrong(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "prediction": "Cannot determine the answer"}, *ROWS[1:]]
    found = score(write_table(tmp_path / "a.tsv", rows))
    assert (found.score, found.unparsed, found.verdicts[0].parsed) == (0, 1, "Z")


def test_a_judges_hits_of_passes_count_for_vlmevalkit_alone(tmp_path: Path) -> None:
    rows = [{**row, "hit": number != 4, "log": "Match Log: A. "} for number, row in enumerate(ROWS)]
    path = write_table(tmp_path / "model_MMBench_DEV_EN_EM_vanilla.tsv", rows)
    found = score(path, "vlmevalkit")
    assert found.score == pytest.approx(200 / 3)  # 7 is right: the judge read its third pass
    assert (found.metrics["every_pass"], found.unparsed) == (87.5, 0)
    assert score(path, "official").score == pytest.approx(100 / 3)


# As mcq_circular_eval writes it: a row for each question; the judge has read 7 throughout.
RESULTS = [
    {**row, "hit": hit, "log": "Succeed During Pre-fetching"}
    for row, hit in zip((ROWS[0], ROWS[2], ROWS[5]), (1, 0, 1), strict=True)
]


@pytest.mark.parametrize("mode", ["official", "vlmevalkit"])
@pytest.mark.parametrize("with_data", [True, False])
def test_hits_of_questions_are_the_circular_score(mode: str, with_data: bool, tmp_path: Path) -> None:
    path = write_table(tmp_path / "model_MMBench_DEV_EN_openai_result.xlsx", RESULTS)
    found = score(path, mode, write_release(tmp_path / "data") if with_data else None)
    assert found.score == pytest.approx(200 / 3)
    assert found.metrics["first_pass"] == 100
    assert (found.n, found.missing, found.manifest["hits_of_the_file"]) == (3, 0, True)
    assert found.printed["dev Overall"] == "0.5"
    assert "every_pass" not in found.metrics


@pytest.mark.parametrize("mode", ["llava", "strict"])
def test_hits_of_questions_are_no_predictions(mode: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"not the predictions of all passes, which --mode={mode} needs"):
        score(write_table(tmp_path / "a_result.tsv", RESULTS), mode)


def test_hits_of_first_passes_are_not_taken_for_questions(tmp_path: Path) -> None:
    rows = [{**row, "log": "Match Log: A. "} for row in RESULTS]
    with pytest.raises(UserError, match="hits of first passes alone"):
        score(write_table(tmp_path / "a_vanilla_circ0_result.tsv", rows), "vlmevalkit")


def test_a_set_asked_once_is_scored_by_what_was_said(tmp_path: Path) -> None:
    once = [{**row, "prediction": "B"} for row in RESULTS]
    path, data = write_table(tmp_path / "a.tsv", once), write_release(tmp_path / "data", once)
    assert score(path, "official", data).score == pytest.approx(100 / 3)
    assert score(path, "vlmevalkit", data).score == pytest.approx(200 / 3)


def test_a_hit_is_0_or_1(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index 1: hit is '0\.5', expected 0 or 1"):
        score(write_table(tmp_path / "a.tsv", [{**row, "hit": 0.5} for row in RESULTS]))


def test_groups_are_those_of_the_file_where_it_names_them(tmp_path: Path) -> None:
    rows = [
        {**row, "g_index": 1 if row["index"] % 1_000_000 == 7 else row["index"] % 1_000_000} for row in ROWS
    ]
    found = score(write_table(tmp_path / "a.tsv", rows))
    assert (found.score, found.manifest["questions"]) == (0, 2)


def test_a_pass_without_prediction_is_wrong_and_counted(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    found = score(write_llava(tmp_path / "a.jsonl", [ROWS[0], *ROWS[2:]]), data=data)
    assert (found.n, found.missing, found.score, found.metrics["first_pass"]) == (8, 1, 0, 100)


def test_a_limit_counts_questions_of_each_split_with_all_their_passes(tmp_path: Path) -> None:
    found = mmbench.score(
        write_table(tmp_path / "a.tsv", ROWS), "vlmevalkit", None, "official", custom=True, limit=1
    )
    assert (found.n, found.score, found.manifest["limit"]) == (5, 50, 1)


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows = list(ROWS)
    random.Random(0).shuffle(rows)
    straight = score(write_table(tmp_path / "a.tsv", ROWS))
    shuffled = score(write_table(tmp_path / "b.tsv", rows))
    assert (shuffled.metrics, shuffled.printed) == (straight.metrics, straight.printed)
    assert (shuffled.intervals, shuffled.verdicts) == (straight.intervals, straight.verdicts)


@pytest.mark.parametrize("name", ["answers.jsonl", "own.jsonl", "a.tsv"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "answered twice"),
        (lambda rows: [{**rows[0], "index": 5}, *rows[1:]], "5: no question of this MMBench"),
    ],
)
def test_predictions_that_do_not_fit_the_release_are_refused(
    name: str, change: Callable[[list[Row]], list[Row]], said: str, tmp_path: Path
) -> None:
    write = FILES.get(name, ("", write_table))[1]
    with pytest.raises(UserError, match=said):
        score(write(tmp_path / name, change(ROWS)), data=write_release(tmp_path / "data"))


def test_another_right_answer_than_the_releases_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv", [{**ROWS[0], "answer": "B"}, *ROWS[1:]])
    with pytest.raises(UserError, match="the right answer is 'B' there and 'A' in the data"):
        score(path, data=write_release(tmp_path / "data"))


def test_other_options_than_the_releases_are_refused(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a.jsonl", [{**ROWS[0], "B": "green"}, *ROWS[1:]])
    with pytest.raises(UserError, match="question_id 1 has other options than the data"):
        score(path, data=write_release(tmp_path / "data"))


def test_options_that_llava_has_shifted_again_are_refused(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text().replace('"round_id": 0', '"round_id": 1', 1))
    with pytest.raises(UserError, match=r"line 1: round 1 of --all-rounds"):
        score(path, data=write_release(tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "index 1 is there twice"),
        (lambda rows: [{**rows[0], "answer": "AB"}, *rows[1:]], "the answer is 'AB', expected a letter"),
        (lambda rows: [{**rows[0], "index": "one"}, *rows[1:]], "the index 'one' is no whole number"),
        (lambda rows: [{**rows[0], "index": 1.5}, *rows[1:]], r"the index '1\.5' is no whole number"),
        (lambda rows: of(rows, "index", "answer", "prediction"), "lacks A, B"),
        (lambda rows: of(rows, "index", "answer"), "lacks prediction"),
    ],
)
def test_a_table_that_is_none_is_refused(
    change: Callable[[list[Row]], list[Row]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        score(write_table(tmp_path / "a.tsv", change(ROWS)))


def test_a_part_of_a_release_is_named_unless_it_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = write_table(tmp_path / "a.tsv", ROWS), write_release(tmp_path / "data")
    results = write_table(tmp_path / "a_result.tsv", RESULTS)
    for wrong in (
        lambda: mmbench.load(data),
        lambda: score(path, custom=False),
        lambda: score(results, custom=False),
    ):
        with pytest.raises(
            UserError, match=r"[38] rows, as no release of MMBench has(?s:.*)4,329 \(1,164 que"
        ):
            wrong()
    monkeypatch.setattr(mmbench_data, "_RELEASES", ((8, 3, "a test's"),))
    assert len(mmbench.load(data)) == 8
    assert score(path, custom=False).manifest["version"].startswith("a test's; 8 rows")
    assert score(results, custom=False).manifest["version"].startswith("a test's; 3 rows")


def test_a_release_of_unknown_size_is_known_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_release(tmp_path)
    monkeypatch.setattr(mmbench_data, "_FILES", {mmbench_data._md5(data / "MMBench_DEV_EN.tsv"): "a test's"})
    assert len(mmbench.load(data)) == 8


def test_a_test_split_can_be_asked_and_not_scored(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data", [{**row, "answer": ""} for row in ROWS])
    assert [question.answer for question in mmbench.load(data, custom=True)] == [""] * 8
    with pytest.raises(UserError, match=r"8 of 8 rows have no right answer: .* Upload the predictions there"):
        score(write_vflax(tmp_path / "own.jsonl", ROWS), data=data)


@pytest.mark.parametrize("secret", ["", "nan"])
def test_a_table_with_secret_answers_among_others_is_refused(secret: str, tmp_path: Path) -> None:
    rows = [{**row, "answer": secret if row["split"] == "test" else row["answer"]} for row in ROWS]
    with pytest.raises(UserError, match=r"a\.tsv: 3 of 8 rows have no right answer"):
        score(write_table(tmp_path / "a.tsv", rows))


def test_a_release_has_its_pictures_and_keeps_none_apart_from_nothing(tmp_path: Path) -> None:
    questions = mmbench.load(write_release(tmp_path), custom=True)
    assert {question.pictures[0].read() for question in questions} == {b"a picture of something" * 5}
    assert [question.pictures[0].name for question in questions if question.unit == "2"] == ["2.jpg"] * 3
    assert questions[1].options == {"A": "None", "B": "two", "C": "three"}
    assert questions[0].options == {"A": "red", "B": "blue"}


def test_a_picture_of_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="index 1000001: its picture is that of index 1, which is not there"):
        mmbench.load(write_release(tmp_path, ROWS[1:]), custom=True)


def test_a_picture_that_is_cut_off_is_named(tmp_path: Path) -> None:
    rows = [{**row, "image": PICTURE[:-3]} for row in ROWS]
    question = mmbench.load(write_table(tmp_path / "cut" / "MMBench_DEV_EN.tsv", rows), custom=True)[0]
    with pytest.raises(UserError, match="index 1: its picture is no base64"):
        question.pictures[0].read()


def test_a_cell_that_pandas_left_empty_in_words_is_no_option(tmp_path: Path) -> None:
    rows = passes(
        3, "What is it?", "", ("ocr", "coarse_perception", "dev"), "apple|pear|nan > B > a banana or a pear"
    )
    found = score(write_table(tmp_path / "a.tsv", rows))
    assert (found.score, found.verdicts[0].parsed) == (100, "B")


def test_a_folder_of_several_files_is_asked_about(tmp_path: Path) -> None:
    write_release(tmp_path)
    write_table(tmp_path / "MMBench_TEST_EN.tsv", ROWS)
    with pytest.raises(UserError, match=r"MMBench_DEV_EN\.tsv, MMBench_TEST_EN\.tsv; name the file"):
        mmbench.load(tmp_path, custom=True)
    assert len(mmbench.load(tmp_path / "MMBench_DEV_EN.tsv", custom=True)) == 8


def test_of_vlmevalkits_folder_the_predictions_are_taken(tmp_path: Path) -> None:
    write_table(tmp_path / "model_MMBench_DEV_EN.xlsx", ROWS)
    write_table(tmp_path / "model_MMBench_DEV_EN_exact_matching_result.xlsx", RESULTS)
    (tmp_path / "model_MMBench_DEV_EN_acc.csv").write_text("split,Overall\n")
    write_table(tmp_path / "model_MME.xlsx", ROWS[:1])
    found = mmbench.score(tmp_path, mmbench.recognise(tmp_path) or "", None, "official", custom=True)
    assert found.n == 8


def test_each_style_asks_in_its_own_words(tmp_path: Path) -> None:
    questions = {question.key: question for question in mmbench.load(write_release(tmp_path), custom=True)}
    ends = "Answer with the option's letter from the given choices directly."
    assert mmbench.prompt(questions["1"], "llava") == f"What colour?\nA. red\nB. blue\n{ends}"
    # LLaVA's options end at one called None.
    assert mmbench.prompt(questions["2"], "llava") == f"Count them.\nHow many?\n{ends}"
    assert (
        mmbench.prompt(questions["1000002"], "llava") == f"Count them.\nHow many?\nA. two\nB. three\n{ends}"
    )
    assert mmbench.prompt(questions["2"], "vlmevalkit") == (
        "Hint: Count them.\nQuestion: How many?\nOptions:\nB. two\nC. three\n"
        "Please select the correct answer from the options above. \n"
    )
    assert mmbench.prompt(questions["2"], "plain") == (
        "Count them. How many? There are several options:\nA. None\nB. two\nC. three\n"
    )


def test_llava_asks_in_chinese_where_the_question_is(tmp_path: Path) -> None:
    rows = passes(3, "哪个?", "", ("ocr", "coarse_perception", "dev"), "一|二 > A > A")
    question = mmbench.load(write_release(tmp_path, rows), custom=True)[0]
    assert mmbench.prompt(question, "llava") == "哪个?\nA. 一\nB. 二\n请直接回答选项字母。"


def test_llava_asks_in_english_about_chinese_options(tmp_path: Path) -> None:
    rows = passes(3, "What is written?", "", ("ocr", "coarse_perception", "dev"), "一|二 > A > A")
    question = mmbench.load(write_release(tmp_path, rows), custom=True)[0]
    assert mmbench.prompt(question, "llava").endswith(
        "\nB. 二\nAnswer with the option's letter from the given choices directly."
    )


def test_what_is_of_no_format_is_not_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"other": 1}')
    assert mmbench.recognise(path) is None


@settings(deadline=None, max_examples=50)
@given(st.text(), st.sampled_from(list(mmbench.MODES)))
def test_no_answer_breaks_a_mode(text: str, mode: str) -> None:
    question = Question("1", "", "A", {}, "1", (), {"A": "None", "B": text})
    verdict = mmbench._verdict(question, Said("1", text), mode, None)
    assert verdict.parsed in ("A", "B", "Z", None)
    assert verdict.score in (0, 1)


@pytest.mark.real_data
def test_the_samples_of_mmbenchs_repository(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "benchmarks" / "mmbench"
    questions = mmbench.load(data)
    assert len({question.groups["category"] for question in questions}) == 20
    assert {question.groups["l2-category"] for question in questions} == set(mmbench_data.ABILITIES.values())
    assert [len(question.options or {}) for question in questions].count(3) == 2
    assert all(question.pictures[0].read()[:2] == b"\xff\xd8" for question in questions)  # JPEG
    lines = [json.dumps({"question_id": int(q.key), "text": "A"}) for q in questions]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    found = score(path, "llava", data, custom=False)
    # Six answers are A, of one pass each.
    assert (found.score, found.metrics["first_pass"], found.n) == (30, 30, 20)
    assert found.printed["dev Overall"] == "0.3"


def test_a_null_answer_of_llava_s_is_missing(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a.jsonl", ROWS)
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**first, "text": None}, *others)))
    found = mmbench.score(path, "llava", write_release(tmp_path / "data"), "official", custom=True)
    assert found.missing == 1
