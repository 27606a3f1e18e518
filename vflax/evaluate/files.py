"""Files that benchmarks and other people's tools wrote, read whole: JSON, JSON lines, tables.

Everything in a table is text, as it stands there: "None", "NA" and an empty cell are three things. What cannot be read
is told with file, line and key.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vflax.errors import UserError
from vflax.small_files import parse_object, read_text

Row = dict[str, Any]
K = TypeVar("K", bound=Hashable)

_SEPARATORS = {".tsv": "\t", ".csv": ","}
TABLES = (*_SEPARATORS, ".xlsx")


def json_value(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: naming the file, where it is missing or no JSON.
    """
    return _parsed(path, None)


def json_object(path: Path) -> dict[str, Any]:
    """The one object of a JSON file.

    Raises:
        UserError: naming the file, where it is missing, no JSON, something else or empty, or names something twice.
    """
    found = _parsed(path, unique(path))
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: expected a JSON object with something in it; fetch it again")
    return found


def _parsed(path: Path, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None) -> Any:
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except UserError:  # of the hook
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again") from None


def unique(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For json's object_pairs_hook, which would let the last of several win: refuses a name that is there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path}: {twice} is there twice; two runs in one file? Keep one of them")
        return found

    return once


def json_lines(path: Path) -> list[Row]:
    """The objects of a file with one in each line, or of a JSON list.

    Raises:
        UserError: naming file and line, where it is missing, empty, or a line is no JSON object.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        found = json_value(path)
        if not all(isinstance(row, dict) for row in found):
            raise UserError(f"{path}: expected a list of JSON objects; fetch it again")
    else:
        # Not splitlines: U+2028 and its like may stand in a string, and end no line of the file.
        lines = enumerate(text.split("\n"), 1)
        found = [parse_object(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    if not found:
        raise UserError(f"{path}: empty; expected one JSON object in each line")
    return found


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a .tsv, .csv or .xlsx file under the names of its first row; or the objects of a .json file, which
    tools write in place of such.

    Raises:
        UserError: naming file and row, where it is missing, empty, damaged, of another kind, or a row has other columns
            than the first.
    """
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        objects = json_lines(path)
        for number, own in enumerate(objects, 1):
            if set(own) != set(objects[0]):
                raise UserError(
                    f"{path}, row {number}: it has {', '.join(own)}, but the first row {', '.join(objects[0])}; two "
                    "files in one? Keep one of them"
                )
        return [{name: as_text(cell) for name, cell in own.items()} for own in objects]
    if suffix == ".xlsx":
        rows = _sheet(path)
    elif suffix in _SEPARATORS:
        csv.field_size_limit(2**31 - 1)  # pictures are in some
        reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=_SEPARATORS[suffix])
        try:
            rows = [row for row in reader if row]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; fetch it again") from None
    else:
        raise UserError(f"{path}: expected a table: {', '.join(TABLES)} or .json")
    if len(rows) < 2:
        raise UserError(f"{path}: empty; expected a row of names and one for each question")
    names = rows[0]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: {', '.join(twice)} is there twice in its first row; rename or remove one")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise UserError(
                f"{path}, row {number}: {len(row)} columns, the first row names {len(names)}; cut off or edited? "
                "Fetch it again"
            )
    return [dict(zip(names, row, strict=True)) for row in rows[1:]]


def _sheet(path: Path) -> list[list[str]]:
    """The first sheet of a workbook, cells as text; rows without any are left out."""
    import openpyxl

    try:
        sheet = openpyxl.load_workbook(path, read_only=True).worksheets[0]
        sheet.reset_dimensions()  # some tools note another size than the sheet has, and cells beyond it would be lost
        rows = [[as_text(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    # A damaged archive, or one without what a workbook has: openpyxl raises what its parsers do.
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, IndexError, SyntaxError, TypeError) as error:
        raise UserError(f"{path}: not readable as a workbook ({error}); fetch it again") from None
    rows = [row for row in rows if any(row)]
    width = max(map(len, rows), default=0)
    return [row + [""] * (width - len(row)) for row in rows]


def as_text(cell: Any) -> str:
    """A cell or an id, which may have a type; of nothing "". A whole number is written as one: where others of a column
    are missing, tools write 1 as 1.0."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def keyed(rows: Iterable[Row], key: Callable[[Row], K], path: Path) -> dict[K, Row]:
    """{key(row): row}.

    Raises:
        UserError: naming file and key, where two rows have the same.
    """
    found: dict[K, Row] = {}
    for row in rows:
        own = key(row)
        if own in found:
            raise UserError(
                f"{path}: {own} is there twice; answers of two runs in one file? Keep one of them"
            )
        found[own] = row
    return found


def need(row: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Refuse a row that lacks one of `keys`.

    Raises:
        UserError: naming place and keys.
    """
    missing = [key for key in keys if key not in row]
    if missing:
        raise UserError(f"{where}: lacks {', '.join(missing)}; it has {', '.join(row) or 'nothing'}")


def digest(paths: Iterable[Path]) -> str:
    """One sha256 of several files: of their names and contents, whatever their order."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
