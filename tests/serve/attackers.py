"""Clients that attack a server over many connections at a time, and judge what it answers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.serve.attacks import MAX_BODY, Attack, attack
from tests.serve.running import asks, png

GOOD = {
    "messages": [{"role": "system", "content": "Be brief."}, *asks("What is in this picture?", png())],
    "n": 2, "max_tokens": 24, "temperature": 1.0, "top_p": 0.9, "seed": 5, "logprobs": True, "top_logprobs": 3,
}  # fmt: skip


@dataclass
class Attackers:
    """`tasks` clients; between their requests, every `every`, a good one.

    statuses: of all answers; wrong: what should not have been, with what it takes to send it again.
    """

    port: int
    seed: int
    tasks: int = 16
    every: int = 500
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    good: Any = None

    def send(self, numbers: range) -> None:
        """These attacks, each once."""
        asyncio.run(self._send_all(numbers))

    async def _send_all(self, numbers: range) -> None:
        left = iter(numbers)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.tasks):
                group.create_task(self._send_some(left))

    async def _send_some(self, left: Iterable[int]) -> None:
        for number in left:
            if number % self.every == 0:
                await self._check_good(number)
            own = attack(self.seed, number)
            try:
                answer = await talk(self.port, own)
            except TimeoutError:
                self._note(number, own, "the server neither answers nor closes")
                continue
            found = statuses(answer)
            self.statuses.update(found or [0])
            if problem := problem_of(own, answer):
                self._note(number, own, f"{problem}: {answer[:2000]!r}")

    async def _check_good(self, number: int) -> None:
        answer = await ask_patiently(f"http://127.0.0.1:{self.port}", GOOD)
        self.good = self.good or answer
        if answer != self.good:
            self.wrong.append(
                f"before {number}: a good request was answered {answer}, and {self.good} at first"
            )

    def _note(self, number: int, own: Attack, what: str) -> None:
        sent = b"".join(own.pieces)
        self.wrong.append(f"attack({self.seed}, {number}), {own.end}, of {sent[:3000]!r}: {what}")


async def ask_patiently(url: str, body: dict[str, Any]) -> Any:
    """The choices of an answer; it waits where the server is busy."""
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(60):
            response = await client.post(f"{url}/v1/chat/completions", json=body)
            if response.status_code != 429:
                break
            await asyncio.sleep(1)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


async def talk(port: int, own: Attack) -> bytes:
    """What comes back.

    Raises:
        TimeoutError: the server neither answers nor closes within a minute.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        for piece in own.pieces:
            writer.write(piece)
            async with asyncio.timeout(60):
                await writer.drain()
            await asyncio.sleep(own.pause)
        if own.end == "half-close":
            writer.write_eof()
        if own.end in ("read", "half-close", "close early"):
            async for data in _pieces(reader, own.patience):
                answer += data
                if own.end == "close early":
                    break
        if own.end == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    except ConnectionError:
        pass  # it has closed before it had all, which it may
    finally:
        writer.close()
    return answer


async def _pieces(reader: asyncio.StreamReader, patience: float) -> Any:
    while True:
        try:
            async with asyncio.timeout(patience):
                data = await reader.read(65_536)
        except TimeoutError:
            if patience >= 60:
                raise
            return
        if not data:
            return
        yield data


def statuses(answer: bytes) -> list[int]:
    """Of all answers on a connection, but for 100 Continue."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) if status != b"100"]


def problem_of(own: Attack, answer: bytes) -> str | None:
    """What is wrong with an answer; None: nothing is."""
    found = statuses(answer)
    if (
        any(status >= 500 and not (own.late and status == 504) for status in found)
        or b"internal_error" in answer
    ):
        return "the server broke"
    if not (own.whole and own.end == "read"):
        return None
    if not found:
        # Of what is too large the server reads on for a moment only; then it closes, and the answer may be lost.
        return None if sum(map(len, own.pieces)) > MAX_BODY else "no answer"
    streams = b"content-type: text/event-stream" in answer
    if streams and not any(end in answer for end in (b"data: [DONE]\n", b'data: {"error": ')):
        return "a stream without end"
    if found[0] >= 400 and not _has_shape(answer):
        return "an error of another shape"
    return None


def _has_shape(answer: bytes) -> bool:
    """Whether the first answer is an error of OpenAI's protocol; others may follow it."""
    body = answer.partition(b"\r\n\r\n")[2].decode(errors="replace")
    try:
        return "message" in json.JSONDecoder().raw_decode(body)[0]["error"]
    except (ValueError, LookupError, TypeError):
        return False
