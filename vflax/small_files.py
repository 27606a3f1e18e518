"""Small files that come with weights: reading them, and telling at once all that is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.values import Kind, wrong


class Problems:
    """Collects what is wrong with one file, to be told at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[str] = []
        self._malformed = False

    def expect(self, key: str, value: Any, allowed: tuple[Any, ...], remedy: str = "") -> None:
        """Note `key` unless its value is one of `allowed`."""
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            self.lines.append(f"{key}={value!r}: vflax supports {wanted}{'; ' + remedy if remedy else ''}")

    def check(self, values: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "") -> set[str]:
        """Note each of `values` that is there and not of its kind; returns their keys."""
        found = wrong(values, kinds, prefix)
        self.lines += found.values()
        self._malformed = self._malformed or bool(found)
        return set(found)

    def add(self, other: Problems) -> None:
        """Note what was noted of another file, too; it is called by its name."""
        prefix = "" if other.file == self.file else f"{other.file.name}: "
        self.lines += [prefix + line for line in other.lines]
        self._malformed = self._malformed or other._malformed

    def stop(self) -> None:
        """Raise what was noted.

        Raises:
            UserError: if anything was.
        """
        if self.lines:
            remedy = ["fetch the file again, or correct it by hand"] if self._malformed else []
            raise UserError(f"{self.file} is not supported:\n  " + "\n  ".join(self.lines + remedy))


def read_text(path: Path) -> str:
    """Read a text file, with or without the mark that some editors put in front of UTF-8.

    Raises:
        UserError: naming the file, when it is missing, no file or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as text in UTF-8 ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: naming the file, when it is missing or broken.
    """
    return parse_object(read_text(path), str(path))


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` it stands is said of one that is broken.

    Raises:
        UserError: when it is none.
    """
    try:
        value = json.loads(text)
    # RecursionError: brackets without end.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(value).__name__}; fetch it again")
    return value
