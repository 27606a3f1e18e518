"""Paths on a bucket, or any other path with a scheme (gs://, s3://, ...) that epath knows."""

from __future__ import annotations

import os
from pathlib import Path

from etils import epath

from vflax.errors import UserError


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike[str], option: str) -> epath.Path:
    """The path, local ones with ~ replaced.

    Raises:
        UserError: a scheme that epath does not know, or one that lost a slash in a pathlib.Path.
    """
    text = os.fspath(path)
    if text.startswith(("gs:/", "s3:/")) and "://" not in text:
        raise UserError(
            f"{option}={text}: a slash is missing; give the path as text, such as gs://bucket/folder"
        )
    try:
        return epath.Path(text) if is_remote(text) else epath.Path(text).expanduser()
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{option}={text}: {error}") from None
    except ImportError as error:
        raise UserError(f"{option}={text}: {error}. Install it with: pip install 'vflax[gcs]'") from None


def download(source: epath.Path, target: Path) -> None:
    """Copy a remote file; what bears the name `target` is whole. One that is there with that size stays."""
    if target.is_file() and target.stat().st_size == source.stat().length:
        return
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    source.copy(part)
    os.replace(part, target)
