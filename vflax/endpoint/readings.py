"""Replies that something must be read from, as a judge's: each is asked for until that goes, or its attempts are over.

What is read is a function of the replies on the disk, in the order of the jobs, so that reading again gives the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from vflax.endpoint.account import Account, Prices, Tokens
from vflax.endpoint.asking import TOKEN_LIMITS, Asker, Request
from vflax.endpoint.responses import Responses, Stored, open_responses
from vflax.endpoint.session import Endpoint, ask_all
from vflax.errors import UserError

Job = TypeVar("Job")


@dataclass(frozen=True)
class Reading:
    """Of a job. values: of each of its series, None where no reply could be read; replies: all that were looked at."""

    values: list[Any]
    replies: list[Stored]


def gather(
    endpoint: Endpoint,
    cache: Path,
    jobs: Sequence[Job],
    series: Callable[[Job], Sequence[Iterable[Request]]],
    read: Callable[[Job, Stored], Any],
    told: Callable[[Job], str],
    *,
    show_progress: bool,
) -> tuple[list[Reading], str]:
    """Ask for all that is not in the cache, and read.

    Args:
        endpoint: who is asked.
        cache: the file of replies, which several runs may share.
        jobs: what values are wanted of.
        series: for each value of a job the attempts at it, one after the other.
        read: what a reply says, None where it cannot be read.
        told: of a job without all its replies, "question 3 has no grade yet".
        show_progress: on stderr.

    Returns:
        a reading of each job; and why there are none yet, "" where all are there.

    Raises:
        UserError: what asking again would not mend, or a budget without a limit of tokens per reply.
    """
    if endpoint.budget is not None and jobs and not next(iter(series(jobs[0])[0])).most_tokens:
        raise UserError(f"--budget: needs a limit of tokens per reply ({' or '.join(TOKEN_LIMITS)})")

    async def settle(asker: Asker, job: Job) -> str | None:
        for attempts in series(job):
            for request in attempts:
                stored = await asker.ask(request)
                if stored is None:
                    return None
                if read(job, stored) is not None:
                    break
        return ""

    with open_responses(cache) as responses:
        account = Account(endpoint.prices, endpoint.budget, *responses.tokens())
        asker, stop, _ = ask_all(
            endpoint, responses, account, jobs, len(jobs), settle, show_progress=show_progress
        )
        if stop.is_error:
            raise UserError(f"{stop.reason}. Replies that came are kept in {cache}")
        found = []
        for job in jobs:
            reading = _read(job, series, read, responses)
            if reading is None:
                failed = next(iter(asker.failures.values()), "")
                return [], stop.reason or f"{told(job)}: {failed}"
            found.append(reading)
    return found, ""


def _read(
    job: Job,
    series: Callable[[Job], Sequence[Iterable[Request]]],
    read: Callable[[Job, Stored], Any],
    responses: Responses,
) -> Reading | None:
    """None: replies are missing."""
    found = Reading([], [])
    for attempts in series(job):
        value = None
        for request in attempts:
            stored = responses.get(request.key)
            if stored is None:
                return None
            found.replies.append(stored)
            value = read(job, stored)
            if value is not None:
                break
        found.values.append(value)
    return found


def facts(readings: Sequence[Reading], prices: Prices | None) -> dict[str, Any]:
    """Who answered, as the endpoint tells it, when, and what it cost: of the replies that were read."""
    used = [stored for reading in readings for stored in reading.replies]
    bodies = [json.loads(stored.body) for stored in used]
    versions = Counter(str(body.get("model") if isinstance(body, dict) else None) for body in bodies)
    tokens = sum((stored.tokens for stored in used), start=Tokens())
    times = [datetime.fromtimestamp(stored.time, UTC).isoformat(timespec="seconds") for stored in used]
    return {
        "versions": dict(sorted(versions.items())),
        "date": min(times, default=None),
        "last_date": max(times, default=None),
        "replies": len(used),
        "tokens": asdict(tokens),
        "cost": None if prices is None else prices.cost(tokens),
    }
