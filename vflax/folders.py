"""A folder appears under its name when it is whole, or not at all; what a killed process left goes at the next one.
Where the name is a symbolic link, the folder that it points to is replaced, and the link stays.

Imports nothing heavy: the offline side uses it too.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vflax.errors import UserError


class NotWritten(UserError):
    """The system's fault, not the input's: the same may go well later."""


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that is removed in the end. Build in a folder inside it (mkdtemp's own mode of 0700
    would keep others out), then `swap`.

    Raises:
        NotWritten: the disk is full, or `out` cannot be written for another reason of the system's. What was there
            under that name is there still.
    """
    out = Path(os.path.realpath(out))
    root = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        recover(out)
        _remove_abandoned(out)
        root = Path(tempfile.mkdtemp(prefix=f"{_prefix(out)}{os.getpid()}-", dir=out.parent))
        yield root
    except OSError as error:
        recover(out)
        full = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise NotWritten(f"{out}: not written: {full}; nothing is left behind") from None
    finally:
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)


def swap(new: Path, out: Path) -> None:
    """Give `new` the name `out`; what had that name goes only then. `recover` mends a process killed in between."""
    out = Path(os.path.realpath(out))
    old = _old_name(out)
    if out.is_dir():
        os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Give back its name to the folder that a killed `swap` had set aside."""
    out = Path(os.path.realpath(out))
    old = _old_name(out)
    if old.is_dir():
        if out.is_dir() and old.is_symlink():
            old.unlink()
        elif out.is_dir():
            shutil.rmtree(old)
        else:
            os.rename(old, out)


def _old_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _prefix(out: Path) -> str:
    return f".{out.name}.tmp-{platform.node()}-"


def _remove_abandoned(out: Path) -> None:
    """Delete what processes of this machine left that were killed: it may be as large as what they made."""
    prefix = _prefix(out)
    for path in out.parent.glob(glob.escape(prefix) + "*-*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
