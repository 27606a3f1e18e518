"""The mini sets that ask how a model answers: every kind, held-out pictures, right references."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import PIL.Image
import pytest

from data_pipeline import mini_benchmarks
from data_pipeline.mini_chat import BENCH_PICTURES, PER_KIND
from vflax.evaluate import llava_bench
from vflax.preference import form, mentions
from vflax.preference.questions import KINDS, ChatQuestion, read_questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "benchmarks"
    mini_benchmarks.write(out)
    return out


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[ChatQuestion]:
    return read_questions(folder / "chat" / "questions.jsonl")


def test_there_are_as_many_questions_of_each_kind(questions: list[ChatQuestion]) -> None:
    assert Counter(question.kind for question in questions) == dict.fromkeys(KINDS, PER_KIND)


def test_every_question_has_a_picture_of_its_own(folder: Path, questions: list[ChatQuestion]) -> None:
    pictures = [(folder / "chat" / "images" / question.image).read_bytes() for question in questions]
    assert len(set(pictures)) == len(questions)
    assert PIL.Image.open(folder / "chat" / "images" / questions[0].image).size == (64, 64)


def test_references_are_what_their_questions_ask_for_and_right(questions: list[ChatQuestion]) -> None:
    for question in questions:
        assert form.FOLLOWS[question.kind](question, question.reference), question
        assert form.is_right(question, question.reference) in (True, None), question


def test_references_mention_nothing_that_is_not_there(questions: list[ChatQuestion]) -> None:
    vocabulary = mentions.load("mini")
    for question in questions:
        if question.kind in ("sentence", "long"):
            bare = ChatQuestion("", "", objects=question.objects)
            assert vocabulary.hallucinated(bare, question.reference)[0] == [], question  # type: ignore[index]


def test_llava_bench_is_loaded_with_what_a_judge_is_told(folder: Path) -> None:
    found = llava_bench.load(folder / "llava_bench", custom=True)
    assert len(found) == 3 * BENCH_PICTURES
    assert Counter(question.groups["category"] for question in found) == dict.fromkeys(
        ("conv", "detail", "complex"), BENCH_PICTURES
    )
    request = llava_bench.judge_request(found[0], "an answer", 0)
    content = request.messages[1]["content"]
    assert "[Context]\n" in content and content.count("\n") < 30  # a caption, and not letter by letter
    assert found[0].answer in content and "Grade how helpful" in content


def test_the_same_files_are_written_every_time(folder: Path, tmp_path: Path) -> None:
    mini_benchmarks.write(tmp_path / "again")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
