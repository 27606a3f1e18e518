"""The catastrophic-forgetting suite (EMT: Zhai et al., 2023, arXiv 2309.10313): does a model still tell what an image
shows, asked with the list of all labels? On CIFAR-10, CIFAR-100, MNIST and miniImageNet (`cf_data`).

EMT has a language model judge each answer, and counts how often it says yes; no string matcher is official.
Vision-Flan's column CF is the mean of the four sets' accuracies so found, with Vicuna-1.5-13B as the judge, where EMT
had gpt-3.5-turbo. That is the rule called official here: answers that no judge has seen are refused, never matched
instead. "strict" is our matcher (`labels`), which needs none. Where a judge has spoken, both numbers are in the
metrics: "judge" and "strict", which are means of all four sets; of fewer, their names tell so ("strict, mean of 2 of
4").

EMT's scripts are not public. The wordings are those of CoIN (github.com/zackschen/CoIN, commit 3be1b48), which took
them over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vflax.errors import UserError
from vflax.evaluate.cf_answers import FORMATS, JUDGED, files, matcher, of_labels, read, recognise, with_keys
from vflax.evaluate.cf_data import DATASETS, load
from vflax.evaluate.files import digest
from vflax.evaluate.judging import Request
from vflax.evaluate.labels import only
from vflax.evaluate.predictions import Said, join
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, Verdict, make

__all__ = [
    "ATTEMPTS", "FORMATS", "MAX_TOKENS", "MODES", "NAME", "RUNS", "judge_request", "load", "prompt", "read_grade",
    "recognise", "score",
]  # fmt: skip

NAME = "cf"
MODES = {
    "official": "EMT's: the share of answers that a judge says yes to; needs the judge's answers",
    "strict": "ours, without a judge: the answer names the label, in whole words, and no other of the list",
}
MAX_TOKENS = 128

_JUDGE = "You are a helpful and precise assistant for checking the quality of the answer."
_JUDGED = (
    'Please only answer the question in yes or no. Is the "Prediction" correctly predicting the right "Label"? '
    "Label: {label}, Prediction: {prediction}"
)
RUNS = 1
ATTEMPTS = 1  # CoIN's scripts ask once, whatever the reply
# EMT's; it does not tell temperature and length.
_JUDGE_MODEL = "gpt-3.5-turbo"
_JUDGE_TOKENS = 64


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


def read_grade(content: str) -> str | None:
    """Yes or no, of a judge's answer: the word that it begins with, or else the one of the two that is in it; None:
    neither or both are."""
    words = re.findall(r"[a-z]+", content.lower())
    said = {"yes", "no"} & set(words[:1]) or {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else None


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

    The score is the mean over the sets that have predictions; a question of theirs without one is wrong. A judge's
    answer that says neither yes nor no is no yes.
    """
    if mode == "official" and format not in JUDGED:
        raise UserError(
            f"{predictions}: no judge has seen these predictions, and its answers are what EMT counts. Run the judge "
            "step of python -m vflax.evaluate on them first, or say --mode=strict for the matcher, which needs none"
        )
    questions = load(data, custom=custom) if data else []
    answers = read(predictions, format, list(dict.fromkeys(q.groups["dataset"] for q in questions)))
    if data:
        answers = with_keys(answers, questions)
    else:
        answers, questions = of_labels(answers, predictions, custom)
    # Where there is no text, the model could not be asked.
    joined = join(
        [Said(a.id, a.text, a.label) for a in answers if a.text is not None],
        {q.key: q for q in questions}, predictions, "CF",
    )  # fmt: skip
    here = {answer.dataset for answer in answers}
    questions = [question for question in questions if question.groups["dataset"] in here]
    labels = _labels(questions)
    questions = limited(questions, limit)
    named = [
        matcher(labels[q.groups["dataset"]]).hits(joined[q.key].text) if q.key in joined else []
        for q in questions
    ]
    replies = {answer.id: answer.replies for answer in answers}
    grades = [[read_grade(one) for one in replies.get(question.key, ())] for question in questions]
    right = {"strict": [float(only(own) == q.answer) for q, own in zip(questions, named, strict=True)]}
    if format in JUDGED:
        right["judge"] = [own.count("yes") / len(own) if own else 0.0 for own in grades]
    rule = "judge" if mode == "official" else "strict"
    verdicts = [
        _verdict(question, joined.get(question.key), mode, named[n], grades[n], right[rule][n])
        for n, question in enumerate(questions)
    ]
    metrics = _Metrics(verdicts, right)
    return make(
        NAME, mode, format, verdicts, metrics, f"{rule}{metrics.of}",
        groups=_groups(verdicts, right), printed={},
        manifest={
            "predictions_sha256": digest(files(predictions)), "custom": custom, "limit": limit,
            "score": f"{rule}{metrics.of}", "sets": dict(Counter(q.groups["dataset"] for q in questions)),
            "judges": sorted({answer.judge for answer in answers if answer.judge is not None}),
            "confusion": _confusion(questions, named, labels),
        },
        strata="dataset",
    )  # fmt: skip


