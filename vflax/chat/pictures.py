"""Pictures that a person names, read once and remembered by a hash; and what a terminal makes of a dragged file."""

from __future__ import annotations

import functools
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import PIL.Image

from vflax import images
from vflax.errors import UserError
from vflax.tokenizer import replace_surrogates


@dataclass(frozen=True)
class Picture:
    """A picture file as it was when it was read.

    path: as it was given.
    sha256: of the file's bytes, in hex.
    size: width and height in pixels, as stored.
    image: RGB; in a conversation already as small as the model sees it.
    """

    path: Path
    sha256: str
    size: tuple[int, int]
    image: PIL.Image.Image

    def facts(self, *, whole_path: bool = False) -> dict[str, Any]:
        """path and sha256, for JSON."""
        path = self.path.absolute() if whole_path else self.path
        return {"path": replace_surrogates(str(path)), "sha256": self.sha256}


def read(path: Path, *, called: str = "") -> Picture:
    """Read and decode a picture file.

    Args:
        path: the file.
        called: what to call it in an error; "": its path.

    Raises:
        UserError: it cannot be read, or is no whole picture.
    """
    called = called or str(path)
    try:
        data = path.read_bytes()
        image = images.decode(data)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, images.ImageError):
            raise UserError(f"{called}: {error}; give another picture") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{called}: cannot be read ({reason})") from None
    return Picture(path, hashlib.sha256(data).hexdigest(), image.size, image)


def named(text: str) -> list[Path]:
    """The files that the text after /image names: the whole text where that is a file, else its words.

    Words are quoted and escaped as in a shell, and may be file:// URLs.

    Raises:
        UserError: a quotation mark without its other half.
    """
    whole = _path(text)
    if _is_file(whole):
        return [whole]
    words = _words(text)
    if words is None:
        raise UserError(f"{text}: a quotation mark has no other half")
    return [_path(word) for word in words]


def file_of(text: str) -> Path:
    """The one file that the text after /save or /load names, quoted and escaped as in a shell or not at all."""
    words = _words(text)
    return _path(words[0] if words and len(words) == 1 else text)


def dragged(line: str) -> list[Path]:
    """The pictures of a line that consists only of paths of pictures; [] for any other line.

    Terminals paste a file that is dragged into them as a path: in quotes, with backslashes before what a shell would
    take amiss, as a file:// URL, or as it is. So a line is taken for pictures when each of its words (or all of it, as
    one path) ends like a picture file and either is a file that exists, or begins with /, ~/ or file://. A path that
    text stands beside is part of the text.
    """
    whole = line.strip()
    if "\n" not in whole and _like_picture(whole) and _is_file(_path(whole)):
        return [_path(whole)]
    words = _words(whole) or []
    for word in words:
        if not (_like_picture(word) and (word.startswith(("/", "~/", "file://")) or _is_file(_path(word)))):
            return []
    return [_path(word) for word in words]


@functools.cache
def _endings() -> frozenset[str]:
    PIL.Image.init()
    return frozenset(end for end, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)


def _like_picture(word: str) -> bool:
    return _path(word).suffix.lower() in _endings()


def _path(word: str) -> Path:
    if word.startswith("file://"):
        try:
            return Path(unquote(urlsplit(word.replace("?", "%3F").replace("#", "%23")).path))
        except ValueError:  # brackets where a host should be: no URL
            return Path(word)
    if word == "~" or word.startswith("~/"):
        return Path.home() / word[2:]
    return Path(word)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or with a NUL
        return False


def _words(text: str) -> list[str] | None:
    """As a shell would split it; None for half a quotation."""
    try:
        return shlex.split(text)
    except ValueError:
        return None
