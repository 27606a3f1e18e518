"""Answers of the catastrophic-forgetting suite in the formats they are written in, and which images they are about."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vflax.errors import UserError
from vflax.evaluate.cf_data import DATASETS, check
from vflax.evaluate.files import json_lines, need
from vflax.evaluate.judging import of_vflax
from vflax.evaluate.labels import Matcher
from vflax.evaluate.predictions import OWN, without_answers
from vflax.evaluate.question import Question

FORMATS = {
    "judged": "JSON lines with key, prediction and grades: for each run of a judge yes, no or null",
    "vflax": OWN,
    "emt": "CoIN's answers, in LLaVA's form: JSON lines with question_id, prompt, text and label",
    "llava": "LLaVA's answers: JSON lines with question_id, prompt and text",
    "review": "CoIN's judge's answers: JSON lines with prompt, which has label and prediction, and text",
}
# Those in which a judge has spoken.
JUDGED = ("judged", "review")

_NEEDED = {
    "judged": ("key", "prediction"),
    "vflax": ("key", "prediction"),
    "emt": ("question_id", "text", "label"),
    "llava": ("question_id", "text"),
    "review": ("question_id", "prompt", "text"),
}
_REVIEWED = re.compile(r"Label: (?P<label>.*?), Prediction: (?P<prediction>.*)", re.DOTALL)


class Answer(NamedTuple):
    """A row of predictions.

    where, file: it stands. dataset: its set, "" before it is known. id: of the image, as the row has it. text: None
    where the model could not be asked. label: the right one, where the row has it. replies: of each run of a judge, ""
    where nothing was read. judge: who it was, where the row tells.
    """

    where: str
    file: Path
    dataset: str
    id: str
    text: str | None
    label: str | None
    replies: tuple[str, ...]
    judge: str | None


def recognise(predictions: Path) -> str | None:
    """The format of a file, or of a folder with a file for each set; None: none of these."""
    of_folder = files(predictions)
    if not of_folder:
        return None
    first = json_lines(of_folder[0])[0]
    if "key" in first:
        return "judged" if "grades" in first else "vflax"
    if "question_id" not in first or "text" not in first:
        return None
    if '"Label"?' in str(first.get("prompt", "")):
        return "review"
    return "emt" if "label" in first else "llava"


def files(predictions: Path) -> list[Path]:
    """The file itself, or those of a folder."""
    return sorted(predictions.glob("*.jsonl")) if predictions.is_dir() else [predictions]


def read(predictions: Path, format: str, sets: Sequence[str]) -> list[Answer]:
    """All answers, with their sets.

    Args:
        predictions: a file, or a folder with some.
        format: one of `FORMATS`.
        sets: those that the data have; empty: there are no data.

    Raises:
        UserError: naming file and line, of a row that is not in this format, is not judged though its format says so,
            may be of any set, or is of one that the data do not have.
    """
    found = []
    for file in files(predictions):
        own = _rows(file, format)
        of_file = _set_of(own, file, sets)
        for answer in own:
            name = answer.dataset if answer.dataset in (*sets, *DATASETS) else of_file
            if name is None:
                raise UserError(
                    f"{answer.where}: of which set is question {answer.id}? Expected keys like cifar10/test/..., the "
                    f"list of labels in the prompt, or one of {', '.join(DATASETS)} in the file's name"
                )
            if sets and name not in sets:
                raise UserError(
                    f"{answer.where}: {answer.id} is of {DATASETS[name].title}, which the data do not have; add it "
                    f"there, or keep only the answers of {', '.join(sets)}"
                )
            # As the set spells it, since it must be that of the question.
            spelled = DATASETS[name].label(answer.label or "") if name in DATASETS else None
            found.append(answer._replace(dataset=name, label=spelled or answer.label))
    return found


def _rows(file: Path, format: str) -> list[Answer]:
    if format == "judged":
        rows = of_vflax(file, "CF's official rule")
    else:
        rows = [(f"{file}, line {number}", row) for number, row in enumerate(json_lines(file), 1)]
    found = []
    for where, row in rows:
        need(row, _NEEDED[format], where)
        keyed = format in ("judged", "vflax")
        id = str(row["key" if keyed else "question_id"])
        text, label = row["prediction" if keyed else "text"], row.get("label")
        replies = row["grades"] if format == "judged" else []
        named = id.split("/")[0]
        if format == "review":
            about = _REVIEWED.search(str(row["prompt"]))
            if about is None:
                raise UserError(f"{where}: the prompt lacks 'Label: ..., Prediction: ...'; judged otherwise?")
            text, label, replies = about["prediction"], about["label"], [row["text"]]
        elif "prompt" in row:
            named = _listed(str(row["prompt"])) or named
        replies = tuple(str(one or "") for one in replies)
        judge = _text(row.get("judge"))
        found.append(Answer(where, file, named, id, _text(text), _text(label), replies, judge))
    return found


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


@lru_cache
def matcher(labels: tuple[str, ...]) -> Matcher:
    """Of a list of labels; made once."""
    return Matcher(labels)


@lru_cache
def _listed(prompt: str) -> str | None:
    """The set most of whose labels a question lists."""
    shares = {
        name: len(matcher(dataset.labels).hits(prompt)) / len(dataset.labels)
        for name, dataset in DATASETS.items()
    }
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0.5 else None


def _set_of(answers: Sequence[Answer], file: Path, sets: Sequence[str]) -> str | None:
    """A file's set: by its name, else the only one there is, else by the labels in it; None: none of these tells."""
    name = re.sub(r"[^a-z0-9]", "", file.stem.lower())
    # The longest first, since cifar100 has cifar10 in it.
    named = [dataset for dataset in sorted(DATASETS, key=len, reverse=True) if dataset in name]
    labels = {answer.label or "" for answer in answers}
    fits = [d.name for d in DATASETS.values() if all(d.label(label) for label in labels)]
    for found in (named[:1], sets, fits):
        if len(found) == 1:
            return found[0]
    return None


