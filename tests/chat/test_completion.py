"""What Tab completes, and where lines are remembered."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from vflax.chat import terminal
from vflax.chat.console import Console
from vflax.chat.interactive import COMMANDS, arguments
from vflax.chat.terminal import CommandCompleter


def completed(text: str) -> list[str]:
    """The lines that Tab makes of one."""
    found = CommandCompleter(arguments()).get_completions(Document(text, len(text)), CompleteEvent())
    return [text[: len(text) + one.start_position] + one.text for one in found]


def test_commands_are_completed() -> None:
    assert completed("/re") == ["/retry", "/reset"]
    assert len(completed("/")) == len(COMMANDS)


def test_paths_are_completed_after_commands_and_at_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "my cat.png").touch()
    for command in ("/image ", "/save ", "/load ", ""):
        assert completed(f"{command}{tmp_path}/my") == [f"{command}{tmp_path}/my cat.png"]


def test_settings_are_completed() -> None:
    assert completed("/set top_k=2 temp") == ["/set top_k=2 temperature="]


@pytest.mark.parametrize("text", ["What", "What /re", "/reset ", "/help /", " /re"])
def test_questions_are_left_alone(text: str) -> None:
    assert completed(text) == []


def test_the_history_lies_in_the_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert terminal.history_file() == tmp_path / "vflax/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/me")
    assert terminal.history_file() == Path("/home/me/.local/state/vflax/chat_history")


def test_the_history_is_read_again_and_by_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "history"
    terminal._history(path, Console()).append_string("Hello.\nYou.")
    assert list(terminal._history(path, Console()).load_history_strings()) == ["Hello.\nYou."]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    terminal._history(tmp_path / "file" / "history", Console()).append_string("Hello.")
    assert "no history is kept" in capsys.readouterr().err


def test_a_line_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    history = terminal._history(tmp_path / "history", Console())
    (tmp_path / "history").unlink()
    (tmp_path / "history").mkdir()
    history.append_string("Hello.")
    assert history.get_strings() == ["Hello."]
