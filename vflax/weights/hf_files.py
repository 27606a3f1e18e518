"""Hugging Face's JSON files: reading them, and telling at once all that is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vflax.errors import UserError


class Problems:
    """Collects what is wrong with one file, to be told at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[str] = []

    def expect(self, key: str, value: Any, allowed: tuple[Any, ...], remedy: str = "") -> None:
        """Note `key` unless its value is one of `allowed`."""
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            self.lines.append(f"{key}={value!r}: vflax supports {wanted}{'; ' + remedy if remedy else ''}")

    def stop(self) -> None:
        """Raise what was noted.

        Raises:
            UserError: if anything was.
        """
        if self.lines:
            raise UserError(f"{self.file} is not supported:\n  " + "\n  ".join(self.lines))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: naming the file, when it is missing or broken.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without the mark that some editors put first.

    Raises:
        UserError: naming the file, when it is missing or in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as text in UTF-8 ({error}); fetch it again") from None
