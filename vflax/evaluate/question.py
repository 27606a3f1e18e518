"""A question of a benchmark, and where its pictures lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """name: for messages and pages; read: its encoded bytes, fetched when asked for."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Question:
    """As its benchmark has it.

    key: names it in its benchmark, in every file of vflax.
    text: the question as released; a benchmark's module makes a prompt of it.
    answer: the right one, as released.
    groups: {kind: name}, what it is counted under.
    unit: see `vflax.evaluate.result.Verdict`.
    pictures: in the order in which the question speaks of them.
    options: {letter: text} of a multiple choice.
    """

    key: str
    text: str
    answer: str
    groups: Mapping[str, str]
    unit: str
    pictures: tuple[Picture, ...] = ()
    options: Mapping[str, str] | None = None


def limited(questions: Sequence[Question], most: int | None) -> list[Question]:
    """All questions of the first `most` units of each group (of the first kind of groups); None: all."""
    if most is None:
        return list(questions)
    units: dict[str, set[str]] = {}
    kept = []
    for question in questions:
        own = units.setdefault(next(iter(question.groups.values()), ""), set())
        if question.unit in own or len(own) < most:
            own.add(question.unit)
            kept.append(question)
    return kept
