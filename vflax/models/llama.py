"""The decoder: LLaMA (Touvron et al., arXiv 2302.13971, 2307.09288); Vicuna, Llama 3 and Mistral fit too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vflax.errors import UserError
from vflax.models.attention import attention, platform
from vflax.models.layers import (
    KERNEL_INIT,
    RMSNorm,
    are_plain,
    inputs_anew,
    linear,
    recomputes_products,
    scan_layers,
    stack,
)
from vflax.models.lora import fold
from vflax.models.mlp import DecoderMlp
from vflax.models.product import product
from vflax.sharding import BATCH_AXES, constrain
from vflax.values import COUNT, FLAG, LAYERS, OBJECT, POSITIVE, TEXT, Kind


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for long contexts; the last three belong to "llama3" only."""

    kind: str
    factor: float
    low_freq_factor: float | None
    high_freq_factor: float | None
    original_max_positions: int | None

    def __post_init__(self) -> None:
        llama3 = (self.low_freq_factor, self.high_freq_factor, self.original_max_positions)
        if self.kind not in ("linear", "llama3"):
            raise UserError(f"rope scaling {self.kind!r} is not supported: expected 'linear' or 'llama3'")
        if self.kind == "llama3" and None in llama3:
            raise UserError(
                "rope scaling 'llama3' needs low_freq_factor, high_freq_factor and original_max_positions"
            )
        if self.kind == "linear" and llama3 != (None, None, None):
            raise UserError("rope scaling 'linear' takes a factor only")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise UserError(
                f"rope scaling 'llama3': low_freq_factor={low} must be below high_freq_factor={high}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-shaped decoder. head_dim need not be width / num_heads."""

    vocab_size: int
    width: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"decoder config: num_heads={self.num_heads} is no multiple "
                f"of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"decoder config: head_dim={self.head_dim} is odd, rotary positions need pairs")


# What the fields of a DecoderConfig, and of its RopeScaling, that come from a file must be.
DECODER_KINDS: dict[str, Kind] = {
    "vocab_size": COUNT,
    "width": COUNT,
    "mlp_dim": COUNT,
    "num_layers": LAYERS,
    "num_heads": COUNT,
    "num_kv_heads": COUNT,
    "head_dim": COUNT,
    "norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "rope_scaling": OBJECT.or_null(),
    "max_positions": COUNT,
    "tie_word_embeddings": FLAG,
}
ROPE_KINDS: dict[str, Kind] = {
    "kind": TEXT,
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE.or_null(),
    "high_freq_factor": POSITIVE.or_null(),
    "original_max_positions": COUNT.or_null(),
}


class Cache(NamedTuple):
    """Keys and values of every layer, each [L, B, C, KV, K]; C is the capacity in tokens."""

    k: jax.Array
    v: jax.Array


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotary frequencies, float32 [K/2] (Su et al., arXiv 2104.09864), with the config's scaling applied.

    The llama3 rule is the one of Meta's reference code: wavelengths below original/high are kept, those above
    original/low are divided by factor, between them the two are blended linearly in original/wavelength.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return stretched
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions
    assert low is not None and high is not None and original is not None  # RopeScaling has checked it
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * stretched + blend * frequencies).astype(np.float32)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, sin with the sign that `rotate` wants: int [B, T] -> float32 [B, T, 1, K] each."""
    # [B, T, 1, 1] x [K/2] -> [B, T, 1, K/2]
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


@jax.custom_vjp
def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate [B, T, H, K] in float32; pair i is (x[i], x[i + K/2]), the rotate-half form of HF weights."""
    cos, sin = rope
    return (x.astype(jnp.float32) * cos + _halves_swapped(x) * sin).astype(x.dtype)


def _rotate_backward(
    rope: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, tuple[None, None]]:
    # A rotation's transpose is the rotation back.
    return rotate(grad, (rope[0], -rope[1])), (None, None)


rotate.defvjp(lambda x, rope: (rotate(x, rope), rope), _rotate_backward)


