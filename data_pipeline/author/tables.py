"""Records from a table: CSV, TSV, JSON, JSON lines or Parquet, with a column of pictures."""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import pyarrow
from etils import epath
from pyarrow import parquet

from data_pipeline.author.sources import Listing, Picture, Place, Record, Source, below, checked
from data_pipeline.releases import json_stream
from data_pipeline.releases.json_stream import BadLine
from vflax.errors import UserError
from vflax.images import ImageError

_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

Row = dict[str, Any]
"""Columns of a row; that of the picture holds a path, or a function that gives its bytes."""


def table(*files: str, image: str, folder: str = ".", key: str = "") -> Source:
    """Rows of tables, each with a picture.

    Args:
        files: .csv, .tsv, .json (an array, or lines), .jsonl or .parquet, one after the other.
        image: the column of the pictures: paths, or in Parquet bytes, or the Hub's {bytes, path}.
        folder: the folder or zip that paths start from.
        key: the column that tells rows apart; "": the place, 00042.

    Fields: all columns but that of the pictures.
    """
    if not files:
        raise UserError(f"table(): expected files, {' '.join(_SUFFIXES)}")
    for file in files:
        if PurePosixPath(file).suffix.lower() not in _SUFFIXES:
            raise UserError(f"table({file!r}): expected one of {' '.join(_SUFFIXES)}")

    def load(data: Path | None) -> Listing:
        records: list[Record] = []
        place = functools.cache(
            lambda: Place(below(data, folder))
        )  # of files without paths there may be none
        for file in files:
            path = below(data, file)
            read = _READERS[path.suffix.lower()]
            for number, row in enumerate(read(path, image), start=1):
                if lacks := [name for name in (image, key) if name and name not in row]:
                    raise UserError(
                        f"{path}, row {number}: no column {lacks[0]!r}; it has {', '.join(map(str, row))}"
                    )
                name = str(row[key]) if key else f"{len(records):05d}"
                records.append(_record(name, row, image, place))
        return Listing(checked(records, ", ".join(files)))

    return Source(f"table({', '.join(map(repr, files))}, image={image!r})", load)


def _record(key: str, row: Row, image: str, place: Callable[[], Place]) -> Record:
    fields = {name: value for name, value in row.items() if name != image}
    found = row[image]
    if callable(found):
        return Record(key, key, fields, partial(_picture, found))
    if not isinstance(found, str) or not found:
        return Record(key, key, fields, partial(_none, found))
    name = PurePosixPath(found).as_posix()
    return Record(key, name, fields, partial(place().read, name))


def _picture(read: Callable[[], bytes]) -> Picture:
    data = read()
    return Picture(data, hashlib.sha256(data).hexdigest())


def _none(found: Any) -> NoReturn:
    raise ImageError(f"the row's picture is {found!r:.40}, expected a path")


# ---------------------------------------------------------------------------------------------------------
# Files


def _separated(path: Path, image: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in rows:
                if None in row:
                    raise UserError(f"{path}, line {rows.line_num}: more cells than the first row has names")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {rows.line_num + 1}: {error}; save it as CSV in UTF-8") from None


def _json(path: Path, image: str) -> Iterator[Row]:
    there = epath.Path(path)
    layout = json_stream.find_layout(there)
    if layout == "object":
        raise UserError(f"{path}: expected an array of objects, or one a line; found one object")
    for number, row in enumerate(json_stream.read_rows(there, layout), start=1):
        if isinstance(row, BadLine):
            raise UserError(f"{path}, line {row.line}: not JSON ({row.detail})")
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object, found {row!r:.60}")
        yield row


def _parquet(path: Path, image: str) -> Iterator[Row]:
    """The pictures stay in the file; the row group that one lies in is read when it is asked for, and the last kept."""
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({error}); fetch it again") from None
    names = file.schema_arrow.names
    if image not in names:
        raise UserError(f"{path}: no column {image!r}; it has {', '.join(names)}")
    kind = file.schema_arrow.field(image).type

    @functools.lru_cache(maxsize=1)
    def group(number: int) -> pyarrow.ChunkedArray:
        return file.read_row_group(number, columns=[image]).column(0)

    def data(number: int, row: int) -> bytes:
        value = group(number)[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ImageError("the row has no bytes of a picture")
        return value

    others = [name for name in names if name != image]
    for number in range(file.num_row_groups):
        texts = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        columns = [*others, image] if texts else others
        rows = file.read_row_group(number, columns=columns).to_pylist()
        count = file.metadata.row_group(number).num_rows
        for row in range(count):
            fields = rows[row] if rows else {}
            yield fields if texts else {**fields, image: partial(data, number, row)}


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".csv": _separated,
    ".tsv": _separated,
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}
