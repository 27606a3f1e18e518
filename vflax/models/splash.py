"""Attention on TPU: JAX's splash kernel under shard_map.

The kernel never writes the scores to memory, and skips the blocks above a causal diagonal. GSPMD cannot partition a
Pallas kernel, so each device runs it on its own rows and heads (`shard_map`). What its backward pass needs of the
forward one, output and log-sum-exp, has a name by which a remat policy keeps it; else the forward kernel would run
twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from vflax.constants import LANES
from vflax.sharding import on_own_rows_and_heads

# Of what a row is filled up with: no segment has it, so nothing that counts sees it.
_BEYOND = -1


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    name: str,
    *,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the tokens of a query's own segment; softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, T, KV, K]; H is a multiple of KV.
        segments: int32 [B, T]; None: all of a row is one.
        name: of output and log-sum-exp, for remat policies.
        causal: a query sees no later token.
        interpret: run the kernel's program step by step on any platform, to test it.

    Returns:
        [B, T, H, K] in q's dtype.
    """
    length = q.shape[1]
    if segments is None:
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    block, room = _block(length, causal), beyond(length, causal)
    if room:
        q, k, v = (jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, room)), constant_values=_BEYOND)
    # The kernel takes q as it is; scaled in float32, so that it is rounded once.
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    run = functools.partial(_rows, name=name, block=block, causal=causal, interpret=interpret)
    return on_own_rows_and_heads(run, k.shape[2])(q, k, v, segments)[:, :length]


def beyond(length: int, causal: bool) -> int:
    """Tokens that a row is short of whole blocks."""
    return -length % _block(length, causal)


def _block(length: int, causal: bool) -> int:
    """Tokens of a block: a causal row in several, so that some can be skipped; another in one, where it is short."""
    return min(512 if causal else 1024, math.ceil(length / LANES) * LANES)


def _rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    name: str,
    block: int,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """The same for the rows and heads of one device, T a multiple of `block`."""
    kernel = _kernel(q.shape[2], q.shape[1], name, block, causal, interpret)

    def row(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array) -> jax.Array:
        return kernel(q, k, v, kernels.SegmentIds(own, own))

    # [B, T, H, K] -> [B, H, T, K]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    mixed = with_finished_residuals(jax.vmap(row))(q, k, v, segments)
    return mixed.transpose(0, 2, 1, 3)


def with_finished_residuals(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, what its backward pass needs of the forward one being made when its result is.

    The kernel writes every log-sum-exp LANES times in float32, twice the memory of its output where heads are 128 wide,
    and one of them is needed. Left to itself the compiler takes that one out in the backward pass, and holds all until
    then.
    """

    finished = jax.custom_vjp(run)

    def forward(*inputs: Any) -> Any:
        return jax.lax.optimization_barrier(jax.vjp(run, *inputs))

    finished.defvjp(forward, lambda back, grad: back(grad))
    return finished


def _kernel(
    heads: int, length: int, name: str, block: int, causal: bool, interpret: bool
) -> Callable[..., Any]:
    of_a_head = masks.CausalMask if causal else masks.FullMask
    mask = masks.MultiHeadMask([of_a_head((length, length)) for _ in range(heads)])
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return kernels.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )


def flops(rows: int, length: int, heads: int, head_dim: int, passes: float, *, causal: bool) -> float:
    """Floating-point operations of the kernel, with `passes` 1 for forward, 3.5 for forward and backward.

    A block that is not skipped costs two products forward and five backward (FlashAttention, arXiv 2205.14135); heads
    are computed at a whole number of LANES.
    """
    block = _block(length, causal)
    side = math.ceil(length / block)
    blocks = side * (side + 1) // 2 if causal else side**2
    return 4.0 * rows * heads * math.ceil(head_dim / LANES) * LANES * block * block * blocks * passes
