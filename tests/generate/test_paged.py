"""Attention over pages: what a row sees, and that nothing else reaches it."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflax.generate import paged_gpu
from vflax.generate.paged import (
    Pool,
    _as_held,
    attend,
    on_gpu,
    quantise,
    write_and_attend,
    write_pages,
    write_tokens,
)
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


def test_a_row_is_the_same_bits_in_any_place_of_any_number() -> None:
    rng = np.random.default_rng(4)
    lengths = [6, 16, 1, 9, 13]
    found, table, _, _ = filled(rng, lengths, 0.0)
    q, table = rng.normal(size=(5, 1, HEADS, DIM)).astype(np.float32), np.asarray(table)

    def mixed(rows: list[int]) -> np.ndarray:
        positions = jnp.asarray(lengths)[jnp.asarray(rows)][None, :, None] - 1
        return np.asarray(
            attend(jnp.asarray(q[rows])[None], found, jnp.asarray(table[rows])[None], positions, 1)[0]
        )

    want = mixed([0, 1, 2, 3, 4])
    for rows in ([4, 3, 2, 1, 0], [2, 0], [1, 1, 1], [3, 4, 0, 2]):
        np.testing.assert_array_equal(mixed(rows), want[rows])


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


@pytest.mark.parametrize("kv_heads, heads", [(2, 2), (2, 6), (1, 4)])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_gpus_kernel_writes_and_mixes_as_xla_does(kind: str, kv_heads: int, heads: int) -> None:
    rng = np.random.default_rng(6)
    rows, pages, table_pages, page, dim = 6, 61, 10, 16, 32
    shape = (1, pages, kv_heads, page)
    if kind == "int8":
        k, v = (jnp.asarray(rng.integers(-127, 128, (*shape, dim)), jnp.int8) for _ in "kv")
        held = Pool(k, v, *(jnp.asarray(rng.uniform(0.001, 0.02, shape), jnp.float32) for _ in "kv"))
    else:
        k, v = (jnp.asarray(rng.normal(size=(*shape, dim)), jnp.float32) for _ in "kv")
        held = Pool(k.at[0, 60].set(jnp.nan), v.at[0, 60].set(jnp.nan))
    # The last row ends in the first key of its last page, where all else is NaN.
    table = jnp.asarray(1 + np.arange(rows * table_pages).reshape(1, rows, table_pages), jnp.int32)
    last = jnp.asarray([[0, 15, 16, 100, 127, 144]], jnp.int32)
    q = jnp.asarray(rng.normal(size=(1, rows, heads, dim)), jnp.float32)
    new = [jnp.asarray(rng.normal(size=(1, rows, kv_heads, dim)), jnp.float32) for _ in "kv"]
    expected = write_and_attend(q, *new, held, table, last, 2)
    found = on_gpu(q, _as_held(held, *new), held, table, last, interpret=True)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_the_kernel_takes_powers_of_two() -> None:
    assert paged_gpu.fits(128, 64) and not paged_gpu.fits(80, 64) and not paged_gpu.fits(128, 8)


@pytest.mark.slow
def test_on_eight_devices_the_kernel_is_that_of_one() -> None:
    program = """
import jax, jax.numpy as jnp, numpy as np
from vflax.generate.paged import Pool, on_gpu
from vflax import sharding
rng = np.random.default_rng(0)
k, v = (jnp.asarray(rng.normal(size=(2, 9, 4, 16, 32)), jnp.float32) for _ in "kv")
q = jnp.asarray(rng.normal(size=(2, 3, 8, 32)), jnp.float32)
new = [jnp.asarray(rng.normal(size=(2, 3, 4, 32)), jnp.float32) for _ in "kv"]
table = jnp.asarray(np.arange(18).reshape(2, 3, 3) % 9, jnp.int32)
last = jnp.asarray([[0, 20, 40], [47, 3, 16]], jnp.int32)
one = [on_gpu(q[z : z + 1], Pool(*(x[z : z + 1] for x in new)), Pool(k[z : z + 1], v[z : z + 1]), table[z : z + 1],
               last[z : z + 1], interpret=True) for z in range(2)]
mesh = sharding.make_mesh(2, 1, 4)
with jax.set_mesh(mesh):
    mixed, pool = jax.jit(lambda *a: on_gpu(*a, interpret=True))(q, Pool(*new), Pool(k, v), table, last)
np.testing.assert_allclose(mixed, jnp.concatenate([x for x, _ in one]), atol=1e-6)
np.testing.assert_array_equal(pool.k, jnp.concatenate([p.k for _, p in one]))
"""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
