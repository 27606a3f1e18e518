"""The catastrophic-forgetting suite (EMT: Zhai et al., 2023, arXiv 2309.10313): does a model still tell what an image
shows, asked with the list of all labels? On CIFAR-10, CIFAR-100, MNIST and miniImageNet (`cf_data`).

EMT has a language model judge each answer, and counts how often it says yes; no string matcher is official.
Vision-Flan's column CF is the mean of the four sets' accuracies so found, with Vicuna-1.5-13B as the judge, where EMT
had gpt-3.5-turbo. That is the rule called official here; it needs the judge's answers. "strict" is our matcher
(`labels`), which needs none; both numbers are in the metrics where both can be had.

EMT's scripts are not public. The wordings are those of CoIN (github.com/zackschen/CoIN, commit 3be1b48), which took
them over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate.cf_data import DATASETS, check, load
from vflax.evaluate.files import digest, json_lines, need
from vflax.evaluate.judging import Request, ungraded
from vflax.evaluate.labels import Matcher
from vflax.evaluate.predictions import OWN, Name, Said, join, without_answers
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, Verdict, make

NAME = "cf"
MODES = {
    "official": "EMT's: the share of answers that a judge says yes to; needs the judge's answers",
    "strict": "ours, without a judge: the answer names the label, in whole words, and no other of the list",
}
FORMATS = {
    "judged": "JSON lines with key, prediction and grades, for each run of a judge yes, no or null; or verdict, of one",
    "vflax": OWN,
    "emt": "CoIN's answers, in LLaVA's form: JSON lines with question_id, prompt, text and label",
    "llava": "LLaVA's answers: JSON lines with question_id, prompt and text",
    "review": "CoIN's judge's answers: JSON lines with prompt, which has label and prediction, and text",
}
MAX_TOKENS = 128

_NEEDED = {
    "judged": ("key", "prediction"),
    "vflax": ("key", "prediction"),
    "emt": ("question_id", "text", "label"),
    "llava": ("question_id", "text"),
    "review": ("question_id", "prompt", "text"),
}

_JUDGE = "You are a helpful and precise assistant for checking the quality of the answer."
_JUDGED = (
    'Please only answer the question in yes or no. Is the "Prediction" correctly predicting the right "Label"? '
    "Label: {label}, Prediction: {prediction}"
)
_REVIEWED = re.compile(r"Label: (?P<label>.*?), Prediction: (?P<prediction>.*)", re.DOTALL)
RUNS = 1
ATTEMPTS = 1  # CoIN's scripts ask once, whatever the reply
# EMT's; it does not tell temperature and length.
_JUDGE_MODEL = "gpt-3.5-turbo"
_JUDGE_TOKENS = 64


class _Answer(NamedTuple):
    """A row of predictions.

    dataset: by what the row itself says. text: None where the model could not be asked. verdicts: of each run of a
    judge, "" where nothing was read; None where there was no judge. judge: who it was, where the row tells.
    """

    where: str
    file: Path
    dataset: str | None
    id: str
    text: str | None
    label: str | None
    verdicts: tuple[str, ...] | None
    judge: str | None


def prompt(question: Question, style: str) -> str:
    """What a model is asked: EMT's question, in every style; LLaVA's adds nothing to it."""
    return question.text


# --- the judge --------------------------------------------------------------------------------------------------------


def judge_request(question: Question, prediction: str, attempt: int = 0) -> Request:
    """What a judge is asked about a prediction, at every attempt; the label as CoIN's scripts have it, with a capital
    letter."""
    asked = _JUDGED.format(label=question.answer.capitalize(), prediction=prediction)
    messages = [{"role": "system", "content": _JUDGE}, {"role": "user", "content": asked}]
    return Request(messages, _JUDGE_MODEL, 0.0, _JUDGE_TOKENS)


def read_verdict(content: str) -> str | None:
    """Yes or no, of a judge's answer: the word that it begins with, or else the one of the two that is in it; None:
    neither or both are."""
    words = re.findall(r"[a-z]+", content.lower())
    said = {"yes", "no"} & set(words[:1]) or {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else None


read_grade = read_verdict  # as `vflax.evaluate.judging.Judged` calls it


# --- predictions ------------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file, or of a folder with a file for each set; None: none of these."""
    files = _files(predictions)
    if not files:
        return None
    first = json_lines(files[0])[0]
    if "key" in first:
        return "judged" if {"verdict", "grades"} & set(first) else "vflax"
    if "question_id" not in first or "text" not in first:
        return None
    if '"Label"?' in str(first.get("prompt", "")):
        return "review"
    return "emt" if "label" in first else "llava"


