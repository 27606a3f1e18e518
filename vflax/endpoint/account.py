"""Tokens, cost, and the budget that no request may exceed."""

from __future__ import annotations

import asyncio
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PER = 1_000_000  # prices are for so many tokens


@dataclass(frozen=True)
class Tokens:
    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    prompt: float
    completion: float

    def cost(self, tokens: Tokens) -> float:
        return (tokens.prompt * self.prompt + tokens.completion * self.completion) / PER


class BudgetReached(Exception):
    """The next request could exceed the budget."""


class Account:
    """What was spent, and what the requests in flight may still cost.

    Args:
        prices: None where nobody asks for costs.
        budget: None for no limit. It holds for all that `spent` and `lost` count, earlier runs included.
        spent: tokens of the replies at hand.
        lost: tokens, at most, of requests without a reply, which may have been billed.
    """

    def __init__(self, prices: Prices | None, budget: float | None, spent: Tokens, lost: Tokens) -> None:
        self.prices, self.budget = prices, budget
        self.spent, self.lost = spent, lost
        self._in_flight = Tokens()
        self._requests = 0
        self._scale = 1.0  # largest ratio seen of a prompt's tokens to their estimate
        self._freed = asyncio.Condition()

    def cost(self) -> float | None:
        """Of all that was spent or lost; None without prices."""
        return None if self.prices is None else self.prices.cost(self.spent + self.lost)

    def bound(self, prompt: int, most: int) -> Tokens:
        """What a request of an estimated `prompt` tokens and at most `most` new ones may use."""
        return Tokens(math.ceil(prompt * self._scale), most)

    async def reserve(self, bound: Tokens) -> None:
        """Waits until the budget has room for `bound`: what is in flight costs mostly less than it may.

        Raises:
            BudgetReached: there is no room and nothing in flight that could leave some.
        """
        async with self._freed:
            while not self._fits(bound):
                if not self._requests:
                    raise BudgetReached
                await self._freed.wait()
            self._in_flight += bound
            self._requests += 1

    async def settle(self, bound: Tokens, prompt: int, spent: Tokens, lost: Tokens) -> None:
        """Ends a reservation: with what it has cost, or may have. `prompt` is the estimate that `bound` was made of."""
        async with self._freed:
            self._in_flight -= bound
            self._requests -= 1
            self.spent += spent
            self.lost += lost
            if prompt:
                self._scale = max(self._scale, spent.prompt / prompt)
            self._freed.notify_all()

    def _fits(self, bound: Tokens) -> bool:
        if self.budget is None or self.prices is None:
            return True
        return self.prices.cost(self.spent + self.lost + self._in_flight + bound) <= self.budget


_PIECE = re.compile(r"[A-Za-z]+|\d|\n+|[^\sA-Za-z\d]")


# Tokens that are reckoned for a picture: what OpenAI's models take for one of 1,024 x 1,024 in high detail, about.
_PICTURE = 800


def estimate(messages: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of a prompt, without its model's tokenizer and on the high side: a word counts one for every four
    letters begun, a digit, a sign or a line's end one (other scripts one for each byte), a message eight more, a
    picture 800.
    """
    return sum(_estimate_content(message["content"]) + 8 for message in messages)


def _estimate_content(content: str | Sequence[Mapping[str, Any]]) -> int:
    if isinstance(content, str):
        return estimate_text(content)
    return sum(estimate_text(part["text"]) if part["type"] == "text" else _PICTURE for part in content)


@functools.lru_cache(maxsize=256)
def estimate_text(text: str) -> int:
    total = 0
    for piece in _PIECE.findall(text):
        if not piece.isascii():
            total += len(piece.encode())
        else:
            total += -(-len(piece) // 4) if piece.isalpha() else 1
    return total
