"""The key-value cache in pages, and the attention over it.

A request's keys and values lie in pages of `page` tokens, anywhere in a pool; its table says where. Requests that begin
alike have the same pages in their tables.

    pool      page 0   page 1   page 2   page 3   page 4 ...     page 0 is nobody's: rows without a request write there
    table     request A: 3 1 .      request B: 3 4 2             page 3 holds what both begin with

Attention goes over blocks of pages of a fixed number of keys, with the softmax's maximum and sum carried along
(Milakov and Gimelshein, arXiv 1805.02867). Blocks that lie behind a row's last token leave what it carries as it is,
bit for bit, so a row does not depend on how long others are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vflax.generate import paged_gpu
from vflax.models import lora
from vflax.models.attention import platform
from vflax.models.blockwise import MASKED, scale
from vflax.models.product import on_one_cpu
from vflax.sharding import BATCH_AXES


class Pool(NamedTuple):
    """One layer's pages. Z shards of the mesh's `data` axis, P pages each.

    k, v: [Z, P, KV, page, K], of the cache's dtype or int8.
    k_scale, v_scale: float32 [Z, P, KV, page], of int8 (one for each token and head); else None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def page(self) -> int:
        return self.k.shape[3]


def write_tokens(pool: Pool, k: jax.Array, v: jax.Array, pages: jax.Array, offsets: jax.Array) -> Pool:
    """One token for each row.

    Args:
        pool: of a layer.
        k, v: [Z, R, KV, K].
        pages: int32 [Z, R], the page that the row's token goes to.
        offsets: int32 [Z, R], its place there.
    """
    heads = jnp.arange(k.shape[2])

    def put(of: jax.Array, new: jax.Array, pages: jax.Array, offsets: jax.Array) -> jax.Array:
        return of.at[pages[:, None], heads, offsets[:, None]].set(new)

    return _each(pool, k, v, lambda of, new: jax.vmap(put)(of, new, pages, offsets))


