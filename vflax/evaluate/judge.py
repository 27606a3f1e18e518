"""Grades of a judge for a benchmark's predictions: any endpoint that speaks OpenAI's protocol, another model that vflax
serves included.

Each reply is kept by the content of its request, so none is paid for twice; only what has no reply yet, or one that
cannot be read, is asked for again. The grades are a function of the replies on the disk, in the benchmark's order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vflax.endpoint.account import Account, Prices, Tokens
from vflax.endpoint.asking import TOKEN_LIMITS, Asker, Request, laid_over, stored_reply
from vflax.endpoint.responses import Responses, Stored, open_responses
from vflax.endpoint.session import Endpoint, ask_all
from vflax.errors import UserError
from vflax.evaluate.files import digest, json_object
from vflax.evaluate.journal import replace
from vflax.evaluate.judging import Judged
from vflax.evaluate.predictions import join, of_vflax
from vflax.evaluate.question import Question

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
    if endpoint.budget is not None and not next(exam.attempts(*jobs[0], 0)).most_tokens:
        raise UserError(f"--budget: needs a limit of tokens per reply ({' or '.join(TOKEN_LIMITS)})")

    async def settle(asker: Asker, job: tuple[Question, str]) -> str | None:
        for run in range(exam.times):
            for request in exam.attempts(*job, run):
                stored = await asker.ask(request)
                if stored is None:
                    return None
                if exam.grade(job[0], stored) is not None:
                    break
        return ""

    with open_responses(cache) as responses:
        account = Account(endpoint.prices, endpoint.budget, *responses.tokens())
        asker, stop, _ = ask_all(
            endpoint, responses, account, jobs, len(jobs), settle, show_progress=show_progress
        )
        if stop.is_error:
            raise UserError(f"{stop.reason}. Replies that came are kept in {cache}")
        graded, used = [], []
        for question, prediction in jobs:
            found = _grades(exam, question, prediction, responses)
            if found is None:
                failed = next(iter(asker.failures.values()), "")
                return stop.reason or f"{question.key} has no grade yet: {failed}"
            grades, replies = found
            row = {"key": question.key, "prediction": prediction, "grades": grades, "judge": endpoint.model}
            graded.append(json.dumps(row, ensure_ascii=False) + "\n")
            used += replies
    replace(folder / GRADED, "".join(graded))
    facts = {
        "judge": endpoint.model,
        "base_url": endpoint.url,
        **_facts(exam, jobs, used, endpoint.prices),
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


def _grades(
    exam: _Exam, question: Question, prediction: str, responses: Responses
) -> tuple[list[Any], list[Stored]] | None:
    """A grade, or None where no reply could be read, for each run; and the replies. None: replies are missing."""
    grades: list[Any] = []
    used = []
    for run in range(exam.times):
        grade = None
        for request in exam.attempts(question, prediction, run):
            stored = responses.get(request.key)
            if stored is None:
                return None
            used.append(stored)
            grade = exam.grade(question, stored)
            if grade is not None:
                break
        grades.append(grade)
    return grades, used


def _facts(
    exam: _Exam, jobs: Sequence[tuple[Question, str]], used: Sequence[Stored], prices: Prices | None
) -> Mapping[str, Any]:
    """What was asked for, what the endpoint says it is and when: of the replies that the grades are read from, so that
    grading again gives the same file. parameters: of the first attempt."""
    versions: Counter[str] = Counter()
    for stored in used:
        body = json.loads(stored.body)
        versions[str(body.get("model") if isinstance(body, dict) else None)] += 1
    tokens = sum((stored.tokens for stored in used), start=Tokens())
    published = exam.task.judge_request(*jobs[0], 0).model
    sent = next(exam.attempts(*jobs[0], 0)).parameters
    first, last = (
        datetime.fromtimestamp(which(stored.time for stored in used), UTC).isoformat(timespec="seconds")
        for which in (min, max)
    )
    return {
        "versions": dict(sorted(versions.items())),
        "date": first,
        "last_date": last,
        "runs": exam.times,
        "temperature": sent.get("temperature"),
        "parameters": sent,
        "judge of published numbers": published,
        "replies": len(used),
        "tokens": asdict(tokens),
        "cost": None if prices is None else prices.cost(tokens),
    }
