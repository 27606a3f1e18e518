"""Attention on CPU for long rows: flash attention (arXiv 2205.14135, 2307.08691) in plain JAX.

The reference writes the scores of a whole row to memory, most of them of tokens that do not see one another: of a row
that packs eight samples, seven eighths. Here they are made block by block, and only between blocks of which some token
sees one of the other; which those are is known when the program runs, so the loops over them turn as often as the
segments ask.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vflax.sharding import on_own_rows_and_heads

# Tokens of a block: scores of one fit a core's cache, and products are still large.
BLOCK = 128
# Finite: a query that may look at nothing, as in a block where it sees none, then gets a plain mean instead of 0/0.
MASKED = -1e30
# Of what a row is filled up with, and padding's when blocks are compared: behind all others, so that a block which ends
# in padding does not seem to reach back to the first segment.
_LAST = jnp.iinfo(jnp.int32).max


class _Bounds(NamedTuple):
    """int32 [N], by block: the first block of keys that its queries see; the last of queries that see its keys."""

    first: jax.Array
    last: jax.Array


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, name: str) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over earlier tokens of a query's own segment; softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, T, KV, K]; H is a multiple of KV.
        segments: int32 [B, T]; None: all of a row is one.
        name: of output and log-sum-exp, for remat policies.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    if segments is None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    run = functools.partial(_rows, name=name)
    return on_own_rows_and_heads(run, k.shape[2])(q, k, v, segments)


def _rows(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, name: str) -> jax.Array:
    """The same for the rows and heads of one device."""
    rows, length, heads, width = q.shape
    kv_heads, room = k.shape[2], -length % BLOCK
    segments = jnp.pad(jnp.where(segments == 0, _LAST, segments), ((0, 0), (0, room)), constant_values=_LAST)
    q, k, v = (jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in (q, k, v))
    # [B, T, H, K] -> [B, T, KV, G, K] -> [B, KV, G, T, K]: G neighbouring query heads share one key head.
    q = q.reshape(rows, length + room, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    # [B, T, KV, K] -> [B, KV, T, K]
    mixed = _mix(name, q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), segments, _bounds(segments))
    # [B, KV, G, T, K] -> [B, T, KV, G, K] -> [B, T, H, K]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length + room, heads, width)[:, :length]


def _bounds(segments: jax.Array) -> _Bounds:
    """Of int32 [B, T] segments: no pair of blocks outside of them has a token that sees one of the other."""
    # [B, T] -> [B, N, b]
    blocks = segments.reshape(len(segments), -1, BLOCK)
    least, most = blocks.min(-1), blocks.max(-1)
    # [B, N, 1], [B, 1, N] -> [N, N]: whether in any row segments of queries can be those of keys.
    meet = ((most[:, :, None] >= least[:, None]) & (least[:, :, None] <= most[:, None])).any(0)
    meet &= jnp.tril(jnp.ones_like(meet))
    count = len(meet)
    # The first and the last true place of a row, and of a column; every block meets itself.
    first, last = jnp.argmax(meet, axis=1), count - 1 - jnp.argmax(meet[::-1], axis=0)
    return _Bounds(first.astype(jnp.int32), last.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
    name: str, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, bounds: _Bounds
) -> jax.Array:
    """q [B, KV, G, T, K]; k, v [B, KV, T, K]; segments [B, T] -> [B, KV, G, T, K]; T a multiple of BLOCK."""
    return _forward(name, q, k, v, segments, bounds)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, _Bounds, jax.Array, jax.Array]


def _forward(
    name: str, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, bounds: _Bounds
) -> tuple[jax.Array, _Residuals]:
    shape = (*q.shape[:3], BLOCK)

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = _block(q, i)

        def keys(
            j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            mixed, largest, total = carry
            scores = _scores(own, _block(k, j), segments, i, j)
            new = jnp.maximum(largest, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            # [B, KV, G, t, u] x [B, KV, u, K] -> [B, KV, G, t, K]
            more = jnp.einsum(
                "bngtu,bnuk->bngtk", weights.astype(v.dtype), _block(v, j), preferred_element_type=jnp.float32
            )
            return mixed * shrink[..., None] + more, new, total * shrink + weights.sum(-1)

        # The block of the queries themselves comes last, and there each sees itself: what a fully masked block left
        # before is then shrunk to nothing.
        start = (
            jnp.zeros((*shape, q.shape[-1]), jnp.float32),
            jnp.full(shape, MASKED),
            jnp.zeros(shape, jnp.float32),
        )
        mixed, largest, total = jax.lax.fori_loop(bounds.first[i], i + 1, keys, start)
        return (mixed / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    out, log_sum = jax.lax.map(queries, jnp.arange(len(bounds.first)))
    out, log_sum = checkpoint_name(_joined(out, 3), name), checkpoint_name(_joined(log_sum, 3), name)
    return out, (q, k, v, segments, bounds, out, log_sum)


def _backward(
    name: str, residuals: _Residuals, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, segments, bounds, out, log_sum = residuals
    # [B, KV, G, T, K] -> [B, KV, G, T]: sum over keys of weight times its gradient.
    through_sum = (grad.astype(jnp.float32) * out).sum(-1)

    def keys(d_q: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        own_k, own_v = _block(k, j), _block(v, j)

        def queries(
            i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            d_q, d_k, d_v = carry
            own_q, own_grad = _block(q, i), _block(grad, i)
            weights = jnp.exp(_scores(own_q, own_k, segments, i, j) - _block(log_sum, i, -1)[..., None])
            # [B, KV, G, t, K] x [B, KV, u, K] -> [B, KV, G, t, u]
            d_weights = jnp.einsum("bngtk,bnuk->bngtu", own_grad, own_v, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - _block(through_sum, i, -1)[..., None]) * scale(q)
            d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
            # [B, KV, G, t, u] x [B, KV, G, t, K] -> [B, KV, u, K]
            d_v += jnp.einsum("bngtu,bngtk->bnuk", weights, own_grad, preferred_element_type=jnp.float32)
            d_k += jnp.einsum("bngtu,bngtk->bnuk", d_scores, own_q, preferred_element_type=jnp.float32)
            # [B, KV, G, t, u] x [B, KV, u, K] -> [B, KV, G, t, K]
            more = jnp.einsum("bngtu,bnuk->bngtk", d_scores, own_k, preferred_element_type=jnp.float32)
            d_q = jax.lax.dynamic_update_slice_in_dim(d_q, _block(d_q, i) + more, i * BLOCK, axis=3)
            return d_q, d_k, d_v

        nothing = jnp.zeros(own_k.shape, jnp.float32)
        d_q, d_k, d_v = jax.lax.fori_loop(j, bounds.last[j] + 1, queries, (d_q, nothing, nothing))
        return d_q, (d_k, d_v)

    d_q, (d_k, d_v) = jax.lax.scan(keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(len(bounds.last)))
    return d_q.astype(q.dtype), _joined(d_k, 2).astype(k.dtype), _joined(d_v, 2).astype(v.dtype), None, None


_mix.defvjp(_forward, _backward)


def _block(x: jax.Array, i: jax.Array, axis: int = -2) -> jax.Array:
    """Block i of an array whose `axis` is T."""
    return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis=axis)


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """Blocks one behind the other: [N, ..., b, ...] -> [..., N * b, ...], with N * b at `axis` of the result."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _scores(q: jax.Array, k: jax.Array, segments: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Of block i of queries [B, KV, G, b, K] and block j of keys [B, KV, b, K]: float32 [B, KV, G, b, b]."""
    places = jnp.arange(BLOCK)
    order = i * BLOCK + places[:, None] >= j * BLOCK + places
    # [B, b, 1] == [B, 1, b] -> [B, 1, 1, b, b]
    same = _block(segments, i, -1)[:, :, None] == _block(segments, j, -1)[:, None]
    # [B, KV, G, t, K] x [B, KV, u, K] -> [B, KV, G, t, u]
    scores = jnp.einsum("bngtk,bnuk->bngtu", q, k, preferred_element_type=jnp.float32) * scale(q)
    return jnp.where((same & order)[:, None, None], scores, MASKED)


def scale(q: jax.Array) -> float:
    """What scores of queries [..., K] are multiplied with."""
    return 1.0 / math.sqrt(q.shape[-1])
