"""VLMEvalKit's tables of multiple choices: a model's predictions, and the same rows again with what it made of them.

A folder of a model has those of many benchmarks, in .xlsx, .tsv or .json.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from vflax.errors import UserError
from vflax.evaluate.files import TABLES, need, table
from vflax.evaluate.question import Picture

SUFFIXES = (*TABLES, ".json")
# "nan" is what an empty cell becomes where pandas is asked for text.
EMPTY = ("", "nan")

_SCORES = re.compile(r"_(acc|acc_all|score)\.\w+$")
_RESULTS = re.compile(r"_result\.\w+$|_vanilla|_EM\.")
_HITS = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}


def tables_in(folder: Path, benchmark: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """A benchmark's files in a folder, those of another name where none has its; where there are predictions, not what
    VLMEvalKit computed from them."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not _SCORES.search(p.name))
    files = [p for p in files if benchmark in p.name.lower()] or files
    return [p for p in files if not _RESULTS.search(p.name)] or files


def only(path: Path, benchmark: str, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file itself, or a folder's only one.

    Raises:
        UserError: the folder has none, or several.
    """
    if not path.is_dir():
        return path
    files = tables_in(path, benchmark, suffixes)
    if len(files) != 1:
        raise UserError(
            f"{path}: expected one file of {benchmark} ({', '.join(suffixes)}) there, found "
            f"{', '.join(p.name for p in files) or 'none'}; name the file"
        )
    return files[0]


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows under VLMEvalKit's names, all in small letters but those of options.

    Raises:
        UserError: naming the file, where it is damaged or lacks one of `columns`.
    """
    found = [
        {name if name in ascii_uppercase else name.lower(): cell for name, cell in row.items()}
        for row in table(path)
    ]
    need(found[0], columns, str(path))
    return found


def options_of(row: dict[str, str]) -> dict[str, str]:
    """{letter: text} of all cells that are not empty; "None" is text as any other."""
    return {letter: row[letter] for letter in ascii_uppercase if row.get(letter, "") not in EMPTY}


def hit_of(row: dict[str, str], where: str) -> float | None:
    """What VLMEvalKit found, with a judge's help or without: 1 right, 0 wrong; None: the file does not say.

    Raises:
        UserError: it is something else.
    """
    if "hit" not in row:
        return None
    found = _HITS.get(row["hit"].lower())
    if found is None:
        raise UserError(f"{where}: hit is {row['hit']!r}, expected 0 or 1; evaluate it again")
    return found


def picture(name: str, code: str, where: str) -> Picture:
    """Of a cell with base64, decoded when asked for."""

    def read() -> bytes:
        try:
            return base64.b64decode(code)
        except ValueError as error:
            raise UserError(f"{where}: its picture is no base64 ({error}); fetch it again") from None

    return Picture(name, read)
