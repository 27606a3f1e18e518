"""LLaVA-Bench: its scripts' numbers from every format, what a judge is told and how it is read, and what is none."""

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
from vflax.evaluate import llava_bench, score
from vflax.evaluate.files import json_lines
from vflax.evaluate.judging import Request
from vflax.evaluate.llava_bench_data import BenchQuestion

# (question, category, GPT-4's grade, the model's): means 8 and 6, of conv 9 and 6.5, of detail 7 and 5.5.
ROWS: list[tuple[int, str, float, float]] = [
    (0, "conv", 10, 5),
    (1, "detail", 8, 6),
    (2, "conv", 8, 8),
    (3, "detail", 6, 5),
]
# Reviews of LLaVA-1.5 in the wild, from LLaVA's eval.zip: the category of each question, and grades.
CATEGORIES = "cdxxccdxdxxccxdxcdxdxcxxxdxcccdxcxxxcdxdxcxcxdxdxcxcdxcdxdxx"
NAMES = {"c": "conv", "d": "detail", "x": "complex"}
REVIEWS_13B = (
    "8 10;9 6.5;8 6;9 8.5;9 2;9 2;9 6;8 7.5;9 7;8 9;8 9;10 10;8 9;9 7;8 3;8 9;9 8.5;9 6;9 8.5;8 4;9 8.5;"
    "8 9;8 7.5;9 7.5;9 8.5;9 6;8 7;9 9;10 10;9 2;9 3;8 5;10 10;9 7.5;6 9;9 6;8 4;9 3;9 4;9 3;9 2;9 1;9 6;"
    "9 7;9 7;9 2;9 6;8 5;9 5;4 6;9 6;9 1;9 5;8 9;10 10;9 6;9 7;9 4;9 9;8 6",
    "7 9;9 6;8 6;9 8.5;9 2;9 1;9 4;8 7.5;9 7;8 9;8 9;10 10;8 9;9 7;9 4;8 9;9 9;9 6.5;9 9;9 6;9 8.5;8 9;"
    "8 7;9 7.5;9 8.5;9 6;8 7;9 9;9 9;9 1;9 2;8 6;10 10;9 7;6 9;9 6;8 4;9 3;9 4;9 3;9 2;9 2;9 6;9 7;9 7;"
    "9 2;9 7;8 5;9 6;4 6;9 6.5;9 2;9 4;8 9;10 10;9 6;9 7;9 4;9 9;8 5",
    "7 9;9 6;8 6;9 8.5;9 2;9 2;9 4;8 7;9 7;8 9.5;8 9;10 10;8 9;9 7;8 4;8 9;9 9;9 6;9 8.5;9 4;9 8.5;8 9;"
    "8 7.5;9 7.5;9 8.5;9 6;8 7;9 9;9 9;9 2;9 3;8 6;10 10;9 7.5;6 8;9 6;9 4;9 3;9 4;9 4;9 2;9 2;9 6;9 7;"
    "9 7;8 3;9 6;9 4;9 6;6 4;9 6.5;9 1;9 4;8 9;10 10;9 6;9 7;9 4;9 9;8 6",
)
REVIEW_7B = (
    "7 9;8 6;8 6;9 8;9 2;9 2;9 2;8 7.5;9 6;8 9;9 8.5;10 10;8 6;9 7;8 7;8 9;9 8.5;9 5;9 7.5;9 4;9 7.5;9 2;"
    "8 7.5;9 7.5;9 8;8 5;8 6;9 9;9 2;9 2;9 4;8 6;10 10;9 6.5;5 7;9 6;9 4;9 2;9 2;9 3;9 3;9 2;9 4;9 6;9 6;"
    "9 2;9 6;9 2;9 7;7 4;9 6;9 1;9 3;8 7;10 10;9 6;9 7;9 6;9 9;8 4"
)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def review(rows: list[tuple[int, str, float, float]], **more: Any) -> list[dict[str, Any]]:
    """As eval_gpt_review_bench.py writes it."""
    return [
        {
            "id": n + 1, "question_id": n, "answer1_id": "a", "answer2_id": f"b{n}",
            "category": f"llava_bench_{category}", "content": f"{first} {second}\nWhy.", "tuple": [first, second],
            **more,
        }
        for n, category, first, second in rows
    ]  # fmt: skip


