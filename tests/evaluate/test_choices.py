"""What each rule reads from an answer to a multiple choice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vflax.evaluate import choices

OPTIONS = {"A": "a cat", "B": "a dog", "C": "a horse", "D": "None"}


@pytest.mark.parametrize(
    ("text", "vlmevalkit", "strict", "llava"),
    [
        ("B", "B", "B", "B"),
        ("B.", "B", "B", None),
        ("(B)", "B", "B", None),
        ("**B**", "B", "B", None),
        ("B. a dog", "B", None, "B"),
        ("B: it is a dog", "B", None, None),
        ("b", None, None, None),
        ("The answer is B", "B", None, None),  # LLaVA wants one more character
        ("The answer is B.", "B", None, "B"),
        ("The answer is A. Or: The answer is B.", "A", None, None),
        ("The answer is b", "B", None, None),
        ("The answer is black", "B", None, None),  # no end of a word is asked for
        ("The answer is what I see", None, None, None),
        ("I see A or B", None, None, None),
        ("C is what it must be", None, None, None),  # not among the last four words
        ("C it must be that", None, None, None),
        ("C it must be", "C", None, None),
        ("C, and once more, since nobody listens: C", None, None, None),  # where it first stands counts
        ("It is a dog", "B", None, None),
        ("It is A DOG", "A", None, None),
        ("IT IS CERTAINLY NOTHING BUT A DOG", "A", None, None),
        ("It is a DOG", "B", None, None),
        ("A cat or a dog", None, None, None),
        ("A cat is what I would say it is", "A", None, None),
        ("none", "D", None, None),
        ("Z", "Z", None, None),
        ("None of them fits: Z", "Z", None, None),
        ("E", None, None, "E"),
        ("Cannot determine the answer, but perhaps B", "Z", None, None),
        ("Failed to obtain answer via API. B", None, None, None),
        ("a dog" + " indeed" * 10, None, None, None),  # more than twice as long as the options
        ("", None, None, None),
        ("AB", None, None, None),
    ],
)
def test_each_rule_reads_what_its_tool_does(
    text: str, vlmevalkit: str | None, strict: str | None, llava: str | None
) -> None:
    assert choices.vlmevalkit(text, OPTIONS) == vlmevalkit
    assert choices.strict(text, OPTIONS) == strict
    assert choices.llava(text) == llava


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("BECAUSE: x. The answer is B.", "B"), ("The answer is B, so", "B"), ("The answer is Z.", "Z"),
        ("The answer is B", None), ("The answer is B\n", None), ("the answer is B.", None), ("B", None),
        ("The answer is B. The answer is B.", None),
    ],
)  # fmt: skip
def test_a_letter_is_named_once_with_something_behind_it(text: str, letter: str | None) -> None:
    assert choices.named(text) == letter


def test_a_letter_without_an_option_is_none() -> None:
    two = {"A": "yes", "B": "no"}
    assert choices.vlmevalkit("C", two) is None
    assert choices.vlmevalkit("The answer is C", two) is None
    assert choices.strict("C", two) is None


def test_letters_after_d_are_read_but_not_from_a_sentence_about_the_answer() -> None:
    five = {**OPTIONS, "E": "a bird"}
    assert choices.vlmevalkit("E", five) == "E"
    assert choices.vlmevalkit("the answer is E, and that is what I say", five) is None


def test_nothing_is_read_without_options() -> None:
    assert choices.vlmevalkit("A", {}) is None


def test_pandas_loses_options_and_answers_that_look_missing() -> None:
    assert choices.pandas_options(OPTIONS) == {"A": "a cat", "B": "a dog", "C": "a horse"}
    assert (choices.vlmevalkit("none", OPTIONS), choices.vlmevalkit_table("none", OPTIONS)) == ("D", None)
    # "None" has become "nan", in which there is an "an".
    two = {"A": "an", "B": "the"}
    assert (choices.vlmevalkit("None", two), choices.vlmevalkit_table("None", two)) == (None, "A")
    assert choices.vlmevalkit_table("B", OPTIONS) == "B"


@settings(deadline=None)
@given(st.text(), st.dictionaries(st.sampled_from("ABCDEFZ"), st.text()))
def test_no_text_breaks_a_rule(text: str, options: dict[str, str]) -> None:
    for rule in (choices.vlmevalkit, choices.strict):
        assert rule(text, options) in (*options, choices.NONE_FITS, None)
    letter = choices.llava(text)
    assert letter is None or len(letter) == 1
