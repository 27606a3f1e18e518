"""What may reach a terminal, and what goes where."""

from __future__ import annotations

import sys

import pytest

from vflax.chat.console import Console

NASTY = "a\x1b[2Jb\x07\r\x9b\tc\n"


def test_an_answer_cannot_give_orders_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Console().write(NASTY)
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\ufffd\tc\n"


def test_in_a_pipe_an_answer_is_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    Console().write(NASTY)
    assert capsys.readouterr().out == NASTY


def test_a_note_is_harmless_and_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Console().note("a\x1b[2J.png")
    assert capsys.readouterr() == ("", "a\ufffd[2J.png\n")


def test_a_note_after_a_broken_off_answer_begins_a_line_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console = Console()
    console.write("It is")
    console.error("no more")
    assert capsys.readouterr() == ("It is\n", "error: no more\n")
