"""Writes accepted tasks as a release in Vision-Flan's form.

    OUT/annotation.json        [{"id", "image", "task_name", "conversations": [{from, value}, {from, value}]}, ...]
    OUT/annotation_test.json   the same of what is held out
    OUT/images/DATASET/...     pictures, byte for byte as they came (a picture of several tasks once)
    OUT/metadata.json          the tasks: definition, source, licence, author, instances, and the review

What is held out is held out by picture: its instances of all tasks are. The order in which pictures are held out is
drawn by the seed and by what is in them, so it is the same in every task that has them. Same input, same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vflax
from data_pipeline.author import TOOL
from data_pipeline.author.accept import accepted
from data_pipeline.author.checks import Checked, check
from data_pipeline.author.instances import Instance, Loader, Seen, ordering
from data_pipeline.author.task import Task, TaskFile
from vflax import folders
from vflax.errors import UserError

METADATA, TRAIN, TEST = "metadata.json", "annotation.json", "annotation_test.json"


@dataclass(frozen=True)
class Part:
    """A task that is exported, with the record of its acceptance; None: nobody reviewed it."""

    file: TaskFile
    found: Checked
    review: dict[str, Any] | None


def export(
    files: Sequence[TaskFile],
    data: Path | None,
    out: Path,
    *,
    held_out: float,
    seed: int = 0,
    unreviewed: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write the release of all tasks of these files.

    Args:
        data: the folder that paths in the files start from.
        out: a folder that this function wrote is replaced.
        held_out: of each task so many pictures, or below 1 such a share of them; 0: none.
        seed: of what is held out.
        unreviewed: tasks that are not accepted, too; the metadata says which.

    Returns:
        What is in metadata.json.

    Raises:
        UserError: a task has faults or is not accepted, naming all of them; or held_out leaves nothing to train on.
            Nothing is written then.
    """
    _check_target(out)
    parts = _parts(files, data, unreviewed, show_progress)
    test = _held_out(parts, held_out, seed)
    rows: dict[str, list[dict[str, Any]]] = {TRAIN: [], TEST: []}
    pictures: dict[str, tuple[Instance, Seen]] = {}
    for part in parts:
        for item, seen in zip(part.found.instances, part.found.pictures, strict=True):
            image = f"{part.found.task.dataset}/{seen.file}"
            there = pictures.setdefault(image, (item, seen))
            if there[1].digest != seen.digest:
                raise UserError(
                    f"{part.found.task.name}: two pictures are called {image}; other tasks of the dataset have another "
                    "source, so give one of them another DATASET in its name"
                )
            rows[TEST if seen.digest in test else TRAIN].append(_annotation(part.found.task, item, image))
    metadata = _metadata(parts, test, held_out, seed)
    with folders.beside(out) as root:
        new = root / "new"
        new.mkdir()
        for name, found in rows.items():
            if found or name == TRAIN:
                _write_array(new / name, found)
        for image, (item, _) in pictures.items():
            path = new / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item.record.read().data)
        _write(new / METADATA, json.dumps(metadata, indent=1, ensure_ascii=False) + "\n")
        folders.swap(new, out)
    return metadata


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            own = json.loads((out / METADATA).read_text("utf-8"))["tool"] == TOOL
        except (OSError, ValueError, KeyError, TypeError):
            own = False
        if not own:
            raise UserError(f"--out={out} holds files that {TOOL} did not write; name a new folder")


def _parts(files: Sequence[TaskFile], data: Path | None, unreviewed: bool, show_progress: bool) -> list[Part]:
    loader, parts, problems = Loader(data), [], []
    for file in files:
        for task in file.tasks:
            found = check(task, loader, show_progress)
            review, why = accepted(file, found)
            if not found.is_fit:
                kinds = ", ".join(dict.fromkeys(fault.kind for fault in found.faults))
                problems.append(f"{task.name}: it has faults ({kinds}); `check` names them")
            elif review is None and not unreviewed:
                problems.append(f"{task.name}: {why}")
            parts.append(Part(file, found, review))
    names = [part.found.task.name for part in parts]
    problems += [
        f"{name}: two task files declare it" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise UserError("not exported:\n  " + "\n  ".join(problems))
    return parts


def _held_out(parts: Iterable[Part], held_out: float, seed: int) -> set[str]:
    """Digests of the pictures: of each task the first ones in the seed's order."""
    chosen: set[str] = set()
    for part in parts:
        digests = sorted(
            {seen.digest for seen in part.found.pictures}, key=lambda digest: ordering(seed, digest)
        )
        count = round(held_out * len(digests)) or 1 if 0 < held_out < 1 else int(held_out)
        chosen.update(digests[:count])
    for part in parts:
        if all(seen.digest in chosen for seen in part.found.pictures):
            raise UserError(
                f"--held-out={held_out:g}: {part.found.task.name} has nothing left to train on, of "
                f"{len(part.found.pictures):,} instances; hold out fewer"
            )
    return chosen


def _annotation(task: Task, item: Instance, image: str) -> dict[str, Any]:
    return {
        "id": f"{task.name}+{item.key}",
        "image": image,
        "task_name": task.name,
        "conversations": [{"from": "human", "value": item.human}, {"from": "gpt", "value": item.answer}],
    }


def _metadata(parts: Sequence[Part], test: set[str], held_out: float, seed: int) -> dict[str, Any]:
    return {
        "tool": TOOL,
        "vflax": vflax.__version__,
        "held_out": held_out,
        "seed": seed,
        "tasks": {part.found.task.name: _task(part, test) for part in parts},
    }


def _task(part: Part, test: set[str]) -> dict[str, Any]:
    task, pictures = part.found.task, part.found.pictures
    held = sum(seen.digest in test for seen in pictures)
    return {
        "dataset": task.dataset,
        "instructions": list(task.instructions),
        "input": task.input,
        "output": task.output,
        "options": task.options.words if task.options else "",
        "source": task.source.words,
        "licence": task.licence,
        "citation": task.citation,
        "author": task.author,
        "instances": {"train": len(pictures) - held, "test": held},
        "seed": task.seed,
        "file": {"name": part.file.path.name, "sha256": part.file.digest},
        "data": part.found.digest,
        "reviewed": part.review is not None,
        "review": part.review,
    }


def _write_array(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON array, one entry a line."""
    _write(path, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
