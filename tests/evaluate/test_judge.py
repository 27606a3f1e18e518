"""A judge grades predictions: once each, resumable, with its name in the result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.openai_server import Answer, Seen, completion, failure, serving
from vflax.endpoint.session import Endpoint
from vflax.errors import UserError
from vflax.evaluate.judge import facts, judge
from vflax.evaluate.judging import Request
from vflax.evaluate.question import Question

QUESTIONS = [Question(f"q{n}", f"What is {n}?", str(n), {}, f"q{n}") for n in range(6)]


@dataclass
class Exam:
    """A benchmark whose judge gives a number."""

    NAME = "exam"
    RUNS = 2
    ATTEMPTS = 3

    def judge_request(self, question: Question, prediction: str, attempt: int) -> Request:
        content = f"{question.text} | {prediction}" + " again" * (attempt > 0)
        return Request([{"role": "user", "content": content}], "official-judge", 0.5 * attempt, 5)

    def read_grade(self, content: str) -> Any:
        return float(content) if content.replace(".", "").isdigit() else None


def write(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    own = rows or [{"key": q.key, "prediction": f"it is {q.answer}"} for q in QUESTIONS]
    folder.mkdir(exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def run(folder: Path, url: str, **options: Any) -> str:
    endpoint = Endpoint("some-judge", url, concurrency=2, retry_wait=0.01, retries=1)
    return judge(Exam(), QUESTIONS, folder, endpoint, folder / "judge.sqlite", show_progress=False, **options)


def graded(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]


def test_every_prediction_has_its_grades_in_order(tmp_path: Path) -> None:
    with serving(lambda seen, before: completion(f"0.{before}")) as server:
        assert run(write(tmp_path), server.url) == ""
    assert graded(tmp_path) == [
        {"key": q.key, "prediction": f"it is {q.answer}", "grades": [0.0, 0.1], "judge": "some-judge"}
        for q in QUESTIONS
    ]
    told = facts(tmp_path)
    assert (told["judge"], told["versions"], told["runs"], told["temperature"]) == (
        "some-judge", {"test-model": 12}, 2, 0
    )  # fmt: skip
    assert told["judge of published numbers"] == "official-judge"
    assert told["tokens"] == {"prompt": 1200, "completion": 240}


def test_what_cannot_be_read_is_asked_for_again_and_then_has_no_grade(tmp_path: Path) -> None:
    def script(seen: Seen, before: int) -> Answer:
        if "What is 1?" in seen.query:
            return completion("hm")
        return completion("0.5" if "again" in seen.query or "What is 0?" not in seen.query else "well")

    with serving(script) as server:
        assert run(write(tmp_path), server.url, runs=1) == ""
        asked = len(server.seen)
    assert [row["grades"] for row in graded(tmp_path)] == [[0.5], [None], [0.5], [0.5], [0.5], [0.5]]
    assert asked == 2 + 3 + 4
    assert {seen.body["temperature"] for seen in server.seen} == {0, 0.5, 1}


def test_a_stopped_judge_goes_on_and_is_not_paid_twice(tmp_path: Path) -> None:
    def script(seen: Seen, before: int) -> Answer:
        return failure(500) if "What is 3?" in seen.query and not healed else completion("1")

    healed: list[bool] = []
    with serving(script) as server:
        assert "q3 has no grade yet" in run(write(tmp_path), server.url)
        assert not (tmp_path / "graded.jsonl").exists()
        healed.append(True)
        assert run(tmp_path, server.url) == ""
        assert set(server.answered.values()) == {2}  # of each prediction, in two runs
    assert len(graded(tmp_path)) == 6


def test_the_same_file_comes_from_the_replies_at_hand(tmp_path: Path) -> None:
    with serving(lambda seen, before: completion("1")) as server:
        run(write(tmp_path), server.url)
        first = (tmp_path / "graded.jsonl").read_bytes()
        (tmp_path / "graded.jsonl").unlink()
        asked = len(server.seen)
        assert run(tmp_path, server.url) == ""
        assert len(server.seen) == asked
    assert (tmp_path / "graded.jsonl").read_bytes() == first


def test_questions_without_prediction_are_not_asked(tmp_path: Path) -> None:
    rows = [{"key": "q0", "prediction": None}, {"key": "q1", "prediction": "x"}]
    with serving(lambda seen, before: completion("1")) as server:
        assert run(write(tmp_path, rows), server.url, runs=1) == ""
    assert [row["key"] for row in graded(tmp_path)] == ["q1"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"key": "q9", "prediction": "x"}], "q9: no question of this exam"),
        ([{"key": "q0", "prediction": "x"}] * 2, "q0: answered twice"),
        ([{"prediction": "x"}], "lacks key"),
        ([{"key": "q0", "prediction": "x"}, {"prediction": "y"}], "line 2: lacks key"),
        ([{"key": "q0", "prediction": None}], "no predictions in it"),
    ],
)
def test_predictions_of_something_else_are_refused(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run(write(tmp_path, rows), "http://127.0.0.1:9/v1")


def test_missing_predictions_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"predictions\.jsonl: not there"):
        run(tmp_path, "http://127.0.0.1:9/v1")


def test_grades_of_earlier_predictions_are_not_taken_for_those_of_new_ones(tmp_path: Path) -> None:
    with serving(lambda seen, before: completion("1")) as server:
        assert run(write(tmp_path), server.url, runs=1) == ""
    facts(tmp_path)
    write(tmp_path, [{"key": q.key, "prediction": "another model's"} for q in QUESTIONS])
    with pytest.raises(
        UserError, match=r"judge\.json: is of another predictions\.jsonl; run the judge step again"
    ):
        facts(tmp_path)
    (tmp_path / "predictions.jsonl").unlink()  # what was graded is in graded.jsonl, too
    facts(tmp_path)


def test_a_refused_key_is_told(tmp_path: Path) -> None:
    with (
        serving(lambda seen, before: failure(401)) as server,
        pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY"),
    ):
        run(write(tmp_path), server.url)


def test_the_record_is_of_the_replies_that_the_grades_are_read_from(tmp_path: Path) -> None:
    """The cache has more: of another judge."""
    with serving(lambda seen, before: completion("1")) as server:
        other = Endpoint("other-judge", server.url)
        judge(Exam(), QUESTIONS, write(tmp_path), other, tmp_path / "judge.sqlite", show_progress=False)
        priced = Endpoint("some-judge", server.url, price_in=1e6, price_out=1e6)
        judge(Exam(), QUESTIONS, tmp_path, priced, tmp_path / "judge.sqlite", runs=1, show_progress=False)
    told = facts(tmp_path)
    assert (told["replies"], told["tokens"], told["cost"]) == (6, {"prompt": 600, "completion": 120}, 720)
    now = datetime.now(UTC)
    for name in ("date", "last_date"):
        assert now - timedelta(minutes=2) < datetime.fromisoformat(told[name]) <= now


def test_parameters_of_ones_own_are_laid_over_the_benchmarks(tmp_path: Path) -> None:
    own = {"temperature": None, "max_tokens": None, "max_completion_tokens": 900}
    with serving(lambda seen, before: completion("1")) as server:
        assert run(write(tmp_path), server.url, parameters=own) == ""
        assert {seen.body.get("max_completion_tokens") for seen in server.seen} == {900}
        assert not any({"temperature", "max_tokens"} & set(seen.body) for seen in server.seen)
    told = facts(tmp_path)
    assert (told["temperature"], told["parameters"]) == (None, {"max_completion_tokens": 900})


def test_a_budget_needs_a_limit_of_tokens(tmp_path: Path) -> None:
    endpoint = Endpoint("j", "http://127.0.0.1:9/v1", price_in=1, price_out=1, budget=5)
    with pytest.raises(UserError, match="--budget: needs a limit of tokens per reply"):
        judge(
            Exam(),
            QUESTIONS,
            write(tmp_path),
            endpoint,
            tmp_path / "judge.sqlite",
            parameters={"max_tokens": None},
        )


def test_a_judge_that_reads_too_little_is_told(tmp_path: Path) -> None:
    long = failure(400, "too many tokens", "context_length_exceeded")
    with (
        serving(lambda seen, before: long) as server,
        pytest.raises(UserError, match=r"q\d: longer with its request than what the judge some-judge reads"),
    ):
        run(write(tmp_path), server.url)
