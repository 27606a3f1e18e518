"""One attention function, several backends.

Which key a query may look at, for a row that packs two samples (segments 1 and 2) and one padding token (0):

            keys   1 1 1 2 2 0
        query 1    x . . . . .
              1    x x . . . .
              1    x x x . . .
              2    . . . x . .
              2    . . . x x .
              0    . . . . . x

A padding query sees itself, so no row of the softmax is ever empty and nothing can become NaN.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vflax.errors import UserError

BACKENDS = ("auto", "reference", "cudnn")

# Finite: a query that may look at nothing then gets a plain mean instead of 0/0.
_MASKED = -1e30
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
# The largest head that cuDNN's flash attention takes on every GPU generation since Ampere.
_CUDNN_MAX_HEAD_DIM = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool,
    backend: str,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, kept inside segments; softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, U, KV, K]; H is a multiple of KV (grouped queries, arXiv 2305.13245).
        q_segments, kv_segments: int [B, T] and [B, U]; a query sees keys of its own segment only.
            None (both): every key is seen.
        causal: a query also sees no key at a later index (T == U).
        backend: "reference" (anywhere), "cudnn" (GPU, bfloat16 or float16) or "auto" (by platform).

    Returns:
        [B, T, H, K] in q's dtype.

    Raises:
        UserError: an unknown backend, or "cudnn" where it cannot run.
    """
    chosen = _choose(q, backend)
    mask = _mask(q, k, q_segments, kv_segments, causal)
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _reference(q, k, v, mask)


def check_backend(backend: str) -> None:
    """Raise UserError unless `backend` names a backend that this process can run."""
    if backend not in BACKENDS:
        raise UserError(f"attention={backend!r} is not a backend: choose one of {', '.join(BACKENDS)}")
    if backend == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"attention='cudnn' needs an NVIDIA GPU, but this process runs on {jax.default_backend()}: "
            "use attention='auto' or attention='reference'"
        )


def _choose(q: jax.Array, backend: str) -> str:
    check_backend(backend)
    obstacle = _cudnn_obstacle(q)
    if backend == "auto":
        return "cudnn" if jax.default_backend() == "gpu" and obstacle is None else "reference"
    if backend == "cudnn" and obstacle is not None:
        raise UserError(f"attention='cudnn' cannot run this: {obstacle}; use attention='auto'")
    return backend


def _cudnn_obstacle(q: jax.Array) -> str | None:
    _, length, _, head_dim = q.shape
    if q.dtype not in _CUDNN_DTYPES:
        return f"it needs bfloat16 or float16, the model computes in {q.dtype}"
    if head_dim % 8 or head_dim > _CUDNN_MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {_CUDNN_MAX_HEAD_DIM}, it is {head_dim}"
    if length % 2:
        return f"it needs an even number of tokens, there are {length}"
    return None


def _mask(
    q: jax.Array, k: jax.Array, q_segments: jax.Array | None, kv_segments: jax.Array | None, causal: bool
) -> jax.Array | None:
    mask = None
    if q_segments is not None and kv_segments is not None:
        # [B, T, 1] == [B, 1, U] -> [B, 1, T, U]
        mask = (q_segments[:, :, None] == kv_segments[:, None, :])[:, None]
    if causal:
        order = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
        mask = order if mask is None else mask & order
    return mask


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # [B, T, H, K] -> [B, T, KV, G, K]: G neighbouring query heads share one key head.
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    # [B, T, KV, G, K] x [B, U, KV, K] -> [B, KV, G, T, U]
    scores = jnp.einsum("btngk,bunk->bngtu", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * (1.0 / math.sqrt(head_dim))
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    # [B, KV, G, T, U] x [B, U, KV, K] -> [B, T, KV, G, K] -> [B, T, H, K]
    return jnp.einsum("bngtu,bunk->btngk", weights, v).reshape(batch, length, heads, head_dim)