def with_keys(answers: Sequence[Answer], questions: Sequence[Question]) -> list[Answer]:
    """With the keys of the questions as ids. Others call an image by its place in the test set, where that has one
    order, by its file, or by a path that ends in it.

    Raises:
        UserError: an id is that of several images.
    """
    called: dict[tuple[str, str], set[str]] = {}
    for question in questions:
        dataset, *parts = question.key.split("/")
        file = question.pictures[0].name.rsplit(".", 1)[0]
        own = {"/".join(parts[start:]) for start in range(len(parts))} | {file, file.split("/")[-1]}
        own |= {str(int(parts[-1]))} if len(parts) == 2 and parts[-1].isdecimal() else set()
        for name in own:
            called.setdefault((dataset, name), set()).add(question.key)
    found = []
    for answer in answers:
        path = re.sub(r"\.(jpe?g|png)$", "", answer.id.replace("\\", "/"), flags=re.IGNORECASE).split("/")
        ends = ((answer.dataset, "/".join(path[start:])) for start in range(len(path)))
        keys = next((called[end] for end in ends if end in called), {answer.id})
        if len(keys) > 1:
            raise UserError(
                f"{answer.where}: {answer.id} is the name of {len(keys)} images, as {min(keys)}; expected such a key"
            )
        found.append(answer._replace(id=next(iter(keys))))
    return found


def of_labels(
    answers: Sequence[Answer], predictions: Path, custom: bool
) -> tuple[list[Answer], list[Question]]:
    """Answers that have the labels with them, under keys; and the questions that they make, in the order of sets and
    keys.

    Args:
        answers: of all files.
        predictions: for messages.
        custom: the answers may be of a part of a set.

    Raises:
        UserError: a label is missing or is none of the set's, or they are not all images of a set.
    """
    keyed, found = [], {}
    for answer in answers:
        dataset = DATASETS[answer.dataset]
        if answer.label is None:
            raise without_answers(predictions, "CIFAR, MNIST and miniImageNet")
        if answer.label not in dataset.labels:
            raise UserError(f"{answer.where}: {answer.label!r} is no label of {dataset.title}")
        key = answer.id if answer.id.startswith(f"{dataset.name}/") else f"{dataset.name}/{answer.id}"
        groups = {"class": f"{dataset.name}/{answer.label}", "dataset": dataset.name}
        found[key] = Question(key, dataset.question, answer.label, groups, key)
        keyed.append(answer._replace(id=key))
    for name, dataset in DATASETS.items():
        seen = Counter(q.answer for q in found.values() if q.groups["dataset"] == name)
        # Which images of miniImageNet are asked about is nobody's rule but ours.
        if seen and not custom and name != "miniimagenet":
            check(dataset, seen, str(predictions))
    order = {name: number for number, name in enumerate(DATASETS)}
    ordered = sorted(found.values(), key=lambda q: (order[q.groups["dataset"]], len(q.key), q.key))
    return keyed, ordered
