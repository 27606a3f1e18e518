"""The feed-forward block as TPUs compute it gives what the formula gives."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vflax.models import mlp


def formula(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def block(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return formula(x @ gate, x @ up) @ down


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) * scale for key, shape in zip(keys, shapes, strict=True)]


def same_value_and_gradients(ours: Callable, theirs: Callable, inputs: list[jax.Array], atol: float) -> None:
    (value, ours_back), (expected, their_back) = jax.vjp(ours, *inputs), jax.vjp(theirs, *inputs)
    (grad,) = normal(value.shape)
    for a, b in zip((value, *ours_back(grad)), (expected, *their_back(grad)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def test_swiglu_has_the_value_and_gradients_of_the_formula():
    same_value_and_gradients(mlp.finished_swiglu, formula, normal((3, 50), (3, 50), scale=3.0), 1e-6)


@pytest.mark.parametrize("inner", [96, 128, 600, 1024])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_block_in_slices_has_the_value_and_gradients_of_the_whole(
    inner: int, parts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mlp, "_PART", 2 * 5 * inner * 4 // parts)
    x, *kernels = normal((2, 5, 24), (24, inner), (24, inner), (inner, 24))
    kernels = [kernel / 5 for kernel in kernels]
    # Sums of up to 1024 products, added up in another order.
    same_value_and_gradients(mlp.swiglu_block, block, [x, *kernels], 1e-5)


@pytest.mark.parametrize(
    ("width", "rows", "count"),
    [(11008, 1, 1), (11008, 4, 4), (11008, 8, 8), (13824, 4, 5), (1, 1, 1), (600, 10**6, 5)],
)
def test_slices_are_small_enough_and_begin_where_a_tpu_has_whole_lanes(width: int, rows: int, count: int):
    slices = mlp.slices(width, rows * 2048 * 2)
    assert [i for begin, end in slices for i in range(begin, end)] == list(range(width))
    assert all(begin % 128 == 0 for begin, _ in slices)
    assert len(slices) == count


@pytest.mark.parametrize("recomputed", [True, False])
def test_only_a_block_that_is_recomputed_anyway_goes_in_slices(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mlp, "platform", lambda: "tpu")
    dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    layer = mlp.DecoderMlp(24, 600, recomputed=recomputed, rngs=nnx.Rngs(0), **dtypes)
    program = str(jax.make_jaxpr(layer)(jnp.zeros((2, 5, 24))))
    assert ("swiglu_block" in program) is recomputed
