"""What a model said to which question, by whatever name a format has for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from vflax.errors import UserError
from vflax.evaluate.files import TABLES, json_lines, need
from vflax.evaluate.question import Question

OWN = "JSON lines with key and prediction, as vflax.evaluate writes them"

Name = str | tuple[str, ...]


class Said(NamedTuple):
    """name: of the question; text: the prediction; answer: the right one, extracted: what a judge has read from the
    prediction, where the file has them."""

    name: Name
    text: str
    answer: str | None = None
    extracted: str | None = None


def of_vflax(path: Path) -> list[Said]:
    """A file of vflax's own; a question is named by its key. One whose prediction is null has none.

    Raises:
        UserError: naming file and line.
    """
    found = []
    for number, row in enumerate(json_lines(path), 1):
        need(row, ("key", "prediction"), f"{path}, line {number}")
        if row["prediction"] is not None:
            found.append(Said(str(row["key"]), str(row["prediction"])))
    return found


def format_of_rows(path: Path, marks: Mapping[str, str]) -> str | None:
    """The format that a file of rows shows; None: none of these.

    Args:
        path: JSON lines, a JSON list, or a table, which is VLMEvalKit's.
        marks: {name that its rows have: format}, the first that is there decides.
    """
    if path.suffix.lower() in TABLES:
        return "vlmevalkit" if "vlmevalkit" in marks.values() else None
    first = json_lines(path)[0]
    return next((format for name, format in marks.items() if name in first), None)


def join(
    said: Iterable[Said], questions: Mapping[Name, Question], where: Path, benchmark: str
) -> dict[str, Said]:
    """{key: what was said}, never by position.

    Args:
        said: all that the predictions hold.
        questions: {name in the format: question}.
        where, benchmark: for messages.

    Raises:
        UserError: of no predictions at all, or of a question that is not one of these, that is answered twice, or
            whose right answer is another one.
    """
    found: dict[str, Said] = {}
    for row in said:
        question = questions.get(row.name)
        name = row.name if isinstance(row.name, str) else ", ".join(row.name)
        if question is None:
            raise UserError(
                f"{where}: {name}: no question of this {benchmark}; predictions for another version?"
            )
        if row.answer is not None and row.answer.lower() != question.answer.lower():
            raise UserError(
                f"{where}: {name}: the right answer is {row.answer!r} there and {question.answer!r} in the data; "
                "predictions for another version?"
            )
        if question.key in found:
            raise UserError(f"{where}: {name}: answered twice; two runs in one file? Keep one of them")
        found[question.key] = row
    if not found:
        raise UserError(f"{where}: no predictions in it; is it the file that was to be filled in?")
    return found


def without_answers(where: Path, benchmark: str) -> UserError:
    return UserError(
        f"{where}: these predictions do not have the right answers with them; say --data=DIR of {benchmark}"
    )
