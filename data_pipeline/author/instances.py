"""A task and its source -> instances: what is asked, what is answered, about which picture.

All draws are a pure function of the task's seed and name and of the record's key: other records, or their order,
change nothing but which labels there are.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data_pipeline.author.sources import Listing, Picture, Record, Source, picture_suffixes
from data_pipeline.author.task import Task, fields_of, told
from vflax import images
from vflax.conversation import IMAGE_MARKER
from vflax.errors import UserError


@dataclass(frozen=True)
class Instance:
    """prompt: all of it but the picture's place; asked: the fields' values in it; options: those that it offers.
    right: the answer without its letter; answer: with it. front: whether the picture comes before the prompt."""

    key: str
    record: Record
    prompt: str
    asked: tuple[str, ...]
    options: tuple[str, ...]
    right: str
    answer: str
    front: bool

    @property
    def human(self) -> str:
        return f"{IMAGE_MARKER}\n{self.prompt}" if self.front else f"{self.prompt}\n{IMAGE_MARKER}"


@dataclass
class Fault:
    """What is wrong, and at which records. kind: one word for counting; detail: one line for a person; others: the
    records that those at `keys` are like, or the files that they name and that cannot be opened."""

    kind: str
    detail: str
    keys: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@dataclass
class Built:
    """What became of a task.

    records: of the source; filtered: of these, what `where` does not take. labels: all answers, sorted. instances: in
    the source's order. faults: of these, and why records became none.
    """

    task: Task
    records: int
    filtered: int
    passed_over: int
    labels: list[str]
    instances: list[Instance]
    faults: list[Fault]


class Loader:
    """Lists a source once, however many tasks have it, and looks at each of its pictures once."""

    def __init__(self, data: Path | None) -> None:
        self._data = data
        self._listings: dict[int, tuple[Source, Listing]] = {}
        self._seen: dict[int, tuple[Record, Seen]] = {}

    def listing(self, source: Source) -> Listing:
        """
        Raises:
            UserError: it cannot be read.
        """
        if id(source) not in self._listings:
            self._listings[id(source)] = source, source.load(self._data)
        return self._listings[id(source)][1]

    def see(self, record: Record) -> Seen:
        """What its picture is."""
        if id(record) not in self._seen:
            self._seen[id(record)] = record, _see(record)
        return self._seen[id(record)][1]


@dataclass(frozen=True)
class Seen:
    """A picture that was decoded to its last byte. problem: why it could not be; "" where it could.

    file: its name in a release. digest: see sources.Picture. size: in pixels. place: the file that cannot be opened.
    """

    file: str
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    problem: str = ""
    place: str = ""


def _see(record: Record) -> Seen:
    try:
        picture = record.read()
        size = images.load(picture.data).size
    except images.ImageError as error:
        return Seen(record.file, problem=error.reason)
    except OSError as error:
        return Seen(record.file, problem=error.strerror or str(error), place=str(error.filename or ""))
    return Seen(record.file + _suffix(record.file, picture), picture.digest, size)


def _suffix(file: str, picture: Picture) -> str:
    """What a name lacks: ".jpg"; nothing where it has a suffix of pictures."""
    if PurePosixPath(file).suffix.lower() in picture_suffixes():
        return ""
    with Image.open(io.BytesIO(picture.data)) as image:
        kind = (image.format or "").lower()
    return f".{'jpg' if kind == 'jpeg' else kind}"


# ---------------------------------------------------------------------------------------------------------
# Building


def build(task: Task, loader: Loader) -> Built:
    """The instances of a task. What is wrong with single records is a fault.

    Raises:
        UserError: the source cannot be read, or records lack a field that a template names.
    """
    listing = loader.listing(task.source)
    faults = _Faults()
    records = _kept(task, listing.records, faults)
    rows, filtered = [], 0
    for record in records:
        fields, wanted = _fields(task, record, faults)
        filtered += not wanted
        if fields is not None and wanted and (row := _row(task, record, fields, faults)) is not None:
            rows.append(row)
    labels = sorted({row.right for row in rows}, key=_by_size)
    chosen = _chosen(task, rows)
    instances = [item for row in chosen if (item := _instance(task, row, labels, faults)) is not None]
    return Built(task, len(listing.records), filtered, listing.passed_over, labels, instances, faults.found)


class _Faults:
    """Collects records by what is wrong with them."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Fault] = {}

    @property
    def found(self) -> list[Fault]:
        return list(self._found.values())

    def add(self, kind: str, detail: str, *keys: str) -> None:
        self._found.setdefault((kind, detail), Fault(kind, detail)).keys.extend(keys)


