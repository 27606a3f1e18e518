"""Engines of a small random model, and what tests ask them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.weights import hub
from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.engine import Engine
from vflax.generate.open import answer_mesh
from vflax.generate.processor import Processor
from vflax.generate.request import Delta, Prompt, Sampling, Token
from vflax.generate.sizes import EngineSettings
from vflax.generate.weights import load_weights
from vflax.models import llava
from vflax.models.llava import LlavaConfig
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.weights.file_source import TensorSource
from vflax.weights.source import RandomSource

# Small pages and chunks, so that short prompts cross their borders.
SETTINGS = {"slots": 8, "chunk": 32, "page": 16, "block": 32, "pictures": 8, "cache_tokens": 8 * 512}
IMAGE_TOKENS = hub.CONFIG.vision.num_tokens
SIDE = hub.CONFIG.vision.image_size


def tokenizer(folder: Path) -> Tokenizer:
    hub.write_tokenizer(folder)
    return load_tokenizer(folder)


def processor(folder: Path, config: LlavaConfig = hub.CONFIG) -> Processor:
    words = tokenizer(folder)
    return Processor(
        "small", words, "vicuna_v1", "auto", hub.RULES, (words.eos_id,), config.vision.num_tokens
    )


def engine(
    folder: Path,
    config: LlavaConfig = hub.CONFIG,
    *,
    int8: bool = False,
    source: TensorSource | None = None,
    dtype: str = "float32",
    devices: Any = None,
    **settings: Any,
) -> Engine:
    """An engine of random weights; larger ones than at the start of training, so that logits differ."""
    mesh = answer_mesh(config, devices or jax.local_devices()[:1])
    weights = load_weights(source or Source(config), config, mesh, dtype, int8=int8)
    own = EngineSettings(**{**SETTINGS, **settings})
    with compiled_once():
        return Engine(processor(folder, config), config, weights, mesh, dtype, own)


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """What is compiled in here is kept for other engines of the same sizes, in this process and in others."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    folder = Path(tempfile.gettempdir()) / f"vflax-test-engines-{os.getuid()}-{jax.__version__}"
    for name, value in zip(names, (str(folder), 0), strict=True):
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


class Source(RandomSource):
    """Random weights, of which kernels are so large that each token has its own next one."""

    def __init__(self, config: LlavaConfig, seed: int = 0, scale: float = 4) -> None:
        super().__init__(config, seed)
        self.scale = scale

    def read(self, name: str, index: Any = None) -> np.ndarray:
        found = super().read(name) if index is None else super().read(name, index)
        return found * np.float32(self.scale) if found.ndim > 1 else found


@dataclass
class Sink:
    """Collects an answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    finish: str | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.deltas.append(delta)
        if delta.finish:
            self.finish = delta.finish
            self.done.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def wait(self) -> Sink:
        assert self.done.wait(120), "no answer in two minutes"
        return self


def ask(engine: Engine, prompt: Prompt, *, logits: bool = False, **sampling: Any) -> Sink:
    """An answer, alone."""
    return begin(engine, prompt, logits=logits, **sampling).wait()


def begin(engine: Engine, prompt: Prompt, *, logits: bool = False, **sampling: Any) -> Sink:
    """A request that runs."""
    sink = Sink()
    engine.submit(prompt, Sampling(**sampling), sink, sink.logits.append if logits else None)
    return sink


def prompt(rng: np.random.Generator, length: int, images: int = 0) -> Prompt:
    """Random ids with images at random places; `length` counts text alone."""
    ids = rng.integers(3, hub.PIECES, length).astype(np.int32)
    places = sorted(rng.integers(0, length, images))
    for place in reversed(places):
        ids = np.insert(ids, place, [IMAGE_TOKEN_ID] * IMAGE_TOKENS)
    return Prompt(ids, tuple(picture(rng) for _ in range(images)))


def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def whole_logits(
    prompt: Prompt, ids: list[int], seed: int = 0, config: LlavaConfig = hub.CONFIG
) -> np.ndarray:
    """Logits of a prompt and its answer by the model's own forward pass: of each of the answer's tokens, [n, V]."""
    graphdef, _ = llava.abstract(
        config, dtype="float32", param_dtype="float32", remat="none", attention="reference"
    )
    params = _params(config)
    row = np.concatenate([prompt.ids, np.array(ids[:-1], np.int32)])[None]
    images = np.stack(prompt.images)[None] if prompt.images else np.zeros((1, 0, SIDE, SIDE, 3), np.uint8)
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    logits = llava.merge(graphdef, params)(row, images, np.ones_like(row), positions)
    return np.asarray(logits)[0, len(prompt.ids) - 1 :]


def _params(config: LlavaConfig) -> dict[str, Any]:
    from jax.sharding import SingleDeviceSharding

    from vflax.weights.load import load_params

    _, shapes = llava.abstract(
        config, dtype="float32", param_dtype="float32", remat="none", attention="reference"
    )
    where = {path: SingleDeviceSharding(jax.devices()[0]) for path in shapes}
    return load_params(Source(config), config, where, {path: np.float32 for path in shapes})
