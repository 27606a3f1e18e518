"""What an engine runs on its devices: five compiled functions of static shapes.

    encode    one picture -> features, into a place of the store
    prefill   one chunk of a prompt per shard -> its keys and values, into pages
    admit     a request's settings -> its slot
    decode    up to STEPS tokens for a few slots, one after the other; chosen, and ends found, on the device

A prompt's last token is read by decode, not by prefill: so one function makes all logits. The number of rows that
decode works on decides how a matrix product is computed, hence the last bits of its results. One number for all, and
rows that do not look at each other, make a request's logits the same whatever else is answered; `Runner.start` finds
out which other numbers do.

Shapes: Z shards of the mesh's data axes, S slots of each, P pages of each, J pages of a slot's table, R rows of a
call per shard, C tokens of a chunk. Slot S belongs to nobody: calls are filled up with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vflax.generate import sample
from vflax.generate.fused import FusedLayer
from vflax.generate.paged import Pool, attend, write_and_attend, write_pages
from vflax.generate.sample import Array, Logprobs, Settings
from vflax.models import llava
from vflax.models.llama import DecoderLayer, rope_tables
from vflax.models.llava import Llava, LlavaConfig, Params
from vflax.models.lora import hold_as_integers
from vflax.sharding import BATCH_AXES, constrain, platform
from vflax.xla_options import compiler_options

# The most tokens that a call of decode writes for a row.
STEPS = 8


@dataclass(frozen=True)
class Layout:
    """Sizes that are fixed when an engine starts; Z, S, P and the rest are those above.

    page: tokens of a page; chunk: of a prefill, a multiple of it; block_pages: pages that attention takes at a time.
    table: J; store: pictures whose features are kept; max_length: tokens of prompt and answer together.
    """

    shards: int
    slots: int
    pages: int
    page: int
    chunk: int
    block_pages: int
    table: int
    store: int
    max_length: int


class Slots(NamedTuple):
    """What is known of each slot, [Z, S + 1, ...]; of one slot, NumPy's scalars and rows."""

    token: Array  # int32: the one to read next
    position: Array  # int32: its place in the sequence
    left: Array  # int32: tokens that may still be written; 0: it does not run
    drawn: Array  # int32: tokens that were written
    endless: Array  # bool: end tokens do not end it
    settings: Settings
    counts: Array  # int32 [Z, S + 1, V]: how often its answer holds each token
    seen: Array  # bool [Z, S + 1, V]: whether prompt or answer holds it


class Written(NamedTuple):
    """What a call of decode gave.

    tokens: int32 [Z, R, STEPS], -1 behind a row's last one.
    logprobs: of these, [Z, R, STEPS] and [Z, R, STEPS, N].
    logits: float32 [Z, R, V], of each row's last step.
    """

    tokens: jax.Array
    logprobs: Logprobs
    logits: jax.Array


class Model(NamedTuple):
    """The model taken apart: all but the decoder's layers, and these one by one.

    A scan over stacked layers would copy each layer's weights out of the stack at every token, where they are read but
    once.
    """

    graphdef: Any
    layer_graphdef: Any


class Weights(NamedTuple):
    """Their parameters: {path: array}, and {path inside a layer: array} of each layer."""

    rest: Params
    layers: tuple[Params, ...]


def merge_layer(graphdef: Any, params: Params) -> DecoderLayer:
    """Put a layer together; inside jit it happens only while tracing."""
    layer: Any = llava.merge(graphdef, params)
    return layer


def take_apart(config: LlavaConfig, dtype: Any, *, int8: bool = False, fused: bool = False) -> Model:
    """The model without its numbers, in 8 bits the decoder's layers if so, or fused; nothing is allocated."""
    kinds = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}

    def whole() -> Llava:
        model = Llava(config, rngs=nnx.Rngs(0), remat="none", attention="auto", **kinds)
        del model.decoder.layers
        return model

    def layer() -> DecoderLayer:
        kind = FusedLayer if fused else DecoderLayer
        found = kind(config.decoder, remat="none", rngs=nnx.Rngs(0), **kinds)
        if int8:
            hold_as_integers(found)
        return found

    return Model(*(nnx.split(nnx.eval_shape(make), nnx.Param)[0] for make in (whole, layer)))


