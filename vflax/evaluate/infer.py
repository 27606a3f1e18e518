"""Predictions of a model for a benchmark's questions."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vflax.evaluate.journal import Journal
from vflax.evaluate.question import Picture, Question

OnAnswer = Callable[[str, str | None, str], None]
"""(key, prediction, finish: "stop" or "length"); None and "too_long" where a question does not fit into the model."""


@dataclass(frozen=True)
class Ask:
    """A question as a model is asked it; its pictures come first."""

    key: str
    text: str
    pictures: tuple[Picture, ...]
    max_tokens: int


class Model(Protocol):
    """Something that answers. identity: what decides its answers, for manifests; decoding is greedy always."""

    identity: Mapping[str, Any]

    def answer(self, asked: Sequence[Ask], on_answer: OnAnswer) -> str:
        """Answer all, in any order.

        Returns:
            "", or why some were not answered; then asking again goes on.

        Raises:
            UserError: what asking again would not mend.
        """
        ...


def infer(
    model: Model,
    folder: Path,
    asked: Sequence[Ask],
    identity: Mapping[str, Any],
    *,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> str:
    """Write predictions.jsonl of a task, or go on with it.

    Args:
        model: who answers.
        folder: OUT/TASK.
        asked: all questions of the benchmark, in its order.
        identity: what decides a prediction beside the model and the questions.
        process, processes: which host this is, of how many.
        wait: returns once all hosts are there.
        show_progress: on stderr.

    Returns:
        "", or why there is no predictions.jsonl yet.

    Raises:
        UserError: a question that cannot be asked, or predictions of another run in `folder`.
    """
    journal = Journal(folder, {"model": model.identity, "questions": digest(asked), **identity}, process)
    keys = [ask.key for ask in asked]
    left = [ask for number, ask in enumerate(asked) if number % processes == process]
    left = [ask for ask in left if ask.key not in journal.found]
    try:
        with _line(folder.name, len(asked), len(asked) - len(left), left, show_progress) as advance:

            def on_answer(key: str, prediction: str | None, finish: str) -> None:
                journal.add(key, prediction and prediction.strip(), finish)
                advance(key)

            reason = model.answer(left, on_answer) if left else ""
    finally:
        journal.close()
    wait()
    if process:
        wait()
        return reason
    missing = journal.finish(keys)
    wait()
    if missing and not reason:
        reason = f"{len(missing):,} questions have no prediction, the first: {missing[0]}"
    return reason


def digest(asked: Iterable[Ask]) -> str:
    """Of all that is asked; of pictures by their names, since reading them all takes as long as answering."""
    whole = hashlib.sha256()
    for ask in asked:
        names = [picture.name for picture in ask.pictures]
        whole.update(repr((ask.key, ask.text, names, ask.max_tokens)).encode())
    return whole.hexdigest()


def asks(
    questions: Sequence[Question], prompt: Callable[[Question, str], str], style: str, max_tokens: int
) -> list[Ask]:
    """Questions as they are asked in a style."""
    return [Ask(q.key, prompt(q, style), q.pictures, max_tokens) for q in questions]


@contextmanager
def _line(
    what: str, total: int, done: int, left: Sequence[Ask], show: bool
) -> Iterator[Callable[[str], None]]:
    """The progress line on stderr: done, pictures per second, time left."""
    pictures = {ask.key: len(ask.pictures) for ask in left}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    began, seen = time.monotonic(), 0
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total, completed=done, rate="")

        def advance(key: str) -> None:
            nonlocal seen
            seen += pictures[key]
            rate = seen / max(time.monotonic() - began, 1e-3)
            progress.update(task, advance=1, rate=f"{rate:.1f} pictures/s")

        yield advance
    if left and show and not console.is_terminal:
        seconds = time.monotonic() - began
        print(
            f"{what}: {len(left):,} questions in {seconds:.0f} s, {seen / seconds:.1f} pictures/s",
            file=sys.stderr,
        )
