"""What the page of a report shows of a task's questions: each with its pictures, and which answers were taken for
which."""

from __future__ import annotations

import base64
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import PIL.Image

from vflax.evaluate.question import Question

Verdicts = Sequence[Mapping[str, Any]]
"""Lines of a verdicts file."""

# In the order in which they are told.
OUTCOMES = ("right", "partly", "wrong", "unparsed", "missing")
_THUMBNAIL = 256  # pixels of the longer side
# A table with so many labels is told in numbers; a larger one is drawn, with its most frequent mistakes.
_TOLD, _MISTAKES = 16, 12
_UNPARSED, _MISSING, _NO_LABEL = "(unparsed)", "(missing)", "(no label)"


def outcome(row: Mapping[str, Any]) -> str:
    """One of OUTCOMES."""
    if row["prediction"] is None:
        return "missing"
    if row["parsed"] is None:
        return "unparsed"
    return "right" if row["score"] == 1 else "wrong" if row["score"] == 0 else "partly"


# --- questions --------------------------------------------------------------------------------------------------------


def browsed(
    verdicts: Verdicts,
    questions: Sequence[Question],
    prompts: Mapping[str, str],
    *,
    text_bytes: int,
    picture_bytes: int,
) -> dict[str, Any]:
    """The questions of a task as the page's script reads them, with what is the same for many told once.

    Args:
        verdicts: on all questions.
        questions: of the benchmark, for their pictures.
        prompts: {key: what the model was asked}.
        text_bytes, picture_bytes: at most about so much. Of what is more, right and other questions are left out alike.

    Returns:
        kinds: of groups; names: of each kind; prompts; pictures: data URLs, "" for what cannot be decoded;
        rows: key, outcome, prompt (its number or -1), answer, prediction, parsed, score, why, pictures (numbers, -1 for
        one that is left out), groups (a number for each kind, or -1).
    """
    kinds = list(dict.fromkeys(kind for row in verdicts for kind in row["groups"]))
    names: list[dict[str, int]] = [{} for _ in kinds]
    asked: dict[str, int] = {}
    pictures = _Pictures(questions, picture_bytes)
    rows: dict[int, list[Any]] = {}
    size = 0
    for number in _mixed(verdicts):
        row = verdicts[number]
        prompt = prompts.get(row["key"])
        if size >= text_bytes:
            break
        of_kinds = [
            own.setdefault(row["groups"][kind], len(own)) if kind in row["groups"] else -1
            for kind, own in zip(kinds, names, strict=True)
        ]
        size += len(prompt or "") * (prompt not in asked)
        rows[number] = [
            row["key"], outcome(row), -1 if prompt is None else asked.setdefault(prompt, len(asked)), row["answer"],
            row["prediction"], row["parsed"], row["score"], row["why"], pictures.of(row["key"]), of_kinds,
        ]  # fmt: skip
        size += len(json.dumps(rows[number]))
    return {
        "kinds": kinds, "names": [list(own) for own in names], "prompts": list(asked), "pictures": pictures.urls,
        "rows": [rows[number] for number in sorted(rows)],
    }  # fmt: skip


def _mixed(verdicts: Verdicts) -> list[int]:
    """All in an order of which any part is a fair sample: by chance, and by turns a right one and another."""
    sides = [[n for n, row in enumerate(verdicts) if (row["score"] == 1) is right] for right in (True, False)]
    chance = random.Random(0)
    for own in sides:
        chance.shuffle(own)
    return [number for pair in zip_longest(*sides) for number in pair if number is not None]


class _Pictures:
    """Small ones, each held once, until they take too much."""

    def __init__(self, questions: Sequence[Question], most: int) -> None:
        self._questions = {question.key: question for question in questions}
        self._left = most
        self._numbers: dict[tuple[str, str], int] = {}
        self.urls: list[str] = []

    def of(self, key: str) -> list[int]:
        """Of a question, by their numbers; -1: left out."""
        question = self._questions.get(key)
        if question is None:
            return []
        found = []
        for picture in question.pictures:
            # Names alone are not enough: MME has a 0001.jpg in several subtasks.
            name = question.unit, picture.name
            if name not in self._numbers and self._left > 0:
                self._numbers[name] = len(self.urls)
                self.urls.append(_thumbnail(picture.read))
                self._left -= len(self.urls[-1])
            found.append(self._numbers.get(name, -1))
        return found


