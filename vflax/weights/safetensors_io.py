"""safetensors files: read in slices, written as a stream.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps. Files are read, not mapped:
mapped pages count as resident memory and would make a 14 GB file look, and on a small machine behave, like 14
GB of arrays.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vflax.errors import UserError
from vflax.small_files import parse_object
from vflax.values import TEXT, Kind, wrong

Index = tuple[slice, ...]

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# A slice over a later axis is cut out of blocks of rows of about this size, so that no whole tensor is held
# beside it.
_BLOCK_BYTES = 16 << 20
# The format's own limit: a longer header is damage.
_MAX_HEADER = 100_000_000
_SIZE = Kind("a whole number, at least 0", lambda value: type(value) is int and value >= 0)
_OFFSETS = Kind(
    "[begin, end]",
    lambda value: type(value) is list and _SIZE.listed(2).holds(value) and value[0] <= value[1],
)
_KINDS: dict[str, Kind] = {"dtype": TEXT, "shape": _SIZE.listed(), "data_offsets": _OFFSETS}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in its file; `start` counts from the beginning of the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One file, its header read and checked. Each read opens the file anew, so threads may share it."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            UserError: when the file is missing, truncated, or not a safetensors file.
        """
        self.path = path
        self._tensors = _read_header(path)

    def names(self) -> tuple[str, ...]:
        """Tensor names, in the header's order."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor.

        Raises:
            UserError: for a dtype that vflax does not read, such as an 8-bit float.
        """
        code = self._tensors[name].code
        if code not in DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {code}; vflax reads {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read a tensor, or the part of it that `index` (slices of step 1, one per axis) names."""
        stored = self._tensors[name]
        return read_part(self.path, name, stored.start, stored.shape, self.dtype(name), index)


def read_part(
    path: Path, name: str, start: int, shape: tuple[int, ...], dtype: np.dtype, index: Index | None = None
) -> np.ndarray:
    """Read a tensor that lies row by row in a file, or the part of it that `index` names.

    Args:
        path: the file; it is opened anew.
        name: the tensor's, for the message.
        start: its first byte.
        shape: its shape.
        dtype: its dtype.
        index: slices of step 1, one per axis; None: all of it.

    Raises:
        UserError: when the file ends before the tensor does.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)] if index else None
    if not bounds or all(b == (0, n) for b, n in zip(bounds[1:], shape[1:], strict=True)):
        return _read_rows(path, name, start, shape, dtype, bounds[0] if bounds else None)
    inner = tuple(slice(*b) for b in bounds[1:])
    out = np.empty([b - a for a, b in bounds], dtype)
    step = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    first, last = bounds[0]
    for a in range(first, last, step):
        b = min(a + step, last)
        out[a - first : b - first] = _read_rows(path, name, start, shape, dtype, (a, b))[:, *inner]
    return out


def _read_rows(
    path: Path, name: str, start: int, shape: tuple[int, ...], dtype: np.dtype, rows: tuple[int, int] | None
) -> np.ndarray:
    if rows is not None:
        start += rows[0] * math.prod(shape[1:]) * dtype.itemsize
        shape = (rows[1] - rows[0], *shape[1:])
    out = np.empty(shape, dtype)
    with path.open("rb") as f:
        f.seek(start)
        got = f.readinto(out.reshape(-1).view(np.uint8).data)
    if got != out.nbytes:
        raise UserError(f"{path}: {name}: the file ends after {got} of {out.nbytes} bytes; fetch it again")
    return out


def _read_header(path: Path) -> dict[str, _Stored]:
    if not path.is_file():
        raise UserError(f"{path}: not there")
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, max(0, size - 8)):
            raise UserError(
                f"{path}: not a safetensors file, or cut off inside its header ({size} bytes); fetch it again"
            )
        raw = f.read(length)
    stored = _parse_header(path, raw, 8 + length)
    problems = _overlaps(stored)
    for name, t in stored.items():
        itemsize = DTYPES[t.code].itemsize if t.code in DTYPES else None
        if itemsize is not None and t.end - t.start != math.prod(t.shape) * itemsize:
            problems.append(
                f"{name}: {t.end - t.start} bytes do not make a {t.code} tensor of shape {list(t.shape)}"
            )
        elif t.end > size:
            problems.append(
                f"{name} should end at byte {t.end}, the file has {size}: it is truncated, fetch it again"
            )
    if problems:
        raise UserError(f"{path}:\n  " + "\n  ".join(problems[:10] + and_more(problems, 10)))
    return stored


