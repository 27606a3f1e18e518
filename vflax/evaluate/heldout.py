"""Evaluation in the loop: loss and greedy answers on held-out samples."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vflax import conversation
from vflax.data.pipeline import Data
from vflax.data.questions import Question
from vflax.errors import UserError
from vflax.generate.greedy import greedy
from vflax.sharding import BATCH_AXES, platform
from vflax.step import make_eval_step
from vflax.workdir import ModelFiles
from vflax.xla_options import compiler_options

# What config.evaluate.tasks may name, and the metrics that each gives.
TASKS = {
    "loss": ("eval/loss",),
    "accuracy": ("eval/accuracy", "eval/blind", "eval/words_short", "eval/words_long"),
}
# Questions answered at a time.
_BATCH = 64
# A task whose reference answers are longer than this in the median is judged by length, not by exact match.
SHORT_ANSWER_WORDS = 5


@dataclass(frozen=True)
class Answered:
    """A question and what the model said, with its own image and, for `blind`, with another sample's."""

    question: Question
    prediction: str
    blind: str


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    metrics: {"eval/loss": ...}, flat numbers; empty where there was nothing to evaluate.
    facts: the same and more for summary.json (see `score`); None where there was nothing.
    answered: every question with its answers.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    answered: list[Answered] = field(default_factory=list)


class Evaluator:
    """Evaluates parameters on the held-out samples of a run's data, as config.evaluate says."""

    def __init__(self, options: Any, graphdef: Any, files: ModelFiles, data: Data, mesh: Mesh) -> None:
        """
        Args:
            options: config.evaluate.
            graphdef: the model without its parameters.
            files: tokenizer and template.
            data: what to evaluate on.
            mesh: where the parameters lie.
        """
        self._options, self._graphdef, self._files, self._data = options, graphdef, files, data
        self._placement = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        if data.has_heldout:
            self._step = jax.jit(
                make_eval_step(graphdef, data.heldout_capacity),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
                compiler_options=compiler_options(platform(mesh)),
            )

    def __call__(self, params: Any) -> Evaluation:
        """Evaluate {path: array}; every process of a run calls it."""
        metrics: dict[str, float] = {}
        facts: dict[str, Any] = {}
        answered: list[Answered] = []
        if "loss" in self._options.tasks and self._data.has_heldout:
            batches = (
                {k: jax.make_array_from_process_local_data(self._placement, v) for k, v in rows.items()}
                for rows in self._data.heldout_batches()
            )
            facts["loss"] = metrics["eval/loss"] = heldout_loss(self._step, params, batches)
        if "accuracy" in self._options.tasks and self._data.has_questions:
            answered = self._answer(params)
            scored = score(answered)
            facts |= scored
            shown = [(name, scored[name.removeprefix("eval/")]) for name in TASKS["accuracy"]]
            metrics |= {name: value for name, value in shown if value is not None}
        return Evaluation(metrics, facts or None, answered)

    def _answer(self, params: Any) -> list[Answered]:
        files = self._files
        questions = self._data.heldout_questions(self._options.samples_per_task)
        options = {
            "tokenizer": files.tokenizer, "eos_ids": conversation.stop_ids(files.template, files.tokenizer),
            "max_new_tokens": self._options.max_new_tokens, "batch_size": _BATCH,
        }  # fmt: skip
        seen = answer(params, self._graphdef, questions, **options)
        blind = answer(params, self._graphdef, permute_images(questions), **options)
        return [Answered(q, a, b) for q, a, b in zip(questions, seen, blind, strict=True)]


def check_tasks(tasks: Sequence[str], best_metric: str) -> None:
    """Refuse a name in config.evaluate.tasks that is none, and a config.checkpoint.best_metric that none gives."""
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise UserError(f"config.evaluate.tasks: {', '.join(unknown)} unknown; there are: {', '.join(TASKS)}")
    given = [metric for task in tasks for metric in TASKS[task]]
    if best_metric and best_metric not in given:
        raise UserError(
            f"config.checkpoint.best_metric={best_metric!r} is not measured: config.evaluate.tasks={tuple(tasks)} "
            f"gives {', '.join(given) or 'nothing'}. Choose one of these, or '' to keep no best checkpoint"
        )


