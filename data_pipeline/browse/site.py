"""Writes the page: a folder that a browser opens from disk, without a server or anything from elsewhere.

    index.html  style.css  app.js
    data/tasks.js        what the page is of, the tasks with their numbers and the ids drawn, the findings
    data/task-N.js       the samples drawn of a task
    images/HASH.{jpg,png}
    page.json            what was shown, and how

Data are scripts, for a page from disk may not fetch. What comes from the dataset reaches the page as text of nodes
only, never as HTML.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vflax
from data_pipeline.browse.pieces import pieces
from data_pipeline.browse.view import View
from vflax import folders, images
from vflax.data.source import SampleText, Source, open_source
from vflax.errors import UserError

PAGE_FILE = "page.json"
DEFAULT_SAMPLES, DEFAULT_IMAGE_PX = 20, 640
_TOOL = "data_pipeline.browse"
# Pictures up to this side stay as they are, pixel by pixel.
_SMALL = 128
# Lines of a reason that the page lists; all are counted.
_LISTED = 200
_STATIC = ("app.js", "style.css")


def write_site(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    view: View,
    *,
    split: str = "train",
    samples_per_task: int = DEFAULT_SAMPLES,
    ids: Sequence[str] = (),
    seed: int = 0,
    image_px: int = DEFAULT_IMAGE_PX,
    threads: int = 4,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write the page of one split to the folder `out`.

    Args:
        path: the dataset directory.
        out: the folder; one that this function wrote is replaced.
        view: tokenizer and template, see view.choose.
        split: of the dataset.
        samples_per_task: so many are drawn of each task.
        ids: samples that are shown in any case.
        seed: of the draw.
        image_px: the longer side of the pictures in pixels, at most.
        threads: samples that are prepared at a time; the result does not depend on it.
        show_progress: draw a progress bar on stderr.

    Returns:
        What is in page.json: {tool, dataset, split, fingerprint, view, samples, shown, tasks, seed, problems}.

    Raises:
        UserError: no such dataset or id, an argument that makes no sense, or a folder that is something else's.
    """
    out = Path(out)
    if samples_per_task < 1 or image_px < 16:
        raise UserError(
            f"--samples_per_task={samples_per_task}, --image_px={image_px}: expected at least 1, and at least 16"
        )
    _check_target(out)
    source = open_source(path, split)
    tasks = _read_tasks(source, ids)
    for task in tasks:
        task.draw(samples_per_task, seed)
    findings = _read_findings(Path(source.path), split)
    page = {
        "tool": _TOOL,
        "vflax": vflax.__version__,
        "dataset": source.path.name,
        "split": split,
        "fingerprint": source.fingerprint,
        "view": view.words,
        "samples": len(source),
        "shown": sum(len(task.drawn) for task in tasks),
        "tasks": len(tasks),
        "samples_per_task": samples_per_task,
        "seed": seed,
    }
    with folders.beside(out) as root:
        new = root / "new"
        for folder in ("data", "images"):
            (new / folder).mkdir(parents=True)
        with _progress(show_progress) as progress, ThreadPoolExecutor(threads) as pool:
            bar = progress.add_task("", total=page["shown"])
            for number, task in enumerate(tasks):
                shown = []
                for sample in pool.map(
                    lambda i: _sample(source, i, view, new / "images", image_px), task.drawn
                ):
                    shown.append(sample)
                    progress.advance(bar)
                task.ids = [sample["id"] for sample in shown]
                task.problems = sum(bool(sample["problem"] or sample["findings"]) for sample in shown)
                _write_data(new / "data" / f"task-{number}.js", f"task({number}", shown)
        page["problems"] = sum(task.problems for task in tasks)
        rows = [task.row() for task in tasks]
        _write_data(new / "data" / "tasks.js", "tasks(0", {"tasks": rows, "findings": findings, "page": page})
        _write_static(new, page)
        (new / PAGE_FILE).write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", "utf-8")
        folders.swap(new, out)
    return page


def _check_target(out: Path) -> None:
    if out.is_file():
        raise UserError(f"--out={out} is a file; expected a folder, or nothing, to write to")
    if out.is_dir() and any(out.iterdir()):
        try:
            own = json.loads((out / PAGE_FILE).read_text("utf-8"))["tool"] == _TOOL
        except (OSError, ValueError, KeyError, TypeError):
            own = False
        if not own:
            raise UserError(f"--out={out} holds files that {_TOOL} did not write; name a new folder")


