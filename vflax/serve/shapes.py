"""OpenAI's answers: whole ones and chunks, of chat and of text completions."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vflax.generate.request import Delta, Token
from vflax.tokenizer import Tokenizer

_IMPOSSIBLE = -9999.0


@dataclass
class Choice:
    """An answer as far as it has come. tokens: those that are told with their probabilities."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Spelling:
    """Single tokens as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A decoder may leave out the space before a first word, so a token is shown as it reads behind another.
        self._anchor = tokenizer.encode("a")[-1:]
        self._before = tokenizer.decode(self._anchor)
        self.text = functools.lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([*self._anchor, token])[len(self._before) :]

    def bytes(self, token: int) -> list[int] | None:
        """Of its text in UTF-8; None for one that is a part of a character."""
        text = self.text(token)
        return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())


class Shape(Protocol):
    """Of one request's answer."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer that is sent at once."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that comes before all of a choice's text."""

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a piece; None for a piece that shows nothing."""

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that tells the usage."""


class ChatShape:
    """chat.completion and chat.completion.chunk.

    logprobs: whether tokens are told; with_usage: whether the stream ends with the usage.
    """

    def __init__(self, model: str, spelling: Spelling, *, logprobs: bool, with_usage: bool) -> None:
        self._spelling, self._logprobs, self._with_usage = spelling, logprobs, with_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        told = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._told(choice.tokens),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": told, "usage": usage.body()}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        logprobs = self._told(delta.tokens) if delta.tokens else None
        if not (delta.text or delta.finish or logprobs):
            return None
        content = {"content": delta.text} if delta.text or logprobs else {}
        return self._chunk(index, content, logprobs, delta.finish)

    def closing(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.body()}

    def _chunk(self, index: int, delta: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _told(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._spelled(token.id, token.logprob),
                "top_logprobs": [self._spelled(*one) for one in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _spelled(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, spelled = self._spelling.text(token), self._spelling.bytes(token)
        return {"token": text, "logprob": _number(logprob), "bytes": spelled}


class TextShape:
    """text_completion, whole and in chunks; the arguments are those of ChatShape."""

    def __init__(self, model: str, spelling: Spelling, *, logprobs: bool, with_usage: bool) -> None:
        self._spelling, self._logprobs, self._with_usage = spelling, logprobs, with_usage
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}
        self._head = {**head, "created": int(time.time()), "model": model}
        self._offsets: dict[int, int] = {}  # characters of a choice's tokens that were told

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        told = [self._choice(i, one.text, one.tokens, one.finish) for i, one in enumerate(choices)]
        return {**self._head, "choices": told, "usage": usage.body()}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if not (delta.text or delta.finish or (self._logprobs and delta.tokens)):
            return None
        usage = {"usage": None} if self._with_usage else {}
        choice = self._choice(index, delta.text, delta.tokens, delta.finish)
        return {**self._head, "choices": [choice], **usage}

    def closing(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.body()}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        logprobs = self._told(index, tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _told(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        texts, offsets = [self._spelling.text(token.id) for token in tokens], []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        """By spelling, which tokens may share: the likeliest has it."""
        return {self._spelling.text(one): _number(logprob) for one, logprob in reversed(token.top)}


def _number(logprob: float | None) -> float | None:
    """As OpenAI writes that of the impossible: JSON has no infinity."""
    return None if logprob is None else logprob if logprob > _IMPOSSIBLE else _IMPOSSIBLE
