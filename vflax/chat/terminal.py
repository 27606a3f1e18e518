"""Reading what a person types: with line editing, history and completion, or plainly where a terminal has none."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from vflax.chat.console import Console, is_terminal, styled

Arguments = Mapping[str, Callable[[], Iterable[str]] | None]
"""What may follow each command, for completion: words; None: a path."""


class Reader(Protocol):
    """Where lines come from."""

    def read(self, prompt: str) -> str:
        """The next line, or several that were pasted at once.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C, and nothing was typed (a plain reader cannot tell whether something was).
        """


def open_reader(commands: Arguments, history: Path | None, console: Console) -> Reader:
    """The best that this terminal can do.

    Args:
        commands: for completion.
        history: the file of earlier lines; None: none is kept.
        console: is told why no history is kept.
    """
    if is_terminal(sys.stdin) and is_terminal(sys.stdout) and os.environ.get("TERM", "dumb") != "dumb":
        return _EditingReader(commands, _history(history, console))
    return _PlainReader()


def history_file() -> Path:
    """In the user's state directory, as the XDG base directories have it."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local/state") / "vflax/chat_history"


class _PlainReader:
    """Lines as the terminal itself edits them. The prompt goes to stderr: stdout may be a file."""

    def read(self, prompt: str) -> str:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class _EditingReader:
    """prompt_toolkit's line editor."""

    def __init__(self, commands: Arguments, history: History) -> None:
        # Cursor position requests, which only menus need, are off: on a slow line their answers come while the model
        # already writes, and are taken for typing.
        output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
        output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            output=output,
            color_depth=None if styled(sys.stdout) else ColorDepth.DEPTH_1_BIT,
            history=history,
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=_keys(),
            enable_suspend=True,
        )
        self._style = "bold ansigreen" if styled(sys.stdout) else ""

    def read(self, prompt: str) -> str:
        return self._session.prompt(FormattedText([(self._style, prompt)]))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """Commands, and what follows one; paths where a line begins with one."""

    def __init__(self, commands: Arguments) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if space and command in self._commands:
            words = self._commands[command]
            if words is None:
                yield from self._paths.get_completions(Document(argument, len(argument)), event)
            else:
                last = argument.rpartition(" ")[2]
                yield from _beginning(words(), last)
        elif text.startswith("~/") or (text.startswith("/") and "/" in text[1:]):
            yield from self._paths.get_completions(document, event)
        elif text.startswith("/") and not space:
            yield from _beginning(self._commands, text)


def _beginning(words: Iterable[str], typed: str) -> Iterable[Completion]:
    return (Completion(word, -len(typed)) for word in words if word.startswith(typed))


class _History(FileHistory):
    """A line that cannot be kept, on a full disk say, is no reason to lose the conversation."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history(path: Path | None, console: Console) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        console.note(f"no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return _History(path)
