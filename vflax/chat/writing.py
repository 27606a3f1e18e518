"""One answer on its way from the engine to the person who waits for it."""

from __future__ import annotations

import contextlib
import queue
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vflax.errors import UserError
from vflax.generate.request import Answering, Closed, Delta, Finish, Prompt, Sampling, Ticket

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """A whole answer, or what was written of one that was stopped.

    seconds: from asking to its end.
    seed: that its tokens were drawn with.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    seed: int

    def facts(self) -> dict[str, Any]:
        """All but the text, for JSON."""
        return {
            "finish_reason": self.finish,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
            },
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
        }


class Writing:
    """A request and its answer. The engine's thread puts pieces into a queue, the caller's takes them out."""

    def __init__(self, prompt: Prompt, sampling: Sampling) -> None:
        self._prompt, self._sampling = prompt, sampling
        self._mail: queue.SimpleQueue[tuple[float, Delta] | None] = queue.SimpleQueue()
        self._ticket: Ticket | None = None
        self._began = 0.0

    def begin(self, engine: Answering) -> None:
        """Ask the engine.

        Raises:
            UserError: PromptTooLong, or the engine has ended.
        """
        self._began = time.monotonic()
        try:
            self._ticket = engine.submit(
                self._prompt, self._sampling, lambda delta: self._mail.put((time.monotonic(), delta))
            )
        except Closed as error:
            raise UserError(f"{error}; start again") from None

    def interrupt(self) -> None:
        """Stop the answer; a second time, stop waiting for its end. May be called from a signal handler."""
        self._mail.put(None)  # the one thing that may be done to a queue there

    def cancel(self) -> None:
        """Stop the answer, and do not wait for its end."""
        if self._ticket is not None:
            self._ticket.cancel()

    def read(self, on_text: OnText) -> Answer:
        """Wait for the answer's end.

        Args:
            on_text: is given each piece as it comes. What it raises stops the answer.

        Raises:
            UserError: the engine failed.
            KeyboardInterrupt: it was interrupted twice.
        """
        try:
            return self._read(on_text)
        except BaseException:
            self.cancel()
            raise

    def _read(self, on_text: OnText) -> Answer:
        assert self._ticket is not None
        texts, tokens, interrupted = [], 0, False
        while True:
            mail = self._mail.get()
            if mail is None:
                if interrupted:
                    raise KeyboardInterrupt
                interrupted = True
                self._ticket.cancel()
                continue
            at, delta = mail
            texts.append(delta.text)
            tokens += len(delta.tokens)
            if delta.text:
                on_text(delta.text)
            if delta.finish == "failed":
                raise UserError("the engine failed while it answered; start again")
            if delta.finish:
                known = self._ticket.prompt_tokens, self._ticket.cached_tokens
                seconds = at - self._began
                return Answer("".join(texts), delta.finish, *known, tokens, seconds, self._sampling.seed)


def answer(engine: Answering, prompt: Prompt, sampling: Sampling, on_text: OnText) -> Answer:
    """Ask, and wait for the whole answer; Ctrl-C stops the answer and not the program. Of the main thread.

    Raises:
        UserError: PromptTooLong, or the engine failed or has ended.
        KeyboardInterrupt: Ctrl-C came twice.
    """
    writing = Writing(prompt, sampling)
    with _on_interrupt(writing.interrupt):
        writing.begin(engine)
        return writing.read(on_text)


@contextlib.contextmanager
def _on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before in (
        None,
        signal.SIG_IGN,
    ):  # started so that Ctrl-C is not for it: in the background of a script
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
