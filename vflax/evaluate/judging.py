"""What a benchmark that is graded by a judge has to say to one. Nothing here sends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vflax.errors import UserError
from vflax.evaluate.files import Row, json_lines, need
from vflax.evaluate.question import Question


@dataclass(frozen=True)
class Request:
    """messages: [{"role", "content"}]; model: the judge that the benchmark's published numbers are by; temperature,
    max_tokens: of its reply."""

    messages: list[dict[str, str]]
    model: str
    temperature: float
    max_tokens: int


class Judged(Protocol):
    """The judge's side of a benchmark's module.

    RUNS: how often an answer is graded, as published numbers were made. ATTEMPTS: replies that are read before an
    answer has no grade.
    """

    NAME: str
    RUNS: int
    ATTEMPTS: int

    def judge_request(self, question: Question, prediction: str, attempt: int) -> Request: ...

    def read_grade(self, content: str) -> Any: ...


def ungraded(where: object, benchmark: str) -> UserError:
    """Of predictions that no judge has seen."""
    return UserError(
        f"{where}: not graded. {benchmark} is scored from the grades of a judge: run the judge step of python -m "
        "vflax.evaluate on these predictions first, or name a file with grades"
    )


def of_vflax(path: Path, benchmark: str) -> list[tuple[str, Row]]:
    """Where each row of a graded file of vflax's own stands, and the row: key, prediction, grades (a list with
    something in it) and, where it is told, judge. Those without a prediction are left out.

    Raises:
        UserError: naming the line, of one that lacks these or is not graded.
    """
    found = []
    for line, row in enumerate(json_lines(path), 1):
        where = f"{path}, line {line}"
        need(row, ("key", "prediction"), where)
        if row["prediction"] is None:
            continue
        if not row.get("grades"):
            raise ungraded(where, benchmark)
        if not isinstance(row["grades"], list):
            raise UserError(
                f"{where}: grades is {row['grades']!r}, expected a list with one for each run of the judge"
            )
        found.append((where, row))
    return found


def number(value: Any, where: object) -> float:
    """A grade as files have it: a number, or a cell with one.

    Raises:
        UserError: naming the place, where it is something else.
    """
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if abs(found) < float("inf"):  # and so no NaN
        return found
    raise UserError(f"{where}: the grade is {value!r}, expected a number; grade this one again")


def times(grades: Mapping[str, Sequence[Any]], where: object, benchmark: str) -> int:
    """How often each answer was graded.

    Args:
        grades: {name of an answer: its grades}.

    Raises:
        UserError: some more often than others, or none.
    """
    found = {len(own): name for name, own in grades.items()}
    if len(found) > 1:
        listed = ", ".join(f"{name} has {count} grades" for count, name in sorted(found.items()))
        raise UserError(
            f"{where}: not all answers are graded equally often ({listed}); go on with the judge step"
        )
    if not found or 0 in found:
        raise ungraded(where, benchmark)
    return next(iter(found))
