"""What is drawn once and kept under the cache root: a folder that is whole, named after what decides its bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

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
