"""Held-out samples as questions: the prompt as the model gets it, and the answer it should give."""

from __future__ import annotations

import dataclasses

import numpy as np

from vflax.conversation import Conversation, expand, read_llava, render
from vflax.data.draw import Draw, permutation
from vflax.data.mixture import first_per_task
from vflax.data.rows import RowFormat, decode_images
from vflax.data.source import Sample


@dataclasses.dataclass(frozen=True)
class Question:
    """One sample, ready to be asked.

    Attributes:
        sample_id, task: of the sample.
        text: the last question.
        reference: the answer in the data.
        ids: int32 [n], the prompt up to where the answer begins, an image as N IMAGE_TOKEN_ID.
        images: uint8 [k, H, W, 3].
        source, split: where the sample lies; "" for one of no dataset.
    """

    sample_id: str
    task: str
    text: str
    reference: str
    ids: np.ndarray
    images: np.ndarray
    source: str = ""
    split: str = ""


def ask(sample: Sample, format: RowFormat, source: str = "", split: str = "") -> Question:
    """The sample as a question: everything before its last answer is the prompt."""
    read, _ = read_llava(sample.conversations, len(sample.images), format.position, sample.id)
    turns = read.turns if read.turns[-1].role == "assistant" else read.turns[:-1]
    rendered = render(
        Conversation(turns, read.system), format.template, format.tokenizer, generation_prompt=True
    )
    ids, _ = expand(rendered, format.num_image_tokens)
    return Question(
        sample_id=sample.id,
        task=sample.task,
        text=turns[-2].text.strip(),
        reference=turns[-1].text.strip(),
        ids=ids,
        images=decode_images(sample, format.rules),
        source=source,
        split=split,
    )


def choose(tasks: list[str], usable: np.ndarray, per_task: int, seed: int) -> list[int]:
    """At most `per_task` samples of each task, drawn by seed, in the order of the data.

    Args:
        tasks: the task of each of n samples.
        usable: bool [n].
        per_task: how many.
        seed: of the draw.
    """
    draw = permutation(len(tasks), Draw.QUESTIONS, seed)
    return np.flatnonzero(first_per_task(tasks, usable, draw, per_task)).tolist()
