"""What the task asks of lmms-eval. It runs in the harness's environment, where vflax is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pictures(row: dict[str, Any]) -> list[Any]:
    """The one picture of a question, as the harness decoded it."""
    return [row["image"]]


def scores(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """1 for an answer that is the reference's, 0 for another."""
    return {"exact_match": float(normalise(answers[0]) == normalise(row["answer"]))}


def normalise(text: str) -> str:
    """As vflax.evaluate.heldout does."""
    return " ".join(text.lower().split()).rstrip(".")
