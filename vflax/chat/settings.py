"""How answers are chosen: the same settings as flags of the command line and for /set."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from vflax.errors import UserError
from vflax.generate.request import Sampling


class Setting(NamedTuple):
    """A field of Sampling: how it is read, what is wrong when that raises ValueError, what it does."""

    read: Callable[[str], Any]
    expected: str
    help: str


def _limit(text: str) -> int | None:
    return None if text == "none" else int(text)


SETTINGS = {
    "temperature": Setting(float, "a number", "0: always the likeliest token; higher: more variety"),
    "top_p": Setting(
        float, "a number", "draw only from the likeliest tokens that together have this probability"
    ),
    "top_k": Setting(int, "a whole number", "draw only from so many likeliest tokens; 0: from all"),
    "repetition_penalty": Setting(
        float, "a number", "more than 1: what was said becomes less likely; 1: none"
    ),
    "max_tokens": Setting(_limit, "a whole number, or none", "end an answer after so many; none: no limit"),
    "seed": Setting(int, "a whole number", "what is drawn depends on it; the same seed, the same answer"),
    "stop": Setting(str, "text", "end an answer where this comes; may be given several times"),
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting; `sampling_of` reads them."""
    group = parser.add_argument_group("answers")
    for name, setting in SETTINGS.items():
        default = getattr(Sampling(), name)
        shown = {None: "none", (): "none"}.get(default, default)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="TEXT" if name == "stop" else "N",
            action="append" if name == "stop" else "store",
            help=f"{setting.help} (default: {shown})",
        )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What the flags say.

    Raises:
        UserError: naming a flag whose value cannot be read, or every setting that is out of its range.
    """
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    values: dict[str, Any] = {
        name: tuple(value) if name == "stop" else _read(name, value, f"--{name.replace('_', '-')}")
        for name, value in given.items()
    }
    return Sampling(**values)


def changed(sampling: Sampling, text: str) -> Sampling:
    """What `/set TEXT` makes of the settings: NAME=VALUE, several of them, or NAME VALUE.

    `stop=` takes all stop strings away; several of them together replace those there were. In one, \\n is a newline.

    Raises:
        UserError: naming a setting that there is not, or a value that it cannot have.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise UserError(f"/set {text}: a quotation mark has no other half") from None
    if len(words) == 2 and "=" not in words[0]:
        words = ["=".join(words)]
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if name not in SETTINGS or not equals:
            raise UserError(f"/set {word}: expected NAME=VALUE, NAME one of {', '.join(SETTINGS)}")
        if name == "stop":
            strings = (value.replace("\\n", "\n").replace("\\t", "\t"),) if value else ()
            values[name] = (*values.get(name, ()), *strings)
        else:
            values[name] = _read(name, value, f"/set {name}")
    return dataclasses.replace(sampling, **values)


def shown(sampling: Sampling) -> str:
    """The settings in the form that /set reads."""
    lines = []
    for name in SETTINGS:
        value = getattr(sampling, name)
        if name == "stop":
            escaped = (stop.replace("\n", "\\n").replace("\t", "\\t") for stop in value)
            lines += [f"stop={shlex.quote(stop)}" for stop in escaped]
        else:
            lines.append(f"{name}={'none' if value is None else value}")
    return "  ".join(lines)


def _read(name: str, value: str, called: str) -> Any:
    try:
        return SETTINGS[name].read(value)
    except (ValueError, OverflowError):
        raise UserError(f"{called}={value}: expected {SETTINGS[name].expected}") from None
