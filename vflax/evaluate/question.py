"""A question of a benchmark, and where its pictures lie."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vflax.errors import UserError

# How LLaVA asks for the form of an answer.
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
# What reading a damaged picture, or archive of pictures, raises.
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


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
    hint: text that the release gives beside the question, "" where it gives none.
    """

    key: str
    text: str
    answer: str
    groups: Mapping[str, str]
    unit: str
    pictures: tuple[Picture, ...] = ()
    options: Mapping[str, str] | None = None
    hint: str = ""


@contextlib.contextmanager
def reading(key: str, picture: Picture, kinds: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Tells what is wrong with a picture as of its question; kinds: of errors.

    Raises:
        UserError: one of these was raised inside.
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{key}: picture {picture.name}: {error}; fetch it again") from None


def digest(questions: Sequence[Question]) -> str:
    """sha256 of questions, right answers, options and the bytes of their pictures: what a number is of.

    Raises:
        UserError: a picture cannot be read.
    """
    whole = hashlib.sha256()
    for question in questions:
        options = sorted((question.options or {}).items())
        whole.update(repr((question.key, question.text, question.hint, question.answer, options)).encode())
        for picture in question.pictures:
            with reading(question.key, picture):
                whole.update(hashlib.sha256(picture.read()).digest())
    return whole.hexdigest()


def by_number(key: str) -> tuple[int, str]:
    """Sorts keys by the number that they are, or end in behind a "_": v1_10 comes after v1_9."""
    digits = key.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdecimal() else 0, key


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
