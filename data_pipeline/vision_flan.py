"""Reads annotation files of the LLaVA family: one JSON array of samples.

    vision_flan   {"id", "image", "task_name", "conversations": [{"from": "human"|"gpt", "value"}, ...]}
                  (the releases annotation_191-task_1k.json and vision_flan.json)
    llava         the same without task_name (blip_laion_cc_sbu_558k.json, llava_instruct_150k.json, ...): the
                  task is the file's stem

"image" may be absent (text only), a path relative to the image folder, or a list of such paths.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.records import Problem, RawSample
from vflax.errors import UserError

# format -> the keys that each sample must have
FORMATS = {"vision_flan": ("id", "task_name", "conversations"), "llava": ("id", "conversations")}


def read_annotations(path: Path, format: str) -> tuple[list[RawSample], list[Problem]]:
    """The samples of an annotation file and the entries that are none.

    Raises:
        UserError: unknown format, no such file, not JSON, not a list, or a key that no entry has.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--format={format}: expected one of {', '.join(FORMATS)}{hint}")
    entries = _read_json(path)
    _check_keys(path, format, entries)
    samples: list[RawSample] = []
    problems: list[Problem] = []
    for number, entry in enumerate(entries):
        read = _read_entry(number, entry, format, path.stem)
        if isinstance(read, RawSample):
            samples.append(read)
        else:
            problems.append(read)
    return samples, problems


def _read_json(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(
            f"--annotations={path}: there is no such file. Expected the release's annotation JSON, "
            "e.g. annotation_191-task_1k.json"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = " It reads like JSON lines; expected one JSON array." if error.msg == "Extra data" else ""
        raise UserError(
            f"{path}: not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}.{hint} "
            "An interrupted download ends like this too: compare the file's size with the release's."
        ) from error
    if not isinstance(value, list) or not value:
        what = (
            f"an object with the keys {', '.join(list(value)[:6])}"
            if isinstance(value, dict)
            else repr(value)[:40]
        )
        raise UserError(f"{path}: expected a JSON array of samples, found {what}")
    return value


def _check_keys(path: Path, format: str, entries: list[Any]) -> None:
    """A key that no entry at all has means another format, not broken samples."""
    found = Counter(key for entry in entries if isinstance(entry, dict) for key in entry)
    missing = [key for key in FORMATS[format] if not found[key]]
    if missing:
        keys = ", ".join(key for key, _ in found.most_common(12)) or "none"
        other = [name for name, needed in FORMATS.items() if all(found[key] for key in needed)]
        remedy = f"Try --format={other[0]}." if other else "Convert the file to that form first."
        raise UserError(
            f"{path}: no sample has the key {', '.join(map(repr, missing))}, which --format={format} needs; "
            f"keys found: {keys}. {remedy}"
        )


def _read_entry(number: int, entry: Any, format: str, stem: str) -> RawSample | Problem:
    if not isinstance(entry, dict):
        return Problem(number, "", "", "", "broken_record", f"expected an object, found {repr(entry)[:60]}")
    entry = _clean(entry)
    task = entry.get("task_name", stem if format == "llava" else None)
    images = entry.get("image")
    files = [] if images is None else [images] if isinstance(images, str) else images
    wrong = []
    if not isinstance(entry.get("id"), str | int) or entry["id"] == "":
        wrong.append("id: expected a text or a number")
    if not isinstance(task, str) or not task:
        wrong.append("task_name: expected a text")
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        wrong.append("image: expected a path or a list of paths")
    if wrong:
        return Problem(
            number, str(entry.get("id", "")), str(task or ""), "", "broken_record", "; ".join(wrong)
        )
    return RawSample(number, str(entry["id"]), str(task), tuple(files), entry.get("conversations"))


def _clean(value: Any) -> Any:
    """Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value