def wild(grades: str) -> list[dict[str, Any]]:
    pairs = [tuple(map(float, pair.split())) for pair in grades.split(";")]
    return review([(n, NAMES[c], *pair) for n, (c, pair) in enumerate(zip(CATEGORIES, pairs, strict=True))])  # type: ignore[misc]


def write_llava(path: Path, rows: list[tuple[int, str, float, float]]) -> Path:
    return write_lines(path, review(rows))


def write_vflax(path: Path, rows: list[tuple[int, str, float, float]]) -> Path:
    return write_lines(
        path,
        [
            {"key": str(n), "prediction": "It is.", "grades": [[first, second]]}
            for n, _, first, second in rows
        ],
    )


def write_vlmevalkit(path: Path, rows: list[tuple[int, str, float, float]]) -> Path:
    names = ["index", "category", "question", "caption", "gpt4_ans", "prediction", "gpt4_score", "score"]
    cells = [[n, category, "What?", "A.", "B.", "It is.", *grades] for n, category, *grades in rows]
    return tables.write(path, names, cells)


def write_release(folder: Path, rows: list[tuple[int, str, float, float]] = ROWS) -> Path:
    asked = [
        {"question_id": n, "image": f"{n // 2}.jpg", "text": f"What is {n}?", "category": category}
        for n, category, *_ in rows
    ]
    write_lines(folder / "questions.jsonl", asked)
    write_lines(
        folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"GPT-4 says {n}"} for n, *_ in rows]
    )
    images = dict.fromkeys(row["image"] for row in asked)
    write_lines(
        folder / "context.jsonl", [{"id": image[0], "image": image, "caption": "A b."} for image in images]
    )
    rule = {
        f"llava_bench_{category}": {"role": "Assistant", "prompt": f"Rate {category}."}
        for category in NAMES.values()
    }
    (folder / "rule.json").write_text(json.dumps(rule))
    return folder


def run_of(path: Path, mode: str = "official", data: Path | None = None, *, custom: bool = True) -> Any:
    format = llava_bench.recognise(path)
    assert format is not None
    return llava_bench.score(path, format, data, mode, custom=custom)


WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "llava": ("review.jsonl", write_llava),
    "vlmevalkit": ("model_LLaVABench_openai_result.xlsx", write_vlmevalkit),
    "vflax": ("own.jsonl", write_vflax),
}


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_scripts_numbers(format: str, tmp_path: Path) -> None:
    name, write = WRITERS[format]
    path, data = write(tmp_path / name, ROWS), write_release(tmp_path / "data")
    assert llava_bench.recognise(path) == format
    found = run_of(path, data=data)
    assert found.score == found.metrics["all"] == 75
    assert found.groups["category"] == {
        "all": {"n": 4, "score": 75, "gpt4": 80, "model": 60},
        "conv": {"n": 2, "score": 72.2, "gpt4": 90, "model": 65},
        "detail": {"n": 2, "score": 78.6, "gpt4": 70, "model": 55},
    }
    assert found.printed == {"all": "75.0 80.0 60.0", "conv": "72.2 90.0 65.0", "detail": "78.6 70.0 55.0"}
    assert (found.metrics["conv/gpt4"], found.metrics["conv/model"], found.metrics["std"]) == (90, 65, 0)
    assert (found.n, found.missing, found.unparsed) == (4, 0, 0)
    assert [verdict.score for verdict in found.verdicts] == [0.5, 0.6, 0.8, 0.5]


