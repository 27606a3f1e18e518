"""From the engine's thread to the event loop: in order, all of it, and never more than a client may leave unread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from vflax.generate.request import Delta, OnDelta, Prompt, Sampling, Token
from vflax.serve import answers
from vflax.serve.answers import Bundle, Mail
from vflax.serve.errors import ApiError
from vflax.serve.limits import Places

PROMPT = Prompt(np.zeros(3, np.int32))


class Writing:
    """Writes `number` tokens to each request, each request from a thread of its own."""

    prompt_tokens, cached_tokens = 3, 0

    def __init__(self, number: int) -> None:
        self.number, self.cancelled, self.threads = number, threading.Event(), []

    def submit(self, prompt: Prompt, sampling: Sampling, on_delta: OnDelta) -> Any:
        def write() -> None:
            for i in range(self.number):
                on_delta(Delta(f"{i} ", (Token(i),), "length" if i == self.number - 1 else None))

        self.threads.append(threading.Thread(target=write))
        self.threads[-1].start()
        return self

    def cancel(self) -> None:
        self.cancelled.set()


def bundle_of(engine: Any, places: Places, number: int) -> Bundle:
    bundle = Bundle(Mail(), places, number, lambda arrival: None)
    bundle.submit(engine, [(PROMPT, Sampling())] * number)
    return bundle


def test_all_pieces_of_all_choices_come_in_order() -> None:
    async def run() -> dict[int, str]:
        places, texts = Places(4), dict.fromkeys(range(4), "")
        with bundle_of(Writing(1000), places, 4) as bundle:
            async for arrivals in bundle.arrivals():
                for arrival in arrivals:
                    texts[arrival.index] += arrival.delta.text
        assert places.held == 0
        return texts

    expected = "".join(f"{i} " for i in range(1000))
    assert asyncio.run(run()) == dict.fromkeys(range(4), expected)


def test_an_answer_that_piles_up_unread_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_WAITING_TOKENS", 50)
    engine = Writing(100)

    async def run() -> None:
        with bundle_of(engine, Places(1), 1) as bundle:
            engine.threads[0].join()
            await asyncio.sleep(0)
            async for _ in bundle.arrivals():
                pass

    with pytest.raises(ApiError, match="not read"):
        asyncio.run(run())
    assert engine.cancelled.is_set()


def test_places_of_choices_that_were_never_asked_for_are_given_back() -> None:
    async def run() -> int:
        places = Places(3)
        with pytest.raises(RuntimeError), Bundle(Mail(), places, 3, lambda arrival: None):
            assert places.held == 3
            raise RuntimeError
        return places.held

    assert asyncio.run(run()) == 0
