"""Attention block by block, for long rows on a CPU, against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from tests.models.test_splash import equations, on_eight_devices
from vflax.errors import UserError
from vflax.models.attention import attention, writes_scores
from vflax.models.blockwise import BLOCK, _bounds
from vflax.models.layers import rematerialised

LENGTH = 3 * BLOCK - 40


def arrays(heads: int, kv_heads: int, rows: int = 2, length: int = LENGTH) -> tuple[jax.Array, ...]:
    """q, k, v and the gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, grad = (
        jax.random.normal(key, (rows, length, n, 16)) for key, n in zip(keys, counts, strict=True)
    )
    return q, k, v, grad


def packed(rows: int = 2, length: int = LENGTH) -> jax.Array:
    """Segments that end inside blocks, other ones in each row, with padding behind them."""
    ends = np.array([0.2, 0.5, 0.9]) * length
    found = np.stack([(np.arange(length)[:, None] >= ends - 9 * row).sum(1) + 1 for row in range(rows)])
    return jnp.array(np.where(found > 3, 0, found), jnp.int32)


def run(backend: str, q, k, v, grad, segments):
    """(output, gradients of q, k and v)."""
    own = {"q_segments": segments, "kv_segments": segments}
    out, backward = jax.vjp(lambda *x: attention(*x, **own, causal=True, backend=backend), q, k, v)
    return out, *backward(grad)


def check(given, segments, atol: float = 1e-5) -> None:
    for ours, expected in zip(
        run("blockwise", *given, segments), run("reference", *given, segments), strict=True
    ):
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, expected)), atol=atol)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_blocks_give_the_references_output_and_gradients(heads: int, kv_heads: int):
    check(arrays(heads, kv_heads), packed())


def test_a_whole_number_of_blocks_needs_no_room():
    check(arrays(2, 2, length=2 * BLOCK), packed(length=2 * BLOCK))


def test_segments_need_not_lie_together():
    segments = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 4)
    check(arrays(2, 2), segments)


def test_without_segments_all_earlier_tokens_are_seen():
    check(arrays(2, 2), None)


def test_a_row_of_padding_alone_gives_numbers():
    check(arrays(2, 2), packed().at[1].set(0))


def test_bfloat16_is_rounded_as_the_reference_rounds_it():
    check([x.astype(jnp.bfloat16) for x in arrays(2, 2)], packed(), atol=0.02)


def test_a_block_reaches_as_far_as_the_segments_in_it():
    # Blocks:            0  1     2     3      4
    counts = {1: BLOCK, 2: BLOCK + 5, 3: 2 * BLOCK, 0: BLOCK - 5}
    segments = np.repeat(list(counts), list(counts.values()))[None]
    padding_last = jnp.asarray(np.where(segments == 0, 9, segments))
    first, last = _bounds(padding_last)
    assert first.tolist() == [0, 1, 1, 2, 2]
    assert last.tolist() == [0, 2, 4, 4, 4]


def test_blocks_of_other_segments_are_not_looked_at():
    q, k, v, grad = arrays(2, 2, rows=1)
    segments = jnp.asarray(np.arange(LENGTH) // BLOCK + 1)[None]
    # A number that is none spoils what it is multiplied with, be it by zero.
    k, v, grad = (x.at[:, :BLOCK].set(jnp.nan) for x in (k, v, grad))
    for result in run("blockwise", q, k, v, grad, segments):
        assert np.isnan(result[:, :BLOCK]).any() and np.isfinite(result[:, BLOCK:]).all()


MESH = """
import jax
import numpy as np
from tests.models.test_blockwise import arrays, packed, run
from vflax.sharding import make_mesh

given = *arrays(4, 2, rows=4), packed(rows=4)
expected = run("blockwise", *given)
with jax.set_mesh(make_mesh(2, 2, 2)):
    compiled = jax.jit(lambda *x: run("blockwise", *x)).lower(*given).compile()
    for ours, alone in zip(compiled(*given), expected, strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)
# Heads of 16 numbers: of 4 rows and 4 heads a device has one and two.
assert "f32[1,1,2,128,16]" in compiled.as_text() and "all-gather" not in compiled.as_text()
"""


@pytest.mark.slow
def test_over_a_mesh_each_device_has_its_own_rows_and_heads():
    on_eight_devices(MESH)


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("full", 2), ("attention", 1), ("dots", 1)])
def test_the_forward_blocks_run_once_where_what_they_give_is_kept(policy: str, times: int):
    q, k, v, _ = arrays(2, 2)

    def layer(q: jax.Array) -> jax.Array:
        return attention(q, k, v, causal=True, backend="blockwise")

    gradient = jax.grad(lambda q: jnp.square(rematerialised(layer, policy)(q)).sum())
    needed, _ = dce_jaxpr(jax.make_jaxpr(gradient)(q).jaxpr, [True])
    # Of a block the forward pass makes two, weights and what shrinks those before; the backward pass one.
    assert len(equations(needed, "exp")) == 2 * times + 1


@pytest.mark.parametrize(("length", "chosen"), [(256, "reference"), (1024, "blockwise")])
def test_long_causal_rows_are_cut_into_blocks_on_a_cpu(length: int, chosen: str):
    if jax.default_backend() != "cpu":
        pytest.skip("this is about the choice on a CPU")
    x = jnp.zeros((1, length, 2, 16))

    def program(backend: str, causal: bool) -> str:
        return str(jax.make_jaxpr(lambda x: attention(x, x, x, causal=causal, backend=backend))(x))

    assert program("auto", causal=True) == program(chosen, causal=True)
    assert program("auto", causal=False) == program("reference", causal=False)
    assert writes_scores("auto", length) == (chosen == "reference")


def test_scores_are_written_by_the_reference_alone():
    assert writes_scores("reference", 4096) and not writes_scores("blockwise", 16)


def test_rows_that_are_not_causal_are_not_for_blocks():
    q, k, v, _ = arrays(2, 2)
    with pytest.raises(UserError, match="attention='blockwise' cannot run this: it is made for causal rows"):
        attention(q, k, v, causal=False, backend="blockwise")
