"""A decoder layer for few rows: what is computed from one input is one product, so that fewer weights are waited for.

An answer's time is that of reading the weights, and a large kernel is read faster than several small ones. With kernels
spread over devices along their outputs, each device would have to hold its part of each: there layers stay as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vflax.models.layers import linear
from vflax.models.llama import DecoderConfig, DecoderLayer, rotate
from vflax.models.mlp import swiglu

# {fused linear: those of `DecoderLayer` that it holds, one after the other along the outputs}
FUSED = {
    "attention/qkv": ("attention/q", "attention/k", "attention/v"),
    "mlp/gate_up": ("mlp/gate", "mlp/up"),
}


class FusedAttention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, **dtypes: Any) -> None:
        width, heads = config.width, config.num_heads + 2 * config.num_kv_heads
        self.qkv = linear(width, heads * config.head_dim, use_bias=False, rngs=rngs, **dtypes)
        self.o = linear(config.num_heads * config.head_dim, width, use_bias=False, rngs=rngs, **dtypes)


class FusedMlp(nnx.Module):
    def __init__(self, width: int, mlp_dim: int, *, rngs: nnx.Rngs, **dtypes: Any) -> None:
        self.gate_up = linear(width, 2 * mlp_dim, use_bias=False, rngs=rngs, **dtypes)
        self.down = linear(mlp_dim, width, use_bias=False, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]"""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(swiglu(gate, up))


class FusedLayer(DecoderLayer):
    """`DecoderLayer` with the linears of `FUSED`."""

    def __init__(self, config: DecoderConfig, *, remat: str, rngs: nnx.Rngs, **dtypes: Any) -> None:
        super().__init__(config, remat=remat, rngs=rngs, **dtypes)
        self.attention: Any = FusedAttention(config, rngs=rngs, **dtypes)
        self.mlp: Any = FusedMlp(config.width, config.mlp_dim, rngs=rngs, **dtypes)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads

    def project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `DecoderLayer`."""
        # [B, T, D] -> [B, T, H + 2 KV, K]
        heads = self.attention.qkv(self.input_norm(x)).reshape(*x.shape[:2], -1, self.head_dim)
        q, kv = self.num_heads, self.num_heads + self.num_kv_heads
        rotated = rotate(heads[:, :, :kv], rope)
        return rotated[:, :, :q], rotated[:, :, q:], heads[:, :, kv:]
