"""One token of each row on a GPU: its key and value go into a page, its queries look at the row's pages. A kernel in
Pallas, through Triton.

A program for each row, key head and split of the row's pages reads its pages where they lie; XLA would first copy them
together, for all rows as many as the longest has. Splits are of a fixed number of keys, so a row's result depends on
nothing but its own keys; a program behind a row's last key ends at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vflax.models.blockwise import MASKED, scale

Array = jax.Array
# Pages of one layer: keys, values, and of int8 their scales; see `vflax.generate.paged.Pool`.
Pages = tuple[Array, Array, Array | None, Array | None]

# Keys of a split.
_SPLIT = 128
# Triton's products have at least so many rows.
_LEAST = 16
# Of those that were tried, the fastest for one row.
_WARPS, _STAGES = 4, 3


def fits(head_dim: int, page: int) -> bool:
    """Whether the kernel takes such pages: Triton's arrays have powers of two as their sizes."""
    return all(size >= _LEAST and size & (size - 1) == 0 for size in (head_dim, page))


def write_and_attend(
    q: Array, new: Pages, pages: Pages, table: Array, last: Array, *, interpret: bool = False
) -> tuple[Array, Pages]:
    """Put each row's new key and value into their page, and mix: softmax(q k^T / sqrt(K)) v over the row's keys up to
    the new one; softmax in float32.

    Args:
        q: [R, KV, G, K].
        new: k, v [R, KV, K] and their scales [R, KV], as `pages` holds them.
        pages: k, v [P, KV, page, K], of q's dtype or int8, and float32 scales [P, KV, page] of int8, else None.
        table: int32 [R, J], the pages of each row.
        last: int32 [R], the place of the new key in its row.
        interpret: run the kernel's program step by step on any platform, to test it.

    Returns:
        [R, KV, G, K] in q's dtype, and the pages, which are those that were given, changed in place where XLA can.
    """
    rows, kv_heads, group, head_dim = q.shape
    page = pages[0].shape[2]
    per_split = max(1, _SPLIT // page)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_split)))
    splits = table.shape[1] // per_split
    padded = 1 << (group - 1).bit_length()  # G as a power of two
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - group), (0, 0)))

    def of_head(x: Array | None) -> Any:
        """All pages of the program's key head: [P, page, ...]."""
        if x is None:
            return None
        rest = x.shape[2:]
        return pl.BlockSpec((x.shape[0], None, *rest), lambda r, h, s: (0, h, *[0] * len(rest)))

    def of_row(x: Array | None) -> Any:
        """What belongs to the program's row and key head: [...], or [1] of scales."""
        if x is None:
            return None
        rest = x.shape[2:]
        return pl.BlockSpec((None, None, *rest), lambda r, h, s: (r, h, *[0] * len(rest)))

    def of_split(*shape: int) -> tuple[Any, Any]:
        spec = pl.BlockSpec((None, None, None, *shape), lambda r, h, s: (s, r, h, *[0] * len(shape)))
        return spec, jax.ShapeDtypeStruct((splits, rows, kv_heads, *shape), jnp.float32)

    scales = (None if x is None else x[..., None] for x in new[2:])
    found = [of_split(padded), of_split(padded), of_split(padded, head_dim)]
    held = [x for x in pages if x is not None]
    arguments = (q, table, last, *new[:2], *scales, *pages)
    flat = [x for x in arguments if x is not None]
    largest, total, mixed, *held = pl.pallas_call(
        partial(_kernel, pages=per_split, scaled=scale(q)),
        grid=(rows, kv_heads, splits),
        in_specs=[
            of_row(q),
            pl.BlockSpec((None, table.shape[1]), lambda r, h, s: (r, 0)),
            pl.BlockSpec((1,), lambda r, h, s: (r,)),
            *map(of_row, arguments[3:7]),
            *map(of_head, pages),
        ],
        out_specs=[*(spec for spec, _ in found), *map(of_head, held)],
        out_shape=[*(shape for _, shape in found), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held)],
        # Inputs are numbered without those that are None.
        input_output_aliases={len(flat) - len(held) + i: len(found) + i for i in range(len(held))},
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="paged_attention",
    )(*arguments)
    # Splits [S, R, KV, G, ...] are put together as blocks are: each softmax after the largest of all.
    kept = jnp.exp(largest - largest.max(axis=0))[:, :, :, :group]
    mixed = (mixed[:, :, :, :group] * kept[..., None]).sum(axis=0)
    mixed = (mixed / (total[:, :, :, :group] * kept).sum(axis=0)[..., None]).astype(q.dtype)
    return mixed, (held[0], held[1], *(held[2:] or (None, None)))