def _files(predictions: Path) -> list[Path]:
    return sorted(predictions.glob("*.jsonl")) if predictions.is_dir() else [predictions]


def _answers(predictions: Path, format: str) -> Iterator[_Answer]:
    for file in _files(predictions):
        for number, row in enumerate(json_lines(file), 1):
            where = f"{file}, line {number}"
            need(row, _NEEDED[format], where)
            id = str(row["key"] if "key" in row else row["question_id"])
            text, label = row.get("prediction", row.get("text")), row.get("label")
            grades = row.get("grades") or ([row["verdict"]] if "verdict" in row else None)
            if format == "review":
                found = _REVIEWED.search(str(row["prompt"]))
                if found is None:
                    raise UserError(
                        f"{where}: the prompt lacks 'Label: ..., Prediction: ...'; judged otherwise?"
                    )
                text, label, grades = found["prediction"], found["label"], [row["text"]]
            if format == "judged" and text is not None and not isinstance(grades, list):
                raise ungraded(where, "CF's official rule")
            listed = None if format == "review" else _listed(str(row.get("prompt", "")))
            first = id.split("/")[0] if "/" in id else None
            yield _Answer(
                where, file, next((name for name in (first, listed) if name in DATASETS), first), id,
                None if text is None else str(text), None if label is None else str(label),
                tuple("" if one is None else str(one) for one in grades) if isinstance(grades, list) else None,
                None if "judge" not in row else str(row["judge"]),
            )  # fmt: skip


@lru_cache
def _matcher(labels: tuple[str, ...]) -> Matcher:
    return Matcher(labels)


@lru_cache
def _listed(prompt: str) -> str | None:
    """The set most of whose labels a question lists."""
    shares = {
        name: len(_matcher(dataset.labels).hits(prompt)) / len(dataset.labels)
        for name, dataset in DATASETS.items()
    }
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0.5 else None


def _placed(answers: Sequence[_Answer], known: Sequence[str]) -> list[tuple[str, _Answer]]:
    """Each with its set: by the row itself, else by the name of its file, else the only one there is, else by the
    labels in the file.

    Args:
        answers: of all files.
        known: the sets of the data; empty: there are no data.

    Raises:
        UserError: none of these tells.
    """
    of_file: dict[Path, str | None] = {}
    for file in {answer.file for answer in answers}:
        name = re.sub(r"[^a-z0-9]", "", file.stem.lower())
        named = [dataset for dataset in sorted(DATASETS, key=len, reverse=True) if dataset in name]
        found = {answer.label for answer in answers if answer.file == file}
        fits = [
            dataset.name
            for dataset in DATASETS.values()
            if all(label is not None and dataset.label(label) for label in found)
        ]
        of_file[file] = (
            named[0] if named else known[0] if len(known) == 1 else fits[0] if len(fits) == 1 else None
        )
    placed = []
    for answer in answers:
        dataset = answer.dataset if answer.dataset in (*known, *DATASETS) else of_file[answer.file]
        if dataset is None:
            raise UserError(
                f"{answer.where}: of which set is question {answer.id}? Expected keys like cifar10/test/..., the list "
                f"of labels in the prompt, or one of {', '.join(DATASETS)} in the file's name"
            )
        placed.append((dataset, answer))
    return placed


def _of_labels(placed: Sequence[tuple[str, _Answer]], predictions: Path, custom: bool) -> list[Question]:
    """The questions of predictions that have the labels with them, in the order of sets and keys."""
    found: dict[str, Question] = {}
    for name, answer in placed:
        if answer.label is None:
            raise without_answers(predictions, "CIFAR, MNIST and miniImageNet")
        label = DATASETS[name].label(answer.label)
        if label is None:
            raise UserError(f"{answer.where}: {answer.label!r} is no label of {DATASETS[name].title}")
        key = _key(name, answer.id)
        groups = {"class": f"{name}/{label}", "dataset": name}
        found[key] = Question(key, DATASETS[name].question, label, groups, key)
    for name, dataset in DATASETS.items():
        seen = Counter(q.answer for q in found.values() if q.groups["dataset"] == name)
        # Which images of miniImageNet are asked about is nobody's rule but ours.
        if seen and not custom and name != "miniimagenet":
            check(dataset, seen, str(predictions))
    order = {name: number for number, name in enumerate(DATASETS)}
    return sorted(found.values(), key=lambda q: (order[q.groups["dataset"]], len(q.key), q.key))


def _key(dataset: str, id: str) -> str:
    return id if id.startswith(f"{dataset}/") else f"{dataset}/{id}"


