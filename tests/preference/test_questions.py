"""Questions, and answers in every format that tells them, are read or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.preference.question_files import lines, question
from vflax.errors import UserError
from vflax.preference.questions import Said, options_in, read_answers, read_models, read_questions

ROW = {"question_id": 0, "image": "a.png", "text": "What is it?"}
QUESTIONS = [question("0", text="What is it?", image="a.png"), question("1", text="Why?", image="b/a.png")]


def test_a_file_of_llavas_own_is_read_without_our_keys(tmp_path: Path) -> None:
    rows = [{"question_id": 7, "image": "001.jpg", "text": "Where?", "category": "conv"}]
    assert read_questions(lines(tmp_path / "q.jsonl", rows)) == [
        question("7", text="Where?", image="001.jpg", category="conv")
    ]


def test_our_keys_are_read(tmp_path: Path) -> None:
    row = {
        **ROW, "kind": "option", "options": ["red", "blue"], "reference": "red", "objects": ["dog"], "context": "c",
    }  # fmt: skip
    [found] = read_questions(lines(tmp_path / "q.jsonl", [row]))
    assert (found.kind, found.options, found.reference) == ("option", {"a": "red", "b": "blue"}, "red")
    assert (found.objects, found.context) == (("dog",), "c")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "poem"}, r"line 1: kind='poem': expected one of word, number"),
        ({"objects": "dog"}, r"line 1: objects='dog': expected a list"),
        ({"text": ""}, r"line 1: text=''"),
        ({"kind": "option"}, r"line 1: kind is option, and there are none in the text"),
    ],
)
def test_what_is_wrong_with_a_question_is_told_by_line_and_key(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"q\.jsonl, {said}"):
        read_questions(lines(tmp_path / "q.jsonl", [{**ROW, **change}]))


def test_a_question_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 is there twice"):
        read_questions(lines(tmp_path / "q.jsonl", [ROW, ROW]))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Where is it? Options: (a) top (b) lower left (c) right", ["top", "lower left", "right"]),
        ("Which?\nA. a dog\nB. a cat\nAnswer with the option's letter.", ["a dog", "a cat"]),
        ("Which? A) one B) two", ["one", "two"]),
        ("Is it a dog. Or not?", []),
        ("(b) two (c) three", []),
    ],
)
def test_options_are_read_from_the_text(text: str, options: list[str]) -> None:
    assert list(options_in(text)) == options


@pytest.mark.parametrize(
    "rows",
    [
        [{"question_id": 1, "text": " b"}, {"question_id": 0, "text": "a ", "prompt": "x"}],
        [{"key": "1", "prediction": "b"}, {"key": "0", "prediction": "a"}],
        [
            {"prompt": "Why?", "images": [{"path": "/x/b/a.png"}], "answer": "b"},
            {"prompt": "What is it?", "images": [{"path": "/x/a.png"}], "answer": "a"},
        ],
    ],
    ids=["llava", "vflax.evaluate", "vflax.chat"],
)
def test_answers_belong_to_questions_by_name_and_never_by_place(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = read_answers(lines(tmp_path / "a.jsonl", rows), QUESTIONS)
    assert found == [Said("a"), Said("b")]


def test_the_same_answers_are_the_same_in_every_format(tmp_path: Path) -> None:
    ours = lines(tmp_path / "ours.jsonl", [{"key": "0", "prediction": "a"}, {"key": "1", "prediction": "b"}])
    llavas = lines(
        tmp_path / "l.jsonl", [{"question_id": n, "text": text} for n, text in ((1, "b"), (0, "a"))]
    )
    other = lines(tmp_path / "o.jsonl", [{"question_id": n, "text": "b"} for n in range(2)])
    one, same, another = read_models([f"x={ours}", f"y={llavas}", f"z={other}"], QUESTIONS)
    assert one.sha256 == same.sha256 != another.sha256


def test_why_an_answer_ended_is_read(tmp_path: Path) -> None:
    row = {"prompt": "What is it?", "images": [{"path": "a.png"}], "answer": "a", "finish_reason": "length"}
    assert read_answers(lines(tmp_path / "a.jsonl", [row]), QUESTIONS[:1]) == [Said("a", "length")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 0, "text": "a"}], "1 of 2 questions have no answer, the first: 1"),
        ([{"question_id": 9, "text": "a"}], "line 1: 9 is none of the questions"),
        ([{"question_id": 0, "text": "a"}] * 2, "line 2: 0 is answered twice"),
        ([{"question_id": 0, "text": 5}], "line 1: text=5: expected text"),
        ([{"question_id": 0}], "line 1: lacks text"),
        ([{"id": 0, "text": "a"}], "expected LLaVA's answers"),
        ([{"key": "0", "prediction": None}, {"key": "1", "prediction": "x"}], "the first: 0"),
        (
            [{"prompt": "What is it?", "images": [], "answer": "a"}],
            "0 of the questions have this prompt and picture",
        ),
        ([{"prompt": "What is it?", "images": ["a.png"], "answer": "a"}], "images is not as"),
    ],
)
def test_answers_that_do_not_fit_the_questions_are_refused(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read_answers(lines(tmp_path / "a.jsonl", rows), QUESTIONS)
    assert str(tmp_path / "a.jsonl") in str(refused.value)


def test_questions_of_one_prompt_and_picture_need_ids(tmp_path: Path) -> None:
    twins = [question("0", text="Q", image="a.png"), question("1", text="Q", image="a.png")]
    rows = [{"prompt": "Q", "images": [{"path": "a.png"}], "answer": "a"}]
    with pytest.raises(UserError, match="2 of the questions have this prompt and picture"):
        read_answers(lines(tmp_path / "a.jsonl", rows), twins)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["answers.jsonl"], "expected NAME=FILE"),
        (["a=x", "a=y"], "a is there twice"),
        (["tie=x", "b=y"], "tie is what an equal pair is called"),
        (["a=x"], "expected at least 2 models"),
    ],
)
def test_models_are_two_or_more_of_different_names(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_models(given, QUESTIONS, least=2)
