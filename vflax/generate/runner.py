"""A model on its devices, with its cache and slots: what an engine's programs run on. It knows nothing of requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.paged import Pool
from vflax.generate.programs import STEPS, Layout, Programs, Slots, Weights, Written, take_apart
from vflax.generate.request import Sampling
from vflax.generate.sample import Settings
from vflax.generate.sizes import EngineSettings, layout_of, reference_size, row_sizes
from vflax.models.llava import LlavaConfig
from vflax.sharding import BATCH_AXES, platform

Table = np.ndarray
"""int32 [Z, S + 1, J]: the pages of each slot; those of slot S are zeros."""


class Runner:
    """Weights, key-value cache, features of pictures and the state of slots, all on a mesh."""

    def __init__(
        self,
        config: LlavaConfig,
        weights: Weights,
        mesh: Mesh,
        dtype: Any,
        settings: EngineSettings,
        stops: tuple[int, ...],
    ) -> None:
        """Allocate; nothing is compiled yet.

        Args:
            config: the model.
            weights: from `vflax.generate.weights.load_weights`.
            mesh: what they lie on.
            dtype: of what is computed, and of the cache unless that has 8 bits.
            settings: sizes.
            stops: ids that end an answer.

        Raises:
            UserError: for settings that are impossible.
        """
        self.config, self.mesh = config, mesh
        self.layout = layout_of(settings, config, mesh, dtype)
        self._weights = weights
        int8 = any(leaf.dtype == jnp.int8 for layer in weights.layers for leaf in layer.values())
        with jax.set_mesh(mesh):
            fused = "attention/qkv/kernel" in weights.layers[0]
            model = take_apart(config, dtype, int8=int8, fused=fused)
        shapes = state_of(config, self.layout, mesh, dtype, int8_cache=settings.int8_cache)
        self._store, self._pools, self._slots = jax.tree.map(_zeros, shapes)
        places = jax.tree.map(lambda x: x.sharding, shapes)
        self._programs = Programs(config, model, self.layout, stops, *places)

    @property
    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return self._programs.compiled()

    def encode(self, image: np.ndarray, place: int) -> None:
        """Features of a picture, uint8 [H, W, 3], into a place of the store."""
        self._store = self._programs.encode(self._weights, self._store, image, np.int32(place))

    def prefill(self, ids: np.ndarray, features: np.ndarray, table: np.ndarray, start: np.ndarray) -> None:
        """A chunk of a prompt for each shard; see `Programs`."""
        self._pools = self._programs.prefill(
            self._weights, self._pools, self._store, ids, features, table, start
        )

    def admit(self, shard: int, slot: int, ids: np.ndarray, sampling: Sampling, most: int) -> None:
        """A slot begins to answer a prompt that was read but for its last token, with at most `most` tokens."""
        values = _slot_values(ids, sampling, most, self.config.decoder.vocab_size)
        self._slots = self._programs.admit(self._slots, np.int32(shard), np.int32(slot), values)

    def steps(self, wanted: int, first: bool) -> int:
        """How many tokens a call of decode had better write.

        Args:
            wanted: so many, or 1, would be right.
            first: for some rows it is the first, for which somebody waits.
        """
        if self._programs.fixed_steps:
            return 1 if first else STEPS
        return min(STEPS, max(1, wanted))

    def decode(self, table: Table, chosen: Sequence[Sequence[int]], size: int, steps: int) -> Written:
        """Up to `steps` tokens for at most `size` slots of each shard; returns before they are there."""
        most = steps if self._programs.fixed_steps else STEPS
        rows = np.full((self.layout.shards, size), self.layout.slots, np.int32)
        for shard, slots in enumerate(chosen):
            rows[shard, : len(slots)] = slots
        self._pools, self._slots, written = self._programs.decode(
            self._weights, self._pools, self._slots, table, rows, np.int32(steps), most=most
        )
        return written

    # --- row sizes --------------------------------------------------------------------------------------------------

    def start(self, which: str) -> tuple[int, ...]:
        """Compile all programs by running them on a made-up prompt.

        Args:
            which: "any": all row sizes; "equal": those that give the same bits as `reference_size`.

        Returns:
            the row sizes that decode may be called with, rising.
        """
        layout, vocab = self.layout, self.config.decoder.vocab_size
        side, rng = self.config.vision.image_size, np.random.default_rng(0)
        self.encode(np.zeros((side, side, 3), np.uint8), 0)
        # All slots begin with the same chunk; behind it each has a page of its own.
        table = np.zeros((layout.shards, layout.slots + 1, layout.table), np.int32)
        shared = layout.chunk // layout.page
        table[:, :-1, :shared] = 1 + np.arange(shared)
        table[:, :-1, shared] = 1 + shared + np.arange(layout.slots)
        ids = rng.integers(0, vocab, (layout.shards, layout.chunk)).astype(np.int32)
        self.prefill(ids, np.full_like(ids, -1), table[:, 0].copy(), np.zeros(layout.shards, np.int32))
        tokens = rng.integers(0, vocab, (layout.shards, layout.slots))
        where = platform(self.mesh)
        sizes = row_sizes(where, layout.slots)
        reference = self._logits(table, tokens, reference_size(where, sizes))
        equal = [size for size in sizes if np.array_equal(self._logits(table, tokens, size), reference)]
        chosen = tuple(sizes if which == "any" else equal)
        for size in chosen if self._programs.fixed_steps else ():
            self.decode(table, [[]] * layout.shards, size, STEPS)
        return chosen

    def chunk_seconds(self) -> float:
        """How long it takes to read the first chunk of a prompt."""
        layout = self.layout
        ids = np.zeros((layout.shards, layout.chunk), np.int32)
        nobody = np.zeros((layout.shards, layout.table), np.int32)
        began = time.perf_counter()
        self.prefill(ids, ids - 1, nobody, np.zeros(layout.shards, np.int32))
        jax.block_until_ready(self._pools)
        return time.perf_counter() - began

    def _logits(self, table: Table, tokens: np.ndarray, size: int) -> np.ndarray:
        """Logits after a chunk and one token in each slot, computed `size` rows at a time: float32 [Z, S, V]."""
        layout, found = self.layout, []
        for slot, shard in itertools.product(range(layout.slots), range(layout.shards)):
            ids = np.full(layout.chunk + 1, tokens[shard, slot], np.int32)
            self.admit(shard, slot, ids, Sampling(), 1)
        for first in range(0, layout.slots, size):
            slots = list(range(first, min(first + size, layout.slots)))
            written = self.decode(table, [slots] * layout.shards, size, 1)
            found.append(np.asarray(written.logits)[:, : len(slots)])
        return np.concatenate(found, axis=1)


def state_of(
    config: LlavaConfig, layout: Layout, mesh: Mesh, dtype: Any, *, int8_cache: bool
) -> tuple[Any, tuple[Pool, ...], Slots]:
    """Store, pools and slots, as `Programs` knows them: jax.ShapeDtypeStruct with where they lie; nothing is allocated.

    Args:
        config: the model.
        layout: sizes.
        mesh: slots and pages are spread over its data axes, key heads over `tensor` where it divides them.
        dtype: of features, and of keys and values unless these have 8 bits.
        int8_cache: they do.
    """
    decoder = config.decoder
    tensor = "tensor" if decoder.num_kv_heads % mesh.shape["tensor"] == 0 else None

    def array(shape: tuple[int, ...], of: Any, *spec: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def pool() -> Pool:
        shape = (layout.shards, layout.pages, decoder.num_kv_heads, layout.page, decoder.head_dim)
        kind = jnp.int8 if int8_cache else dtype
        k, v = (array(shape, kind, BATCH_AXES, None, tensor) for _ in range(2))
        if not int8_cache:
            return Pool(k, v)
        return Pool(k, v, *(array(shape[:-1], jnp.float32, BATCH_AXES, None, tensor) for _ in range(2)))

    store = array((layout.store, config.vision.num_tokens, decoder.width), dtype)
    empty = _slot_values(np.zeros(1, np.int32), Sampling(), 0, decoder.vocab_size)
    slots: Slots = jax.tree.map(
        lambda x: array((layout.shards, layout.slots + 1, *x.shape), x.dtype, BATCH_AXES), empty
    )
    return store, tuple(pool() for _ in range(decoder.num_layers)), slots


def _zeros(shape: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=shape.sharding)()


def _slot_values(ids: np.ndarray, sampling: Sampling, most: int, vocab: int) -> Slots:
    """What decode has to know of a request whose prompt was read but for its last token."""
    seed = sampling.seed % 2**64
    seen = np.zeros(vocab, bool)
    seen[ids[ids != IMAGE_TOKEN_ID]] = True
    settings = Settings(
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(min(sampling.top_k, vocab)),
        top_p=np.float32(sampling.top_p),
        repetition=np.float32(sampling.repetition_penalty),
        presence=np.float32(sampling.presence_penalty),
        frequency=np.float32(sampling.frequency_penalty),
        seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        logprobs=np.bool_(sampling.logprobs is not None),
    )
    return Slots(
        token=np.int32(ids[-1]),
        position=np.int32(len(ids) - 1),
        left=np.int32(most),
        drawn=np.int32(0),
        endless=np.bool_(sampling.ignore_eos),
        settings=settings,
        counts=np.zeros(vocab, np.int32),
        seen=seen,
    )
