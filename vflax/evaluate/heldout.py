"""Loss and greedy answers on held-out samples."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vflax.data.questions import Question
from vflax.generate.greedy import Prompt, greedy

# A task whose reference answers are longer than this in the median is judged by length, not by exact match.
SHORT_ANSWER_WORDS = 5


@dataclass(frozen=True)
class Answered:
    """A question and what the model said, with its own image and, for `blind`, with another sample's."""

    question: Question
    prediction: str
    blind: str


def heldout_loss(
    eval_step: Callable[..., Mapping[str, jax.Array]],
    params: Any,
    batches: Iterable[tuple[Mapping[str, jax.Array], Sequence[Sequence[str]]]],
) -> tuple[float, dict[str, float]]:
    """Mean loss in nats per supervised token, over all batches and over those of each task.

    Args:
        eval_step: see `vflax.step.make_eval_step`.
        params: {path: array}.
        batches: each with the tasks of the samples of its rows.

    Returns:
        (one global mean, {task: mean}); nan without any supervised token.
    """
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for batch, rows in batches:
        result = jax.device_get(eval_step(params, batch))
        for losses, segments, tasks in zip(result["losses"], result["segments"], rows, strict=True):
            if np.isnan(losses).any():
                return float("nan"), {}
            of_segment = np.bincount(segments, losses.astype(np.float64), len(tasks) + 1)
            counts = np.bincount(segments, minlength=len(tasks) + 1)
            for task, loss, count in zip(tasks, of_segment[1:], counts[1:], strict=True):
                sums[task] = sums.get(task, 0.0) + float(loss)
                tokens[task] = tokens.get(task, 0) + int(count)
    total = sum(tokens.values())
    mean = math.fsum(sums.values()) / total if total else float("nan")
    return mean, {task: sums[task] / tokens[task] for task in sorted(sums) if tokens[task]}


def permute_images(questions: Sequence[Question]) -> list[Question]:
    """Give each question the images of the next one of its task that has as many, and other ones: a model that looks
    then fails. Where there is none such, as where there are no images, a question keeps its own.
    """
    by_task: dict[str, list[int]] = collections.defaultdict(list)
    for i, question in enumerate(questions):
        by_task[question.task].append(i)
    result = list(questions)
    for members in by_task.values():
        for place, here in enumerate(members):
            own = questions[here]
            others = (questions[there].images for there in members[place + 1 :] + members[:place])
            other = next((images for images in others if _are_others(own.images, images)), own.images)
            result[here] = dataclasses.replace(own, images=other)
    return result


def _are_others(own: np.ndarray, images: np.ndarray) -> bool:
    return own.shape == images.shape and not np.array_equal(own, images)


def answer(
    params: Any,
    graphdef: Any,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Any,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers as stripped text, in the prompts' order."""
    answers = greedy(
        params, graphdef, prompts, eos_ids=eos_ids, pad_id=tokenizer.pad_id, max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )  # fmt: skip
    return [tokenizer.decode([int(i) for i in a.ids]).strip() for a in answers]


def normalise(text: str) -> str:
    """What exact match compares: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def matches(prediction: str, reference: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(prediction) == normalise(reference)


def records(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """What is kept of each question: of which sample it is, what was asked, what was answered, and whether it counts as
    right. `short` is False of a task whose answers are long: exact match says nothing there, and no mean has them."""
    short = {task: found["short"] for task, found in score(answered)["tasks"].items()}
    return [
        {
            "id": item.question.sample_id,
            "task": item.question.task,
            "source": item.question.source,
            "split": item.question.split,
            "question": item.question.text,
            "reference": item.question.reference,
            "answer": item.prediction,
            "blind": item.blind,
            "right": matches(item.prediction, item.question.reference),
            "blind_right": matches(item.blind, item.question.reference),
            "words": len(item.prediction.split()),
            "short": short[item.question.task],
        }
        for item in answered
    ]


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