def _of_data(placed: Sequence[tuple[str, _Answer]], questions: Sequence[Question]) -> Iterator[Said]:
    """What was said, under the keys of the questions. Others call an image by its place in the test set, where that has
    one order, by its file, or by a path that ends in it."""
    called: dict[tuple[str, str], set[str]] = {}
    for question in questions:
        dataset, *parts = question.key.split("/")
        file = question.pictures[0].name.rsplit(".", 1)[0]
        own = {"/".join(parts[start:]) for start in range(len(parts))} | {file, file.split("/")[-1]}
        own |= {str(int(parts[-1]))} if len(parts) == 2 and parts[-1].isdecimal() else set()
        for name in own:
            called.setdefault((dataset, name), set()).add(question.key)
    for dataset, answer in placed:
        path = re.sub(r"\.(jpe?g|png)$", "", answer.id.replace("\\", "/"), flags=re.IGNORECASE).split("/")
        ends = ["/".join(path[start:]) for start in range(len(path))]
        keys = next((called[dataset, end] for end in ends if (dataset, end) in called), {answer.id})
        if len(keys) > 1:
            raise UserError(
                f"{answer.where}: {answer.id} is the name of {len(keys)} images, as {min(keys)}; expected such a key"
            )
        yield _said(next(iter(keys)), dataset, answer)


def _said(name: str, dataset: str, answer: _Answer) -> Said:
    """The label as the set spells it, since it must be that of the question."""
    label = answer.label
    if label is not None and dataset in DATASETS:
        label = DATASETS[dataset].label(label) or label
    return Said(name, answer.text or "", label)


# --- the score --------------------------------------------------------------------------------------------------------


def score(
    predictions: Path,
    format: str,
    data: Path | None,
    mode: str,
    *,
    custom: bool = False,
    limit: int | None = None,
) -> Score:
    """Score a file or folder of predictions; see `vflax.evaluate.mme.score`.

    The score is the mean over the sets that have predictions, which its name tells: "mean", or "mean of 2 of 4". Of
    these sets, a question without prediction is wrong.
    """
    answers = list(_answers(predictions, format))
    questions = load(data, custom=custom) if data else []
    placed = _placed(answers, list(dict.fromkeys(q.groups["dataset"] for q in questions)))
    # A null stands for a question that the model could not be asked.
    asked = [(name, answer) for name, answer in placed if answer.text is not None]
    if data is None:
        questions = _of_labels(placed, predictions, custom)
        said = [_said(_key(name, answer.id), name, answer) for name, answer in asked]
    else:
        said = list(_of_data(asked, questions))
    joined = join(said, {q.key: q for q in questions}, predictions, "CF")
    here = {name for name, _ in placed}
    questions = limited([question for question in questions if question.groups["dataset"] in here], limit)
    judged = {one.name: answer.verdicts for one, (_, answer) in zip(said, asked, strict=True)}
    unjudged = sum(question.key in joined and judged[question.key] is None for question in questions)
    if mode == "official" and unjudged:
        raise UserError(
            f"{predictions}: {unjudged:,} of {len(joined):,} predictions have no verdict of a judge, which is what EMT "
            "counts. Run the judge step of python -m vflax.evaluate on them first, or say --mode=strict for the "
            "matcher, which needs none"
        )
    listed = {
        name: DATASETS[name].labels if name in DATASETS else _own_labels(questions, name) for name in here
    }
    readings = [
        _reading(
            question, joined.get(question.key), judged.get(question.key) or (),
            _matcher(listed[question.groups["dataset"]]), mode,
        )
        for question in questions
    ]  # fmt: skip
    verdicts = [reading.verdict for reading in readings]
    right = {"strict": [float(reading.named == [reading.verdict.answer]) for reading in readings]}
    if not unjudged:
        right["judge"] = [reading.agreed for reading in readings]
    metrics = _Metrics(verdicts, right, "judge" if mode == "official" else "strict")
    return make(
        NAME, mode, format, verdicts, metrics, metrics.name,
        groups=_groups(verdicts, right), printed={} if unjudged else _printed(questions, judged),
        manifest={
            "predictions_sha256": digest(_files(predictions)), "custom": custom, "limit": limit,
            "score": metrics.name, "sets": dict(Counter(q.groups["dataset"] for q in questions)),
            "judges": sorted({answer.judge for answer in answers if answer.judge is not None}),
            "confusion": _confusion(readings),
        },
        strata="dataset",
    )  # fmt: skip


