"""A run's folder as vflax.evaluate leaves it, with numbers that a test chooses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import PIL.Image

from vflax.evaluate.question import Picture, Question


def verdict(key: str, answer: str, prediction: str | None, **changes: Any) -> dict[str, Any]:
    """Read as it was said, and right where that is the answer."""
    row = {
        "key": key, "unit": key, "groups": {"split": "dev"}, "answer": answer, "prediction": prediction,
        "parsed": prediction, "score": float(prediction == answer), "why": f"read {prediction}",
    }  # fmt: skip
    return {**row, **changes}


def write_task(out: Path, task: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """score.json and verdicts.jsonl; changes: of the score."""
    folder = out / task
    folder.mkdir(parents=True)
    value = 100 * sum(row["score"] for row in rows) / len(rows)
    metrics = changes.pop("metrics", {"accuracy": value})
    score = {
        "task": task, "mode": "official", "format": "vflax", "n": len(rows),
        "missing": sum(row["prediction"] is None for row in rows),
        "unparsed": sum(row["prediction"] is not None and row["parsed"] is None for row in rows),
        "score": value, "headline": next(iter(metrics)), "metrics": metrics, "intervals": {}, "groups": {},
        "printed": {}, "manifest": {"custom": False, "limit": None}, **changes,
    }  # fmt: skip
    (folder / "score.json").write_text(json.dumps(score))
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def question(key: str, *pictures: Picture) -> Question:
    return Question(key, "?", "yes", {}, key, pictures)


def picture(name: str = "one.png", size: tuple[int, int] = (8, 8), colour: str = "red") -> Picture:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return Picture(name, file.getvalue)
