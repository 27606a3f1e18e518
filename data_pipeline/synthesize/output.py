"""What lies in OUT: samples in LLaVA's form, the rejects, and the manifest.

All of it but the manifest's date is a pure function of the contexts, the prompts, the options and the replies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.synthesize.contexts import Context
from data_pipeline.synthesize.parsing import Pairs
from vflax.conversation import IMAGE_MARKER
from vflax.whole_file import replace

MANIFEST_FILE, REJECTS_FILE, ALL_FILE = "manifest.json", "rejects.jsonl", "all.json"


def llava_sample(
    context: Context, type: str, pairs: Pairs, questions: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """{id, image, conversations: [{from, value}, ...]}; the image stands before or after the first question.

    Which of the two, and which of `questions` a description answers, is drawn from seed, type and id alone.
    """
    draw = random.Random(f"{seed}/{type}/{context.id}")
    conversations: list[dict[str, str]] = []
    for question, answer in pairs:
        question = question or draw.choice(questions)
        if not conversations:
            question = f"{IMAGE_MARKER}\n{question}" if draw.random() < 0.5 else f"{question}\n{IMAGE_MARKER}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": context.id, "image": context.image, "conversations": conversations}


def write_array(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """A JSON array, one sample a line."""
    lines = (json.dumps(sample, ensure_ascii=False) for sample in samples)
    replace(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    replace(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
