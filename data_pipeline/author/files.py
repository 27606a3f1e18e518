"""Files that the kit writes: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from vflax.errors import UserError

# What its files say they are of.
TOOL = "data_pipeline.author"


def write_text(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part.

    Raises:
        UserError: the disk is full, or the file cannot be written for another reason of the system's.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
