"""Paths on a bucket, or any other path with a scheme (gs://, s3://, ...) that epath knows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from vflax import bucket, folders
from vflax.errors import UserError


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike[str], option: str) -> epath.Path:
    """The path, local ones with ~ replaced.

    Raises:
        UserError: a scheme that nobody knows or that needs a package, one that lost a slash in a pathlib.Path, or a
            name that is not UTF-8.
    """
    text = os.fspath(path)
    check_name(text, option)
    if text.startswith(("gs:/", "s3:/")) and "://" not in text:
        raise UserError(
            f"{option}={text}: a slash is missing; give the path as text, such as gs://bucket/folder"
        )
    if not is_remote(text):
        return epath.Path(text).expanduser()
    try:
        fsspec.get_filesystem_class(text.partition("://")[0])
        if bucket.is_url(text):
            bucket.limit()
        return epath.Path(text)
    except ImportError as error:
        raise UserError(f"{option}={text}: {error}. pip install 'vflax[gcs]' brings it for gs://") from None
    except ValueError as error:
        raise UserError(f"{option}={text}: {error}") from None


def check_name(path: str | os.PathLike[str], option: str) -> None:
    """Refuse a name that no text file can hold: reports and indexes name every source.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{option}={os.fspath(path)!a}: the name is not UTF-8; rename it") from None


class Unreachable(folders.NotWritten):
    """A bucket that does not answer: no word about what is on it."""


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """Ask a bucket about one file; for a path on a disk this does nothing.

    The time limit is set here, too: a worker, a pool's or Beam's, is a process that has never called `to_path`.

    Raises:
        FileNotFoundError: it is not there.
        Unreachable: every other failure, after the client's own retries. A file is never called missing for it.
        UserError: gcsfs is not installed.
    """
    if not is_remote(path):
        yield
        return
    if bucket.is_url(path):
        bucket.limit()
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # gcsfs raises its own, aiohttp's, google-auth's and OSError
        said = str(error) or type(error).__name__  # a timeout has no words
        raise Unreachable(
            f"{path}: the bucket does not answer ({said}); the same command goes on with what is finished"
        ) from None


def download(source: epath.Path, target: Path) -> None:
    """Copy a remote file; what bears the name `target` is whole and has the date of its original.

    A copy that is there stays if it has the size and the date (in whole seconds) that the original has now.
    """
    with reaching(source):
        found = source.stat()
    changed = int(found.mtime)
    if target.is_file():
        there = target.stat()
        if (there.st_size, int(there.st_mtime)) == (found.length, changed):
            return
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    with reaching(source):
        source.copy(part)
    os.utime(part, (changed, changed))
    os.replace(part, target)
