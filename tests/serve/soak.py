"""A server at full slots for a long time, with all kinds of requests mixed; at the end all is as it was at the start.

    python -m tests.serve.soak --seconds=600

Requests are drawn from a fixed pool: short and long prompts, pictures, several choices, all kinds of sampling. Some are
streamed, some cancelled on the way, some come with a deadline that is too near. Whatever else is answered meanwhile, a
request of the pool always has the same answer. Told are the tokens per second of each third of the time, how full the
slots were, and the memory; a problem is an error, and the exit status then 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.serve.process import ServerProcess, write_model
from tests.serve.running import asks, png

SLOTS, CLIENTS, POOL = 8, 24, 48
# Of the last third's tokens per second to the first's: what is told, and what is an error.
NOTED, LEAST = 0.8, 0.5
LEAST_FULL = 0.8
MOST_GROWTH = 1.05
WARM_REQUESTS, LEAST_SECONDS = 1_000, 10


@dataclass
class Sample:
    """The server at a moment: seconds since the start, tokens of answers so far, slots that run."""

    at: float
    tokens: float
    running: float


@dataclass
class Soaked:
    """What was seen. memory: under load, after WARM_REQUESTS and last; wrong: answers that should not have been."""

    samples: list[Sample] = field(default_factory=list)
    memory: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def rates(self) -> list[float]:
        """Tokens per second of each third of the time."""
        begin, end = self.samples[0].at, self.samples[-1].at
        borders = [
            min(self.samples, key=lambda one: abs(one.at - begin - part * (end - begin) / 3))
            for part in range(4)
        ]
        return [(b.tokens - a.tokens) / (b.at - a.at) for a, b in itertools.pairwise(borders)]

    @property
    def full(self) -> float:
        """Slots that ran, of all."""
        return sum(one.running for one in self.samples) / len(self.samples) / SLOTS

    def problems(self) -> list[str]:
        """What is not as it should be, a line each."""
        first, _, last = self.rates()
        found = [f"{len(self.wrong)} wrong answers, as: {self.wrong[0]}"] if self.wrong else []
        if last < LEAST * first:
            found.append(
                f"{last:.0f} tokens/s in the last third, {first:.0f} in the first: less than {LEAST:.0%}"
            )
        if self.full < LEAST_FULL:
            found.append(f"{self.full:.0%} of the slots ran: too few requests for a soak")
        if not self.memory[0]:
            found.append(f"{self.kinds.total()} requests: too few to tell whether memory grows")
        elif self.memory[1] > MOST_GROWTH * self.memory[0]:
            found.append(f"memory grew from {_mib(self.memory[0])} to {_mib(self.memory[1])}")
        return found

    def report(self) -> str:
        first, middle, last = self.rates()
        note = "" if last >= NOTED * first else f" (below {NOTED:.0%})"
        return (
            f"{dict(self.kinds)}\ntokens/s by thirds: {first:.0f}, {middle:.0f}, {last:.0f}: {last / first:.2f}{note}\n"
            f"slots full: {self.full:.0%}\nmemory: {_mib(self.memory[0])} -> {_mib(self.memory[1])}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


# ----------------------------------------------------------------------------------------------------------------------
# Requests


def pool(seed: int) -> list[dict[str, Any]]:
    """Bodies of chat completions, each of which has one answer only."""
    return [_body(random.Random(f"{seed}/{number}"), number) for number in range(POOL)]


def _body(draw: random.Random, number: int) -> dict[str, Any]:
    pictures = [png(30 + number, 20, draw.choice(["red", "blue"])) for _ in range(draw.choice([0, 0, 1, 2]))]
    text = " ".join(
        draw.choice(["dogs", "cats", "What is", "picture", "5"]) for _ in range(draw.choice([3, 20, 100]))
    )
    system = (
        [{"role": "system", "content": draw.choice(["Be brief.", "Be long."])}] if draw.random() < 0.5 else []
    )
    return {
        "messages": [*system, *asks(text, *pictures)], "seed": number, "n": draw.choice([1, 1, 1, 3]),
        "max_tokens": draw.choice([8, 40, 40, 120]), "temperature": draw.choice([0, 0.7, 1.2]),
        "top_p": draw.choice([1, 0.9]), "top_k": draw.choice([0, 20]), "repetition_penalty": draw.choice([1, 1.1]),
        "stop": draw.choice([None, ["dogs"]]),
    }  # fmt: skip


Texts = list[tuple[str, str]]
"""Of each choice: its text, and why it ended."""


class Clients:
    """Who ask. Each asks for one answer after the other until `end`, seconds of time.monotonic."""

    def __init__(self, url: str, seed: int, end: float, found: Soaked) -> None:
        self._url, self.end, self._found = f"{url}/v1/chat/completions", end, found
        self._pool, self._answers = pool(seed), dict[int, Texts]()
        self._draw = random.Random(seed)

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._ask_on(client))

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        asking = {
            "whole": self._whole,
            "stream": self._stream,
            "cancelled": self._cancelled,
            "late": self._late,
        }
        while time.monotonic() < self.end:
            number = self._draw.randrange(POOL)
            kind = self._draw.choices(list(asking), [4, 4, 1, 1])[0]
            try:
                answer = await asking[kind](client, self._pool[number])
            except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                self._found.wrong.append(f"{kind} request {number}: {type(error).__name__} {error}")
                continue
            self._found.kinds[kind] += 1
            if answer is not None and answer != self._answers.setdefault(number, answer):
                self._found.wrong.append(f"{kind} request {number}: {answer}, before {self._answers[number]}")

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Texts:
        response = await client.post(self._url, json=body)
        assert response.status_code == 200, response.text
        return [(one["message"]["content"], one["finish_reason"]) for one in response.json()["choices"]]

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Texts:
        texts, reasons, done = [""] * body["n"], [""] * body["n"], False
        async with client.stream("POST", self._url, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    texts[choice["index"]] += choice["delta"].get("content", "")
                    reasons[choice["index"]] = choice["finish_reason"] or ""
        assert done, "the stream has no end"
        return list(zip(texts, reasons, strict=True))

    async def _cancelled(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """The client goes away after a few pieces."""
        left = self._draw.randrange(8)
        async with client.stream("POST", self._url, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    return

    async def _late(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """With a deadline that most answers miss."""
        response = await client.post(self._url, json={**body, "deadline": self._draw.uniform(0.01, 0.3)})
        assert response.status_code in (200, 504), response.text


# ----------------------------------------------------------------------------------------------------------------------
# The soak


def soak(seconds: float, seed: int, folder: Path) -> Soaked:
    """All of it, with a model and a log in this folder."""
    write_model(folder / "model")
    found = Soaked()
    flags = (f"--slots={SLOTS}", "--max-queue=1000")
    with ServerProcess(folder / "model", folder / "log", *flags) as server:
        clients = Clients(server.url, seed, time.monotonic() + seconds, found)
        asyncio.run(_watched(clients, server, found))
        server.wait_until_idle()
        found.wrong += server.complaints()
        if status := server.end():
            found.wrong.append(f"exit status {status}")
    return found


async def _watched(clients: Clients, server: ServerProcess, found: Soaked) -> None:
    """The clients run, and the server is looked at."""
    began, running = time.monotonic(), asyncio.ensure_future(clients.run())
    while not running.done():
        await asyncio.wait({running}, timeout=1)
        numbers = await asyncio.to_thread(server.numbers)
        if not running.done() and time.monotonic() < clients.end:
            tokens, slots = numbers["vflax_answer_tokens_total"], numbers["vflax_running"]
            found.samples.append(Sample(time.monotonic() - began, tokens, slots))
        if found.kinds.total() >= WARM_REQUESTS:
            found.memory = (found.memory[0] or server.memory(), server.memory())
    running.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.serve.soak", description="A server at full slots for a long time."
    )
    parser.add_argument("--seconds", type=float, default=600, help="default: 600")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (default: 0)")
    args = parser.parse_args(argv)
    if not args.seconds >= LEAST_SECONDS:
        print(f"error: --seconds={args.seconds:g}: at least {LEAST_SECONDS}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.seconds, args.seed, Path(folder))
    print(f"seed {args.seed}: {found.report()}")
    for problem in found.problems():
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
