"""Questions and answers on the disk, as tests need them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from vflax.preference.questions import ChatQuestion, Model, Said


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(key: str = "0", **fields: Any) -> ChatQuestion:
    return ChatQuestion(key, **{"text": f"What is {key}?", **fields})


def model(name: str, *texts: str) -> Model:
    return Model(name, tuple(Said(text) for text in texts), f"sha of {name}")


def write_set(folder: Path, count: int = 6) -> Path:
    """questions.jsonl with pictures in images/, and the answers of short.jsonl and chatty.jsonl."""
    rows = [
        {
            "question_id": n, "image": f"{n}.png", "text": f"Describe picture {n} in detail.", "category": "detail",
            "kind": "long", "reference": f"Picture {n} shows a dog.",
        }
        for n in range(count)
    ]  # fmt: skip
    lines(folder / "questions.jsonl", rows)
    lines(folder / "short.jsonl", [{"question_id": n, "text": f"A dog {n}."} for n in range(count)])
    chatty = [{"question_id": n, "text": f"Picture {n} shows a dog and a cat. " * 8} for n in range(count)]
    lines(folder / "chatty.jsonl", chatty)
    (folder / "images").mkdir()
    for n in range(count):
        PIL.Image.new("RGB", (24, 16), (40 * n % 256, 90, 120)).save(folder / "images" / f"{n}.png")
    return folder


def named(folder: Path) -> list[str]:
    """The arguments of a command that say the two models and the questions."""
    return [
        f"short={folder / 'short.jsonl'}", f"chatty={folder / 'chatty.jsonl'}",
        f"--questions={folder / 'questions.jsonl'}",
    ]  # fmt: skip
