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

from vflax.errors import UserError
from vflax.evaluate.hosts import Hosts
from vflax.evaluate.journal import Journal
from vflax.evaluate.question import Picture

# Seconds between two lines of progress where stderr is no terminal.
_TELL = 30

OnAnswer = Callable[[str, str | None, str, tuple[int, int]], None]
"""(key, prediction, finish, (tokens of the prompt, of the answer)). finish: "stop", "length" or what else an endpoint
says; where a question does not fit into the model there is no prediction, and finish is "too_long"."""


@dataclass(frozen=True)
class Ask:
    """A question as a model is asked it; its pictures come first."""

    key: str
    text: str
    pictures: tuple[Picture, ...]
    max_tokens: int


class Model(Protocol):
    """Something that answers. identity: what decides its answers, as JSON; decoding is greedy always."""

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
    hosts: Hosts = Hosts(),  # noqa: B008 (an immutable tuple)
    *,
    show_progress: bool = True,
) -> str:
    """Write predictions.jsonl of a task, or go on with it; all hosts call it.

    Args:
        model: who answers. Where there are several hosts it answers all or raises.
        folder: OUT/TASK.
        asked: all questions of the benchmark, in its order.
        identity: what decides a prediction beside the model and the questions.
        hosts: this one among those that share the questions.
        show_progress: on stderr.

    Returns:
        "", or why there is no predictions.jsonl yet.

    Raises:
        UserError: a question that cannot be asked, predictions of another run in `folder`, a disk that is full.
    """
    if hosts.process:
        hosts.wait()  # for run.json
    journal = Journal(
        folder, {"model": model.identity, "questions": digest(asked), **identity}, hosts.process
    )
    if not hosts.process:
        hosts.wait()
    left = [ask for ask in asked[hosts.process :: hosts.processes] if ask.key not in journal.found]
    pictures = {ask.key: len(ask.pictures) for ask in left}
    began = time.monotonic()
    done = len(asked[hosts.process :: hosts.processes]) - len(left)
    try:
        with _line(folder.name, done, len(left), show_progress) as advance:

            def on_answer(key: str, prediction: str | None, finish: str, tokens: tuple[int, int]) -> None:
                text = None if prediction is None else prediction.strip()
                seconds = time.monotonic() - began
                journal.add(key, text, finish, pictures=pictures[key], tokens=tokens, seconds=seconds)
                advance(pictures[key])

            reason = model.answer(left, on_answer) if left else ""
    finally:
        journal.close()
    hosts.wait()
    if hosts.process or reason:
        return reason
    if missing := journal.finish([ask.key for ask in asked]):
        raise UserError(
            f"{folder}: {len(missing):,} questions have no prediction though all hosts are done, the first: "
            f"{missing[0]}; --out must be one folder that all hosts share. If it is, run the same command again"
        )
    return ""


def digest(asked: Iterable[Ask]) -> str:
    """Of all that is asked; of pictures by their names, since reading them all takes as long as answering."""
    whole = hashlib.sha256()
    for ask in asked:
        names = [picture.name for picture in ask.pictures]
        whole.update(repr((ask.key, ask.text, names, ask.max_tokens)).encode())
    return whole.hexdigest()


@contextmanager
def _line(what: str, done: int, left: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Progress on stderr: done, pictures per second, time left; on a terminal a line that moves, else one in a while.

    Gives what is to be called with each answer's number of pictures.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    plain = show and not console.is_terminal
    began = told = time.monotonic()
    answers = pictures = 0
    with Progress(*columns, console=console, disable=plain or not show) as progress:
        task = progress.add_task(what, total=done + left, completed=done, rate="")

        def advance(more: int) -> None:
            nonlocal answers, pictures, told
            answers, pictures, now = answers + 1, pictures + more, time.monotonic()
            rate = f"{pictures / max(now - began, 1e-3):.1f} pictures/s"
            progress.update(task, advance=1, rate=rate)
            if plain and (answers == left or now - told > _TELL):
                told = now
                remaining = (now - began) / answers * (left - answers)
                print(
                    f"{what}: {done + answers:,} of {done + left:,} questions, {rate}, {remaining:,.0f} s left",
                    file=sys.stderr, flush=True,
                )  # fmt: skip

        yield advance
