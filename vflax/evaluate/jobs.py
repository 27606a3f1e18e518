"""What a run is asked for: its tasks, their questions, and what is wrong with them before anything is computed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vflax.errors import UserError
from vflax.evaluate.infer import Ask
from vflax.evaluate.question import Question, limited
from vflax.evaluate.tasks import JUDGED, SHOWN, TASKS, WITHOUT_JUDGE, Task

STYLES = ("llava", "plain", "vlmevalkit", "qcm_lea")
# Some of its questions are text alone, those with a picture being in this kind of groups; all others' have one.
_WITH_PICTURE = {"scienceqa": "image"}


@dataclass(frozen=True)
class Job:
    """One task of a run. style: of the prompts as they are; "llava" where the task has no other wording."""

    task: Task
    data: Path
    folder: Path
    mode: str
    style: str
    questions: list[Question]
    asked: list[Ask]

    @property
    def needs_judge(self) -> bool:
        name = self.task.NAME
        return name in JUDGED and self.mode not in WITHOUT_JUDGE.get(name, ())


def open_jobs(args: argparse.Namespace) -> list[Job]:
    """The tasks that the command line asks for.

    Raises:
        UserError: a flag that is wrong, or a benchmark that is not there or not whole.
    """
    names = some(args.tasks, tuple(TASKS), "--tasks")
    own = [value for value in args.data if value.partition("=")[0] in TASKS]
    roots = [Path(value) for value in args.data if value not in own]
    if len(roots) > 1:
        raise UserError(
            f"--data={roots[0]} and --data={roots[1]}: one folder for all tasks; others as TASK=DIR"
        )
    places = _pairs(own, "--data", names)
    modes = _pairs(args.mode, "--mode", names)
    found = []
    for name in names:
        task = TASKS[name]
        mode = modes.get(name, next(iter(task.MODES)))
        if mode not in task.MODES:
            raise UserError(f"--mode={name}={mode}: expected one of {', '.join(task.MODES)}")
        if name not in places and not roots:
            raise UserError(f"--data: names no folder for {name}")
        data = Path(places[name]) if name in places else roots[0] / name
        if not data.exists():
            raise UserError(f"--data: {data}: not there; {name} is expected in it, or say --data={name}=DIR")
        questions = limited(task.load(data, custom=args.custom), args.limit)
        most = args.max_tokens or task.MAX_TOKENS
        asked, usual = (asks(task, questions, style, most) for style in (args.style, "llava"))
        style = "llava" if asked == usual else args.style
        found.append(Job(task, data, args.out / name, mode, style, questions, asked))
    return found


def asks(task: Task, questions: Sequence[Question], style: str, max_tokens: int) -> list[Ask]:
    """Questions as a model is asked them in a style."""
    shown = SHOWN.get(task.NAME, lambda question, style: question.pictures)
    return [Ask(q.key, task.prompt(q, style), shown(q, style), max_tokens) for q in questions]


def check_pictures(jobs: Sequence[Job]) -> None:
    """Refuse questions about pictures that are not there.

    Raises:
        UserError: naming every task.
    """
    if lacking := [words for job in jobs if (words := lacking_pictures(job.task, job.data, job.questions))]:
        raise UserError("; ".join(lacking))


def lacking_pictures(task: Task, data: Path, questions: Sequence[Question]) -> str:
    """What is to be said of questions about pictures that are not there; "" where all are."""
    kind = _WITH_PICTURE.get(task.NAME)
    without = [q.key for q in questions if not q.pictures and (kind is None or kind in q.groups)]
    if without and len(without) == len(questions):
        return f"{data}: the questions of {task.NAME} are there, their pictures are not"
    if without:
        return (
            f"{data}: {len(without):,} of {len(questions):,} questions of {task.NAME} lack their picture, the first: "
            f"{without[0]}"
        )
    return ""


def some(text: str, known: Sequence[str], flag: str) -> list[str]:
    """Names of a flag, in the order in which they are known."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag}={','.join(unknown)}: expected some of {', '.join(known)}")
    return [name for name in known if name in names]


def _pairs(values: Sequence[str], flag: str, names: Sequence[str]) -> dict[str, str]:
    """{task: value} of TASK=VALUE."""
    found = {}
    for given in values:
        name, sign, value = given.partition("=")
        if not sign:
            raise UserError(f"{flag}={given}: expected TASK=VALUE")
        if name not in names:
            raise UserError(f"{flag}={name}=...: is not one of --tasks={','.join(names)}")
        found[name] = value
    return found
