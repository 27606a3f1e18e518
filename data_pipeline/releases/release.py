"""Opens a release: which format it is, whether the file can be that, and its rows."""

from __future__ import annotations

import difflib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from etils import epath

from data_pipeline.records import Problem, RawSample
from data_pipeline.releases import json_stream, llava, scienceqa
from data_pipeline.releases.json_stream import BadLine, Layout
from data_pipeline.remote import reaching
from vflax.errors import UserError

FORMATS = {
    "auto": "found out from the first records",
    "vision_flan": "annotation_191-task_1k.json, vision_flan.json; the site's earlier schema",
    "llava": "LLaVA-Instruct, mix665k and other files of that form",
    "llava_plain": "pictures with captions: blip_laion_cc_sbu_558k.json, CC3M's chat.json, metadata.json",
    "scienceqa": "problems.json with pid_splits.json beside it",
}

# What is looked at before anything is read in earnest: a key that none of so many records has, the format has not.
PEEK = 1000


@dataclass(frozen=True)
class Option:
    """An option of open_release, as a command line shows it."""

    flag: str
    formats: tuple[str, ...]  # that have it
    choices: tuple[str, ...]
    default: str
    help: str


OPTIONS = {
    "task_from": Option(
        "--task_from",
        ("llava", "llava_plain"),
        ("file", "image_folder"),
        "file",
        "task of a sample: the file's name, or the first folder of its image path (coco, gqa, ...; else text)",
    ),
    "style": Option(
        "--style",
        ("scienceqa",),
        scienceqa.STYLES,
        "QCM-LEA",
        "order of question, context and choices, then of lecture, explanation and answer",
    ),
    "split": Option(
        "--source_split",
        ("scienceqa",),
        scienceqa.SPLITS,
        "train",
        "which problems, by pid_splits.json",
    ),
}

# format -> the sets of keys of which a record must have one in full
_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "vision_flan": llava.VISION_FLAN_KEYS,
    "llava": llava.LLAVA_KEYS,
    "llava_plain": llava.PLAIN_KEYS,
    "scienceqa": (("question", "choices", "answer"),),
}


class Release:
    """The rows of a release; to be gone through as often as wanted, each time from the file.

    format: the resolved one, never "auto".
    files: what is read, for hashing.
    name: stem of the annotation file: the task of the llava formats.

    Iterating gives, in the file's order, a RawSample or a Problem ("broken_record", in llava_plain also
    "not_a_caption") for each row, numbered from 0. Nothing is kept of a row; an id may come again.

    Raises, while iterating:
        UserError: the file turns out not to be JSON, or ends too early, after PEEK records.
        Unreachable: the bucket does not answer.
    """

    def __init__(
        self,
        format: str,
        files: list[epath.Path],
        name: str,
        read: Callable[[], Iterator[RawSample | Problem]],
    ) -> None:
        self.format, self.files, self.name, self._read = format, files, name, read

    def __iter__(self) -> Iterator[RawSample | Problem]:
        with reaching(self.files[0]):
            yield from self._read()


def open_release(annotations: str | os.PathLike[str], format: str, **options: str | None) -> Release:
    """Open an annotation file, local or gs://.

    Args:
        annotations: the JSON file.
        format: one of FORMATS.
        options: see OPTIONS; None means the default.

    Raises:
        UserError: an unknown format or option, one that the format has not, no such file, not JSON, no records, or
            a key that the format needs and none of the first PEEK records has.
    """
    path = epath.Path(annotations)
    _check_format(format)
    if not path.is_file():
        raise UserError(
            f"--annotations={path}: there is no such file. Expected the release's annotation JSON, "
            "e.g. annotation_191-task_1k.json"
        )
    layout = json_stream.find_layout(path)
    keys = _count_keys(path, layout)
    format = _recognise(path, layout, keys) if format == "auto" else format
    _check_keys(path, layout, format, keys)
    chosen = _check_options(path, format, options)
    if format == "scienceqa":
        splits = scienceqa.splits_file(path)
        pids = scienceqa.read_split(splits, chosen["split"])
        read = functools.partial(scienceqa.read, path, pids, chosen["style"], chosen["split"])
        return Release(format, [path, splits], path.stem, read)
    record = llava.reader(format, path.stem, **chosen)
    return Release(format, [path], path.stem, functools.partial(_read, path, layout, record))


def _read(
    path: epath.Path, layout: Layout, record: Callable[[int, Any], RawSample | Problem]
) -> Iterator[RawSample | Problem]:
    for number, row in enumerate(json_stream.read_rows(path, layout)):
        if isinstance(row, BadLine):
            yield Problem(number, "", "", "", "broken_record", f"line {row.line} is not JSON: {row.detail}")
        else:
            yield record(number, row)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--format={format}: expected one of {', '.join(FORMATS)}{hint}")


