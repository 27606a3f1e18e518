"""Rotary positions: the formula, its written gradient, and the way of a TPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from vflax.models import llama

CONFIG = dataclasses.replace(toy.CONFIG.decoder, head_dim=16)
POSITIONS = np.array([[0, 1, 2, 0, 1], [0, 5, 90, 700, 1000]], np.int32)


def drawn(seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 5, 3, CONFIG.head_dim), dtype)


def turned(x: jax.Array) -> np.ndarray:
    """Pairs as complex numbers, turned in float64."""
    left, right = np.split(np.asarray(x, np.float64), 2, axis=-1)
    angles = POSITIONS[..., None, None] * llama.rope_frequencies(CONFIG).astype(np.float64)
    z = (left + 1j * right) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def gradient(x: jax.Array, out_grad: jax.Array) -> jax.Array:
    return jax.vjp(lambda x: llama.rotate(x, llama.rope_tables(CONFIG, POSITIONS)), x)[1](out_grad)[0]


def test_a_pair_is_turned_by_its_position_times_its_frequency():
    got = llama.rotate(drawn(0), llama.rope_tables(CONFIG, POSITIONS))
    # Angles of up to 1,000 have about four decimals in float32.
    np.testing.assert_allclose(got, turned(drawn(0)), atol=2e-4)


def test_the_gradient_is_the_rotation_back():
    x, out_grad = drawn(0), drawn(1)
    # <g, R x> = <R' g, x>, and R' R = 1
    np.testing.assert_allclose((gradient(x, out_grad) * x).sum(), (out_grad * turned(x)).sum(), rtol=1e-3)
    back = gradient(x, llama.rotate(x, llama.rope_tables(CONFIG, POSITIONS)))
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpus_product_with_a_permutation_gives_the_same_numbers(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
):
    x, out_grad = drawn(0, dtype), drawn(1, dtype)
    rope = llama.rope_tables(CONFIG, POSITIONS)
    expected = llama.rotate(x, rope), gradient(x, out_grad)
    monkeypatch.setattr(llama, "platform", lambda: "tpu")
    assert "dot_general" in str(jax.make_jaxpr(llama.rotate)(x, rope))
    for ours, other in zip((llama.rotate(x, rope), gradient(x, out_grad)), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, other)
