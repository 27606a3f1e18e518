"""What an engine is asked, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from vflax.errors import UserError

# As many likeliest tokens beside the chosen one as OpenAI's protocol allows.
MAX_LOGPROBS = 20
MAX_STOPS = 16
_SEEDS = 2**63

Finish = Literal["stop", "length", "cancelled", "failed"]
"""Why an answer ended: an end token or a stop string; max_tokens; it was cancelled; the engine broke."""


class PromptTooLong(UserError):
    """A prompt that leaves no room for an answer: nothing is ever cut.

    tokens: of the prompt, its images included; limit: of prompt and answer together.
    """

    def __init__(self, message: str, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class Closed(RuntimeError):
    """The engine takes no more requests: it is being closed, or it broke."""


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    ids: int32 [n]; every image stands as N times IMAGE_TOKEN_ID.
    images: uint8 [size, size, 3] each, in order of appearance.
    chat: the answer is a turn of a conversation: white space around it is not part of it.
    """

    ids: np.ndarray
    images: tuple[np.ndarray, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and when it ends.

    max_tokens: the most tokens, the end token included; None: as many as there is room for.
    temperature: 0: the likeliest token, always (greedy).
    top_k: only the k likeliest tokens are drawn from; 0: all.
    top_p: only the likeliest tokens that together have this probability (Holtzman et al., arXiv 1904.09751).
    repetition_penalty: logits of tokens that prompt or answer hold are divided by it where positive, multiplied where
        negative (Keskar et al., arXiv 1909.05858).
    presence_penalty, frequency_penalty: OpenAI's: taken from the logits of tokens that the answer holds, once, and
        once for each time.
    seed: of the draws. The same prompt, settings and seed give the same answer, whatever else is answered meanwhile.
    stop: strings that end the answer; they are not part of it.
    logprobs: give each token's logarithmic probability, and those of so many likeliest; None: none.
    ignore_eos: end tokens do not end the answer (for measurements).

    Raises:
        UserError: naming every setting that is out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def within(value: float, low: float, high: float) -> bool:
            return math.isfinite(value) and low <= value <= high

        problems = []
        if self.max_tokens is not None and self.max_tokens < 1:
            problems.append(f"max_tokens={self.max_tokens}: at least 1")
        if not within(self.temperature, 0, 2):
            problems.append(f"temperature={self.temperature}: from 0 (greedy) to 2")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: at least 1, or 0 for all tokens")
        if not (within(self.top_p, 0, 1) and self.top_p > 0):
            problems.append(f"top_p={self.top_p}: more than 0, at most 1")
        if not within(self.repetition_penalty, 0.01, 100):
            problems.append(f"repetition_penalty={self.repetition_penalty}: from 0.01 to 100 (1 is none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not within(getattr(self, name), -2, 2):
                problems.append(f"{name}={getattr(self, name)}: from -2 to 2")
        if not -_SEEDS <= self.seed < _SEEDS:
            problems.append(f"seed={self.seed}: a whole number of 64 bits")
        if len(self.stop) > MAX_STOPS or "" in self.stop:
            problems.append(f"stop: at most {MAX_STOPS} strings, none of them empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            problems.append(f"logprobs={self.logprobs}: from 0 to {MAX_LOGPROBS}")
        if problems:
            raise UserError("; ".join(problems))


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    logprob: of the model's own distribution, before temperature and penalties; None where it was not asked for.
    top: the likeliest tokens with theirs, the likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What an answer has grown by.

    text: whole characters; what might be the beginning of a stop string is held back.
    tokens: written since the last one, end tokens and those of a stop string included.
    finish: why the answer ended; None while it goes on.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None


OnDelta = Callable[[Delta], None]


class Ticket(Protocol):
    """A request that was taken."""

    @property
    def prompt_tokens(self) -> int:
        """Of its prompt, images included."""

    @property
    def cached_tokens(self) -> int:
        """Of those, how many were known from earlier requests; 0 until it begins."""

    def cancel(self) -> None:
        """End the answer; its slot is free at once. Of no effect on one that has ended. Any thread may call it."""


@dataclass(frozen=True)
class Stats:
    """An engine at a moment, and what it has done since its start.

    slots: requests that can run at a time; running: those that do; waiting: those that were taken and wait for a slot.
    pages, pages_used, pages_cached: of the key-value cache: all, held by requests, kept for prompts that begin alike.
    images, cached_images: pictures that went through the tower, and pictures of prompts whose features were known.
    """

    slots: int
    running: int
    waiting: int
    pages: int
    pages_used: int
    pages_cached: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    images: int
    cached_images: int
    finished: dict[str, int]


class Answering(Protocol):
    """What chat and server need of an engine (vflax.generate.engine.Engine)."""

    max_length: int
    """The most tokens of prompt and answer together."""

    def submit(self, prompt: Prompt, sampling: Sampling, on_delta: OnDelta) -> Ticket:
        """Take a request; returns at once. Any thread may call it.

        Args:
            prompt: what to answer.
            sampling: how.
            on_delta: called with every piece of the answer, in order, from the engine's own thread: it must be quick,
                and must not raise. The last one has `finish`.

        Raises:
            PromptTooLong: the prompt and max_tokens, or one token where that is None, do not fit.
            Closed: the engine takes no more.
        """

    def stats(self) -> Stats:
        """How it stands. Any thread may call it."""

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Take no more requests and end: at once, or after those that were taken (at most `timeout` seconds)."""
