"""From two reviews to the record that a task is accepted, beside its task file.

A task is accepted when at least two people, none of them its author, went through the same 20 samples, and

    each of them solved at least 18: gave an answer that means the same as the key,
    each of them found at least 18 with a clear instruction, and 18 whose picture is enough to tell,
    there is no sample whose key two of them call wrong.

Vision-Flan (Xu et al., 2024) tried each new task on 20 samples solved by hand, with two reviewers; it does not state a
limit, so that one of nine tenths is ours. TASKFILE.accepted.json holds for the file as it was then, and the instances
as they were then: either changed, `export` asks for a new review.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.author import TOOL
from data_pipeline.author.checks import REVIEWED, Checked
from data_pipeline.author.task import Task, TaskFile, same_name
from vflax.errors import UserError
from vflax.small_files import read_json
from vflax.values import FLAG, NAME, TEXT, Kind, wrong
from vflax.whole_file import replace

# Of 20 samples, for each reviewer.
LEAST = 18
_RATINGS = ("solved", "clear", "right", "enough")
_REVIEW: dict[str, Kind] = {
    "tool": Kind(f"{TOOL}: a review as its sheet exports it", lambda value: value == TOOL),
    "task": NAME,
    "file": NAME,
    "data": NAME,
    "reviewer": Kind("a name", lambda value: isinstance(value, str) and bool(value.strip())),
    "samples": Kind(
        f"a list of {REVIEWED}", lambda value: isinstance(value, list) and len(value) == REVIEWED
    ),
}
_SAMPLE: dict[str, Kind] = {"id": NAME, "key": NAME, "answer": TEXT, "comment": TEXT} | dict.fromkeys(
    _RATINGS, FLAG
)


@dataclass(frozen=True)
class Review:
    """One person's, of one task: samples of {id, key, answer, comment, solved, clear, right, enough}."""

    path: Path
    task: str
    file: str
    data: str
    reviewer: str
    samples: list[dict[str, Any]]

    def count(self, rating: str) -> int:
        """How many samples got a yes."""
        return sum(sample[rating] for sample in self.samples)

    @property
    def called_wrong(self) -> list[str]:
        return [sample["id"] for sample in self.samples if not sample["right"]]


def read_review(path: Path) -> Review:
    """
    Raises:
        UserError: it is not there, or not what a sheet exports; naming all that is wrong.
    """
    found = read_json(path)
    lines = [f"{key} is missing" for key in _REVIEW if key not in found] + list(
        wrong(found, _REVIEW).values()
    )
    if not lines:
        lines = [line for at, sample in enumerate(found["samples"]) for line in _sample_problems(at, sample)]
    if not lines and len({sample["id"] for sample in found["samples"]}) < REVIEWED:
        lines = ["two samples have one id"]
    if lines:
        raise UserError(f"{path}: {'; '.join(lines[:5])}. Export it again from the review sheet")
    values = {name: found[name] for name in ("task", "file", "data", "samples")}
    return Review(path, reviewer=found["reviewer"].strip(), **values)


def _sample_problems(at: int, sample: Any) -> list[str]:
    if not isinstance(sample, dict):
        return [f"samples[{at}]: expected an object"]
    prefix = f"samples[{at}]."
    missing = [f"{prefix}{key} is missing" for key in _SAMPLE if key not in sample]
    return missing + list(wrong(sample, _SAMPLE, prefix).values())


# ---------------------------------------------------------------------------------------------------------
# Judging


@dataclass(frozen=True)
class Verdict:
    """Of the reviews of one task. problems: why it is not accepted, empty where it is. record: what is kept of it."""

    task: str
    problems: list[str]
    record: dict[str, Any]


def judge(file: TaskFile, reviews: Sequence[Review]) -> list[Verdict]:
    """What the reviews say of the tasks that they are of, in the file's order.

    Raises:
        UserError: a review of a task that the file does not declare.
    """
    by_task: dict[str, list[Review]] = defaultdict(list)
    known = [task.name for task in file.tasks]
    for review in reviews:
        if review.task not in known:
            raise UserError(f"{review.path}: of task {review.task}; {file.path} declares {', '.join(known)}")
        by_task[review.task].append(review)
    return [_verdict(file, task, by_task[task.name]) for task in file.tasks if task.name in by_task]


