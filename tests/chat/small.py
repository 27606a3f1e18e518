"""A small model's processor, an engine that answers with what it was asked, and pictures to ask about."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from tests.generate.fake_engine import FakeEngine, FakeTicket
from tests.weights import hub
from vflax import conversation as talk
from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.processor import Processor
from vflax.generate.request import Delta, OnDelta, Prompt, Sampling
from vflax.tokenizer import load_tokenizer

IMAGE_TOKENS = 4
LONG = " ".join(f"word{number}" for number in range(3000))


def processor(folder: Path) -> Processor:
    """Of a model that is called "tiny"."""
    if not (folder / "tokenizer.model").exists():
        hub.write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    stops = talk.stop_ids("vicuna_v1", tokenizer)
    return Processor("tiny", tokenizer, "vicuna_v1", "front", hub.RULES, stops, IMAGE_TOKENS)


def read_by(model: Processor, prompt: Prompt) -> str:
    """What a prompt spells, its images left out."""
    return model.tokenizer.decode([int(id) for id in prompt.ids if id != IMAGE_TOKEN_ID])


def engine(model: Processor, pace: float = 0.0, max_length: int = 100_000) -> FakeEngine:
    """It says how many pictures it saw, and the last question.

    "on and on" it answers with LONG; "go on" with the beginning of it, and then it writes no more until it is stopped.
    """

    def answer(prompt: Prompt) -> str:
        question = read_by(model, prompt).rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
        return LONG if question in ("go on", "on and on") else f"{len(prompt.images)} seen: {question}"

    return _Pausing(model, answer, pace=pace, max_length=max_length)


class _Pausing(FakeEngine):
    def _write(self, ticket: FakeTicket, sampling: Sampling, most: int, on_delta: OnDelta) -> None:
        pieces = itertools.count(1)
        pauses = read_by(self.processor, ticket.prompt).endswith("go on ASSISTANT:")

        def pass_on(delta: Delta) -> None:
            on_delta(delta)
            if next(pieces) == 30 and pauses:
                ticket.cancelled.wait()

        super()._write(ticket, sampling, most, pass_on)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 25)) -> Path:
    """A picture file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path
