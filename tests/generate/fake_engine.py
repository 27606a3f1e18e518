"""An engine without a model, for tests of what stands around one: it writes what a function says, at a given pace."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np

from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.processor import Processor
from vflax.generate.request import Closed, Delta, OnDelta, Prompt, PromptTooLong, Sampling, Stats, Token
from vflax.generate.run import Run


class FakeTicket:
    def __init__(self, prompt: Prompt) -> None:
        self.prompt_tokens = len(prompt.ids)
        self.cached_tokens = 0
        self.prompt = prompt
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Answers every request with `answer(prompt)`, a token each `pace` seconds; at most `slots` at a time.

    submitted: every (prompt, sampling) that was taken, for tests to look at.
    """

    def __init__(
        self,
        processor: Processor,
        answer: Callable[[Prompt], str] = lambda prompt: "It is a red circle.",
        *,
        pace: float = 0.0,
        slots: int = 4,
        max_length: int = 1024,
    ) -> None:
        self.processor, self.answer, self.pace, self.slots = processor, answer, pace, slots
        self.max_length = max_length
        self.submitted: list[tuple[Prompt, Sampling]] = []
        self._free = threading.Semaphore(slots)
        self._lock = threading.Lock()
        self._open = True
        self._running = self._waiting = 0
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []

    def submit(self, prompt: Prompt, sampling: Sampling, on_delta: OnDelta) -> FakeTicket:
        room = self.max_length - len(prompt.ids)
        if room < (sampling.max_tokens or 1):
            raise PromptTooLong(
                f"the prompt is {len(prompt.ids)} tokens and the answer may have {sampling.max_tokens or 1}: together "
                f"more than {self.max_length}",
                len(prompt.ids),
                self.max_length,
            )
        ticket = FakeTicket(prompt)
        with self._lock:
            if not self._open:
                raise Closed("the engine is closed")
            self.submitted.append((prompt, sampling))
            self._waiting += 1
            thread = threading.Thread(
                target=self._run, args=(ticket, sampling, sampling.max_tokens or room, on_delta), daemon=True
            )
            self._threads.append(thread)
        thread.start()
        return ticket

    def stats(self) -> Stats:
        with self._lock:
            return Stats(
                slots=self.slots, running=self._running, waiting=self._waiting, pages=64,
                pages_used=self._running, pages_cached=0, prompt_tokens=self._counts["prompt"], cached_tokens=0,
                answer_tokens=self._counts["answer"], images=self._counts["images"], cached_images=0,
                finished=dict(self._finished),
            )  # fmt: skip

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        with self._lock:
            self._open = False
            threads = list(self._threads)
        if drain:
            for thread in threads:
                thread.join(timeout)

    def _run(self, ticket: FakeTicket, sampling: Sampling, most: int, on_delta: OnDelta) -> None:
        def tell(delta: Delta) -> None:
            with self._lock:
                self._counts["answer"] += len(delta.tokens)
                if delta.finish:
                    self._finished[delta.finish] += 1
            on_delta(delta)

        while not self._free.acquire(timeout=0.01):
            if ticket.cancelled.is_set():
                with self._lock:
                    self._waiting -= 1
                return tell(Delta("", (), "cancelled"))
        with self._lock:
            self._waiting -= 1
            self._running += 1
            self._counts["prompt"] += ticket.prompt_tokens
            self._counts["images"] += len(ticket.prompt.images)
        try:
            self._write(ticket, sampling, most, tell)
        finally:
            with self._lock:
                self._running -= 1
            self._free.release()

    def _write(self, ticket: FakeTicket, sampling: Sampling, most: int, on_delta: OnDelta) -> None:
        assert (
            np.sum(ticket.prompt.ids == IMAGE_TOKEN_ID)
            == len(ticket.prompt.images) * self.processor.image_tokens
        )
        # No prompt fills a chunk of that size, so none is hashed.
        run = Run(ticket.prompt, sampling, most, self.processor, self.max_length, on_delta, None)
        ids = [*self.processor.tokenizer.encode(self.answer(ticket.prompt)), self.processor.stops[0]]
        for id in itertools.cycle(ids):  # with ignore_eos it begins again after its end
            if ticket.cancelled.wait(self.pace) or run.cancelled:
                return run.end("cancelled")
            wanted = sampling.logprobs
            token = Token(id) if wanted is None else Token(id, -0.5, ((id, -0.5),) * wanted)
            finish, _ = run.grow([token])
            if finish:
                return None
        return None