def _verdict(file: TaskFile, task: Task, reviews: list[Review]) -> Verdict:
    problems = [*_of_other_versions(file, reviews), *_of_reviewers(task, reviews)]
    for review in reviews:
        asks = {
            "solved": "were solved",
            "clear": "had a clear instruction",
            "enough": "had a picture that was enough",
        }
        for rating, words in asks.items():
            if review.count(rating) < LEAST:
                problems.append(
                    f"{review.reviewer}: {review.count(rating)} of {REVIEWED} {words}; {LEAST} are needed"
                )
    doubted = [review.called_wrong for review in reviews]
    both = sorted({key for keys in doubted for key in keys if sum(key in other for other in doubted) > 1})
    if both:
        problems.append(f"two reviewers call the key wrong of {', '.join(both)}")
    record = {
        "file": file.digest,
        "data": reviews[0].data,
        "author": task.author,
        "reviewers": [
            {
                "name": review.reviewer,
                **{rating: review.count(rating) for rating in _RATINGS},
                "called_wrong": review.called_wrong,
            }
            for review in sorted(reviews, key=lambda review: same_name(review.reviewer))
        ],
        "samples": REVIEWED,
        "agreement": _agreement(reviews),
    }
    return Verdict(task.name, problems, record)


def _of_other_versions(file: TaskFile, reviews: list[Review]) -> Iterable[str]:
    for review in reviews:
        if review.file != file.digest:
            yield f"{review.path} is of another version of {file.path.name}: it changed since the sheet was made"
    if len({(review.data, *(sample["id"] for sample in review.samples)) for review in reviews}) > 1:
        yield "the reviews are of different data: make one sheet, and give both reviewers that"


def _of_reviewers(task: Task, reviews: list[Review]) -> Iterable[str]:
    names = [same_name(review.reviewer) for review in reviews]
    for review, name in zip(reviews, names, strict=True):
        if name in task.authors:
            yield f"{review.reviewer} wrote the task; somebody else has to review it"
    if len(set(names)) < 2:
        yield f"{len(set(names))} reviewer; two different ones are needed"
    elif len(set(names)) < len(names):
        yield "two reviews are by one person"


def _agreement(reviews: list[Review]) -> dict[str, float]:
    """For each question the share of samples of which all say the same."""
    return {
        rating: sum(
            len({sample[rating] for sample in one}) == 1
            for one in zip(*(review.samples for review in reviews), strict=True)
        )
        / REVIEWED
        for rating in _RATINGS
    }


# ---------------------------------------------------------------------------------------------------------
# The record


def record_path(file: Path) -> Path:
    """flowers.py -> flowers.accepted.json."""
    return file.with_suffix(".accepted.json")


def write_record(file: TaskFile, verdicts: Iterable[Verdict]) -> Path:
    """Write what is accepted; what was accepted of this version of the file before stays."""
    path = record_path(file.path)
    tasks = {name: one for name, one in _read(path).items() if one["file"] == file.digest}
    tasks |= {verdict.task: verdict.record for verdict in verdicts}
    replace(path, json.dumps({"tool": TOOL, "tasks": tasks}, indent=1, ensure_ascii=False) + "\n")
    return path


def accepted(file: TaskFile, found: Checked) -> tuple[dict[str, Any] | None, str]:
    """(the record of a task as it is now, ""), or (None, why there is none).

    Raises:
        UserError: there is a record, and it is broken.
    """
    path = record_path(file.path)
    record = _read(path).get(found.task.name)
    if record is None:
        return (
            None,
            f"not accepted: {path} does not name it; have it reviewed (review, accept), or say --unreviewed",
        )
    if record["file"] != file.digest:
        return None, f"{file.path.name} changed since it was accepted; have it reviewed again"
    if record["data"] != found.digest:
        return (
            None,
            "its instances are not those that were accepted: other data, or another version of a library",
        )
    return record, ""


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    tasks = read_json(path).get("tasks")
    kinds = {"file": NAME, "data": NAME}
    if not isinstance(tasks, dict) or not all(
        isinstance(one, dict) and one.keys() >= kinds.keys() and not wrong(one, kinds)
        for one in tasks.values()
    ):
        raise UserError(f"{path}: not what `accept` writes; delete it and accept the reviews again")
    return tasks