def _kernel(
    q_ref: Any, table_ref: Any, last_ref: Any,
    new_k_ref: Any, new_v_ref: Any, new_k_scale_ref: Any, new_v_scale_ref: Any,
    k_ref: Any, v_ref: Any, k_scale_ref: Any, v_scale_ref: Any,
    largest_ref: Any, total_ref: Any, mixed_ref: Any, *held: Any, pages: int, scaled: float,
) -> None:  # fmt: skip
    """A row's queries [G, K] over the pages of split program_id(2); see `write_and_attend`.

    New key and value come from the arguments, not from the page that they are written to.
    """
    page, group = k_ref.shape[1], q_ref.shape[0]
    copies = max(1, _LEAST // group)
    # [G, K] -> [copies * G, K], Q below
    q = jnp.broadcast_to(q_ref[...], (copies, *q_ref.shape)).reshape(copies * group, -1)
    last = last_ref[0]
    first = pl.program_id(2) * pages

    def add(carry: tuple[Array, ...], scores: Array, seen: Array, mix: Any) -> tuple[Array, ...]:
        """Keys with scores [Q, keys], of which `seen` are; mix: weights [Q, keys] -> [Q, K]."""
        largest, total, mixed = carry
        scores = jnp.where(seen, scores, MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_largest[:, None]), 0.0)
        kept = jnp.exp(largest - new_largest)
        return new_largest, total * kept + weights.sum(axis=1), mixed * kept[:, None] + mix(weights)

    def block(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        number = table_ref[j]
        k, v = k_ref[number].astype(q.dtype), v_ref[number].astype(q.dtype)
        seen = j * page + jnp.arange(page) < last
        # A key behind the row's end may be anything, even NaN, which a weight of zero would not take away.
        v = jnp.where(seen[:, None], v, jnp.zeros_like(v))
        # [Q, K] x [page, K] -> [Q, page]
        scores = triton.dot(q, k, trans_b=True) * scaled
        if k_scale_ref is not None:
            scores = scores * k_scale_ref[number][None]

        def mix(weights: Array) -> Array:
            if v_scale_ref is not None:
                weights = weights * jnp.where(seen, v_scale_ref[number], 0.0)[None]
            # [Q, page] x [page, K] -> [Q, K]
            return triton.dot(weights.astype(v.dtype), v)

        return add(carry, scores, seen[None], mix)

    start = (
        jnp.full(q.shape[:1], MASKED, jnp.float32),
        jnp.zeros(q.shape[:1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    carry = jax.lax.fori_loop(first, jnp.minimum(first + pages, (last - 1) // page + 1), block, start)
    mine = (last // page >= first) & (last // page < first + pages)
    new = [
        None if ref is None else ref[...] for ref in (new_k_ref, new_v_ref, new_k_scale_ref, new_v_scale_ref)
    ]
    k, v = (_floats(*own) for own in zip(new[:2], new[2:], strict=True))
    # [Q, K] x [K] -> [Q, 1]
    scores = (q.astype(jnp.float32) * k[None]).sum(axis=1)[:, None] * scaled
    carry = add(carry, scores, jnp.broadcast_to(mine, scores.shape), lambda weights: weights * v[None])
    for ref, x in zip((largest_ref, total_ref, mixed_ref), carry, strict=True):
        # All copies are alike: [copies * G, ...] -> [copies, G, ...] -> [G, ...]
        ref[...] = x.reshape(copies, group, *x.shape[1:]).max(axis=0)

    @pl.when(mine)
    def _() -> None:
        for ref, x in zip(held, (x for x in new if x is not None), strict=True):
            ref[table_ref[last // page], last % page] = x if x.ndim and x.shape[0] > 1 else x[0]


def _floats(x: Any, scale: Any) -> Array:
    found: Array = x.astype(jnp.float32)
    return found if scale is None else found * scale
