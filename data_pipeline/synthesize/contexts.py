"""What is known of a picture, in place of the picture: captions and boxes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.tokenizer import replace_surrogates
from vflax.values import NAME, Kind, wrong

_SHOWN = 5
_CAPTION = Kind("a sentence", lambda value: isinstance(value, str) and value.strip() != "")
_CORNER = Kind(
    "a number from 0 to 1 (a share of the picture's width or height)",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
)
_KINDS = {
    "id": Kind("a name or a whole number", lambda value: NAME.holds(value) or type(value) is int),
    "image": NAME,
    "captions": Kind(
        "a list of sentences, at least one", lambda value: _CAPTION.listed().holds(value) and len(value) > 0
    ),
    "instances": Kind("a list of objects", lambda value: isinstance(value, list)),
}


@dataclass(frozen=True)
class Instance:
    """A thing in the picture; box: left, top, right, bottom, as shares of the width and the height."""

    category: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Context:
    id: str
    image: str
    captions: tuple[str, ...]
    instances: tuple[Instance, ...]

    def text(self, with_boxes: bool) -> str:
        """Captions one a line; then, with boxes, an empty line and `category: [x1, y1, x2, y2]` one a line."""
        lines = list(self.captions)
        if with_boxes and self.instances:
            lines.append("")
            for thing in self.instances:
                lines.append(f"{thing.category}: [{', '.join(f'{corner:.3f}' for corner in thing.box)}]")
        return "\n".join(lines)


def read_contexts(path: Path) -> list[Context]:
    """Reads JSON lines {id, image, captions: [sentence, ...], instances: [{category, bbox: [x1, y1, x2, y2]}, ...]}.

    Raises:
        UserError: no such file, no line in it, or lines that are not of this form: the first of them, by number. A file
            is refused whole, before anything is paid for.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(
            f"--contexts={path}: there is no such file. Expected JSON lines {{id, image, captions, instances}}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--contexts={path}: cannot be read ({error})") from None
    contexts: list[Context] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        read = _read_line(line)
        if isinstance(read, Context):
            contexts.append(read)
        else:
            problems += [f"line {number}: {problem}" for problem in read]
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise UserError(
            f"{path}: not contexts of pictures:\n  " + "\n  ".join(problems[:_SHOWN] + more) + "\n  correct "
            "these lines or take them out: nothing was sent"
        )
    if not contexts:
        raise UserError(f"{path}: holds no line")
    return contexts


def _read_line(line: str) -> Context | list[str]:
    """The context, or what is wrong."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [f"not JSON ({error})"]
    if not isinstance(value, dict):
        return [f"expected an object {{id, image, captions, instances}}, found {repr(value)[:40]}"]
    problems = [f"{key} is missing" for key in _KINDS if key not in value]
    problems += wrong(value, _KINDS).values()
    if problems:
        return problems
    for number, instance in enumerate(value["instances"]):
        problems += _instance_problems(f"instances[{number}]", instance)
    if problems:
        return problems
    return Context(
        replace_surrogates(str(value["id"])),
        replace_surrogates(value["image"]),
        tuple(" ".join(replace_surrogates(caption).split()) for caption in value["captions"]),
        tuple(
            Instance(" ".join(replace_surrogates(thing["category"]).split()), tuple(thing["bbox"]))
            for thing in value["instances"]
        ),
    )


def _instance_problems(where: str, instance: Any) -> list[str]:
    if not isinstance(instance, dict):
        return [f"{where}: expected an object {{category, bbox}}, found {repr(instance)[:40]}"]
    kinds = {"category": _CAPTION, "bbox": _CORNER.listed(4)}
    problems = [f"{where}.{key} is missing" for key in kinds if key not in instance]
    problems += wrong(instance, kinds, f"{where}.").values()
    if not problems:
        left, top, right, bottom = instance["bbox"]
        if left > right or top > bottom:
            problems.append(
                f"{where}.bbox={instance['bbox']}: expected left <= right and top <= bottom "
                "(not left, top, width, height)"
            )
    return problems