def _parse_header(path: Path, raw: bytes, begin: int) -> dict[str, _Stored]:
    """The tensors by name; `begin` is the first byte after the header."""
    header = parse_object(raw, f"{path}: its safetensors header")
    header.pop("__metadata__", None)
    problems = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not _KINDS.keys() <= entry.keys():
            problems.append(f"{name}: expected {', '.join(_KINDS)}")
        else:
            problems += wrong(entry, _KINDS, f"{name}: ").values()
    if problems:
        lines = "\n  ".join(problems[:10] + and_more(problems, 10))
        raise UserError(f"{path}: its safetensors header cannot be read; fetch it again:\n  {lines}")
    return {
        name: _Stored(entry["dtype"], tuple(entry["shape"]), *(begin + o for o in entry["data_offsets"]))
        for name, entry in header.items()
    }


def _overlaps(stored: dict[str, _Stored]) -> list[str]:
    """A line for each two tensors that share bytes: what one is read as was written as the other."""
    ordered = sorted((t.start, t.end, name) for name, t in stored.items() if t.end > t.start)
    return [
        f"{name} begins at byte {start}, before {before} ends at {end}: they overlap, fetch it again"
        for (_, end, before), (start, _, name) in itertools.pairwise(ordered)
        if start < end
    ]


def and_more(items: Sequence[Any], shown: int) -> list[str]:
    """The last line of a list of which `shown` items are printed, if there are more."""
    return [f"... and {len(items) - shown} more"] if len(items) > shown else []


def plan_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Part tensors, in their order, into shards of at most `max_bytes` (a larger tensor has a shard of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + spec.nbytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.nbytes
    return shards


def row_blocks(shape: tuple[int, ...], itemsize: int) -> list[Index]:
    """Cut a tensor along its first axis into parts of about _BLOCK_BYTES, whole rows each; a scalar is one part."""
    if not shape:
        return [()]
    step = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    rest = tuple(slice(0, n) for n in shape[1:])
    return [(slice(a, min(a + step, shape[0])), *rest) for a in range(0, shape[0], step)]


def write_file(path: Path, specs: Sequence[TensorSpec], read: Callable[[str, Index], np.ndarray]) -> str:
    """Write one file block by block, holding one block at a time, and flush it to the disk.

    Args:
        path: the file to write.
        specs: what it will hold; wide dtypes come first in the file so that every tensor is aligned.
        read: (name, index) -> that part of the tensor, in the spec's dtype. It is called for the blocks of
            `row_blocks`, one tensor after the other.

    Returns:
        The file's sha256, in hex.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    # Readers of Hugging Face's libraries want the "format"; "pt" is what they call row-major host tensors.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in ordered:
        header[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for part in (struct.pack("<Q", len(raw)), raw):
            f.write(part)
            digest.update(part)
        for spec in ordered:
            for index in row_blocks(spec.shape, spec.dtype.itemsize):
                array = read(spec.name, index)
                planned = tuple(s.stop - s.start for s in index)
                if array.dtype != spec.dtype or array.shape != planned:
                    raise AssertionError(
                        f"{spec.name}: planned {spec.dtype} {planned}, got {array.dtype} {array.shape}"
                    )
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                f.write(data)
                digest.update(data)
                # Else it would be held while the next one is read.
                del array, data
        f.flush()
        os.fsync(f.fileno())
    return digest.hexdigest()


def write_shards(
    folder: Path,
    stem: str,
    specs: Sequence[TensorSpec],
    max_bytes: int,
    read: Callable[[str, Index], np.ndarray],
) -> dict[str, str]:
    """Write STEM.safetensors, or STEM-0000i-of-0000n.safetensors with STEM.safetensors.index.json, as HF names them.

    Returns:
        {file name: sha256} of all files written.
    """
    shards = plan_shards(specs, max_bytes)
    total = len(shards)
    files: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}.safetensors" if total == 1 else f"{stem}-{i:05d}-of-{total:05d}.safetensors"
        files[name] = write_file(folder / name, shard, read)
        weight_map |= {spec.name: name for spec in shard}
    if total > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=1) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text)
        files[f"{stem}.safetensors.index.json"] = hashlib.sha256(text.encode()).hexdigest()
    return files
