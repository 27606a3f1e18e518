"""Where a conversion keeps what it has finished, so that a killed one goes on: a folder whose name stays the same.

Beside a local OUT it is .OUT.converting-SPLIT; for an OUT on a bucket it lies in the cache (VFLAX_CACHE, or
~/.cache/vflax). It goes when the conversion ends well, or for a reason that running again would not change; what an
earlier run left in it goes only when the conversion ends well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from data_pipeline.remote import is_remote
from vflax import folders
from vflax.errors import UserError


@contextlib.contextmanager
def work_folder(out: str | os.PathLike[str], split: str) -> Iterator[Path]:
    """The folder of this conversion, while nobody else converts to the same `out`.

    Raises:
        UserError: somebody else does; or the disk is full, or cannot be written: then the folder stays. So does one
            that was there before, whatever is raised: a mistake in the second command does not cost what the first did.
    """
    parent, name = _where(out)
    folder = parent / f".{name}.converting-{split}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent / f".{name}.converting.lock", out):
            was_there = folder.is_dir()
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except folders.NotWritten:
                raise
            except UserError as error:
                if was_there:
                    kept = f"{error}. What an earlier run finished is kept in {folder}"
                    raise UserError(kept) from None
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else str(error)
        raise UserError(
            f"{out}: not written: {reason}. What is finished is kept in {folder}: the same command goes on with it"
        ) from error


def _where(out: str | os.PathLike[str]) -> tuple[Path, str]:
    if not is_remote(out):
        local = Path(os.path.realpath(out))
        return local.parent, local.name
    cache = Path(os.environ.get("VFLAX_CACHE") or "~/.cache/vflax").expanduser()
    url = os.fspath(out).rstrip("/")
    return cache, f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _locked(path: Path, out: str | os.PathLike[str]) -> Iterator[None]:
    lock = FileLock(path)
    while True:
        path.touch()
        before = path.stat().st_ino
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{out}: another conversion is writing there ({path.name} is locked). Wait until it has ended"
            ) from None
        # Who ends deletes the file: what was locked may be a file that bears the name no longer.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == before:
                break
        lock.release()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
