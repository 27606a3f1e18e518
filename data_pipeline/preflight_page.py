"""preflight.html: the figures of a preflight with pictures, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from vflax import images
from vflax.data.duplicates import LEVELS, Pair
from vflax.data.preflight import Part, Preflight
from vflax.data.source import Sample, Source

_IDS, _EXAMPLES, _PAIRS = 20, 6, 24  # shown of a kind, of a kind with pictures, of a split's copies
_THUMBNAIL, _TEXT = 160, 280  # pixels, characters


def write_page(path: Path, result: dict[str, Any], preflight: Preflight) -> None:
    """Write the page.

    Args:
        path: of the file.
        result: what stands in preflight.json.
        preflight: it is about this; samples are read for their pictures.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_pipeline", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    splits = [
        {
            **facts,
            "bars": _bars(facts["lengths"]),
            "examples": _examples(part),
            "pairs": _pairs(part, preflight.of("training")),
        }
        for facts, part in zip(result["splits"], preflight.parts, strict=True)
    ]
    page = environment.get_template("preflight.html.j2").render(
        result=result, splits=splits, shown_ids=_IDS, levels=LEVELS
    )
    path.write_text(page, "utf-8")


def _bars(lengths: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The histogram as bars: {low, high (inclusive), count, height in percent of the highest}."""
    if lengths is None:
        return []
    edges, counts = lengths["edges"], lengths["counts"]
    return [
        {"low": low, "high": high - 1, "count": count, "height": 100 * count / max(counts)}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def _examples(part: Part) -> dict[str, list[dict[str, Any]]]:
    """{kind of finding: the first few samples, shown}."""
    wanted = {kind: numbers[:_EXAMPLES].tolist() for kind, numbers in part.findings.items()}
    if part.damaged:
        wanted["damaged_image"] = _numbers(part.source, part.damaged[:_EXAMPLES])
    return {kind: [_shown(part.source[number]) for number in numbers] for kind, numbers in wanted.items()}


def _numbers(source: Source, ids: Sequence[str]) -> list[int]:
    """The first sample of each of these ids."""
    found: dict[str, int] = {}
    for number, text in enumerate(source.texts()):
        if text.id in ids:
            found.setdefault(text.id, number)
    return sorted(found.values())


def _pairs(part: Part, training: list[Part]) -> list[dict[str, Any]]:
    """The worst copies, each beside what it is a copy of."""
    pairs: Iterable[Pair] = part.copies.pairs[:_PAIRS] if part.copies else ()
    return [
        {
            "level": pair.level,
            "distance": pair.distance,
            "asked": _shown(part.source[pair.sample], pair.image),
            "trained": _shown(training[pair.source].source[pair.copy], pair.copy_image),
        }
        for pair in pairs
    ]


def _shown(sample: Sample, image: int = 0) -> dict[str, Any]:
    """A sample for the page: id, task, its turns, and one of its images as a data: URL."""
    turns = sample.conversations if isinstance(sample.conversations, list) else [sample.conversations]
    return {
        "id": sample.id,
        "task": sample.task,
        "turns": [_turn(turn) for turn in turns[:2]],
        "more": max(0, len(turns) - 2),
        "images": len(sample.images),
        "thumbnail": _thumbnail(sample.images[image]) if sample.images else None,
    }


def _turn(turn: Any) -> tuple[str, str]:
    """(speaker, text) of a turn, whatever it is."""
    if not isinstance(turn, dict):
        return "?", _short(repr(turn))
    return str(turn.get("from", "?")), _short(str(turn.get("value", "")))


def _short(text: str) -> str:
    # Half a UTF-16 pair cannot be written.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _TEXT else text[:_TEXT] + " …"


def _thumbnail(data: bytes) -> str | None:
    """A small copy as a data: URL; None for what cannot be decoded."""
    try:
        picture = images.decode(data)
    except images.ImageError:
        return None
    if max(picture.size) < _THUMBNAIL:  # a drawing of 64 px, its pixels kept
        factor = _THUMBNAIL // max(picture.size)
        size = picture.width * factor, picture.height * factor
        picture = picture.resize(size, Image.Resampling.NEAREST)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
