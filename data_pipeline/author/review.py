"""The review sheet: a page on which a person solves 20 samples of a task blind, and then judges them.

It is one file: pictures and script are in it, and nothing is fetched. The second reviewer gets the same one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from data_pipeline.author import TOOL
from data_pipeline.author.checks import REVIEWED, Checked
from data_pipeline.author.instances import Instance, ordering
from data_pipeline.author.task import Task
from vflax import images
from vflax.whole_file import replace

# Pictures up to the first side are shown pixel by pixel, those over the second are made smaller.
_SMALL, _LARGEST = 128, 1024


def drawn(found: Checked) -> list[Instance]:
    """The samples of a review: by the task's seed, in the order that they are shown in."""
    seed, name = found.task.seed, found.task.name
    return sorted(found.instances, key=lambda item: ordering(seed, "review", name, item.key))[:REVIEWED]


def write_sheet(found: Checked, file: str, folder: Path) -> Path:
    """Write FOLDER/TASK.html.

    Args:
        found: the task; it is_fit.
        file: SHA-256 of its task file.

    Raises:
        UserError: it cannot be written.
    """
    task, version = found.task, hashlib.sha256((file + found.digest).encode()).hexdigest()[:16]
    data = {
        "tool": TOOL,
        "task": task.name,
        "file": file,
        "data": found.digest,
        "version": version,
        "authors": sorted(task.authors),
        "samples": [_sample(item) for item in drawn(found)],
    }
    parts = resources.files("data_pipeline.author") / "page"
    style, script = ((parts / name).read_text("utf-8") for name in ("review.css", "review.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string((parts / "review.html").read_text("utf-8")).render(
        task=task.name,
        count=len(data["samples"]),
        definition=_definition(task),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        # Without "<" it stays what it is inside the page.
        data=Markup(json.dumps(data).replace("<", "\\u003c")),
    )
    path = folder / f"{task.name}.html"
    replace(path, page)
    return path


def _definition(task: Task) -> list[tuple[str, list[str]]]:
    rows = [
        ("Instruction", list(task.instructions)),
        ("Input", [task.input]),
        ("Output", [task.output]),
        ("Options", [task.options.words if task.options else ""]),
        ("Source", [task.citation]),
        ("Licence", [task.licence]),
        ("Author", [task.author]),
    ]
    return [(name, lines) for name, lines in rows if any(lines)]


def _sample(item: Instance) -> dict[str, Any]:
    picture = images.decode(item.record.read().data)
    small = max(picture.size) <= _SMALL
    picture.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=90)
    kind = "png" if small else "jpeg"
    return {
        "id": item.key,
        "prompt": item.prompt,
        "answer": item.answer,
        "picture": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "small": small,
    }


def _hash(text: str) -> str:
    """As a Content-Security-Policy has it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
