"""How results are told, in JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vflax.whole_file import replace


def save_json(path: Path, value: Any) -> None:
    """Indented."""
    replace(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; whatever a cell holds, it stays one cell of one line."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |\n"

    return row(head) + "|---" * len(head) + "|\n" + "".join(map(row, rows))


def number(value: float | None, *, percent: bool = False) -> str:
    """As a table has it: a share in percent, others to two places; "-" for none."""
    if value is None:
        return "-"
    return f"{_rounded(100 * value, 1)} %" if percent else _rounded(value, 2)


def with_interval(cell: Mapping[str, Any], *, percent: bool = False) -> str:
    """Of a Measured as JSON: "63.3 % (51.0 to 74.1)"."""
    told = number(cell["value"], percent=percent)
    if cell["value"] is None or cell["low"] is None:
        return told
    low, high = (_rounded(100 * cell[end] if percent else cell[end], 1) for end in ("low", "high"))
    return f"{told} ({low} to {high})"


def _rounded(value: float, places: int) -> str:
    """Never "-0.0"."""
    return f"{round(value, places) + 0.0:.{places}f}"
