"""Folders of pictures, task files and reviews for the tests of data_pipeline.author."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.author import checks, review, task
from data_pipeline.author.instances import Loader

CLASSES = ("cat", "dog", "owl")


def png(seed: int, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(root: Path, each: int = 10, classes: tuple[str, ...] = CLASSES) -> Path:
    """root/CLASS/N.png, no two alike."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for n in range(each):
            (root / name / f"{n:02d}.png").write_bytes(png(1000 * c + n))
    return root


ANIMAL = {
    "name": '"ANIMALS+animal"',
    "source": 'pictures(".")',
    "instructions": '["Which animal is it?", "Name the animal."]',
    "output": '"{label}"',
    "licence": '"CC0-1.0"',
    "citation": '"drawn"',
    "author": '"Ann Author"',
}


def declared(**changes: str | None) -> str:
    """A Task as a file declares it; each change is Python, None takes a line away."""
    lines = {name: value for name, value in (ANIMAL | changes).items() if value is not None}
    return "Task(" + "".join(f"\n    {name}={value}," for name, value in lines.items()) + "\n)\n"


def write_task(path: Path, before: str = "", **changes: str | None) -> Path:
    path.write_text(f"from data_pipeline.author import *\n\n{before}\nanimal = {declared(**changes)}")
    return path


def checked(path: Path, data: Path | None) -> list[checks.Checked]:
    loader = Loader(data)
    return [checks.check(one, loader, show_progress=False) for one in task.load_task_file(path).tasks]


def write_review(
    path: Path,
    file: Path,
    data: Path | None,
    reviewer: str,
    no: dict[str, list[int]] | None = None,
    task_at: int = 0,
) -> Path:
    """As the sheet of a task of the file exports it, the first; `no` names the samples that got a no to a question."""
    found = checked(file, data)[task_at]
    ratings = ("solved", "clear", "right", "enough")
    samples: list[dict[str, Any]] = [
        {"id": item.key, "key": item.answer, "answer": item.answer, "comment": ""}
        | {rating: at not in (no or {}).get(rating, []) for rating in ratings}
        for at, item in enumerate(review.drawn(found))
    ]
    value = {
        "tool": "data_pipeline.author",
        "task": found.task.name,
        "file": task.load_task_file(file).digest,
        "data": found.digest,
        "reviewer": reviewer,
        "samples": samples,
    }
    path.write_text(json.dumps(value))
    return path
