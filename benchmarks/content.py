"""What both sides of a comparison train on: samples of given lengths, padded as LLaVA does it or packed as vflax does.

A sample is an image of N tokens, a prompt and an answer of random ids. Of vflax the packing plan and the model's sizes
are needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.data.packing import SUPERVISED_UNIT, PackPlan
from vflax.models.llava import LlavaConfig

Rows = dict[str, np.ndarray]
# Tokens before the image: BOS and what a template begins with.
_BEFORE_IMAGE = 4
# LLaVA's scripts run on eight devices, and its sampler groups what they take in one step.
DEVICES = 8


@dataclass(frozen=True)
class Lengths:
    """Of n samples of one image each, int [n]: text tokens, how many of them are supervised, and words of the text."""

    text: np.ndarray
    supervised: np.ndarray
    words: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    def drawn(self, n: int, seed: int) -> Lengths:
        """n of them, drawn with repeats."""
        chosen = np.random.default_rng(seed).integers(0, len(self), n)
        return Lengths(self.text[chosen], self.supervised[chosen], self.words[chosen])

    def statistics(self) -> dict[str, float]:
        """What is known of them where the samples themselves are not."""
        return {
            "samples": len(self),
            "text_mean": round(float(self.text.mean()), 1),
            "text_p90": float(np.percentile(self.text, 90)),
            "text_longest": int(self.text.max()),
            "supervised_mean": round(float(self.supervised.mean()), 1),
        }


def lognormal(n: int, seed: int = 0) -> Lengths:
    """Texts with the mean (128) and the 90th percentile (210) of Vision-Flan's, a fifth supervised; no real data."""
    # The smaller solution of mu + sigma^2 / 2 = log 128 and mu + 1.2816 sigma = log 210.
    sigma = 1.2815516 - (1.2815516**2 - 2 * np.log(210 / 128)) ** 0.5
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log(128) - sigma**2 / 2, sigma, n)
    text = np.maximum(_BEFORE_IMAGE + 2, np.rint(drawn).astype(int))
    return Lengths(text, np.minimum(text - _BEFORE_IMAGE - 1, rng.geometric(1 / 24, n)), text)


def length_grouped(words: np.ndarray, batch: int, seed: int, devices: int = DEVICES) -> list[np.ndarray]:
    """Batches as LLaVA's trainer makes them with group_by_modality_length, where all samples have an image.

    The samples are shuffled; each run of `devices` batches of them is sorted, longest first, and dealt out one by one,
    each sample to the batch with the fewest words so far that is not full, so that the devices of a step have as much
    to do as each other (llava/train/llava_trainer.py, split_to_even_chunks). Whole runs only.

    Args:
        words: int [n], of each sample's text.
        batch: samples per device.
        seed: of the shuffle.
        devices: times accumulation steps.

    Returns:
        Sample numbers [batch] each; batch i of a run has its i-th longest sample.
    """
    order = np.random.default_rng(seed).permutation(len(words))
    run = batch * devices
    batches: list[np.ndarray] = []
    for start in range(0, len(order) - run + 1, run):
        chosen = order[start : start + run]
        dealt: list[list[int]] = [[] for _ in range(devices)]
        for number in chosen[np.argsort(-words[chosen], kind="stable")]:
            open_ = [held for held in dealt if len(held) < batch]
            min(open_, key=lambda held: words[held].sum()).append(int(number))
        batches += [np.array(held) for held in dealt]
    return batches


