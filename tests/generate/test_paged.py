"""Attention over pages: what a row sees, and that nothing else reaches it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflax.generate.paged import Pool, attend, quantise, write_pages, write_tokens
from vflax.models.attention import attention

KV, HEADS, DIM, PAGE = 2, 6, 10, 4


def pool(pages: int, fill: float = 0.0) -> Pool:
    shape = (1, pages, KV, PAGE, DIM)
    return Pool(jnp.full(shape, fill, jnp.float32), jnp.full(shape, fill, jnp.float32))


def filled(
    rng: np.random.Generator, lengths: list[int], fill: float
) -> tuple[Pool, np.ndarray, np.ndarray, np.ndarray]:
    """A pool with rows of so many tokens in pages in no order, all else `fill`; its table; k, v [R, T, KV, K]."""
    longest = max(lengths)
    most = -(-longest // PAGE)
    k, v = rng.normal(size=(2, len(lengths), longest, KV, DIM)).astype(np.float32)
    numbers = 1 + rng.permutation(len(lengths) * most)
    table = numbers.reshape(len(lengths), most).astype(np.int32)
    found = pool(1 + len(numbers), fill)
    for row, length in enumerate(lengths):
        for at in range(length):
            page = jnp.asarray([[table[row, at // PAGE]]])
            offset = jnp.asarray([[at % PAGE]])
            found = write_tokens(found, k[None, row : row + 1, at], v[None, row : row + 1, at], page, offset)
    return found, np.pad(table, ((0, 0), (0, -most % 2))), k, v


@pytest.mark.parametrize("block_pages", [1, 2])
@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_a_row_sees_its_own_keys_up_to_its_position_and_nothing_else(block_pages: int, fill: float) -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 4, 5, 17, 12]
    found, table, k, v = filled(rng, lengths, fill)
    q = rng.normal(size=(1, 5, 1, HEADS, DIM)).astype(np.float32)
    positions = jnp.asarray(lengths)[None, :, None] - 1
    mixed = attend(jnp.asarray(q), found, jnp.asarray(table)[None], positions, block_pages)
    for row, length in enumerate(lengths):
        expected = attention(
            jnp.asarray(q[0, row : row + 1]), k[row : row + 1, :length], v[row : row + 1, :length], causal=False,
            backend="reference",
        )  # fmt: skip
        np.testing.assert_allclose(mixed[0, row], expected[0], atol=1e-5, rtol=1e-5)


def test_several_queries_of_a_row_are_causal() -> None:
    rng = np.random.default_rng(1)
    found, table, k, v = filled(rng, [12], 0.0)
    q = rng.normal(size=(1, 1, 12, HEADS, DIM)).astype(np.float32)
    positions = jnp.arange(12)[None, None]
    mixed = attend(jnp.asarray(q), found, jnp.asarray(table)[None], positions, 1)
    expected = attention(jnp.asarray(q[0]), k, v, causal=True, backend="reference")
    np.testing.assert_allclose(mixed[0], expected, atol=1e-5, rtol=1e-5)


def test_a_longer_neighbour_does_not_change_a_bit() -> None:
    rng = np.random.default_rng(2)
    found, table, _, _ = filled(rng, [6, 16], 0.0)
    q = jnp.asarray(rng.normal(size=(1, 2, 1, HEADS, DIM)), jnp.float32)
    both = attend(q, found, jnp.asarray(table)[None], jnp.asarray([[[5], [15]]]), 1)
    short = attend(q, found, jnp.asarray(table)[None], jnp.asarray([[[5], [5]]]), 1)
    np.testing.assert_array_equal(both[0, 0], short[0, 0])


def test_whole_pages_are_written_as_their_tokens_one_by_one() -> None:
    rng = np.random.default_rng(3)
    k, v = (jnp.asarray(rng.normal(size=(1, 8, KV, DIM)), jnp.float32) for _ in range(2))
    one = pool(5)
    for at in range(8):
        page = jnp.asarray([[[3, 1][at // PAGE]]])
        one = write_tokens(one, k[:, at : at + 1], v[:, at : at + 1], page, jnp.asarray([[at % PAGE]]))
    whole = write_pages(pool(5), k, v, jnp.asarray([[3, 1]]))
    jax.tree.map(np.testing.assert_array_equal, one, whole)


def test_in_8_bits_keys_and_values_come_back_nearly() -> None:
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(5, DIM)) * 10.0 ** rng.integers(-3, 4, (5, 1)), jnp.float32).at[0].set(0)
    integers, scale = quantise(x)
    assert integers.dtype == jnp.int8
    error = np.abs(np.asarray(integers * scale[:, None] - x))
    assert (error <= np.asarray(scale)[:, None] / 2 * 1.001).all() and (error[0] == 0).all()


def test_attention_over_8_bits_is_near_that_over_floats() -> None:
    rng = np.random.default_rng(5)
    k, v = (jnp.asarray(rng.normal(size=(1, 8, KV, DIM)), jnp.float32) for _ in range(2))
    shape = (1, 4, KV, PAGE)
    held = Pool(*(jnp.zeros((*shape, DIM), jnp.int8) for _ in "kv"), *(jnp.zeros(shape) for _ in "kv"))
    pages = jnp.asarray([[2, 3]])
    q = jnp.asarray(rng.normal(size=(1, 1, 1, HEADS, DIM)), jnp.float32)
    table, positions = jnp.asarray([[[2, 3]]]), jnp.asarray([[[7]]])
    ours = attend(q, write_pages(held, k, v, pages), table, positions, 1)
    exact = attend(q, write_pages(pool(4), k, v, pages), table, positions, 1)
    np.testing.assert_allclose(ours, exact, atol=0.03)
    assert not np.array_equal(ours, exact)
