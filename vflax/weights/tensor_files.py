"""Files of named tensors: what such a file is, and which files a directory or a path holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from vflax.errors import UserError
from vflax.small_files import Problems, read_json
from vflax.values import NAME, OBJECT, Kind
from vflax.weights.safetensors_io import Index, SafetensorsFile, and_more
from vflax.weights.torch_files import TorchFile


def _is_inside(value: Any) -> bool:
    path = PurePosixPath(value) if NAME.holds(value) else PurePosixPath("..")
    return not path.is_absolute() and ".." not in path.parts


_SHARD = Kind("a file of this folder", _is_inside)


class TensorFile(Protocol):
    """One file, its header read. Threads may share it."""

    path: Path

    def names(self) -> tuple[str, ...]:
        """Tensor names, in the file's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read a tensor, or the part of it that `index` (slices of step 1, one per axis) names."""
        ...


def open_file(path: Path) -> TensorFile:
    """Open a safetensors or PyTorch file, told apart by content, whatever its name.

    Raises:
        UserError: when it is missing, damaged or neither of the two.
    """
    if not path.is_file():
        raise UserError(f"{path}: not there")
    with path.open("rb") as f:
        head = f.read(9)
    # PyTorch files are zip archives or, before torch 1.6, pickles. The first 8 bytes of safetensors are a number,
    # which may begin like a pickle, but then comes "{".
    is_torch = head.startswith((b"PK\x03\x04", b"\x80")) and head[8:] != b"{"
    return TorchFile(path) if is_torch else SafetensorsFile(path)


def open_directory(folder: Path, stem: str = "model") -> dict[str, TensorFile]:
    """Open the weights of a directory, sharded or not: safetensors, and where there are none, PyTorch files.

    Args:
        folder: holds STEM.safetensors, or shards with STEM.safetensors.index.json, or the same in .bin.
        stem: beginning of the files' names. Hugging Face's name for "model" in .bin is "pytorch_model".

    Returns:
        {tensor name: the file that holds it}, in the files' order.

    Raises:
        UserError: when there are none, or the index and the files disagree; all disagreements at once.
    """
    kinds: dict[str, Callable[[Path], TensorFile]] = {
        f"{stem}.safetensors": SafetensorsFile,
        f"{'pytorch_model' if stem == 'model' else stem}.bin": TorchFile,
    }
    for whole, kind in kinds.items():
        index_path = folder / f"{whole}.index.json"
        if index_path.is_file():
            weight_map = read_index(index_path)
            files = _open_all([folder / name for name in sorted(set(weight_map.values()))], kind)
            return _merge(files, weight_map, index_path)
        if (folder / whole).is_file():
            file = kind(folder / whole)
            return dict.fromkeys(file.names(), file)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    raise UserError(
        f"{folder}: no weights: none of {', '.join(f'{whole}, {whole}.index.json' for whole in kinds)} is there"
    )


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index of weights.

    Raises:
        UserError: when it cannot be read, names no tensor, or a file of another folder.
    """
    raw = read_json(path)
    problems = Problems(path)
    weight_map = raw.get("weight_map")
    if not OBJECT.holds(weight_map) or not weight_map:
        problems.lines.append(f"weight_map={weight_map!r}: expected {{tensor: file}}; fetch the index again")
        problems.stop()
    assert isinstance(weight_map, dict)
    problems.check(weight_map, dict.fromkeys(weight_map, _SHARD), "weight_map.")
    problems.stop()
    return weight_map


def _open_all(paths: list[Path], kind: Callable[[Path], TensorFile]) -> list[TensorFile]:
    """Open the shards; what is wrong with any of them is told at once."""
    files, problems = [], []
    for path in paths:
        try:
            files.append(kind(path))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems[:20] + and_more(problems, 20)))
    return files


def _merge(files: list[TensorFile], weight_map: dict[str, str], index_path: Path) -> dict[str, TensorFile]:
    found: dict[str, TensorFile] = {}
    problems = []
    for file in files:
        for name in file.names():
            if name in found:
                problems.append(f"{name} is both in {found[name].path.name} and in {file.path.name}")
            found[name] = file
    for name, file_name in weight_map.items():
        if name not in found:
            problems.append(f"{name} is not in {file_name}, where the index puts it")
    if problems:
        raise UserError(
            f"{index_path} and its files disagree:\n  " + "\n  ".join(problems[:20] + and_more(problems, 20))
        )
    return found