class Content:
    """The samples themselves, made from their lengths.

    Args:
        lengths: of each sample.
        image_tokens: N.
        image_size: of the pictures, which are noise, in pixels.
        vocabulary: V; ids are drawn from 3 .. V - 2, for V - 1 stands for the image in transformers.
    """

    def __init__(self, lengths: Lengths, image_tokens: int, image_size: int, vocabulary: int) -> None:
        self.lengths, self.image_tokens = lengths, image_tokens
        self._size, self._vocabulary = image_size, vocabulary

    @classmethod
    def of(cls, lengths: Lengths, model: LlavaConfig) -> Content:
        """For this model."""
        vision = model.vision
        return cls(lengths, vision.num_tokens, vision.image_size, model.decoder.vocab_size)

    @property
    def tokens(self) -> np.ndarray:
        """int [n]: of each sample, its image included."""
        return self.lengths.text + self.image_tokens

    def padded(self, batch: Sequence[int], multiple: int = 1) -> Rows:
        """One sample a row, as long as the longest of the batch (or the next multiple); see vflax/data/rows.py."""
        length = -(-int(self.tokens[np.asarray(batch)].max()) // multiple) * multiple
        return self.rows([[number] for number in batch], length, 1)

    def rows(self, samples: Sequence[Sequence[int]], length: int, slots: int) -> Rows:
        """The given samples in each row: leaves [B, ...] as vflax/data/rows.py describes them."""
        count = len(samples)
        result = {
            "ids": np.zeros((count, length), np.int32),
            "labels": np.full((count, length), IGNORE_LABEL, np.int32),
            "segments": np.zeros((count, length), np.int32),
            "positions": np.zeros((count, length), np.int32),
            "images": np.zeros((count, slots, self._size, self._size, 3), np.uint8),
        }
        for row, numbers in enumerate(samples):
            start = 0
            for place, number in enumerate(numbers):
                ids, supervised, picture = self._sample(number)
                end = start + len(ids)
                result["ids"][row, start:end] = ids
                result["labels"][row, end - supervised : end] = ids[-supervised:]
                result["segments"][row, start:end] = place + 1
                result["positions"][row, start:end] = np.arange(len(ids))
                result["images"][row, place] = picture
                start = end
        return result

    def _sample(self, number: int) -> tuple[np.ndarray, int, np.ndarray]:
        """ids [n], how many of the last are supervised, picture uint8 [H, W, 3]."""
        rng = np.random.default_rng((7, number))
        text = rng.integers(3, self._vocabulary - 1, self.lengths.text[number]).astype(np.int32)
        image = np.full(self.image_tokens, IMAGE_TOKEN_ID, np.int32)
        ids = np.concatenate([text[:_BEFORE_IMAGE], image, text[_BEFORE_IMAGE:]])
        picture = rng.integers(0, 256, (self._size, self._size, 3), np.uint8)
        return ids, int(self.lengths.supervised[number]), picture

    def plan(self, samples: int, rows: int) -> PackPlan:
        """vflax's plan of these samples, with the T and S that it advises for so many rows a step."""
        trial = self._plan(samples, int(self.tokens.max()), samples)
        size = trial.size_for(rows)
        if size is None:
            raise SystemExit(f"no T and S put {samples} samples into {rows} rows")
        return self._plan(samples, *size)

    def _plan(self, samples: int, length: int, slots: int) -> PackPlan:
        return PackPlan(
            self.tokens, np.ones(len(self.lengths), int), self.lengths.supervised,
            samples=samples, max_length=length, slots=slots, packing=True, seed=0,
        )  # fmt: skip

    def packed(self, plan: PackPlan, step: int) -> tuple[Rows, int]:
        """The rows of a step of the plan, and how many samples they hold."""
        numbers = [plan.row(step, row) for row in range(plan.rows_per_step)]
        return self.rows(numbers, plan.capacity.tokens, plan.capacity.images), sum(map(len, numbers))


def all_supervised(rows: Rows) -> Rows:
    """The same rows with a loss on every token but a sample's first, its image's included."""
    labels = np.where(rows["positions"] > 0, np.maximum(rows["ids"], 0), IGNORE_LABEL)
    return rows | {"labels": labels.astype(np.int32)}


def capacity_of(batches: Sequence[Rows]) -> int:
    """C: the most supervised tokens of a row of any batch, rounded up as the packing plan rounds."""
    most = max(int((rows["labels"] != IGNORE_LABEL).sum(axis=1).max()) for rows in batches)
    return -(-most // SUPERVISED_UNIT) * SUPERVISED_UNIT