def _verdict(
    question: Question, said: Said | None, mode: str, named: Sequence[str], grades: Sequence[str | None],
    right: float,
) -> Verdict:  # fmt: skip
    """named: the labels that the matcher finds; grades: of each run of the judge; right: the share of it."""
    why = f"names {', '.join(named) or 'no label'}"
    if mode == "official":
        parsed = ", ".join(one or "neither" for one in grades) if any(grades) else None
        why = f"the judge says {parsed or 'neither yes nor no'}; {why}"
    else:
        parsed = only(named)
    return Verdict(
        question.key, question.unit, question.groups, question.answer, said.text if said else None, parsed,
        right, why if said else "no prediction",
    )  # fmt: skip


def _labels(questions: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    """{set: its labels}; of a set of somebody's own, those of the images."""
    found: dict[str, dict[str, None]] = {}
    for question in questions:
        found.setdefault(question.groups["dataset"], {})[question.answer] = None
    return {name: DATASETS[name].labels if name in DATASETS else tuple(own) for name, own in found.items()}


class _Metrics:
    """Accuracies by each rule, of every set and their mean, from how often each verdict counts.

    of: what the name of a mean has after that of its rule: "" where it is of the four sets.
    """

    def __init__(self, verdicts: Sequence[Verdict], right: Mapping[str, Sequence[float]]) -> None:
        names = [v.groups["dataset"] for v in verdicts]
        self._sets = list(dict.fromkeys(names))
        number = {name: number for number, name in enumerate(self._sets)}
        self._of_verdict = np.array([number[name] for name in names])
        self._right = {rule: np.array(values) for rule, values in right.items()}
        if not set(self._sets) <= set(DATASETS):
            self.of = f", mean of {len(self._sets)}, your own among them"
        else:
            self.of = (
                "" if len(self._sets) == len(DATASETS) else f", mean of {len(self._sets)} of {len(DATASETS)}"
            )

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        size = len(self._sets)
        whole = np.bincount(self._of_verdict, counts, size)
        shares = {
            rule: 100 * np.bincount(self._of_verdict, counts * right, size) / whole
            for rule, right in self._right.items()
        }
        found = {f"{rule}{self.of}": float(share.mean()) for rule, share in shares.items()}
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


def _confusion(
    questions: Sequence[Question], named: Sequence[Sequence[str]], labels: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """{set: {"labels": [...], "counts": [[...]]}}, by the matcher: in row i and column j, how often an image of label i
    was read as label j; in the last column, which is no label's, how often as none or several, or was not answered."""
    number = {name: {label: n for n, label in enumerate(own)} for name, own in labels.items()}
    counts = {name: np.zeros((len(own), len(own) + 1), np.int64) for name, own in labels.items()}
    for question, own in zip(questions, named, strict=True):
        dataset = question.groups["dataset"]
        label = only(own)
        column = -1 if label is None else number[dataset][label]
        counts[dataset][number[dataset][question.answer], column] += 1
    return {name: {"labels": list(own), "counts": counts[name].tolist()} for name, own in labels.items()}
