"""Answers of the engine's thread, brought to the event loop: one bundle for the choices of one request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from vflax.generate.request import Answering, Delta, Prompt, Sampling, Ticket
from vflax.serve.errors import ApiError, draining, internal
from vflax.serve.limits import Places
from vflax.serve.log import LOG

# Tokens that may wait for a client that reads slowly; far more than a connection's buffers take before it is cut off.
MAX_WAITING_TOKENS = 8192


@dataclass(frozen=True)
class Arrival:
    """A piece of choice `index`, written at `at` (seconds of time.monotonic)."""

    index: int
    delta: Delta
    at: float


class Mail:
    """From the engine's thread to the event loop. However many pieces a step writes, the loop is woken once."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: list[tuple[Bundle, Arrival]] = []

    def post(self, bundle: Bundle, arrival: Arrival) -> None:
        """Of any thread; quick, and never raises."""
        with self._lock:
            self._waiting.append((bundle, arrival))
            if len(self._waiting) > 1:
                return  # who was first has woken the loop
        with contextlib.suppress(RuntimeError):  # the loop has ended; so have all that waited
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, []
        for bundle, arrival in taken:
            bundle.receive(arrival)


class Bundle:
    """The choices of one request. All but Mail.post is of the event loop's thread.

    It takes their places (ApiError, 429, where there are none); each is given back when its answer has ended. Leaving
    it (`with`) cancels what is under way and gives back the places of what was never asked.

    on_arrival: told of each piece as it comes, for measurements.
    """

    def __init__(
        self, mail: Mail, places: Places, number: int, on_arrival: Callable[[Arrival], None]
    ) -> None:
        places.take(number)
        self.tickets: list[Ticket] = []
        self._mail, self._places, self._on_arrival = mail, places, on_arrival
        self._unasked, self._open = number, 0
        self._new: list[Arrival] = []
        self._waiting_tokens = 0
        self._event = asyncio.Event()
        self._error: ApiError | None = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel()
        self._places.give(self._unasked)
        self._unasked = 0

    def submit(self, engine: Answering, requests: Sequence[tuple[Prompt, Sampling]]) -> None:
        """Ask for all; what the engine raises at one of them is raised here."""
        for index, (prompt, sampling) in enumerate(requests):
            self.tickets.append(engine.submit(prompt, sampling, self._poster(index)))
            self._unasked -= 1
            self._open += 1

    def receive(self, arrival: Arrival) -> None:
        """Take a piece."""
        self._on_arrival(arrival)
        self._new.append(arrival)
        self._waiting_tokens += len(arrival.delta.tokens)
        if arrival.delta.finish:
            self._open -= 1
            self._places.give(1)
        elif self._waiting_tokens > MAX_WAITING_TOKENS:
            self.stop(ApiError(408, "the answer was not read as it came", code="too_slow"))
        self._event.set()

    def stop(self, error: ApiError) -> None:
        """End it with an error."""
        self._error = self._error or error
        self._cancel()
        self._event.set()

    async def arrivals(self) -> AsyncGenerator[list[Arrival], None]:
        """What has come, as it comes, until all choices have ended.

        Raises:
            ApiError: it was stopped, or the engine failed.
        """
        left = len(self.tickets)
        while left:
            await self._event.wait()
            self._event.clear()
            if self._error:
                raise self._error
            new, self._new, self._waiting_tokens = self._new, [], 0
            for arrival in new:
                left -= arrival.delta.finish is not None
                if arrival.delta.finish == "failed":
                    LOG.error("the engine failed at a request")
                    raise internal()
                if (
                    arrival.delta.finish == "cancelled"
                ):  # not by this bundle: who cancels it does not listen any more
                    raise draining()
            if new:
                yield new

    def _cancel(self) -> None:
        if self._open:
            for ticket in self.tickets:
                ticket.cancel()

    def _poster(self, index: int) -> Callable[[Delta], None]:
        return lambda delta: self._mail.post(self, Arrival(index, delta, time.monotonic()))
