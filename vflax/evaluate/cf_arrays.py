"""Image sets that lie in one array: MNIST's IDX files, and CIFAR's pickles, of which nothing is run."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import pickletools
import re
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError


class Arrays(NamedTuple):
    """Images of one set, in its order.

    labels: [N] numbers. pixels: [N, H, W] or [N, H, W, 3], bytes. names: of the files that they were made of. md5: of
    each file, unpacked.
    """

    labels: Sequence[int]
    pixels: np.ndarray
    names: Sequence[str]
    md5: tuple[str, ...]


def idx(images: Path, labels: Path) -> Arrays:
    """MNIST's images and labels, packed by gzip or not.

    Raises:
        UserError: naming the file that is none, is cut off, or does not fit the other.
    """
    (pixels, of_pixels), (numbers, of_numbers) = _idx(images, 3), _idx(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(
            f"{labels}: {len(numbers):,} labels, expected {len(pixels):,} as {images.name} has images; fetch both again"
        )
    names = [f"{number:05d}.png" for number in range(len(numbers))]
    return Arrays(numbers.tolist(), pixels, names, (of_pixels, of_numbers))


def _idx(path: Path, rank: int) -> tuple[np.ndarray, str]:
    """Unsigned bytes of so many dimensions (LeCun's IDX format), and the MD5 of the file."""
    try:
        raw = path.read_bytes()
        # By how it begins, since browsers unpack a file and leave its name, or the other way round.
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        kind, shape = struct.unpack_from(">I", raw)[0], struct.unpack_from(f">{rank}I", raw, 4)
        if kind != 0x800 + rank:
            raise ValueError(f"it begins with {kind:#x}, not {0x800 + rank:#x}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape), _md5(raw)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise UserError(f"{path}: not readable as IDX ({error}); fetch it again") from None


def cifar(path: Path, member: str | None = None) -> Arrays:
    """The images of one of CIFAR's pickles, with their fine labels where there are two kinds.

    Args:
        path: the pickle, or a tar archive.
        member: which of the archive's files it is.

    Raises:
        UserError: naming file and member; not there, damaged, of something else, or with more in it than images.
    """
    where = f"{path}, {member}" if member else str(path)
    try:
        raw = path.read_bytes() if member is None else _member(path, member)
        found = _unpickle(raw)
        numbers = found["fine_labels"] if "fine_labels" in found else found["labels"]
        pixels, names = found["data"].array(), found["filenames"]
        if not len(pixels) == len(numbers) == len(names) or pixels.shape[1:] != (3072,):
            raise ValueError(f"{len(numbers)} labels and {len(names)} names of {pixels.shape} bytes")
        if not all(type(number) is int for number in numbers):
            raise ValueError("labels that are no numbers")
        channels_last = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Arrays(numbers, channels_last, [str(name) for name in names], (_md5(raw),))
    # A pickle that is damaged, or was made to do harm, raises anything: the reader has no bound on what it makes of it.
    except Exception as error:
        raise UserError(
            f"{where}: not readable as CIFAR ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _member(path: Path, name: str) -> bytes:
    with tarfile.open(path) as archive:
        file = archive.extractfile(name)
        return file.read() if file is not None else b""


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


# --- pickles ----------------------------------------------------------------------------------------------------------


class _Array:
    """What a pickle says of a numpy array; numpy itself is not asked until the bytes are counted."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Of unsigned bytes.

        Raises:
            ValueError: it is none.
        """
        _, shape, kind, columns_first, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _Kind) or kind.name != "u1":
            raise ValueError("expected an array of unsigned bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if columns_first else "C")


class _Kind:
    """Of a numpy array's elements."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which bytes have not."""


def _of_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """An array as protocol 5 has it."""
    found = _Array()
    found.state = (1, shape, kind, order == "F", bytes(memoryview(raw)))
    return found


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 of Python 3 has them."""
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Plain containers and arrays of bytes; whatever else a pickle names is refused, and nothing of it is run."""

    _KNOWN = {
        ("multiarray", "_reconstruct"): _Array, ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Kind,
        ("numeric", "_frombuffer"): _of_buffer, ("_codecs", "encode"): _latin1,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        found = self._KNOWN.get((re.sub(r"^numpy\._?core\.", "", module), name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image set needs")
        return found


def _unpickle(raw: bytes) -> dict[str, Any]:
    """A dictionary under text keys; text of Python 2 is read as latin1, which holds all bytes."""
    for number, (opcode, value, _) in enumerate(pickletools.genops(raw)):
        # A damaged one would have gigabytes reserved for what it never puts there.
        if opcode.name.endswith("PUT") and isinstance(value, int) and value > number:
            raise ValueError(f"object {value} of {number}")
    found = _Plain(io.BytesIO(raw), encoding="latin1").load()
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
