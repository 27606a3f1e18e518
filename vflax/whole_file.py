"""Files that are whole: a reader, and whoever comes after a kill, sees the old one or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vflax.errors import UserError


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, and whoever comes after a kill or a power cut, sees the old one or the new one.

    Half of a surrogate pair, where an answer was cut off, is written as JSON has it: \\ud83d.

    Raises:
        UserError: the disk does not take it.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, which keeps its name
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Tells an error of the disk inside as one of `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: cannot be written ({error.strerror or error}); free the disk or name another place, and run "
            "the same command again"
        ) from None
