"""What each rule reads from an answer to a yes-or-no question."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vflax.evaluate import yes_no
from vflax.evaluate.predictions import Said
from vflax.evaluate.question import Question


@pytest.mark.parametrize(
    ("text", "mme", "pope", "vlmevalkit", "strict"),
    [
        ("Yes", "yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no", "no"),
        (" Yes", "yes", "yes", "yes", "yes"),
        ("Yes.", "yes", "yes", "yes", "yes"),
        ("NO", "no", "yes", "no", "no"),  # POPE knows No and no
        (
            "**Yes**",
            None,
            "yes",
            None,
            "yes",
        ),  # marks without a space beside them stay words' parts, but for * and '
        ("The answer is yes", None, "yes", "yes", None),
        ("not sure", "no", "no", None, None),
        ("I know this one", None, "yes", None, None),
        ("Know what? yes", "no", "yes", "yes", None),
        ("There is a cat. No dog", None, "yes", "no", None),  # POPE reads the first sentence
        ("No, there is yes", "no", "no", None, None),
        ("No\nfoo", "no", "yes", "no", None),  # the word is "No\nfoo" for POPE
        ("isn't", None, "yes", None, None),
        ("", None, "yes", None, None),
        ("A\nno", None, "yes", "no", None),
        ("yes/no", "yes", "yes", None, None),
        ("yes,", "yes", "yes", "yes", None),
    ],
)
def test_each_rule_reads_what_its_tool_does(
    text: str, mme: str | None, pope: str, vlmevalkit: str | None, strict: str | None
) -> None:
    assert yes_no.mme_tool(text) == mme
    assert yes_no.pope_tool(text) == pope
    assert yes_no.vlmevalkit(text) == vlmevalkit
    assert yes_no.strict(text) == strict


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_a_rule(text: str) -> None:
    for rule in (yes_no.mme_tool, yes_no.pope_tool, yes_no.vlmevalkit, yes_no.strict):
        assert rule(text) in ("yes", "no", None)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a, b", "a b"),
        ("a,b", "a b"),
        ("1,000 a,b", "1000 ab"),  # a comma in a number: all marks go
        ("3.5 is.", "3.5 is"),
        ("." * 40, "." * 8),  # VQA's code replaces 32 periods
    ],
)
def test_punctuation_goes_as_in_vqa(text: str, left: str) -> None:
    assert yes_no.without_punctuation(text) == left


QUESTION = Question("1", "Is it?", "no", {"split": "random"}, "a.jpg")


@pytest.mark.parametrize(
    ("said", "rule", "parsed", "score", "why"),
    [
        (None, yes_no.pope_tool, None, 0, "no prediction"),
        (Said("1", "No"), yes_no.pope_tool, "no", 1, "read no"),
        (Said("1", "perhaps"), yes_no.strict, None, 0, "neither yes nor no"),
        (Said("1", "perhaps", extracted="No"), yes_no.strict, None, 0, "neither yes nor no"),
        (Said("1", "perhaps", extracted="No"), yes_no.vlmevalkit, "no", 1, "read no"),
        (Said("1", "No", extracted="Unknown"), yes_no.vlmevalkit, None, 0, "neither yes nor no"),
        (Said("1", "No", extracted=""), yes_no.vlmevalkit, "no", 1, "read no"),
    ],
)
def test_a_verdict_says_why(
    said: Said | None, rule: yes_no.Rule, parsed: str | None, score: float, why: str
) -> None:
    found = yes_no.verdict(QUESTION, said, rule)
    assert (found.parsed, found.score, found.why) == (parsed, score, why)
    assert found.prediction == (said.text if said else None)