def write_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: Pool,
    table: jax.Array,
    positions: jax.Array,
    block_pages: int,
) -> tuple[jax.Array, Pool]:
    """`write_tokens` and `attend` for one token of each row, which a GPU has a kernel for.

    Args:
        q: [Z, R, H, K].
        k, v: [Z, R, KV, K].
        pool: of a layer.
        table: int32 [Z, R, J].
        positions: int32 [Z, R], of the tokens.
        block_pages: pages of a block.

    Returns:
        [Z, R, H, K] in q's dtype, and the pool.
    """
    if platform() == "gpu" and paged_gpu.fits(q.shape[-1], pool.page):
        return on_gpu(q, _as_held(pool, k, v), pool, table, positions)
    pages = jnp.take_along_axis(table, (positions // pool.page)[..., None], axis=2)[..., 0]
    pool = write_tokens(pool, k, v, pages, positions % pool.page)
    return attend(q[:, :, None], pool, table, positions[..., None], block_pages)[:, :, 0], pool


def on_gpu(
    q: jax.Array, new: Pool, pool: Pool, table: jax.Array, positions: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, Pool]:
    """`write_and_attend` by the kernel, each device with its own shard and heads.

    Args:
        q, pool, table, positions: as there.
        new: the tokens' keys and values as the pool holds them: k, v [Z, R, KV, K], scales [Z, R, KV].
        interpret: see `paged_gpu.write_and_attend`.
    """

    def own(q: jax.Array, new: Pool, pool: Pool, table: jax.Array, last: jax.Array) -> tuple[jax.Array, Pool]:
        # A device has one shard: [1, ...] -> [...]
        q, new, held, table, last = jax.tree.map(lambda x: x[0], (q, new, pool, table, last))
        # [R, H, K] -> [R, KV, G, K]
        grouped = q.reshape(q.shape[0], held.k.shape[1], -1, q.shape[-1])
        mixed, held = paged_gpu.write_and_attend(grouped, new, held, table, last, interpret=interpret)
        return jax.tree.map(lambda x: x[None], (mixed.reshape(q.shape), Pool(*held)))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return own(q, new, pool, table, positions)
    tensor = "tensor" if pool.k.shape[2] % mesh.shape["tensor"] == 0 else None
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, tensor)
    return jax.shard_map(
        own, in_specs=(heads, heads, heads, rows, rows), out_specs=(heads, heads), check_vma=False
    )(q, new, pool, table, positions)


def write_pages(pool: Pool, k: jax.Array, v: jax.Array, pages: jax.Array) -> Pool:
    """Whole pages.

    Args:
        pool: of a layer.
        k, v: [Z, T, KV, K], T tokens that fill pages.shape[1] pages.
        pages: int32 [Z, T / page].
    """

    def put(of: jax.Array, new: jax.Array, pages: jax.Array) -> jax.Array:
        # [T, KV, ...] -> [pages, page, KV, ...] -> [pages, KV, page, ...]
        new = new.reshape(pages.shape[0], -1, *new.shape[1:])
        return of.at[pages].set(jnp.moveaxis(new, 2, 1))

    return _each(pool, k, v, lambda of, new: jax.vmap(put)(of, new, pages))


def _each(pool: Pool, k: jax.Array, v: jax.Array, put: Callable[[jax.Array, jax.Array], jax.Array]) -> Pool:
    return jax.tree.map(put, pool, _as_held(pool, k, v))


def _as_held(pool: Pool, k: jax.Array, v: jax.Array) -> Pool:
    """New keys and values [..., K] as the pool holds them; its fields are [...] or [..., K]."""
    if pool.k_scale is None:
        return Pool(k.astype(pool.k.dtype), v.astype(pool.v.dtype))
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return Pool(k, v, k_scale, v_scale)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., K] -> int8 [..., K] and a float32 scale [...], so that x is about int8 * scale."""
    integers, scales = lora.quantise(x[..., None], jnp)
    return integers[..., 0], scales[..., 0]


def attend(q: jax.Array, pool: Pool, table: jax.Array, positions: jax.Array, block_pages: int) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the pages of each row; a query sees the keys up to its own position.

    On one CPU device rows come two at a time, in one function that knows of no others: their results are the same bits
    however many there are, and a pair takes its own number of blocks. Two keep both of a small machine's cores at
    copying pages; more at a time are no faster, and of eight XLA may compute products in other blocks, to other bits.
    Elsewhere rows are one array, for as many blocks as the longest needs.

    Args:
        q: [Z, R, T, H, K]; H is a multiple of KV.
        pool: of a layer; holds the keys of the queries themselves, too.
        table: int32 [Z, R, J], the pages of each row; J is a multiple of block_pages.
        positions: int32 [Z, R, T], rising along T.
        block_pages: pages of a block.

    Returns:
        [Z, R, T, H, K] in q's dtype.
    """
    shards, rows, length, heads, head_dim = q.shape
    kv_heads, page = pool.k.shape[2:4]
    group = heads // kv_heads
    # [Z, R, T, H, K] -> [Z, R, T, KV, G, K] -> [Z, R, KV, G, T, K] -> [Z, R, KV, G * T, K]
    grouped = q.reshape(shards, rows, length, kv_heads, group, head_dim).transpose(0, 1, 3, 4, 2, 5)
    grouped = grouped.reshape(shards, rows, kv_heads, group * length, head_dim)
    # [Z, R, T] -> [Z, R, 1, G * T, 1]
    last = jnp.tile(positions, (1, 1, group))[:, :, None, :, None]

    def mix(q: jax.Array, last: jax.Array, table: jax.Array) -> jax.Array:
        """[Z, R, KV, G * T, K], [Z, R, 1, G * T, 1] and [Z, R, J] -> [Z, R, KV, G * T, K]"""

        def find(x: jax.Array, j: jax.Array) -> jax.Array:
            pages = jax.lax.dynamic_slice_in_dim(table, j * block_pages, block_pages, axis=2)
            # Each shard's rows look into its own pages: [P, KV, page, ...], [R, J] -> [R, J, KV, page, ...]
            found = jnp.moveaxis(jax.vmap(lambda of, at: of[at])(x, pages), 2, 3)
            # [Z, R, KV, J, page, ...] -> [Z, R, KV, block, ...]
            return found.reshape(*found.shape[:3], -1, *found.shape[5:])

        def block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            k = _floats(find(pool.k, j), pool.k_scale, lambda scale: find(scale, j), q.dtype)
            v = _floats(find(pool.v, j), pool.v_scale, lambda scale: find(scale, j), q.dtype)
            return _add_block(carry, q, k, v, last, j * block_pages * page)

        start = (
            jnp.full(q.shape[:-1], MASKED, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        _, total, mixed = jax.lax.fori_loop(0, last.max() // (block_pages * page) + 1, block, start)
        return (mixed / total[..., None]).astype(q.dtype)

    out = _by_pairs(mix, grouped, last, table) if on_one_cpu() else mix(grouped, last, table)
    # [Z, R, KV, G * T, K] -> [Z, R, KV, G, T, K] -> [Z, R, T, KV, G, K] -> [Z, R, T, H, K]
    out = out.reshape(shards, rows, kv_heads, group, length, head_dim).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(q.shape)


def _by_pairs(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """function(*arrays) over [1, R, ...] two rows at a time; of an odd number the last is in a pair with itself."""
    rows = arrays[0].shape[1]
    if rows <= 2:
        return function(*arrays)
    padded = [jnp.pad(x, [(0, 0), (0, rows % 2), *[(0, 0)] * (x.ndim - 2)], mode="edge") for x in arrays]
    # [1, R, ...] -> [pairs, 1, 2, ...]
    pairs = [x.reshape(-1, 1, 2, *x.shape[2:]) for x in padded]
    out = jax.lax.map(lambda of: function(*of), pairs)
    return out.reshape(1, -1, *out.shape[3:])[:, :rows]


def _floats(
    x: jax.Array, scale: jax.Array | None, find: Callable[[jax.Array], jax.Array], dtype: Any
) -> jax.Array:
    """A block of keys or values; of integers times its scales."""
    if scale is None:
        return x.astype(dtype)
    return (x.astype(jnp.float32) * find(scale)[..., None]).astype(dtype)


def _add_block(
    carry: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array, last: jax.Array, first: jax.Array
) -> tuple[jax.Array, ...]:
    """The softmax's maximum and sum [..., KV, Q], and what it mixes [..., KV, Q, K], with another block of keys.

    Args:
        carry: of the blocks before.
        q: [..., KV, Q, K].
        k, v: [..., KV, block, K].
        last: int [..., 1, Q, 1], the last key that each query sees.
        first: int, the block's first key.
    """
    largest, total, mixed = carry
    index = first + jnp.arange(k.shape[-2])
    # A key behind the row's end may be anything, even NaN, which a weight of zero would not take away.
    v = jnp.where(index[:, None] <= last.max(axis=-2, keepdims=True), v, 0)
    # [..., KV, Q, K] x [..., KV, block, K] -> [..., KV, Q, block]
    scores = jnp.einsum("...qk,...ck->...qc", q, k, preferred_element_type=jnp.float32) * scale(q)
    seen = index <= last
    scores = jnp.where(seen, scores, MASKED)
    new_largest = jnp.maximum(largest, scores.max(axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - new_largest[..., None]), 0)
    kept = jnp.exp(largest - new_largest)
    # [..., KV, Q, block] x [..., KV, block, K] -> [..., KV, Q, K]
    added = jnp.einsum("...qc,...ck->...qk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new_largest, total * kept + weights.sum(axis=-1), mixed * kept[..., None] + added
