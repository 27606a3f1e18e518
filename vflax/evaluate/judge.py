"""Grades of a judge for a benchmark's predictions: any endpoint that speaks OpenAI's protocol, another model that vflax
serves included.

Each reply is kept by the content of its request, so none is paid for twice; only what has no reply yet, or one that
cannot be read, is asked for again. The grades are a function of the replies on the disk, in the benchmark's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vflax.endpoint.account import Account
from vflax.endpoint.asking import Asker, Request, stored_reply
from vflax.endpoint.responses import Responses, Stored, open_responses
from vflax.endpoint.session import Endpoint, ask_all
from vflax.errors import UserError
from vflax.evaluate.files import json_lines, keyed, need
from vflax.evaluate.judging import Judged
from vflax.evaluate.question import Question


@dataclass(frozen=True)
class _Job:
    question: Question
    prediction: str


def judge(
    task: Judged,
    questions: Sequence[Question],
    folder: Path,
    endpoint: Endpoint,
    cache: Path,
    *,
    runs: int | None = None,
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
        show_progress: on stderr.

    Returns:
        "", or why there are no grades yet; then the same call goes on.

    Raises:
        UserError: predictions that are missing or not of these questions, or the endpoint's refusal.
    """
    path = folder / "predictions.jsonl"
    rows = json_lines(path)
    need(rows[0], ("key", "prediction"), str(path))
    said = keyed(rows, lambda row: row["key"], path)
    if foreign := [key for key in said if key not in {question.key for question in questions}]:
        raise UserError(f"{path}: {foreign[0]} is no question of this {task.NAME}")
    jobs = [
        _Job(question, text)
        for question in questions
        if (text := said.get(question.key, {}).get("prediction")) is not None
    ]
    times = task.RUNS if runs is None else runs

    async def settle(asker: Asker, job: _Job) -> str | None:
        for run in range(times):
            for request in _attempts(task, job, run, endpoint.model):
                stored = await asker.ask(request)
                if stored is None:
                    return None
                if task.read_grade(stored_reply(stored).text) is not None:
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
        for job in jobs:
            found = _grades(task, job, times, endpoint.model, responses)
            if found is None:
                failed = next(iter(asker.failures.values()), "")
                return stop.reason or f"{job.question.key} has no grade yet: {failed}"
            grades, replies = found
            graded.append(
                {
                    "key": job.question.key,
                    "prediction": job.prediction,
                    "grades": grades,
                    "judge": endpoint.model,
                }
            )
            used += replies
        facts = {**_facts(task, jobs, times, endpoint, used), "cost": account.cost()}
    _write(folder / "graded.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in graded))
    _write(folder / "judge.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return ""


def _attempts(task: Judged, job: _Job, run: int, model: str) -> Iterator[Request]:
    """What is sent for one grade, one after the other until a reply can be read."""
    for attempt in range(task.ATTEMPTS):
        wanted = task.judge_request(job.question, job.prediction, attempt)
        parameters = {"temperature": wanted.temperature, "max_tokens": wanted.max_tokens}
        yield Request(model, wanted.messages, parameters, run * task.ATTEMPTS + attempt)


def _grades(
    task: Judged, job: _Job, runs: int, model: str, responses: Responses
) -> tuple[list[Any], list[Stored]] | None:
    """A grade, or None where no reply could be read, for each run; and the replies. None: replies are missing."""
    grades: list[Any] = []
    used = []
    for run in range(runs):
        grade = None
        for request in _attempts(task, job, run, model):
            stored = responses.get(request.key)
            if stored is None:
                return None
            used.append(stored)
            grade = task.read_grade(stored_reply(stored).text)
            if grade is not None:
                break
        grades.append(grade)
    return grades, used


def _facts(
    task: Judged, jobs: Sequence[_Job], runs: int, endpoint: Endpoint, used: Sequence[Stored]
) -> Mapping[str, Any]:
    """Who judged: what was asked for, what the endpoint says it is, when, how."""
    versions: dict[str, int] = {}
    for stored in used:
        body = json.loads(stored.body)
        version = body.get("model") if isinstance(body, dict) else None
        versions[str(version)] = versions.get(str(version), 0) + 1
    tokens = sum((stored.tokens for stored in used), start=type(used[0].tokens)()) if used else None
    wanted = task.judge_request(jobs[0].question, jobs[0].prediction, 0) if jobs else None
    return {
        "judge": endpoint.model,
        "base_url": endpoint.url,
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
        "temperature": wanted and wanted.temperature,
        "max_tokens": wanted and wanted.max_tokens,
        "judge of published numbers": wanted and wanted.model,
        "tokens": tokens and asdict(tokens),
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