@dataclass(frozen=True)
class _Row:
    """A record with its answer."""

    record: Record
    fields: dict[str, Any]
    right: str


def _kept(task: Task, records: Sequence[Record], faults: _Faults) -> list[Record]:
    left_out = set(task.leave_out)
    if unknown := sorted(left_out - {record.key for record in records}):
        faults.add("leave_out", "no record of the source has this key", *unknown)
    return [record for record in records if record.key not in left_out]


def _fields(task: Task, record: Record, faults: _Faults) -> tuple[dict[str, Any] | None, bool]:
    """(the record's fields and those that are computed, None where that fails; whether `where` takes it)."""
    fields, at = dict(record.fields), ""
    try:
        for name, function in task.fields.items():
            at = f"fields[{name!r}]"
            fields[name] = function(dict(fields))
        at = "where"
        return fields, task.where is None or bool(task.where(dict(fields)))
    # Whatever a person's function raises.
    except Exception as error:
        faults.add("function_failed", f"{at}: {told(error)}", record.key)
        return None, True


def _row(task: Task, record: Record, fields: dict[str, Any], faults: _Faults) -> _Row | None:
    _check_fields(task, fields)
    right = _render(task.output, fields, "output", record.key, faults)
    if right is None:
        return None
    if not right:
        faults.add("empty_answer", "the answer has no text", record.key)
        return None
    return _Row(record, fields, right)


def _check_fields(task: Task, fields: dict[str, Any]) -> None:
    templates = {"output": task.output, "input": task.input}
    templates |= {f"instructions[{i}]": text for i, text in enumerate(task.instructions)}
    missing = {name: where for where, text in templates.items() for name in fields_of(text) - fields.keys()}
    if task.options and task.options.field and task.options.field not in fields:
        missing[task.options.field] = "options"
    if missing:
        named = ", ".join(f"{{{name}}} of {where}" for name, where in missing.items())
        raise UserError(
            f"task {task.name}: records have no field {named}; they have {', '.join(fields) or 'none'}"
        )


def _render(template: str, fields: dict[str, Any], where: str, key: str, faults: _Faults) -> str | None:
    """The text; None where a value has none."""
    named = {name: fields[name] for name in fields_of(template)}
    if absent := sorted(name for name, value in named.items() if value is None):
        faults.add("empty_field", f"{where}: {{{absent[0]}}} has no value", key)
        return None
    try:
        text = template.format(**named).strip()
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        faults.add("template_failed", f"{where}: {error}", key)
        return None
    if IMAGE_MARKER in text:
        faults.add(
            "image_marker",
            f"{where}: {IMAGE_MARKER} is written there; the picture's place is not the template's",
            key,
        )
        return None
    return text


def _chosen(task: Task, rows: list[_Row]) -> list[_Row]:
    if len(rows) <= task.max_instances:
        return rows
    first = sorted(range(len(rows)), key=lambda i: ordering(task.seed, rows[i].record.key))
    return [rows[i] for i in sorted(first[: task.max_instances])]


def ordering(seed: int, *names: str) -> str:
    """By this things are put in an order that is a matter of chance, and the same for the same seed and name."""
    return hashlib.sha256("/".join((str(seed), *names)).encode()).hexdigest()


def _instance(task: Task, row: _Row, labels: Sequence[str], faults: _Faults) -> Instance | None:
    key, draw = row.record.key, random.Random(f"{task.seed}/{task.name}/{row.record.key}")
    template = draw.choice(list(task.instructions))
    front = draw.random() < 0.5
    instruction = _render(template, row.fields, "instructions", key, faults)
    given = _render(task.input, row.fields, "input", key, faults)
    if instruction is None or given is None:
        return None
    asked = tuple(str(row.fields[name]) for name in sorted(fields_of(template) | fields_of(task.input)))
    parts = [instruction, *([f"\n{given}"] if given else [])]
    options: tuple[str, ...] = ()
    answer = row.right
    if task.options is not None:
        try:
            options, answer = task.options.offer(row.right, labels, row.fields, draw)
        except UserError as error:
            faults.add("options", str(error), key)
            return None
        parts.append(task.options.line(options))
    return Instance(key, row.record, "\n".join(parts), asked, options, row.right, answer, front)


def _by_size(label: str) -> tuple[int, float, str]:
    """Numbers by size and before all else."""
    is_number = label.removeprefix("-").replace(".", "", 1).isdecimal()
    return (0, float(label), label) if is_number else (1, 0.0, label)
