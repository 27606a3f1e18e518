"""docs/preference.md is true: its commands have the flags that there are, its names are those of the code."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vflax.preference import __main__ as commands
from vflax.preference import aggregate, answer, judge, rater_page, style
from vflax.preference.form import LONG_WORDS
from vflax.preference.questions import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "preference.md").read_text()
MODULES = {"answer": answer, "style": style, "judge": judge, "page": rater_page, "aggregate": aggregate}


def of_page(command: str) -> list[list[str]]:
    """The arguments of each of its commands of that name."""
    lines = re.findall(rf"^ +python -m vflax\.preference {command} (.*)$", PAGE.replace("\\\n", " "), re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_its_commands_have_the_flags_that_there_are(name: str) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    MODULES[name].add_flags(parser)
    found = of_page(name)
    assert found
    for arguments in found:
        parser.parse_args(arguments)


def test_it_names_every_kind_and_the_length_of_a_long_answer() -> None:
    assert all(f"`{kind}`" in PAGE for kind in KINDS)
    assert f"{LONG_WORDS} words or as many as the question names" in PAGE