def test_answers_tell_how_long_they_are_and_what_they_mention_that_nothing_else_does(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    answers = ["A dog and a cat.", "A dog.", "", "A bench beside a dog on a couch."]
    lines = [{"key": str(n), "prediction": answers[n], "grades": [[8, 6]]} for n in range(4)]
    contexts = json_lines(data / "context.jsonl")
    write_lines(data / "context.jsonl", [row | {"caption": "A dog on a sofa."} for row in contexts])
    found = run_of(write_lines(tmp_path / "own.jsonl", lines), data=data)
    assert found.metrics["words"] == 3.5  # 5, 2, 0, 8
    assert found.metrics["hallucinated"] == pytest.approx(100 * 2 / 6)  # cat, bench; a couch is a sofa
    assert "words" not in run_of(write_llava(tmp_path / "review.jsonl", ROWS), data=data).metrics


@pytest.mark.parametrize("suffix", ["tsv", "json"])
def test_vlmevalkit_does_not_round_means_and_prints_by_its_own_names(suffix: str, tmp_path: Path) -> None:
    found = run_of(write_vlmevalkit(tmp_path / f"a.{suffix}", ROWS), "vlmevalkit")
    assert found.metrics["conv"] == pytest.approx(100 * 6.5 / 9, abs=1e-12)
    assert found.printed["overall Relative Score (main)"] == "75.0"
    assert (found.printed["conv VLM Score"], found.printed["conv GPT4 Score"]) == ("65.0", "90.0")


def test_means_are_rounded_before_their_ratio_and_vlmevalkits_are_not(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", wild(REVIEW_7B))
    official, kit = run_of(path, custom=False), run_of(path, "vlmevalkit", custom=False)
    assert (official.score, official.printed["all"]) == (64.7, "64.7 87.0 56.3")
    assert (kit.printed["overall Relative Score (main)"], kit.score) == ("64.8", pytest.approx(64.75096))


def test_the_published_score_is_the_mean_of_three_reviews(tmp_path: Path) -> None:
    for n, grades in enumerate(REVIEWS_13B, 1):
        write_lines(tmp_path / f"eval{n}.jsonl", wild(grades))
    found = run_of(tmp_path, "llava", custom=False)
    lines = [found.printed[f"eval{n}: all"] for n in (1, 2, 3)]
    assert lines == ["72.8 86.5 63.0", "72.7 86.5 62.9", "72.1 86.8 62.6"]
    assert round(found.score, 1) == 72.5
    assert found.metrics["std"] == pytest.approx(0.3091, abs=1e-4)
    assert [row["score"] for row in found.groups["review"].values()] == [72.8, 72.7, 72.1]
    assert {name: row["n"] for name, row in found.groups["category"].items()} == {
        "all": 60, "complex": 28, "conv": 17, "detail": 15
    }  # fmt: skip


def test_the_command_needs_a_review_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(score.TASKS, "llava_bench", llava_bench)
    path, out = write_lines(tmp_path / "a.jsonl", wild(REVIEW_7B)), tmp_path / "out.json"
    assert score.main(["--task=llava_bench", f"--predictions={path}", f"--json={out}"]) == 0
    assert json.loads(out.read_text())["score"] == 64.7


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows = wild(REVIEW_7B)
    straight = run_of(write_lines(tmp_path / "a.jsonl", rows), custom=False)
    random.Random(0).shuffle(rows)
    shuffled = run_of(write_lines(tmp_path / "b.jsonl", rows), custom=False)
    assert (shuffled.metrics, shuffled.intervals) == (straight.metrics, straight.intervals)


def test_an_interval_is_of_ratios_of_means_unrounded(tmp_path: Path) -> None:
    low, high = run_of(write_lines(tmp_path / "a.jsonl", wild(REVIEW_7B)), custom=False).intervals["all"]
    assert 50 < low < 64.7 < high < 80
    assert round(low, 1) != low
    assert run_of(write_llava(tmp_path / "b.jsonl", [(n, "conv", 8, 6) for n in range(4)])).intervals[
        "all"
    ] == (75, 75)


def test_a_failed_review_counts_minus_one_by_the_official_rule_and_not_by_strict(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "a.jsonl", [*ROWS[:3], (3, "detail", -1, -1)])
    official, strict = run_of(path), run_of(path, "strict")
    # Means (10 + 8 + 8 - 1) / 4 and (5 + 6 + 8 - 1) / 4; without the last (26, 19) / 3.
    assert official.score == round(100 * 4.5 / 6.25, 1)
    assert strict.score == round(100 * 6.333 / 8.667, 1)
    assert (official.unparsed, strict.unparsed, strict.missing) == (1, 1, 0)
    assert official.verdicts[3].why == "review 1 was not read"
    own = write_vflax(tmp_path / "own.jsonl", ROWS)
    own.write_text(own.read_text().replace("[[6, 5]]", "[null]"))
    assert run_of(own, data=write_release(tmp_path / "data")).score == official.score


def test_of_several_reviews_strict_takes_those_that_were_read(tmp_path: Path) -> None:
    for name, second in (("1", (8, 6)), ("2", (-1, -1)), ("3", (8, 8))):
        write_llava(tmp_path / f"{name}.jsonl", [(0, "conv", *second), (1, "conv", 8, 8)])
    official, strict = (run_of(tmp_path, mode).verdicts[0].score for mode in ("official", "strict"))
    assert (official, strict) == (pytest.approx((6 - 1 + 8) / 30), pytest.approx((6 + 8) / 20))


def test_a_question_without_review_counts_0_for_the_model(tmp_path: Path) -> None:
    path, data = write_llava(tmp_path / "a.jsonl", ROWS[:3]), write_release(tmp_path / "data")
    found = run_of(path, data=data)
    # Means 26 / 3 and 19 / 4.
    assert (found.n, found.missing, found.score) == (4, 1, round(100 * 4.75 / 8.667, 1))
    assert run_of(write_lines(tmp_path / "b.jsonl", wild(REVIEW_7B)[1:]), custom=False).missing == 1


def test_a_prediction_that_is_null_is_missing(tmp_path: Path) -> None:
    path, data = write_vflax(tmp_path / "a.jsonl", ROWS), write_release(tmp_path / "data")
    path.write_text(path.read_text().replace('"It is."', "null", 1))
    assert run_of(path, data=data).missing == 1


def test_a_limit_is_of_each_category(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", wild(REVIEW_7B))
    found = llava_bench.score(path, "llava", None, "official", limit=2)
    assert (found.n, found.groups["category"]["detail"]["n"]) == (6, 2)


def test_reviews_of_the_first_days_have_score_and_no_category(tmp_path: Path) -> None:
    rows = [{"question_id": n, "text": "Why.", "score": [first, second]} for n, _, first, second in ROWS]
    found = run_of(write_lines(tmp_path / "a.jsonl", rows), custom=False)
    assert (found.score, list(found.groups["category"])) == (75, ["all"])
    rows = [{**row, "category_id": "conv" if n < 2 else "generic"} for n, row in enumerate(rows)]
    found = run_of(write_lines(tmp_path / "b.jsonl", rows), custom=False)
    assert list(found.groups["category"]) == ["all", "conv", "generic"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("answers.jsonl", '{"question_id": 0, "prompt": "What?", "text": "It is.", "answer_id": "a"}\n'),
        ("own.jsonl", '{"key": "0", "prediction": "It is."}\n'),
        ("model_LLaVABench.tsv", "index\tcategory\tprediction\n0\tconv\tIt is.\n"),
    ],
)
def test_predictions_without_grades_name_the_judge_step(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"run the judge step of python -m vflax\.evaluate"):
        run_of(tmp_path / name, data=write_release(tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "0 is there twice"),
        (lambda rows: [*rows, (9, *rows[0][1:])], "9: no question of this LLaVA-Bench"),
        (lambda rows: [(0, "detail", *rows[0][2:]), *rows[1:]], "question 0 is detail there, and conv in LLaVA-Bench"),
        (lambda rows: [(0, "conv", 8, "ten"), *rows[1:]], "question 0: the grade is 'ten', expected a number"),
        (lambda rows: [(0, "conv", 8, float("inf")), *rows[1:]], "question 0: the grade is inf"),
        (lambda rows: [], "empty"),
    ],
)  # fmt: skip
def test_reviews_that_do_not_fit_the_release_are_refused(
    change: Callable[[list[Any]], list[Any]], said: str, tmp_path: Path
) -> None:
    path, data = write_llava(tmp_path / "a.jsonl", change(list(ROWS))), write_release(tmp_path / "data")
    with pytest.raises(UserError, match=said):
        llava_bench.score(path, "llava", data, "official", custom=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": 0, "category": "conv", "tuple": [8]}, "expected two numbers"),
        ({"question_id": 0, "category": "conv", "tuple": "8 9"}, "expected two numbers"),
        ({"id": 1, "tuple": [8, 9]}, "line 1: lacks question_id"),
        ({"key": "0", "prediction": "It is.", "grades": [[8, 9], [8]]}, "expected two numbers"),
        ({"key": "0", "prediction": "It is.", "grades": 3}, "grades is 3, expected a list"),
        ({"key": "0", "grades": [[8, 9]]}, "lacks prediction"),
    ],
)
def test_broken_rows_are_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path, data = write_lines(tmp_path / "a.jsonl", [row]), write_release(tmp_path / "data")
    format = "vflax" if "key" in row else "llava"
    with pytest.raises(UserError, match=said):
        llava_bench.score(path, format, data, "official", custom=True)