def _halves_swapped(x: jax.Array) -> jax.Array:
    """[..., K] -> float32 [..., K], of which the second half of x comes first."""
    width = x.shape[-1]
    if platform() != "tpu":
        return jnp.roll(x.astype(jnp.float32), width // 2, axis=-1)
    # Heads are as wide as a TPU's lanes. Arrays of half a head would be padded to whole ones and written to memory; a
    # product with a permutation, which is exact, is not, and goes on into the rotation's sums.
    swap = np.roll(np.eye(width), width // 2, axis=1)
    exact = jax.lax.Precision.HIGHEST
    # [..., K] x [K, K] -> [..., K]
    return jnp.matmul(x, swap.astype(x.dtype), precision=exact, preferred_element_type=jnp.float32)


class DecoderAttention(nnx.Module):
    """The four projections of grouped-query attention; the mixing itself is `attention`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, **dtypes: Any) -> None:
        width, q_width = config.width, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q = linear(width, q_width, use_bias=False, rngs=rngs, **dtypes)
        self.k = linear(width, kv_width, use_bias=False, rngs=rngs, **dtypes)
        self.v = linear(width, kv_width, use_bias=False, rngs=rngs, **dtypes)
        self.o = linear(q_width, width, use_bias=False, rngs=rngs, **dtypes)


class DecoderLayer(nnx.Module):
    """A pre-norm block, cut in two where training and decoding differ: what the queries look at."""

    def __init__(self, config: DecoderConfig, *, remat: str, rngs: nnx.Rngs, **dtypes: Any) -> None:
        self.input_norm = RMSNorm(config.width, config.norm_eps, **dtypes)
        self.attention = DecoderAttention(config, rngs=rngs, **dtypes)
        self.post_attention_norm = RMSNorm(config.width, config.norm_eps, **dtypes)
        self.recomputed = recomputes_products(remat)
        self.mlp = DecoderMlp(config.width, config.mlp_dim, recomputed=self.recomputed, rngs=rngs, **dtypes)
        self.head_dim = config.head_dim

    def project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> rotated q [B, T, H, K], rotated k and v [B, T, KV, K]."""
        # Adapters are not linear in what they keep: they would be computed once more.
        anew = self.recomputed and are_plain(self.attention.q, self.attention.k, self.attention.v)
        q, k, v = inputs_anew(DecoderLayer._queries_keys_values, anew)(self, x)
        split = (*x.shape[:2], -1, self.head_dim)
        return rotate(q.reshape(split), rope), rotate(k.reshape(split), rope), v.reshape(split)

    def _queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = self.input_norm(x)
        return self.attention.q(h), self.attention.k(h), self.attention.v(h)

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Residual x [B, T, D] and what attention mixed [B, T, H, K] -> [B, T, D]."""
        x = x + self.attention.o(mixed.reshape(*x.shape[:2], -1))
        return x + self.mlp(self.post_attention_norm(x))


class Embedding(nnx.Module):
    """A table of token embeddings [V, D]."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        self.embedding = nnx.Param(KERNEL_INIT(rngs.params(), (vocab_size, width), param_dtype))
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [B, T], each in [0, V) -> [B, T, D]; rows are gathered first and cast after."""
        return self.embedding[...][ids].astype(self.dtype)


class Decoder(nnx.Module):
    """LLaMA from embeddings to logits: over whole rows, or token by token with a cache."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
        attention: str,
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed_tokens = Embedding(config.vocab_size, config.width, rngs=rngs, **dtypes)
        self.layers = stack(
            lambda rngs: DecoderLayer(config, remat=remat, rngs=rngs, **dtypes), config.num_layers, rngs
        )
        self.norm = RMSNorm(config.width, config.norm_eps, **dtypes)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.width, config.vocab_size, use_bias=False, rngs=rngs, **dtypes)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.backend = attention

    def __call__(
        self, x: jax.Array, segments: jax.Array, positions: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
            x: embeddings [B, T, D].
            segments: int [B, T]; tokens see earlier tokens of their own segment only.
            positions: int [B, T], restarting with each segment.
            keys: of the adapters' dropout, key array [B]; None: without dropout.

        Returns:
            [B, T, D] in the compute dtype.
        """
        rope = rope_tables(self.config, positions)
        mix = partial(attention, q_segments=segments, kv_segments=segments, causal=True, backend=self.backend)

        def body(layer: DecoderLayer, x: jax.Array) -> jax.Array:
            return constrain(layer.finish(x, mix(*layer.project(x, rope))), BATCH_AXES)

        per_layer = None if keys is None else fold(keys, self.config.num_layers)
        return self.norm(scan_layers(body, self.layers, constrain(x, BATCH_AXES), self.remat, per_layer))

    def prefill(
        self, x: jax.Array, segments: jax.Array, positions: jax.Array, capacity: int
    ) -> tuple[jax.Array, Cache]:
        """As __call__, and every layer's keys and values at the front of a cache of `capacity` tokens."""
        rope = rope_tables(self.config, positions)
        mix = partial(attention, q_segments=segments, kv_segments=segments, causal=True, backend=self.backend)

        def body(x: jax.Array, layer: DecoderLayer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            q, k, v = layer.project(x, rope)
            return constrain(layer.finish(x, mix(q, k, v)), BATCH_AXES), (k, v)

        x, (k, v) = jax.lax.scan(body, constrain(x, BATCH_AXES), self.layers)
        # [L, B, T, KV, K] -> [L, B, C, KV, K]
        room = ((0, 0), (0, 0), (0, capacity - x.shape[1]), (0, 0), (0, 0))
        return self.norm(x), Cache(jnp.pad(k, room), jnp.pad(v, room))

    def decode(
        self, x: jax.Array, cache: Cache, slot: jax.Array, kv_segments: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One more token for each row.

        Args:
            x: embeddings of the new tokens [B, 1, D].
            cache: what earlier tokens left; the new tokens go to index `slot` in every row.
            slot: int scalar below the cache's capacity.
            kv_segments: int [B, C]; 1 where the cache holds a token of the row (index `slot` included).
            positions: int [B, 1], the new tokens' rotary positions.

        Returns:
            Hidden states after the final norm [B, 1, D], and the cache with the new tokens in it.
        """
        rope = rope_tables(self.config, positions)
        ones = jnp.ones_like(positions)

        # The cache is carried, not scanned over: XLA then writes one token in place, not a whole new cache.
        def body(
            carry: tuple[jax.Array, Cache], xs: tuple[DecoderLayer, jax.Array]
        ) -> tuple[tuple[jax.Array, Cache], None]:
            (x, cache), (layer, index) = carry, xs
            q, k, v = layer.project(x, rope)
            start = (index, 0, slot, 0, 0)
            cache = Cache(
                jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start),
                jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start),
            )
            mixed = attention(
                q,
                jax.lax.dynamic_index_in_dim(cache.k, index, keepdims=False).astype(q.dtype),
                jax.lax.dynamic_index_in_dim(cache.v, index, keepdims=False).astype(q.dtype),
                q_segments=ones,
                kv_segments=kv_segments,
                causal=False,
                backend="reference",  # one query per row: nothing for a kernel to save
            )
            return (layer.finish(x, mixed), cache), None

        indices = jnp.arange(self.config.num_layers)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (self.layers, indices))
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states after the final norm [..., D] -> float32 [..., V]."""
        # [..., D] x [D, V] -> [..., V], accumulated and kept in float32
        return product(hidden.astype(self.dtype), self.head(), preferred_element_type=jnp.float32)

    def head(self) -> jax.Array:
        """The kernel that makes logits, [D, V] in the compute dtype."""
        tied = self.config.tie_word_embeddings
        kernel = self.embed_tokens.embedding[...].T if tied else self.lm_head.kernel[...]
        return kernel.astype(self.dtype)