def _thumbnail(read: Callable[[], bytes]) -> str:
    """As a data: URL; "" for what cannot be decoded."""
    try:
        opened = PIL.Image.open(io.BytesIO(read()))
        opened.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
        image = opened.convert("RGB")
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    except Exception:  # a page without one picture is better than none; decoders raise whatever they meet
        return ""
    return _url(image, "WEBP", quality=60)


def _url(image: PIL.Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


# --- which answers were taken for which -------------------------------------------------------------------------------


def confusions(verdicts: Verdicts, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of right answers (rows) by what was read (columns).

    Args:
        verdicts: on all questions; those whose answer is yes, no or a letter make a table.
        manifest: of the score, whose "confusion" may hold others: {set: {labels, counts [labels, labels + 1]}}; in the
            last column is what names no label.

    Returns:
        title; columns; rows of name and cells; picture and mistakes ([right, read, count]) in place of them where there
        are many; filters: whether the cells are of `verdicts`, by answer and what was read.
    """
    found = [
        _table(name, own["labels"], [*own["labels"], _NO_LABEL], own["counts"], filters=False)
        for name, own in manifest.get("confusion", {}).items()
    ]
    named = [row for row in verdicts if row["answer"] in ("yes", "no") or _is_letter(row["answer"])]
    rights = sorted({row["answer"] for row in named}, key=lambda name: (name == "no", name))
    if len(rights) > 1:
        counts = Counter((row["answer"], _read(row)) for row in named)
        reads = {read for _, read in counts} - {*rights}
        columns = [*rights, *sorted(reads, key=lambda name: (name in (_UNPARSED, _MISSING), name))]
        part = "" if len(named) == len(verdicts) else f"{len(named):,} of {len(verdicts):,} questions"
        cells = [[counts[right, column] for column in columns] for right in rights]
        found.append(_table(part, rights, columns, cells, filters=True))
    return found


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and "A" <= answer <= "Z"


def _read(row: Mapping[str, Any]) -> str:
    if row["prediction"] is None:
        return _MISSING
    return _UNPARSED if row["parsed"] is None else str(row["parsed"])


def _table(
    title: str,
    rights: Sequence[str],
    columns: Sequence[str],
    counts: Sequence[Sequence[int]],
    *,
    filters: bool,
) -> dict[str, Any]:
    table: dict[str, Any] = {"title": title, "columns": columns, "filters": filters}
    if len(columns) <= _TOLD:
        rows = [
            {"name": right, "n": sum(own), "cells": own} for right, own in zip(rights, counts, strict=True)
        ]
        return {**table, "rows": rows}
    wrong = [
        (right, column, count)
        for right, own in zip(rights, counts, strict=True)
        for column, count in zip(columns, own, strict=True)
        if count and column != right
    ]
    return {
        **table,
        "picture": _drawn(counts),
        "mistakes": sorted(wrong, key=lambda one: -one[2])[:_MISTAKES],
    }


def _drawn(counts: Sequence[Sequence[int]]) -> str:
    """A pixel for each cell, the stronger the larger its share of the row."""
    image = PIL.Image.new("RGBA", (len(counts[0]), len(counts)))
    for y, own in enumerate(counts):
        for x, count in enumerate(own):
            # The root, so that rare mistakes are seen.
            image.putpixel((x, y), (47, 111, 235, round(255 * (count / max(sum(own), 1)) ** 0.5)))
    return _url(image, "PNG")


def yes_shares(verdicts: Verdicts) -> list[dict[str, Any]]:
    """Of yes-or-no questions: in percent how many are answered by yes and by no, and how many should be by yes. All
    together, and by the first kind of groups."""
    if not {row["answer"] for row in verdicts} <= {"yes", "no"}:
        return []
    found: dict[str, list[Mapping[str, Any]]] = {"all": list(verdicts)}
    for row in verdicts:
        for name in list(row["groups"].values())[:1]:
            found.setdefault(name, []).append(row)

    def share(own: Verdicts, name: str, value: str) -> float:
        return 100 * sum(row[name] == value for row in own) / len(own)

    return [
        {"name": name, "yes": share(own, "parsed", "yes"), "no": share(own, "parsed", "no"),
         "true": share(own, "answer", "yes")}
        for name, own in found.items()
    ]  # fmt: skip
