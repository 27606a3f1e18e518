"""What a task file declares, and how it is read.

A task file is Python; every Task that it binds to a name at its top level is one of its tasks, in their order.
"""

from __future__ import annotations

import functools
import hashlib
import re
import string
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.author.options import Options
from data_pipeline.author.sources import Source
from vflax.errors import UserError, line_of
from vflax.values import COUNT, ID, NAME, TEXT, Kind, wrong

# [VF] of each task at most so many instances were kept.
MAX_INSTANCES = 10_000
_TASK_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\+[A-Za-z0-9][\w.-]*", re.ASCII)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _TASK_NAME.fullmatch(value) is not None


def _are_phrasings(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(text, str) and text.strip() for text in value) and len(set(value)) == len(value)


def _are_functions(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(callable, value.values()))


_FILLED = Kind("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
_KINDS = {
    "name": Kind("DATASET+task, of letters, digits and _ . -", _is_name),
    "source": Kind(
        "a source: idx, pictures, table, tfds_directory or generated", lambda value: isinstance(value, Source)
    ),
    "instructions": Kind("a list of phrasings, at least one, no two alike", _are_phrasings),
    "output": _FILLED,
    "licence": _FILLED,
    "citation": _FILLED,
    "author": _FILLED,
    "input": TEXT,
    "options": Kind(
        "None, all_labels, sampled or of_field", lambda value: value is None or isinstance(value, Options)
    ),
    "fields": Kind("{name: function of the record}", _are_functions),
    "where": Kind("None, or a function of the record", lambda value: value is None or callable(value)),
    "leave_out": NAME.listed(),
    "max_instances": Kind(
        f"a whole number from 1 to {MAX_INSTANCES:,}",
        lambda value: COUNT.holds(value) and value <= MAX_INSTANCES,
    ),
    "seed": ID,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of a dataset. Templates are str.format's over the record's fields: "the {color} bar".

    name: DATASET+task.
    source: where records come from.
    instructions: the definition of the task; of several phrasings each instance gets one by chance.
    output: the answer, a template.
    input: what follows the instruction, a template; often a question that comes with the picture.
    options: what the prompt offers.
    fields: further fields, each a function of the record, a dict; a later one sees those before it.
    where: of the record, fields among it: whether it is used; None: all are.
    leave_out: keys of records that are not used, such as damaged pictures that `check` names.
    max_instances: so many are drawn by the seed where there are more.
    seed: of all draws.
    licence, citation: of the source, as its authors ask for it.
    author: who wrote the task; several are divided by commas. They cannot review it.

    Raises:
        UserError: naming all that is wrong.
    """

    name: str
    source: Source
    instructions: Sequence[str]
    output: str
    licence: str
    citation: str
    author: str
    input: str = ""
    options: Options | None = None
    fields: Mapping[str, Callable[[dict[str, Any]], Any]] = field(default_factory=dict)
    where: Callable[[dict[str, Any]], bool] | None = None
    leave_out: Collection[str] = ()
    max_instances: int = MAX_INSTANCES
    seed: int = 0

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _KINDS} | {"leave_out": list(self.leave_out)}
        found = wrong(values, _KINDS)
        lines = list(found.values())
        templates = {"input": self.input, "output": self.output}
        if "instructions" not in found:
            templates |= {f"instructions[{i}]": text for i, text in enumerate(self.instructions)}
        for key in templates.keys() - found.keys():
            lines += [f"{key}: {problem}" for problem in _template_problems(templates[key])]
        if lines:
            raise UserError(f"task {self.name!r}: " + "; ".join(lines))

    @property
    def dataset(self) -> str:
        return self.name.partition("+")[0]

    @property
    def authors(self) -> set[str]:
        return {same_name(part) for part in self.author.split(",")}


def same_name(name: str) -> str:
    """What names are compared by."""
    return " ".join(name.casefold().split())


@functools.cache
def fields_of(template: str) -> frozenset[str]:
    """The fields that a template names."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)


def _template_problems(template: str) -> list[str]:
    try:
        names = fields_of(template)
    except ValueError as error:
        return [f"{template!r:.60}: not a template ({error}); a brace of the text is written twice"]
    return [
        f"{{{name}}}: expected the name of a field; for more than that, give the task a field that is computed"
        for name in sorted(names)
        if not name.isidentifier()
    ]


# ---------------------------------------------------------------------------------------------------------
# Task files


@dataclass(frozen=True)
class TaskFile:
    """path; tasks, in the file's order; digest: SHA-256 of the file."""

    path: Path
    tasks: tuple[Task, ...]
    digest: str


def load_task_file(path: Path) -> TaskFile:
    """Run a task file.

    Raises:
        UserError: it is not there, fails (naming the line), declares no task, or one name twice.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such task file; python -m data_pipeline.author new writes one")
    source = path.read_bytes()
    module = types.ModuleType(f"vflax_task_file_{path.stem}")
    module.__file__ = str(path)
    try:
        # Not imported: bytecode that is kept goes by the second of a change, and the digest is to be of what is run.
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    # Whatever a person's file raises; where in it is what they need to know.
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}{line_of(error, path)}: {told(error)}") from None
    tasks = tuple(value for value in vars(module).values() if isinstance(value, Task))
    if not tasks:
        raise UserError(f"{path}: it declares no task; bind one to a name: digits = Task(name=...)")
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: declared twice: {', '.join(twice)}; give each task a name of its own")
    return TaskFile(path, tasks, hashlib.sha256(source).hexdigest())


def told(error: BaseException) -> str:
    """A person's own error by its kind, ours by its words."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
