"""Grades of a judge for a benchmark's predictions: any endpoint that speaks OpenAI's protocol, another model that vflax
serves included.

Each reply is kept by the content of its request, so none is paid for twice; only what has no reply yet, or one that
cannot be read, is asked for again. The grades are a function of the replies on the disk, in the benchmark's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vflax.endpoint.account import Prices
from vflax.endpoint.asking import Request, laid_over, stored_reply
from vflax.endpoint.readings import Reading, gather
from vflax.endpoint.readings import facts as readings_facts
from vflax.endpoint.responses import Stored
from vflax.endpoint.session import Endpoint
from vflax.errors import UserError
from vflax.evaluate.files import digest, json_object
from vflax.evaluate.judging import Judged
from vflax.evaluate.predictions import join, of_vflax
from vflax.evaluate.question import Question
from vflax.whole_file import replace

PREDICTIONS, GRADED, FACTS = "predictions.jsonl", "graded.jsonl", "judge.json"


@dataclass(frozen=True)
class _Exam:
    """What is asked of a judge. times: how often each prediction is graded; parameters: see `judge`."""

    task: Judged
    model: str
    times: int
    parameters: Mapping[str, Any]

    def attempts(self, question: Question, prediction: str, run: int) -> Iterator[Request]:
        """What is sent for one grade, one after the other until a reply can be read."""
        for attempt in range(self.task.ATTEMPTS):
            wanted = self.task.judge_request(question, prediction, attempt)
            usual = {"temperature": wanted.temperature, "max_tokens": wanted.max_tokens}
            sent = laid_over(usual, self.parameters)
            yield Request(self.model, wanted.messages, sent, run * self.task.ATTEMPTS + attempt)

    def grade(self, question: Question, stored: Stored) -> Any:
        """What a reply says, None where it cannot be read.

        Raises:
            UserError: the request is longer than what the judge reads.
        """
        reply = stored_reply(stored)
        if reply.finish == "too_long":
            raise UserError(
                f"{question.key}: longer with its request than what the judge {self.model} reads; choose one that "
                "reads more"
            )
        return self.task.read_grade(reply.text)


def judge(
    task: Judged,
    questions: Sequence[Question],
    folder: Path,
    endpoint: Endpoint,
    cache: Path,
    *,
    runs: int | None = None,
    parameters: Mapping[str, Any] = MappingProxyType({}),
    show_progress: bool = True,
) -> str:
    """Write graded.jsonl and judge.json beside a task's predictions.jsonl.

    Args:
        task: the benchmark.
        questions: of it.
        folder: OUT/TASK.
        endpoint: the judge.
        cache: the file of its replies; several tasks and runs may share it.
        runs: how often each answer is graded; None: as published numbers were made.
        parameters: laid over the benchmark's temperature and max_tokens; None leaves one out.
        show_progress: on stderr.

    Returns:
        "", or why there are no grades yet; then the same call goes on.

    Raises:
        UserError: predictions that are missing or not of these questions, or the endpoint's refusal.
    """
    path = folder / PREDICTIONS
    said = join(of_vflax(path), {question.key: question for question in questions}, path, task.NAME)
    jobs = [(question, said[question.key].text) for question in questions if question.key in said]
    exam = _Exam(task, endpoint.model, task.RUNS if runs is None else runs, parameters)
    readings, reason = gather(
        endpoint,
        cache,
        jobs,
        lambda job: [exam.attempts(*job, run) for run in range(exam.times)],
        lambda job, stored: exam.grade(job[0], stored),
        lambda job: f"{job[0].key} has no grade yet",
        show_progress=show_progress,
    )
    if reason:
        return reason
    graded = []
    for (question, prediction), reading in zip(jobs, readings, strict=True):
        row = {
            "key": question.key,
            "prediction": prediction,
            "grades": reading.values,
            "judge": endpoint.model,
        }
        graded.append(json.dumps(row, ensure_ascii=False) + "\n")
    replace(folder / GRADED, "".join(graded))
    facts = {
        "judge": endpoint.model,
        "base_url": endpoint.url,
        **_facts(exam, jobs, readings, endpoint.prices),
        "predictions_sha256": digest([path]),
        "graded_sha256": digest([folder / GRADED]),
    }
    replace(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return ""


def facts(folder: Path) -> dict[str, Any]:
    """Of the judge whose grades are in a folder: what is in judge.json.

    Raises:
        UserError: the file is missing, or is of other grades or predictions than those beside it.
    """
    found = json_object(folder / FACTS)
    for name, key in ((GRADED, "graded_sha256"), (PREDICTIONS, "predictions_sha256")):
        # Without the predictions: they are in the grades, too.
        if (folder / name).exists() and found.get(key) != digest([folder / name]):
            raise UserError(f"{folder / FACTS}: is of another {name}; run the judge step again")
    return found


def _facts(
    exam: _Exam, jobs: Sequence[tuple[Question, str]], read: Sequence[Reading], prices: Prices | None
) -> Mapping[str, Any]:
    """What was asked for, and `readings.facts`, so that grading again gives the same file. parameters: of the first
    attempt."""
    sent = next(exam.attempts(*jobs[0], 0)).parameters
    return {
        **readings_facts(read, prices),
        "runs": exam.times,
        "temperature": sent.get("temperature"),
        "parameters": sent,
        "judge of published numbers": exam.task.judge_request(*jobs[0], 0).model,
    }
