"""Where weights come from, under canonical names (see names.py). Nothing is read before it is asked for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.models.lora import LoraConfig
from vflax.weights import names
from vflax.weights.file_source import FileSource, TensorSource
from vflax.weights.names import Index
from vflax.weights.workdir_source import WorkdirSource

__all__ = [
    "DescribedSource",
    "FileSource",
    "JoinedSource",
    "LoraSource",
    "RandomSource",
    "TensorSource",
    "WorkdirSource",
]


class JoinedSource:
    """Several sources as one: the tower from here, the decoder from there, the bridge from a third place."""

    def __init__(self, parts: Sequence[TensorSource]) -> None:
        """Join the parts; nothing is read.

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


def _positions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Position embeddings [1 + G x G, D] of unit spread: the class token's, then row + column + a vector of its own."""
    grid = math.isqrt(count - 1)
    drawn = rng.standard_normal((1 + 2 * grid + grid * grid, width), np.float32)
    first, rows, columns, own = np.split(drawn, (1, 1 + grid, 1 + 2 * grid))
    # [G, 1, D] + [1, G, D] -> [G x G, D]
    cells = (rows[:, None] + columns[None]).reshape(grid * grid, width) + own
    return np.concatenate([first, cells / np.float32(3**0.5)])


class RandomSource:
    """Random float32 weights; each tensor is a pure function of (seed, its name, its shape), on any host.

    Spreads are those of Hugging Face's initialisation: 0.02 for decoder, bridge and patch embedding; CLIP's own, which
    shrink with width and depth, for the tower's layers (Radford et al., arXiv 2103.00020, section 2.5, as in their
    code). Norm scales are one, biases zero. Three things are ours, so that a narrow model learns from scratch: a linear
    of the decoder or bridge with fewer than 1,024 inputs is drawn wider, so that its outputs spread as they do at
    that width; a token's embedding is as long as at LLaMA-7B's width of 4,096, so that tokens stay distinct; and a
    patch's position holds its row's and its column's vector (axial, Ho et al., arXiv 1912.12180) and counts for more
    than its content, so that what is learned of one place holds for its row and column and is not lost on the way.
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
        rng = _generator(self._seed, name)
        if name.endswith(".position_embedding.weight"):
            return np.float32(std) * _positions(rng, *shape)
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
        if name.endswith(".position_embedding.weight"):
            # Thrice what a patch of 3 P^2 pixel values of unit spread becomes under a kernel of spread 0.02.
            return 3 * 0.02 * (3 * self._vision.patch_size**2) ** 0.5
        if name.endswith(".embed_tokens.weight"):
            return 0.02 * max(1.0, (4096 / self._shapes[name][-1]) ** 0.5)
        if re.search(r"_(proj|[12])\.weight$|projector\.linear\.weight$", name):
            return 0.02 * max(1.0, (1024 / self._shapes[name][-1]) ** 0.5)
        return 0.02


class DescribedSource(RandomSource):
    """The tensors that configs ask for, of weights that are not here: names and shapes, and nothing to read."""

    def __init__(self, place: Path, parts: Iterable[VisionConfig | BridgeConfig | DecoderConfig]) -> None:
        """Describe; place: where the configs lie."""
        self._place = place
        self._shapes = {name: shape for part in parts for name, shape in names.expected_part(part).items()}

    def where(self, name: str) -> str:
        return f"{self._place} (by its config)"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        raise UserError(f"{self._place}: its weights are not here")


class LoraSource:
    """Weights with fresh adapters beside them: lora_A as PEFT draws it, uniform within 1 / sqrt(in), and lora_B zero.

    Adapters are float32; each is a pure function of (seed, its name, its shape), on any host.
    """

    def __init__(self, base: TensorSource, config: LlavaConfig, lora: LoraConfig, seed: int) -> None:
        """Wrap `base`, the weights of `config`; nothing is drawn yet."""
        self._base, self._seed = base, seed
        plain = names.expected(config)
        self._drawn = {
            name: shape for name, shape in names.expected(config, lora).items() if name not in plain
        }

    def names(self) -> tuple[str, ...]:
        return (*self._base.names(), *self._drawn)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._drawn[name] if name in self._drawn else self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._drawn else self._base.dtype(name)

    def source_dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._drawn else self._base.source_dtype(name)

    def where(self, name: str) -> str:
        return f"new adapters of seed {self._seed}" if name in self._drawn else self._base.where(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        if name not in self._drawn:
            return self._base.read(name, index)
        tensor = self._draw(name)
        return tensor if index is None else tensor[index].copy()

    def _draw(self, name: str) -> np.ndarray:
        shape = self._drawn[name]
        if name.endswith(".lora_B.weight"):
            return np.zeros(shape, np.float32)
        drawn = _generator(self._seed, name).random(shape, np.float32)
        return (drawn * 2 - 1) * np.float32(shape[1] ** -0.5)


def _generator(seed: int, name: str) -> np.random.Generator:
    """The generator of one tensor."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64([seed, key]))