class Programs:
    """The compiled functions of one model in one layout."""

    def __init__(
        self,
        config: LlavaConfig,
        model: Model,
        layout: Layout,
        stops: tuple[int, ...],
        store: Any,
        pools: Any,
        slots: Any,
    ) -> None:
        """
        Args:
            config: the model.
            model: taken apart.
            layout: sizes.
            stops: ids that end an answer.
            store, pools, slots: where these lie, as shardings; they stay there.
        """
        self.config, self.model, self.layout = config, model, layout
        # A GPU's host starts each step of a loop, and waits for the end of the one before where that decides whether
        # there is another. There decode has a fixed number of steps, in which rows may stand still.
        self.fixed_steps = platform(store.mesh) == "gpu"
        self._stops = np.array(stops, np.int32)
        everywhere = NamedSharding(store.mesh, PartitionSpec())
        jit = partial(jax.jit, compiler_options=compiler_options(platform(store.mesh)))
        self.encode = jit(self._encode, donate_argnames="store", out_shardings=store)
        self.prefill = jit(self._prefill, donate_argnames="pools", out_shardings=pools)
        self.admit = jit(self._admit, donate_argnames="slots", out_shardings=slots)
        self.decode = jit(
            self._decode,
            donate_argnames=("pools", "slots"),
            static_argnames="most",
            out_shardings=(pools, slots, everywhere),
        )

    def compiled(self) -> int:
        """How many programs were compiled so far."""
        functions: tuple[Any, ...] = (self.encode, self.prefill, self.admit, self.decode)
        return sum(function._cache_size() for function in functions)

    # --- pictures ---------------------------------------------------------------------------------------------------

    def _encode(self, weights: Weights, store: jax.Array, image: jax.Array, place: jax.Array) -> jax.Array:
        """uint8 [H, W, 3] -> its features, in the decoder's width, at `place` of the store [store, N, D]."""
        model = llava.merge(self.model.graphdef, weights.rest)
        # [1, 1, N, tower width] -> [N, D]
        features = model.bridge(model.features(image[None, None]))[0, 0]
        return jax.lax.dynamic_update_slice(store, features[None].astype(store.dtype), (place, 0, 0))

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prefill(
        self,
        weights: Weights,
        pools: tuple[Pool, ...],
        store: jax.Array,
        ids: jax.Array,
        features: jax.Array,
        table: jax.Array,
        start: jax.Array,
    ) -> tuple[Pool, ...]:
        """A chunk of a prompt for each shard.

        Args:
            weights: of the model.
            pools: of the layers.
            store: [store, N, D].
            ids: int32 [Z, C].
            features: int32 [Z, C], of image tokens the feature, as an index into the store's [store * N]; else -1.
            table: int32 [Z, J]; zeros where a shard has nothing to do.
            start: int32 [Z], the position of the first token, a multiple of C.
        """
        layout = self.layout
        model = llava.merge(self.model.graphdef, weights.rest)
        positions = start[:, None] + jnp.arange(layout.chunk)
        words = model.decoder.embed_tokens(jnp.maximum(ids, 0))
        # [store, N, D] -> [store * N, D] gathered by [Z, C] -> [Z, C, D]
        seen = store.reshape(-1, store.shape[-1])[jnp.maximum(features, 0)]
        x = constrain(jnp.where(features[..., None] >= 0, seen, words), BATCH_AXES)
        rope = rope_tables(self.config.decoder, positions)
        first = start // layout.page
        pages = jax.vmap(lambda own, at: jax.lax.dynamic_slice_in_dim(own, at, layout.chunk // layout.page))(
            table, first
        )
        written = []
        for own, pool in zip(weights.layers, pools, strict=True):
            layer = merge_layer(self.model.layer_graphdef, own)
            q, k, v = layer.project(x, rope)
            pool = write_pages(pool, k, v, pages)
            written.append(pool)
            # [Z, C, H, K] as one row of C tokens
            mixed = attend(q[:, None], pool, table[:, None], positions[:, None], layout.block_pages)[:, 0]
            x = constrain(layer.finish(x, mixed), BATCH_AXES)
        return tuple(written)

    # --- slots ------------------------------------------------------------------------------------------------------

    def _admit(self, slots: Slots, shard: jax.Array, slot: jax.Array, values: Slots) -> Slots:
        """Put `values`, of one slot, in the place of what a slot had."""
        return jax.tree.map(
            lambda of, new: jax.lax.dynamic_update_slice(
                of, new[None, None].astype(of.dtype), (shard, slot, *[0] * new.ndim)
            ),
            slots,
            values,
        )

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _decode(
        self,
        weights: Weights,
        pools: tuple[Pool, ...],
        slots: Slots,
        table: jax.Array,
        rows: jax.Array,
        steps: jax.Array,
        most: int = STEPS,
    ) -> tuple[tuple[Pool, ...], Slots, Written]:
        """Up to `steps` tokens for some slots; a slot whose answer ends writes no more.

        Args:
            weights: of the model.
            pools: of the layers.
            slots: all of them.
            table: int32 [Z, S + 1, J]; that of slot S is zeros.
            rows: int32 [Z, R], which slots; S fills up.
            steps: int32, at most `most`.
            most: of the loop where `fixed_steps`, at most STEPS; compiled in.
        """
        model = llava.merge(self.model.graphdef, weights.rest)
        layers = [merge_layer(self.model.layer_graphdef, own) for own in weights.layers]
        # [Z, S + 1, ...] gathered by [Z, R] -> [Z, R, ...]
        mine: Slots = jax.tree.map(lambda x: jax.vmap(lambda of, at: of[at])(x, rows), slots)
        tables = jax.vmap(lambda of, at: of[at])(table, rows)
        shape, vocab = rows.shape, self.config.decoder.vocab_size

        def more(step: jax.Array, mine: Slots) -> jax.Array:
            return (step < steps) & (mine.left > 0)

        def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
            step, pools, mine, written = state
            logits, pools = self._next(model, layers, pools, mine, tables)
            mine, written = self._take(step, more(step, mine), logits, mine, written)
            return step + 1, pools, mine, written

        number = min(sample.MAX_LOGPROBS, vocab)
        nothing = Written(
            jnp.full((*shape, STEPS), -1, jnp.int32),
            Logprobs(
                jnp.zeros((*shape, STEPS), jnp.float32),
                jnp.zeros((*shape, STEPS, number), jnp.float32),
                jnp.zeros((*shape, STEPS, number), jnp.int32),
            ),
            jnp.zeros((*shape, vocab), jnp.float32),
        )
        start = (jnp.int32(0), pools, mine, nothing)
        if self.fixed_steps:
            _, pools, mine, written = jax.lax.fori_loop(0, most, lambda _, state: advance(state), start)
        else:
            _, pools, mine, written = jax.lax.while_loop(
                lambda state: more(state[0], state[2]).any(), advance, start
            )
        slots = jax.tree.map(
            lambda x, new: jax.vmap(lambda of, at, to: of.at[at].set(to))(x, rows, new), slots, mine
        )
        return pools, slots, written

    def _next(
        self, model: Llava, layers: list[Any], pools: tuple[Pool, ...], mine: Slots, tables: jax.Array
    ) -> tuple[jax.Array, tuple[Pool, ...]]:
        """Logits float32 [Z, R, V] after each row's token, whose keys and values go into its pages."""
        shards, rows = mine.token.shape
        # Rows are one axis for the layers: [Z, R] -> [Z * R, 1]
        positions = mine.position.reshape(-1, 1)
        x = constrain(model.decoder.embed_tokens(mine.token.reshape(-1, 1)), BATCH_AXES)
        rope = rope_tables(self.config.decoder, positions)
        written = []
        for layer, pool in zip(layers, pools, strict=True):
            q, k, v = layer.project(x, rope)
            # [Z * R, 1, heads, K] -> [Z, R, heads, K]
            new_k, new_v = (y.reshape(shards, rows, *y.shape[2:]) for y in (k, v))
            queries = q.reshape(shards, rows, *q.shape[2:])
            mixed, pool = write_and_attend(
                queries, new_k, new_v, pool, tables, mine.position, self.layout.block_pages
            )
            written.append(pool)
            x = constrain(layer.finish(x, mixed.reshape(q.shape)), BATCH_AXES)
        logits = model.decoder.logits(model.decoder.norm(x[:, 0]))
        return logits.reshape(shards, rows, -1), tuple(written)

    def _take(
        self, step: jax.Array, runs: jax.Array, logits: jax.Array, mine: Slots, written: Written
    ) -> tuple[Slots, Written]:
        """Choose the next token of each row that runs, bool [Z, R]."""
        shape = mine.token.shape
        # [Z, R, ...] -> [Z * R, ...]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (logits, mine, runs))
        flat_logits, own, runs = flat
        token, chances = sample.choose(flat_logits, own.settings, own.drawn, own.counts, own.seen, runs)
        ended = (token[:, None] == self._stops).any(axis=-1) & ~own.endless
        row = jnp.arange(len(token))
        new = own._replace(
            token=jnp.where(runs, token, own.token),
            position=own.position + runs,
            left=jnp.where(ended & runs, 0, own.left - runs),
            drawn=own.drawn + runs,
            counts=own.counts.at[row, token].add(runs.astype(jnp.int32)),
            seen=own.seen.at[row, token].max(runs),
        )

        def put(of: jax.Array, x: jax.Array) -> jax.Array:
            return of.at[:, :, step].set(x.reshape(*shape, *x.shape[1:]))

        out = Written(
            put(written.tokens, jnp.where(runs, token, -1)),
            jax.tree.map(put, written.logprobs, chances),
            jnp.where(runs.reshape(*shape, 1), logits, written.logits),
        )
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), new), out
