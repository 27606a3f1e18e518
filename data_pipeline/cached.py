"""Built-in sets: drawn once and kept under the cache root, or written where a command line says."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from data_pipeline import mini
from vflax import folders
from vflax.errors import UserError
from vflax.mirror import cache_root


def made(name: str, make: Callable[[Path], None], room: str, cache: Path | None = None) -> Path:
    """The folder CACHE/NAME, made now if it is not there; a second process waits instead of making the same.

    Args:
        name: with a hash of the generator, so that a changed one makes another folder.
        make: writes into a folder that is not there yet.
        room: what it takes on the disk, for the error.
        cache: the cache folder; None: $VFLAX_CACHE, or ~/.cache/vflax.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache or cache_root()
    root = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            if not root.is_dir():
                with folders.beside(root) as temporary:
                    make(temporary / "new")
                    folders.swap(temporary / "new", root)
    except (OSError, UserError) as error:
        raise UserError(
            f"{root}: cannot be written there ({error}). Name a folder with {room} to spare in the environment "
            "variable VFLAX_CACHE"
        ) from error
    return root


def version(*sources: str) -> str:
    """A short hash of these files and of all that decides the mini dataset's bytes: scenes, renderer, converter."""
    digest = hashlib.sha256(mini.version().encode())
    for source in sources:
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:12]


def write_command(module: str, usage: str, write: Callable[[Path], None], argv: Sequence[str] | None) -> int:
    """`python -m MODULE --out=DIR`; gives the exit status.

    Args:
        module: its name.
        usage: its docstring.
        write: into a folder that is not there yet; what it raises is told.
        argv: the command line; None: that of the process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=usage, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    try:
        write(parser.parse_args(argv).out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
