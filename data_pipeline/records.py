"""What a reader of a release gives: samples, and entries that are none."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RawSample:
    """One entry of an annotation file."""

    number: int  # place in the file, from 0
    id: str
    task: str
    files: tuple[str, ...]  # images, relative to the image folder
    conversations: Any  # as it stands there; vflax.conversation.read_llava judges it
    repeated: str = (
        ""  # the id that it has there, where an earlier sample has it too and `id` was made to differ
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a sample is not in the dataset."""

    number: int
    id: str
    task: str
    file: str
    reason: str  # one word for counting
    detail: str  # one line for a person


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is odd about a sample that is in the dataset all the same."""

    number: int
    id: str
    task: str
    file: str  # the image it is about, or ""
    kind: str  # one word for counting
    detail: str  # one line for a person