def _progress(show: bool) -> Progress:
    columns = (TextColumn("preparing samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


# ---------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class _Task:
    """numbers: its samples in the split; wanted: those that were asked for; drawn: those shown, in order."""

    name: str
    numbers: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    images: int = 0
    turns: int = 0
    words: int = 0
    ids: list[str] = field(default_factory=list)
    problems: int = 0

    def add(self, number: int, text: SampleText) -> None:
        self.numbers.append(number)
        self.images += text.num_images
        # Another writer's conversations may be anything; a page is for finding that out, too.
        found = text.conversations if isinstance(text.conversations, list) else []
        turns = [turn for turn in found if isinstance(turn, dict)]
        answers = [turn.get("value") for turn in turns if turn.get("from") in ("gpt", "assistant")]
        self.turns += len(answers)
        self.words += sum(len(answer.split()) for answer in answers if isinstance(answer, str))

    def draw(self, count: int, seed: int) -> None:
        """The draw of a task depends on the seed, its name and how many samples it has."""
        key = hashlib.sha256(f"{seed} {self.name}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(key, "little"))
        chosen = random.choice(self.numbers, min(count, len(self.numbers)), replace=False)
        self.drawn = sorted({*map(int, chosen), *self.wanted})

    def row(self) -> dict[str, Any]:
        count = len(self.numbers)
        return {
            "name": self.name,
            "samples": count,
            "images": round(self.images / count, 2),
            "answers": round(self.turns / count, 2),
            "words": round(self.words / max(self.turns, 1), 1),
            "problems": self.problems,
            "ids": self.ids,
        }


def _read_tasks(source: Source, ids: Sequence[str]) -> list[_Task]:
    tasks: dict[str, _Task] = {}
    missing = set(ids)
    for number, text in enumerate(source.texts()):
        task = tasks.setdefault(text.task, _Task(text.task))
        task.add(number, text)
        if text.id in missing:
            missing.discard(text.id)
            task.wanted.append(number)
    if missing:
        raise UserError(
            f"--ids: {source.path} (split {source.split}) has no sample {', '.join(sorted(missing))}; those that "
            "were left out at conversion are listed under quarantine/"
        )
    return [tasks[name] for name in sorted(tasks)]


# ---------------------------------------------------------------------------------------------------------
# Samples


def _sample(source: Source, number: int, view: View, folder: Path, image_px: int) -> dict[str, Any]:
    """A sample as the page's script reads it."""
    sample = source[number]
    found = pieces(sample.conversations, len(sample.images), view, sample.id)
    raw = [] if found.texts else sample.conversations  # what cannot be rendered is shown as it stands
    return {
        "id": sample.id,
        "number": number,
        "images": [_picture(data, folder, image_px) for data in sample.images],
        "texts": found.texts,
        "kinds": found.kinds,
        "ids": found.ids,
        "tokens": found.tokens,
        "supervised": found.supervised,
        "image_tokens": view.format.num_image_tokens if view.format else None,
        "findings": found.findings,
        "problem": found.problem,
        "raw": json.dumps(raw, indent=1, ensure_ascii=False) if raw else "",
    }


def _picture(data: bytes, folder: Path, longest: int) -> dict[str, Any]:
    """Write a picture for the page: {file, width, height, bytes}, or {error} of one that cannot be decoded."""
    try:
        picture = images.decode(data)
    except images.ImageError as error:
        return {"error": error.reason}
    width, height = picture.size
    small = max(picture.size) <= _SMALL
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", quality=85)
    # Named after its bytes: a picture that several samples have is kept once.
    name = hashlib.sha256(buffer.getvalue()).hexdigest()[:20] + (".png" if small else ".jpg")
    (folder / name).write_bytes(buffer.getvalue())
    return {"file": f"images/{name}", "width": width, "height": height, "bytes": len(data)}


# ---------------------------------------------------------------------------------------------------------
# Findings


def _read_findings(path: Path, split: str) -> list[dict[str, Any]]:
    """What the conversion left out and what it noted: [{kind, reason, count, lines}], the most frequent first."""
    result = []
    for kind in ("quarantine", "findings"):
        counts: Counter[str] = Counter()
        listed: dict[str, list[dict[str, Any]]] = {}
        for line in _lines(path / kind / f"{split}.jsonl"):
            reason = str(line.get("reason") or line.get("kind", ""))  # records.Problem, records.Finding
            counts[reason] += 1
            if counts[reason] <= _LISTED:
                shown = {key: str(line.get(key, "")) for key in ("id", "task", "file", "detail")}
                listed.setdefault(reason, []).append(shown)
        result += [
            {"kind": kind, "reason": reason, "count": count, "lines": listed[reason]}
            for reason, count in counts.most_common()
        ]
    return result


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error}); convert the data again"
                ) from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: expected an object; convert the data again")
            yield value


# ---------------------------------------------------------------------------------------------------------
# Files of the page


def _write_data(path: Path, call: str, value: Any) -> None:
    # ASCII, and without "<": it stays what it is in whatever it is put into.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(f"browse.{call},{text});\n", "utf-8")


def _write_static(folder: Path, page: dict[str, Any]) -> None:
    files = resources.files("data_pipeline.browse") / "page"
    for name in _STATIC:
        (folder / name).write_text((files / name).read_text("utf-8"), "utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files / "index.html").read_text("utf-8"))
    (folder / "index.html").write_text(template.render(page=page), "utf-8")
