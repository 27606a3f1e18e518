"""Published numbers to stand beside one's own. Only cells that have a source; all others stay empty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A model's row: {task: score, as the paper prints it}, and where it is printed."""

    model: str
    scores: dict[str, str]
    source: str


_ZOO = "LLaVA's docs/MODEL_ZOO.md"
_VISION_FLAN = "Vision-Flan (Xu et al., 2024), Table 2"

ROWS = (
    Row("Vision-Flan Base", {"mmbench": "69.8", "mme": "1537.8", "llava_bench": "38.5", "cf": "87.2"}, _VISION_FLAN),
    Row("Vision-Flan Chat", {"mme": "1490.6", "llava_bench": "78.3", "mmvet": "38.0"}, _VISION_FLAN),
    Row(
        "LLaVA-1.5, 13B",
        {
            "mmbench": "67.7", "mme": "1531.3", "llava_bench": "72.5", "mmvet": "36.1", "pope": "85.9",
            "scienceqa": "71.6", "cf": "73.3",
        },
        f"{_ZOO}; CF: {_VISION_FLAN}",
    ),
    Row(
        "LLaVA-1.5, 7B",
        {
            "mmbench": "64.3", "mme": "1510.7", "llava_bench": "65.4", "mmvet": "31.1", "pope": "85.9",
            "scienceqa": "66.8",
        },
        _ZOO,
    ),
)  # fmt: skip
# What a score is, in a word, over its column.
MEASURES = {
    "mme": "perception", "pope": "F1, mean of splits", "mmbench": "circular", "mmmu": "accuracy", "mmvet": "total",
    "llava_bench": "relative to GPT-4", "scienceqa": "questions with pictures", "cf": "mean of sets",
    "textocr": "word F1",
}  # fmt: skip