def heldout_loss(
    eval_step: Callable[..., Mapping[str, jax.Array]], params: Any, batches: Iterable[Mapping[str, jax.Array]]
) -> float:
    """Mean loss in nats per supervised token over all batches (one global mean); nan without any."""
    total, tokens = 0.0, 0.0
    for batch in batches:
        result = eval_step(params, batch)
        total += float(result["loss_sum"])
        tokens += float(result["tokens"])
    return total / tokens if tokens else float("nan")


def permute_images(questions: Sequence[Question]) -> list[Question]:
    """Give each question the images of the next one of its task, as many and as large: a model that looks then fails.

    A question whose neighbour has other images (and the only one of a task) keeps its own.
    """
    by_task: dict[str, list[int]] = collections.defaultdict(list)
    for i, question in enumerate(questions):
        by_task[question.task].append(i)
    result = list(questions)
    for members in by_task.values():
        for here, there in zip(members, members[1:] + members[:1], strict=True):
            own, other = questions[here], questions[there]
            if own.images.shape == other.images.shape:
                result[here] = Question(
                    own.sample_id, own.task, own.text, own.reference, own.ids, other.images
                )
    return result


def answer(
    params: Any,
    graphdef: Any,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers as stripped text, in the questions' order."""
    answers = greedy(
        params,
        graphdef,
        [(q.ids, q.images) for q in questions],
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return [tokenizer.decode([int(i) for i in a.ids]).strip() for a in answers]


def normalise(text: str) -> str:
    """What exact match compares: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def matches(prediction: str, reference: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(prediction) == normalise(reference)


def score(answered: Sequence[Answered]) -> dict[str, Any]:
    """Accuracy, majority and blind accuracy per task, and the words of answers.

    Returns:
        {"tasks": {task: {"n", "accuracy", "majority", "blind", "words", "short"}}, "accuracy", "majority", "blind"
        (means over the tasks with short reference answers), "above_blind" (how many of these stand at least 0.25
        above blind), "short_tasks", "words_short", "words_long" (median words of an answer)}. What there are no such
        tasks for is None. `majority` is the share of the commonest reference answer.
    """
    by_task: dict[str, list[Answered]] = collections.defaultdict(list)
    for item in answered:
        by_task[item.question.task].append(item)
    tasks: dict[str, dict[str, Any]] = {}
    words: dict[bool, list[int]] = {True: [], False: []}
    for task in sorted(by_task):
        items = by_task[task]
        references = collections.Counter(normalise(i.question.reference) for i in items)
        short = statistics.median(len(i.question.reference.split()) for i in items) <= SHORT_ANSWER_WORDS
        lengths = [len(i.prediction.split()) for i in items]
        words[short] += lengths
        tasks[task] = {
            "n": len(items),
            "accuracy": sum(matches(i.prediction, i.question.reference) for i in items) / len(items),
            "majority": references.most_common(1)[0][1] / len(items),
            "blind": sum(matches(i.blind, i.question.reference) for i in items) / len(items),
            "words": statistics.median(lengths),
            "short": short,
        }
    scored = [t for t in tasks.values() if t["short"]]

    def mean(key: str) -> float | None:
        return statistics.fmean(t[key] for t in scored) if scored else None

    return {
        "tasks": tasks,
        "accuracy": mean("accuracy"),
        "majority": mean("majority"),
        "blind": mean("blind"),
        "above_blind": sum(t["accuracy"] - t["blind"] >= 0.25 - 1e-9 for t in scored),
        "short_tasks": len(scored),
        "words_short": statistics.median(words[True]) if words[True] else None,
        "words_long": statistics.median(words[False]) if words[False] else None,
    }
