"""Where tensors come from, under canonical names (see names.py). Nothing is read before it is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from vflax.errors import UserError
from vflax.models.llava import LlavaConfig
from vflax.weights import names
from vflax.weights.names import Index, Rules
from vflax.weights.safetensors_io import SafetensorsFile, open_directory


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
        """Read a tensor, or the part that `index` (a slice of step 1 per axis) names."""
        ...


class SafetensorsSource:
    """Safetensors files, their names brought to the canonical form by rules."""

    def __init__(self, files: dict[str, SafetensorsFile], rules: Rules, place: Path) -> None:
        """Map the names; the tensors stay on disk.

        Args:
            files: {name in the file: file}.
            rules: one of the lists in names.py.
            place: the directory or file, for messages.

        Raises:
            UserError: when two tensors have the same canonical name.
        """
        self.place = place
        self._found: dict[str, tuple[SafetensorsFile, str]] = {}
        problems = []
        for raw, file in files.items():
            name = names.canonical(raw, rules)
            if name is None:
                continue
            if name in self._found:
                problems.append(f"{raw} in {file.path.name} is the same weight as {self._found[name][1]}")
            self._found[name] = (file, raw)
        if problems:
            raise UserError(f"{place}: tensors stand for the same weight:\n  " + "\n  ".join(problems))

    @classmethod
    def open(cls, folder: Path, rules: Rules = names.LLAVA_RULES) -> SafetensorsSource:
        """Open a directory of safetensors, sharded or not."""
        return cls(open_directory(folder), rules, folder)

    @classmethod
    def open_bridge(cls, path: Path) -> SafetensorsSource:
        """Open a file that holds a bridge; whatever else it holds is reported as unexpected when loading."""
        file = SafetensorsFile(path)
        return cls({name: file for name in file.names()}, names.BRIDGE_RULES, path)

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
        return file.read(raw, index)


class JoinedSource:
    """Several sources as one: the tower from here, the decoder from there, the bridge from a third place."""

    def __init__(self, *parts: TensorSource) -> None:
        """Join the parts.

        Raises:
            UserError: when two parts hold the same tensor.
        """
        self._found: dict[str, TensorSource] = {}
        problems = []
        for part in parts:
            for name in part.names():
                if name in self._found:
                    problems.append(f"{name}: in {self._found[name].where(name)} and in {part.where(name)}")
                self._found[name] = part
        if problems:
            raise UserError("two of the given checkpoints hold the same tensor:\n  " + "\n  ".join(problems))

    def names(self) -> tuple[str, ...]:
        return tuple(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._found[name].dtype(name)

    def source_dtype(self, name: str) -> np.dtype:
        return self._found[name].source_dtype(name)

    def where(self, name: str) -> str:
        return self._found[name].where(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._found[name].read(name, index)


class RandomSource:
    """Random float32 weights; each tensor is a pure function of (seed, its name, its shape), on any host.

    Spreads are those of Hugging Face's initialisation: 0.02 for decoder, bridge and the tower's patch and position
    embeddings; CLIP's own, which shrink with width and depth, for the tower's layers (Radford et al., arXiv
    2103.00020, section 2.5, as in their code). Norm scales are one, biases zero.
    """

    def __init__(self, config: LlavaConfig, seed: int, only: str = "") -> None:
        """Describe the weights; nothing is drawn yet.

        Args:
            config: the model. All config.vision.num_layers tower layers exist, carried ones included.
            seed: of all draws.
            only: prefix of the canonical names to hold; "" holds all.
        """
        self._seed = seed
        self._vision = config.vision
        self._shapes = {
            name: shape for name, shape in names.expected(config).items() if name.startswith(only)
        }
        self._last: tuple[str, np.ndarray] | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def source_dtype(self, name: str) -> np.dtype:
        return self.dtype(name)

    def where(self, name: str) -> str:
        return f"random weights of seed {self._seed}"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        # A sharded array asks for the same tensor slice by slice, one tensor after the other.
        if self._last is None or self._last[0] != name:
            self._last = (name, self._draw(name))
        tensor = self._last[1]
        return tensor.copy() if index is None else tensor[index].copy()

    def _draw(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        std = self._std(name)
        if std is None:
            return np.full(shape, 1.0 if name.endswith(".weight") else 0.0, np.float32)
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        rng = np.random.Generator(np.random.PCG64([self._seed, key]))
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    def _std(self, name: str) -> float | None:
        """Spread of a tensor; None for norm scales (ones) and biases (zeros)."""
        if name.endswith(".bias") or re.search(r"norm\d?\.weight$", name):
            return None
        width, layers = self._vision.width, self._vision.num_layers
        if name.endswith((".class_embedding", ".self_attn.out_proj.weight")):
            return width**-0.5
        if name.startswith("vision_tower.") and re.search(r"\.([qkv]_proj|fc2)\.weight$", name):
            return width**-0.5 * (2 * layers) ** -0.5
        if name.endswith(".mlp.fc1.weight"):
            return (2 * width) ** -0.5
        return 0.02


def source_dtypes(source: TensorSource, wanted: Iterable[str] | None = None) -> dict[str, str]:
    """{canonical name: name of the dtype it came in}, as it is kept in WORKDIR/model/source_dtypes.json."""
    return {
        name: source.source_dtype(name).name for name in (source.names() if wanted is None else wanted)
    }
