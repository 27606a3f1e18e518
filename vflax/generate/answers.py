"""Answers to many requests, for callers that wait for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from vflax.generate.request import Answering, Delta, Finish, Prompt, Sampling, Token


@dataclass(frozen=True)
class Answer:
    """A whole answer; see `vflax.generate.request.Delta` for what its parts are."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish


def answer_all(engine: Answering, asked: Sequence[tuple[Prompt, Sampling]]) -> list[Answer]:
    """Answer all requests, as many at a time as the engine has slots; in the order in which they are given.

    Raises:
        PromptTooLong: one of them has no room; those that were begun are cancelled.
        RuntimeError: the engine broke or was closed meanwhile.
    """
    deltas: list[list[Delta]] = [[] for _ in asked]
    ended = threading.Semaphore(0)

    def collect(number: int, delta: Delta) -> None:
        deltas[number].append(delta)
        if delta.finish:
            ended.release()

    tickets = []
    try:
        for number, (prompt, sampling) in enumerate(asked):
            tickets.append(engine.submit(prompt, sampling, partial(collect, number)))
        for _ in asked:
            ended.acquire()
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    answers = [_joined(own) for own in deltas]
    if lost := [number for number, answer in enumerate(answers) if answer.finish in ("cancelled", "failed")]:
        raise RuntimeError(f"{len(lost)} of {len(asked)} requests were not answered: the engine ended")
    return answers


def _joined(deltas: Sequence[Delta]) -> Answer:
    finish = deltas[-1].finish
    assert finish is not None
    return Answer(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        finish,
    )
