"""Published numbers to stand beside one's own. Only cells that have a source; all others stay empty."""

from __future__ import annotations

from dataclasses import dataclass

# {task: {metric, as its score file names it: what it is, in a word}}: the numbers that papers quote.
MEASURES = {
    "mme": {"perception": "perception"},
    "pope": {"f1": "F1, mean of splits"},
    "mmbench": {"circular": "circular"},
    "mmmu": {"accuracy": "accuracy"},
    "mmvet": {"total": "total"},
    "llava_bench": {"all": "relative to GPT-4"},
    "scienceqa": {"accuracy": "all questions", "IMG": "with pictures"},
    "cf": {"judge": "mean of sets, by a judge", "strict": "mean of sets, by words"},
}


@dataclass(frozen=True)
class Row:
    """A model's row: {"task/metric": the number, as it is printed}, and where."""

    model: str
    cells: dict[str, str]
    source: str


_ZOO = "LLaVA's docs/MODEL_ZOO.md"
_VISION_FLAN = "Vision-Flan (Xu et al., 2024), Table 2"
_SCIENCEQA = "LLaVA (Liu et al., 2023), as in ScienceQA's README.md"

ROWS = (
    Row(
        "Vision-Flan Base, 13B",
        {"mmbench/circular": "69.8", "mme/perception": "1537.8", "llava_bench/all": "38.5", "cf/judge": "87.2"},
        _VISION_FLAN,
    ),
    Row(
        "Vision-Flan Chat, 13B",
        {"mme/perception": "1490.6", "llava_bench/all": "78.3", "mmvet/total": "38.0"},
        _VISION_FLAN,
    ),
    Row(
        "LLaVA-1.5, 13B",
        {
            "mmbench/circular": "67.7", "mme/perception": "1531.3", "llava_bench/all": "72.5", "mmvet/total": "36.1",
            "pope/f1": "85.9", "scienceqa/IMG": "71.6", "mmmu/accuracy": "36.4", "cf/judge": "73.3",
        },
        f"{_ZOO}; MMMU: its README.md; CF: {_VISION_FLAN}",
    ),
    Row(
        "LLaVA-1.5, 7B",
        {
            "mmbench/circular": "64.3", "mme/perception": "1510.7", "llava_bench/all": "65.4", "mmvet/total": "31.1",
            "pope/f1": "85.9", "scienceqa/IMG": "66.8",
        },
        _ZOO,
    ),
    Row("LLaVA, 13B, tuned on ScienceQA", {"scienceqa/accuracy": "90.92", "scienceqa/IMG": "88.00"}, _SCIENCEQA),
    Row("... with GPT-4 as its judge", {"scienceqa/accuracy": "92.53", "scienceqa/IMG": "88.99"}, _SCIENCEQA),
)  # fmt: skip
