"""Lengths, ends, loops, and whether an answer is what was asked for."""

from __future__ import annotations

import pytest

from tests.preference.question_files import question
from vflax.preference import form
from vflax.preference.questions import Said

OPTIONS = {"a": "red", "b": "dark blue"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("A dog", 1),
        ("It is red. It is round!", 2),
        ('He said "stop." Then he left.', 2),
        ("Dr. Smith of the U.S. saw 3.5 dogs, e.g. two large ones.", 1),
        ("J. Smith and George W. Bush are there.", 1),
        ("The last letter is T. The word is CAT.", 2),
        ("So do I. She does not.", 2),
        ("The answer is no. It is red.", 2),
        ("1. A dog\n2. A cat", 2),
        ("Wait... what?!", 2),
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert len(form.sentences(text)) == count


@pytest.mark.parametrize(
    ("text", "finish", "unfinished"),
    [
        ("red", "stop", False),
        ("The dog sits on the", "", True),
        ("The dog sits on the mat.", "", False),
        ('It says "The dog sits here."', "", False),
        ("The dog sits on the mat.", "length", True),
        ("left of the dog", "stop", False),
    ],
)
def test_prose_without_an_end_and_what_was_cut_is_unfinished(
    text: str, finish: str, unfinished: bool
) -> None:
    assert form.is_unfinished(Said(text, finish)) is unfinished


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("the dog and the dog and the dog and", True),
        ("a very very very large dog", False),
        ("no no no no no no", True),
        ("It is red. It is here. It is red. It is there. It is red.", True),
        ("It is red. It is blue. It is red.", False),
        ("", False),
    ],
)
def test_words_that_come_three_times_in_a_row_are_a_loop(text: str, loop: bool) -> None:
    assert form.is_loop(text) is loop


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("three.", 3), ("**12**", 12), ("1,234.5", 1234.5), ("-2", -2), ("Twenty-one", 21), ("40%", 40),
        ("three dogs", None), ("1,23", None), ("", None), ("twenty-ten", None),
    ],
)  # fmt: skip
def test_numbers_are_read_in_figures_and_words(text: str, value: float | None) -> None:
    assert form.number(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "follows"),
    [
        ("word", "Red.", True),
        ("word", "dark red", False),
        ("word", "", False),
        ("number", "Three", True),
        ("number", "3 dogs", False),
        ("yes_no", "Yes.", True),
        ("yes_no", "Yes, there is a dog.", False),
        ("option", "B", True),
        ("option", "(b) dark blue", True),
        ("option", "Dark blue.", True),
        ("option", "b. dark blue", True),
        ("option", "blue", False),
        ("option", "The answer is b", False),
        ("sentence", "It is a red dog.", True),
        ("sentence", "It is a dog. It is red.", False),
        ("sentence", "Red.", False),
        ("sentence", "It is a red dog on a", False),
        ("long", "word " * (form.LONG_WORDS - 1), False),
        ("long", "word " * form.LONG_WORDS, True),
    ],
)
def test_an_answer_is_what_was_asked_for_or_not(kind: str, text: str, follows: bool) -> None:
    asked = question(kind=kind, options=OPTIONS if kind == "option" else None)
    assert form.FOLLOWS[kind](asked, text.strip()) is follows


def test_a_question_may_name_how_many_words_it_wants() -> None:
    asked = question(text="Tell me about it in at least 12 words.", kind="long")
    assert form.FOLLOWS["long"](asked, "word " * 12)
    assert not form.FOLLOWS["long"](asked, "word " * 11)


@pytest.mark.parametrize(
    ("kind", "reference", "text", "right"),
    [
        ("word", "red", "It is a red dog.", True),
        ("word", "red", "It is a reddish dog.", False),
        ("word", "red", "", False),
        ("number", "three", "I see 3 dogs.", True),
        ("number", "21", "There are twenty one of them", True),
        ("number", "3", "two", False),
        ("yes_no", "yes", "Yes, there is no doubt.", True),
        ("yes_no", "yes", "There is none.", False),
        ("option", "dark blue", "(b)", True),
        ("option", "b", "It is dark blue.", True),
        ("option", "b", "red", False),
        ("sentence", "A dog sits.", "A dog sits.", None),
        ("word", "", "red", None),
    ],
)
def test_a_short_answer_is_right_where_the_reference_stands_in_it(
    kind: str, reference: str, text: str, right: bool | None
) -> None:
    asked = question(kind=kind, reference=reference, options=OPTIONS if kind == "option" else None)
    assert form.is_right(asked, text) is right
