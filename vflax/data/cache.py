"""Files that keep what was found out about a dataset, beside it or, where it is read-only, elsewhere."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_Value = TypeVar("_Value")

# What readers of JSON and of NumPy's files raise for one that is not there, cut short or of another form.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


def folders(dataset: str | os.PathLike[str], fallback: str | os.PathLike[str] | None) -> list[Path]:
    """Where to look, in this order: DATASET/preflight, then the folder that is used when that is read-only."""
    return [Path(os.fspath(dataset)) / "preflight", *([Path(fallback)] if fallback is not None else [])]


def load(places: Sequence[Path], name: str, read: Callable[[Path], _Value | None]) -> _Value | None:
    """What `read` makes of the first file of this name that is whole; None where there is none.

    A damaged file is passed over, so that what it held is made again. So is one of which `read` returns None.
    """
    for place in places:
        try:
            value = read(place / name)
        except _UNREADABLE:
            continue
        if value is not None:
            return value
    return None


def keep(places: Sequence[Path], name: str, write: Callable[[Path], object]) -> None:
    """Write a file into the first of the folders that takes it; it appears when it is whole.

    Where none does, a line on stderr says so and why: the same work will be done again at the next start.
    """
    refused = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place, prefix=".tmp-") as temporary:
                write(Path(temporary) / name)
                os.replace(Path(temporary) / name, place / name)
            return
        except OSError as error:
            refused.append(f"{place} ({error.strerror or error})")
    if refused:
        print(
            f"warning: what was found out about the data cannot be kept in {' or '.join(refused)}, and will be found "
            "out anew at the next start",
            file=sys.stderr,
        )