class _Reading(NamedTuple):
    """named: the labels that the matcher finds; agreed: the share of runs in which the judge says yes."""

    verdict: Verdict
    named: list[str]
    agreed: float


def _reading(
    question: Question, said: Said | None, verdicts: Sequence[str], matcher: Matcher, mode: str
) -> _Reading:
    named = matcher.hits(said.text) if said else []
    read = [read_verdict(verdict) for verdict in verdicts]
    agreed = read.count("yes") / len(read) if read else 0.0
    why = f"names {', '.join(named) or 'no label'}"
    if mode == "official":
        parsed = ", ".join(one or "neither" for one in read) if any(read) else None
        right = agreed
        why = f"the judge says {parsed or 'neither yes nor no'}; {why}"
    else:
        parsed = named[0] if len(named) == 1 else None
        right = float(named == [question.answer])
    verdict = Verdict(
        question.key, question.unit, question.groups, question.answer, said.text if said else None, parsed,
        right, why if said else "no prediction",
    )  # fmt: skip
    return _Reading(verdict, named, agreed)


def _own_labels(questions: Sequence[Question], name: str) -> tuple[str, ...]:
    """Of a set of somebody's own, each of which has images."""
    return tuple(dict.fromkeys(q.answer for q in questions if q.groups["dataset"] == name))


class _Metrics:
    """Accuracies by each rule, of every set and their mean, from how often each verdict counts."""

    def __init__(
        self, verdicts: Sequence[Verdict], right: Mapping[str, Sequence[float]], headline: str
    ) -> None:
        names = [v.groups["dataset"] for v in verdicts]
        self._sets = list(dict.fromkeys(names))
        number = {name: number for number, name in enumerate(self._sets)}
        self._of = np.array([number[name] for name in names])
        self._right = {rule: np.array(values) for rule, values in right.items()}
        self._headline = headline
        known = sum(name in DATASETS for name in self._sets)
        if known < len(self._sets):
            self.name = f"mean of {len(self._sets)}, your own among them"
        else:
            self.name = "mean" if known == len(DATASETS) else f"mean of {known} of {len(DATASETS)}"

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        size = len(self._sets)
        whole = np.bincount(self._of, counts, size)
        shares = {
            rule: 100 * np.bincount(self._of, counts * right, size) / whole
            for rule, right in self._right.items()
        }
        found = {self.name: float(shares[self._headline].mean())}
        found |= {rule: float(share.mean()) for rule, share in shares.items()}
        for number, name in enumerate(self._sets):
            found |= {f"{name}/{rule}": float(share[number]) for rule, share in shares.items()}
        return found


def _groups(
    verdicts: Sequence[Verdict], right: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of sets and of classes, these in the order of labels."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    known = [f"{name}/{label}" for name, dataset in DATASETS.items() for label in dataset.labels]
    for kind, order in (("dataset", list(DATASETS)), ("class", known)):
        here = {verdict.groups[kind]: None for verdict in verdicts}
        members: dict[str, list[int]] = {name: [] for name in (*order, *here) if name in here}
        for number, verdict in enumerate(verdicts):
            members[verdict.groups[kind]].append(number)
        found[kind] = {
            name: {
                "n": len(own),
                **{rule: 100 * sum(values[n] for n in own) / len(own) for rule, values in right.items()},
            }
            for name, own in members.items()
        }
    return found


def _printed(questions: Sequence[Question], judged: Mapping[Name, Sequence[str] | None]) -> dict[str, str]:
    """The line of CoIN's eval_gpt_review_visual_cl.py, which takes any "yes" in a judge's answer for one, also that in
    "eyes", and does not count what is missing."""
    said_yes: dict[str, list[bool]] = {}
    for question in questions:
        own = ["YES" in verdict.upper() for verdict in judged.get(question.key) or ()]
        said_yes.setdefault(question.groups["dataset"], []).extend(own)
    return {
        f"{name} Accuracy": f"Accuracy: {sum(own)}/{len(own)} = {sum(own) / len(own)}"
        for name, own in said_yes.items()
        if own
    }


def _confusion(readings: Sequence[_Reading]) -> dict[str, Any]:
    """{set: {label: {label that the matcher read, or why it read none: how often}}}."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for verdict, named, _ in readings:
        if verdict.prediction is None:
            read = "(missing)"
        else:
            read = named[0] if len(named) == 1 else "(several)" if named else "(none)"
        found.setdefault(verdict.groups["dataset"], {}).setdefault(verdict.answer, Counter())[read] += 1
    return {name: {label: dict(own) for label, own in of_set.items()} for name, of_set in found.items()}