def test_answers_graded_unequally_often_are_refused(tmp_path: Path) -> None:
    path, data = write_vflax(tmp_path / "a.jsonl", ROWS), write_release(tmp_path / "data")
    path.write_text(path.read_text().replace("[[6, 5]]", "[[6, 5], [6, 6]]"))
    with pytest.raises(UserError, match="3 has 2 grades"):
        run_of(path, data=data)


def test_a_folder_is_of_one_models_answers_all_reviewed(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", review(ROWS))
    write_lines(tmp_path / "b.jsonl", review(ROWS, answer2_id="another"))
    with pytest.raises(
        UserError, match=r"b\.jsonl: question 0 has answer2_id another.*reviews of one model in a"
    ):
        run_of(tmp_path)
    write_lines(tmp_path / "b.jsonl", review(ROWS[:3]))
    with pytest.raises(UserError, match=r"b\.jsonl: no review of question 3"):
        run_of(tmp_path)
    write_lines(tmp_path / "b.jsonl", review([(0, "detail", 8, 8), *ROWS[1:]]))
    with pytest.raises(UserError, match="question 0 has category llava_bench_detail"):
        run_of(tmp_path)


def test_what_is_none_of_the_formats_is_not_recognised(tmp_path: Path) -> None:
    assert llava_bench.recognise(write_lines(tmp_path / "a.json", [{"other": 1}])) is None
    assert llava_bench.recognise(tmp_path) is None


@pytest.mark.parametrize("format", llava_bench.FORMATS)
def test_a_format_that_it_is_not_is_refused(format: str, tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    paths = {
        own: write(tmp_path / own / name, ROWS) for own, (name, write) in WRITERS.items() if own != format
    }
    (tmp_path / "empty").mkdir()
    for path in (*paths.values(), tmp_path / "empty"):
        with pytest.raises(UserError):
            llava_bench.score(path, format, data, "official", custom=True)


def test_a_part_of_vlmevalkits_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 rows, LLaVA-Bench"):
        run_of(write_vlmevalkit(tmp_path / "a.tsv", ROWS), custom=False)


def test_another_release_is_named_unless_it_is_ones_own(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    with pytest.raises(UserError, match=r"4 questions, released were 60; 58 differ.*--custom"):
        llava_bench.load(data)
    assert len(llava_bench.load(data, custom=True)) == 4
    with pytest.raises(UserError, match=r"no questions\.jsonl"):
        llava_bench.load(tmp_path / "images")
    write_lines(data / "answers_gpt4.jsonl", [{"question_id": 0, "text": "It is."}])
    with pytest.raises(UserError, match=r"answers_gpt4\.jsonl: nothing on question 1"):
        llava_bench.load(data, custom=True)
    write_release(data)
    write_lines(data / "context.jsonl", [{"image": f"{n}.jpg", "caption": n} for n in range(2)])
    with pytest.raises(UserError, match=r"context\.jsonl: 0\.jpg: expected text"):
        llava_bench.load(data, custom=True)
    (data / "context.jsonl").unlink()
    with pytest.raises(UserError, match=r"context\.jsonl: not there"):
        llava_bench.load(data, custom=True)


def test_a_release_of_the_right_size_is_one(tmp_path: Path) -> None:
    rows = [(n, NAMES[c], 0.0, 0.0) for n, c in enumerate(CATEGORIES)]
    assert len(llava_bench.load(write_release(tmp_path, rows))) == 60


def test_a_release_has_its_pictures(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    assert llava_bench.load(data, custom=True)[0].pictures == ()
    (data / "images").mkdir()
    (data / "images" / "0.jpg").write_bytes(b"0")
    (data / "images" / "COCO_val2014_1.jpg").write_bytes(b"1")
    assert [q.pictures[0].read() for q in llava_bench.load(data, custom=True)] == [b"0", b"0", b"1", b"1"]
    (data / "images" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"0\.jpg: not there"):
        llava_bench.load(data, custom=True)


def test_a_model_is_asked_the_question_alone(tmp_path: Path) -> None:
    question = llava_bench.load(write_release(tmp_path), custom=True)[0]
    assert {llava_bench.prompt(question, style) for style in ("llava", "plain", "vlmevalkit")} == {
        "What is 0?"
    }


def test_the_judge_is_told_llavas_text(tmp_path: Path) -> None:
    question = llava_bench.load(write_release(tmp_path), custom=True)[1]
    request = llava_bench.judge_request(question, "It is.", 0)
    assert request == Request(request.messages, "gpt-4-0314", 0.2, 1024)
    system, user = request.messages
    assert system == {
        "role": "system",
        "content": "You are a helpful and precise assistant for checking the quality of the answer.",
    }
    assert user["content"] == (
        "[Context]\nA\n \nb\n.\n\n"  # the script joins the letters of a caption by line breaks
        "[Question]\nWhat is 1?\n\n[Assistant 1]\nGPT-4 says 1\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nIt is.\n\n[End of Assistant 2]\n\n[System]\nRate detail.\n\n"
    )
    (tmp_path / "rule.json").unlink()
    with pytest.raises(UserError, match=r"put llava/eval/table/rule\.json"):
        llava_bench.judge_request(llava_bench.load(tmp_path, custom=True)[0], "It is.", 0)


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        ("8 7.5\nBoth", (8, 7.5)), ("10 10", (10, 10)), ("8,9\n", (8, 9)), ("85 90", (85, 90)), ("-1 -1", (-1, -1)),
        ("8, 9", None), ("8 9 ", None), ("8  9", None), (" 8 9", None), ("8 9\r\nBoth", (8, 9)), ("8\n9", None),
        ("Assistant 1: 8", None), ("8 nine", None), ("8/10 9/10", None), ("nan 1", None), ("inf 1", None), ("", None),
        ("8\t9", None),
    ],
)  # fmt: skip
def test_grades_are_the_two_numbers_of_the_first_line(reply: str, pair: tuple[float, float] | None) -> None:
    assert llava_bench.read_grade(reply) == pair


@given(st.text() | st.text(alphabet="0123456789., \n-e"))
@settings(deadline=None)
def test_no_reply_breaks_the_reading(reply: str) -> None:
    pair = llava_bench.read_grade(reply)
    assert pair is None or len(pair) == 2


@given(st.text(alphabet='{}[]",:question_idtuple category 0189.\n', max_size=60))
@settings(deadline=None, max_examples=200)
def test_no_text_breaks_the_reading_of_a_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_text(text)
    try:
        format = llava_bench.recognise(path)
        if format is not None:
            llava_bench.score(path, format, None, "official")
    except UserError:
        pass


@pytest.mark.real_data
def test_the_coco_questions_and_their_judge(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "llava-gpt4"
    questions = llava_bench.load(data)
    assert len(questions) == 90
    assert isinstance(questions[0], BenchQuestion)
    captions, boxes = questions[0].context.split("\n\n")
    assert len(captions.split("\n")) == 5
    assert all(line.endswith("]") and ": [" in line for line in boxes.split("\n"))
    assert questions[0].answer.startswith("The colors of the two suitcases")
    categories = [(int(q.key), q.groups["category"]) for q in questions]
    rows = review([(n, category, 8, 6) for n, category in categories])
    for row in rows:
        row["category"] = row["category"].removeprefix("llava_bench_")
    path = write_lines(tmp_path / "a.jsonl", rows)
    for where in (data, None):
        found = llava_bench.score(path, "llava", where, "official")
        assert (found.n, found.score, found.groups["category"]["detail"]["n"]) == (90, 75, 30)
