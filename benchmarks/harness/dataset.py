"""Held-out questions of the built-in mini dataset as a folder of pictures that `datasets` reads ("imagefolder").

    python -m benchmarks.harness.dataset --out=DIR

writes DIR/vflax_mini_data/test/: a PNG for each question, and metadata.jsonl with a Row on each line. Asked is what
has a short answer, so that exact match is a fair score.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipeline import mini
from vflax.errors import UserError
from vflax.evaluate.heldout import SHORT_ANSWER_WORDS

NAME, SPLIT = "vflax_mini_data", "test"
PER_TASK = 5


@dataclass(frozen=True)
class Row:
    """A question. file_name: of its picture, in the same folder; names are in the order of the rows."""

    file_name: str
    id: str
    task: str
    question: str
    answer: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.dataset",
        description="Write held-out questions with their pictures.",
    )
    parser.add_argument("--out", type=Path, required=True, help=f"the folder that {NAME}/ is written into")
    add_per_task(parser)
    args = parser.parse_args(argv)
    try:
        rows = write(args.out, args.per_task)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(rows)} questions of {len({row.task for row in rows})} tasks in {args.out / NAME}")
    return 0


def add_per_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per-task", type=int, default=PER_TASK, help=f"questions of each task (default: {PER_TASK})"
    )


def write(out: Path, per_task: int = PER_TASK, data: mini.MiniData | None = None) -> list[Row]:
    """The first `per_task` held-out questions of each task, written into out/NAME; returns them in their order.

    Args:
        out: a folder that need not exist.
        data: the dataset; None: the built-in one, made if it is not in the cache.

    Raises:
        UserError: there is something at out/NAME, it cannot be written, or `per_task` is less than 1.
    """
    if per_task < 1:
        raise UserError(f"--per-task={per_task}: at least 1")
    release = (data or mini.ensure()).release("stage1")
    samples = _chosen(release / f"annotation_{SPLIT}.json", per_task)
    rows = [_row(number, sample) for number, sample in enumerate(samples)]
    folder = out / NAME / SPLIT
    try:
        folder.mkdir(parents=True)
        for row, sample in zip(rows, samples, strict=True):
            shutil.copyfile(release / "images" / sample["image"], folder / row.file_name)
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    except FileExistsError:
        raise UserError(f"{folder}: is there already; name another folder, or remove it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return rows


def _chosen(annotations: Path, per_task: int) -> list[dict[str, Any]]:
    """Of the tasks whose answers are short; the annotations stand task by task."""
    samples = json.loads(annotations.read_text(encoding="utf-8"))
    result: list[dict[str, Any]] = []
    for _, group in groupby(samples, key=lambda sample: sample["task_name"]):
        own = list(group)
        if all(len(sample["conversations"][-1]["value"].split()) <= SHORT_ANSWER_WORDS for sample in own):
            result += own[:per_task]
    return result


def _row(number: int, sample: dict[str, Any]) -> Row:
    """Without the marker of the image: the client sends the picture as a part of its own."""
    human, answer = (turn["value"] for turn in sample["conversations"])
    question = human.replace("<image>", "").strip()
    return Row(f"{number:04}.png", sample["id"], sample["task_name"], question, answer)


if __name__ == "__main__":
    sys.exit(main())
