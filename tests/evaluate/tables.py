"""Tables as VLMEvalKit writes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import openpyxl


def write(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """By the suffix: a workbook, a list of JSON objects, or text with tabs (.tsv) or commas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook(write_only=True)
        sheet = book.create_sheet()
        for row in (names, *rows):
            sheet.append(list(row))
        book.save(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([names, *rows])
    return path
