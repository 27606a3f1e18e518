"""Which answers a prompt offers: none, all labels of the task, some of them, or what the record itself lists."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vflax.errors import UserError

LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Options:
    """Of a task; made by `all_labels`, `sampled` and `of_field`.

    count: so many are offered, the right one among them; 0: all labels.
    field: of the record, which lists them; "": they are the task's labels, that is all its answers.
    letters: "(a) cat (b) dog", and the answer is "(b) dog"; else "cat, dog" and "dog".
    shuffle: in an order drawn for each instance; else labels by the alphabet (numbers by size), a field's as it
        stands.
    """

    count: int = 0
    field: str = ""
    letters: bool = True
    shuffle: bool = True

    def offer(
        self, right: str, labels: Sequence[str], fields: Mapping[str, Any], draw: random.Random
    ) -> tuple[tuple[str, ...], str]:
        """(what one prompt offers, in its order; the answer, with its letter).

        Args:
            right: the answer. labels: all answers of the task, sorted. fields: of the record.

        Raises:
            UserError: the field is no list, or the right answer is not in it; two options are alike, there are fewer
                than two, or more than letters.
        """
        found = self._found(right, labels, fields, draw)
        if self.field and right not in found:
            raise UserError(f"the answer is none of the options in field {self.field!r}")
        if len({option.casefold() for option in found}) < len(found):
            raise UserError("two options are alike but for capitals")
        if len(found) < max(2, self.count):
            raise UserError(f"{len(found)} options, expected at least {max(2, self.count)}")
        if self.letters and len(found) > len(LETTERS):
            raise UserError(
                f"{len(found)} options, and {len(LETTERS)} letters; say sampled(4), or letters=False"
            )
        if self.shuffle:
            draw.shuffle(found)
        return tuple(found), f"({LETTERS[found.index(right)]}) {right}" if self.letters else right

    def _found(
        self, right: str, labels: Sequence[str], fields: Mapping[str, Any], draw: random.Random
    ) -> list[str]:
        if self.field:
            value = fields[self.field]
            if not isinstance(value, list | tuple):
                raise UserError(
                    f"field {self.field!r} is a {type(value).__name__}, expected a list of options"
                )
            return [str(option).strip() for option in value]
        if not self.count:
            return list(labels)
        others = [label for label in labels if label != right]
        chosen = {right, *draw.sample(others, min(self.count - 1, len(others)))}
        return [label for label in labels if label in chosen]

    def line(self, options: Sequence[str]) -> str:
        """As prompts of Vision-Flan have it."""
        if not self.letters:
            return "Options: " + ", ".join(options)
        return "Options: " + " ".join(f"({LETTERS[i]}) {option}" for i, option in enumerate(options))

    @property
    def words(self) -> str:
        what = f"field {self.field}" if self.field else f"{self.count} labels" if self.count else "all labels"
        return f"{what}{', lettered' if self.letters else ''}{', shuffled' if self.shuffle else ''}"


def all_labels(*, letters: bool = True, shuffle: bool = True) -> Options:
    """All answers that the task has anywhere in its source."""
    return Options(0, "", letters, shuffle)


def sampled(count: int, *, letters: bool = True, shuffle: bool = True) -> Options:
    """So many of the task's answers, drawn for each instance; the right one is among them."""
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= len(LETTERS):
        raise UserError(
            f"sampled({count!r}): expected how many options a prompt has, from 2 to {len(LETTERS)}"
        )
    return Options(count, "", letters, shuffle)


def of_field(field: str, *, letters: bool = True, shuffle: bool = True) -> Options:
    """The options that each record has of its own, in a field that is a list; the answer must be one of them."""
    if not isinstance(field, str) or not field:
        raise UserError(f"of_field({field!r}): expected the name of a field")
    return Options(0, field, letters, shuffle)