def _check_options(path: epath.Path, format: str, options: Mapping[str, str | None]) -> dict[str, str]:
    """The options of the format, with their defaults."""
    for key, value in options.items():
        if key not in OPTIONS:
            raise UserError(f"{key}={value}: expected one of the options {', '.join(OPTIONS)}")
        option = OPTIONS[key]
        if value is None:
            continue
        if format not in option.formats:
            raise UserError(
                f"{option.flag}={value}: only --format={' and '.join(option.formats)} has it, and {path} is "
                f"read as {format}"
            )
        if value not in option.choices:
            near = difflib.get_close_matches(value, option.choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{option.flag}={value}: expected one of {', '.join(option.choices)}{hint}")
    return {
        key: options.get(key) or option.default for key, option in OPTIONS.items() if format in option.formats
    }


# ---------------------------------------------------------------------------------------------------------
# Looking at the first records


def _count_keys(path: epath.Path, layout: Layout) -> Counter[str]:
    """In how many of the first records each key is.

    Raises:
        UserError: there is no record, or no JSON.
    """
    rows: Iterator[Any]
    if layout == "object":
        rows = _members(path)
    else:
        rows = json_stream.read_rows(path, layout)
    found: Counter[str] = Counter()
    number = 0
    for row in islice(rows, PEEK):
        number += 1
        if isinstance(row, dict):
            found.update(row.keys())
    if not number:
        raise UserError(f"{path}: expected a JSON array of samples, found an empty one")
    return found


def _members(path: epath.Path) -> Iterator[Any]:
    """The problems of a problems.json, of some kilobytes each. A long value is a list of samples inside an object."""
    try:
        for _, value in json_stream.read_members(path, max_row=1 << 20):
            yield value
    except json_stream.LongRowError:
        _refuse_object(path)


def _missing(format: str, layout: Layout, keys: Mapping[str, int], least: float = 1) -> list[str]:
    """The keys that the format needs and fewer than `least` records have; those of the nearest way to write it."""
    if (format == "scienceqa") != (layout == "object"):
        return list(_NEEDS[format][0])
    lacking = ([key for key in needed if keys.get(key, 0) < least] for needed in _NEEDS[format])
    return min(lacking, key=len)


def _recognise(path: epath.Path, layout: Layout, keys: Counter[str]) -> str:
    """The first format, the more particular ones before the others, whose keys most records have; else any have."""
    for least in (max(keys.values(), default=0) / 2, 1):
        missing = {format: _missing(format, layout, keys, least) for format in _NEEDS}
        for format, lacks in missing.items():
            if not lacks:
                return format
    if layout == "object":
        _refuse_object(path)
    missing = {format: [key for key in needed[0] if key not in keys] for format, needed in _NEEDS.items()}
    near = min(missing, key=lambda format: len(missing[format]))
    known = "; ".join(f"{format} has {', '.join(needed[0])}" for format, needed in _NEEDS.items())
    raise UserError(
        f"{path}: --format=auto does not know this format; keys found: {_shown(keys)}. {known}. The nearest is "
        f"{near}, but no sample has the key {', '.join(map(repr, missing[near]))}. "
        "Convert the file to that form first."
    )


def _check_keys(path: epath.Path, layout: Layout, format: str, keys: Counter[str]) -> None:
    """A key that no record at all has means another format, not broken samples."""
    missing = _missing(format, layout, keys)
    if not missing:
        return
    other = [name for name in _NEEDS if not _missing(name, layout, keys)]
    remedy = f"Try --format={other[0]}." if other else "Convert the file to that form first."
    if format == "scienceqa" and layout != "object":
        raise UserError(
            f"{path}: expected ScienceQA's problems.json, an object of problems by their pid; found a list with "
            f"the keys {_shown(keys)}. {remedy}"
        )
    if layout == "object" and not other:
        _refuse_object(path)
    raise UserError(
        f"{path}: no sample has the key {', '.join(map(repr, missing))}, which --format={format} needs; "
        f"keys found: {_shown(keys)}. {remedy}"
    )


def _shown(keys: Counter[str]) -> str:
    return ", ".join(key for key, _ in keys.most_common(12)) or "none"


def _refuse_object(path: epath.Path) -> NoReturn:
    keys = ", ".join(json_stream.first_keys(path)) or "no keys"
    raise UserError(
        f"{path}: expected a JSON array of samples, found an object with the keys {keys}. "
        "A list inside it must be taken out first"
    )
