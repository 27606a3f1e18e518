"""Tensors by name: what a source is, and the commonest one, files of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from vflax.errors import UserError
from vflax.weights import names
from vflax.weights.finite import check_finite
from vflax.weights.names import Index, Rules
from vflax.weights.tensor_files import TensorFile, open_directory, open_file


class TensorSource(Protocol):
    """A checkpoint as named tensors in Hugging Face's layout."""

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors; names that no table knows stand as they came."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read` returns."""
        ...

    def source_dtype(self, name: str) -> np.dtype:
        """Dtype that the weight first came in with; an export writes it in this dtype unless told otherwise."""
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Read a tensor, or the part that `index` (a slice of step 1 per axis) names.

        Raises:
            UserError: when a file is cut off, or what was read is not finite.
        """
        ...


class FileSource:
    """A directory of safetensors or PyTorch files, sharded or not, its names brought to the canonical form by rules."""

    def __init__(self, folder: Path, rules: Rules = names.RULES, stem: str = "model") -> None:
        """Read the headers; the tensors stay on disk.

        Args:
            folder: holds STEM.safetensors, or shards with STEM.safetensors.index.json, or else .bin files
                (see tensor_files.open_directory).
            rules: for the names; () takes them as they are.
            stem: beginning of the files' names.

        Raises:
            UserError: when files are missing or damaged, or two tensors have the same canonical name.
        """
        self.place = folder
        self._found = _canonical(open_directory(folder, stem), rules, folder)

    @classmethod
    def file(cls, path: Path, rules: Rules = names.RULES) -> FileSource:
        """Open a single file of either kind, such as a projector; what it should not hold shows when it is loaded."""
        file = open_file(path)
        source = cls.__new__(cls)
        source.place = path
        source._found = _canonical(dict.fromkeys(file.names(), file), rules, path)
        return source

    def names(self) -> tuple[str, ...]:
        return tuple(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        file, raw = self._found[name]
        return file.shape(raw)

    def dtype(self, name: str) -> np.dtype:
        file, raw = self._found[name]
        return file.dtype(raw)

    def source_dtype(self, name: str) -> np.dtype:
        return self.dtype(name)

    def where(self, name: str) -> str:
        file, raw = self._found[name]
        return str(file.path) if raw == name else f"{file.path} ({raw})"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        file, raw = self._found[name]
        return check_finite(file.read(raw, index), raw, str(file.path))


def _canonical(files: dict[str, TensorFile], rules: Rules, place: Path) -> dict[str, tuple[TensorFile, str]]:
    """{canonical name: (file, name in it)}."""
    found: dict[str, tuple[TensorFile, str]] = {}
    problems = []
    for raw, file in files.items():
        name = names.canonical(raw, rules)
        if name is None:
            continue
        if name in found:
            problems.append(f"{raw} in {file.path.name} and {found[name][1]} in {found[name][0].path.name}")
        found[name] = (file, raw)
    if problems:
        raise UserError(f"{place}: tensors that stand for the same weight:\n  " + "\n  ".join(problems))
    return found
