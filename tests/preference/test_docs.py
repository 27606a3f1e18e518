"""docs/preference.md is true: its names are those of the code."""

from __future__ import annotations

from pathlib import Path

from vflax.preference.form import LONG_WORDS
from vflax.preference.questions import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "preference.md").read_text()


def test_it_names_every_kind_and_the_length_of_a_long_answer() -> None:
    assert all(f"`{kind}`" in PAGE for kind in KINDS)
    assert f"{LONG_WORDS} words or as many as the question names" in PAGE
