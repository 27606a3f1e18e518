"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend. The message names the file or key, what was expected and what to do.

    Command lines print the message without a traceback and exit with status 1.
    """


@contextlib.contextmanager
def naming(file: Path, remedy: str = "") -> Iterator[None]:
    """Put the file that values come from in front of what is said of them.

    Raises:
        UserError: for one that is raised inside; `remedy` follows it.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}{'; ' + remedy if remedy else ''}") from None


def line_of(error: BaseException, path: Path) -> str:
    """Where in the file it was raised: ", line 12"; "" where in none of its lines."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    here = path.resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    return f", line {lines[-1]}" if lines else ""
