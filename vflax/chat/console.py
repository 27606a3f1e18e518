"""What goes to the screen: answers to stdout as they come, everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from typing import TextIO

# Control characters other than newline and tab: an answer, or a file's name, must not move the cursor or worse.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


def harmless(text: str) -> str:
    """Text without anything that a terminal would obey."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is at the other end; a stream that was closed at the start is None."""
    return stream is not None and stream.isatty()


def styled(stream: TextIO) -> bool:
    """Whether colours may be written there (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def prepare_streams() -> None:
    """Pipes and files hold UTF-8, whatever the locale says; what a terminal cannot show is replaced. In what is read,
    bytes that are no text become U+FFFD."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


class Console:
    """Writes an answer piece by piece, and notes between answers."""

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stdout)
        self._styled = styled(sys.stderr)
        self._in_line = False

    def write(self, text: str) -> None:
        """A piece of an answer, at once.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        if text:
            print(harmless(text) if self._terminal else text, end="", flush=True)
            self._in_line = not text.endswith("\n")

    def end(self) -> None:
        """The answer has ended, so its line does, too: an empty answer is an empty line."""
        print(flush=True)
        self._in_line = False

    def end_line(self) -> None:
        """What comes next begins a line, even where an answer broke off."""
        if self._in_line:
            self.end()

    def note(self, text: str = "") -> None:
        """For the person, not part of any answer."""
        self._say(text, _DIM)

    def error(self, text: object) -> None:
        """What went wrong."""
        self._say(f"error: {text}", _RED)

    def _say(self, text: str, style: str) -> None:
        if self._terminal:
            self.end_line()
        text = harmless(text)
        with contextlib.suppress(OSError):
            print(f"{style}{text}{_PLAIN}" if text and self._styled else text, file=sys.stderr, flush=True)
