"""What a value in a small file must be, so that a reader can tell a wrong one by its key, and all of them at once.

Imports nothing of vflax and nothing heavy: models, images and readers of weights' files use it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# More layers than any model has: a number beyond is damage, and would fill the memory with the names of its tensors.
MAX_LAYERS = 1000
_SHOWN = 120


@dataclass(frozen=True)
class Kind:
    """words: what is expected, for a message; holds: whether a value, of any JSON type, is that."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """The same, or null."""
        return Kind(f"{self.words}, or null", lambda value: value is None or self.holds(value))

    def listed(self, length: int | None = None) -> Kind:
        """A list of them, of any length or of this one."""
        count = "" if length is None else f"{length} of them: "
        return Kind(
            f"a list, {count}each {self.words}",
            lambda value: (
                isinstance(value, list | tuple)
                and length in (None, len(value))
                and all(map(self.holds, value))
            ),
        )

    def problem(self, key: str, value: Any) -> str:
        """The line that says so of a wrong value."""
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} ..."
        return f"{key}={shown}: expected {self.words}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A number, and one that a float can hold: JSON has no limit, and Python's reader takes NaN and Infinity."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


TEXT = Kind("text", lambda value: isinstance(value, str))
NAME = Kind("a name", lambda value: isinstance(value, str) and value != "")
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))
WHOLE = Kind("a whole number", lambda value: _is_whole(value) and abs(value) < 2**31)
ID = Kind("a whole number, at least 0", lambda value: WHOLE.holds(value) and value >= 0)
COUNT = Kind("a whole number, at least 1", lambda value: WHOLE.holds(value) and value >= 1)
EVEN = Kind("an even whole number, at least 2", lambda value: COUNT.holds(value) and value % 2 == 0)
LAYERS = Kind(
    f"a whole number from 1 to {MAX_LAYERS}", lambda value: WHOLE.holds(value) and 1 <= value <= MAX_LAYERS
)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)


def wrong(values: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "") -> dict[str, str]:
    """{key: a line} for each of `values` that is not what `kinds` says; keys that are not there are passed over."""
    return {
        key: kind.problem(prefix + key, values[key])
        for key, kind in kinds.items()
        if key in values and not kind.holds(values[key])
    }


def missing(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for each field of a dataclass that is not among `values`, and for each value that is no field of it."""
    expected = {field.name for field in dataclasses.fields(kind)}
    lines = [f"{prefix}{key} is missing" for key in sorted(expected - set(values))]
    return lines + [f"{prefix}{key} is not a known key" for key in sorted(set(values) - expected)]
