"""What the backward pass reads of the forward pass is counted once, and only where it lies on the device."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from vflax import kept
from vflax.models.layers import INPUT, rematerialised

LAYERS, ROWS, WIDTH = 3, 4, 8
INPUT_BYTES = LAYERS * ROWS * WIDTH * 4


def loss(remat: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A scan over layers that have two products each."""

    def layer(kernels: jax.Array, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x, INPUT)
        return jnp.tanh(jnp.tanh(x @ kernels[0]) @ kernels[1])

    step = rematerialised(layer, remat)
    return lambda x, kernels: jax.lax.scan(lambda x, k: (step(k, x), None), x, kernels)[0].sum()


def shapes() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((ROWS, WIDTH), "float32"), jax.ShapeDtypeStruct(
        (LAYERS, 2, WIDTH, WIDTH), "float32"
    )


@pytest.mark.parametrize(("remat", "inputs"), [("full", 1), ("offload", 0), ("dots", 3)])
def test_a_policy_keeps_what_it_says(remat: str, inputs: int):
    jaxpr = jax.make_jaxpr(jax.grad(loss(remat), argnums=1))(*shapes())
    assert kept.activations(jaxpr) == inputs * INPUT_BYTES


def test_without_a_gradient_nothing_is_kept():
    assert kept.activations(jax.make_jaxpr(loss("full"))(*shapes())) == 0


def test_of_several_micro_batches_one_counts():
    def step(x: jax.Array, kernels: jax.Array) -> jax.Array:
        gradient = jax.grad(loss("full"), argnums=1)
        return jax.lax.scan(lambda total, x: (total + gradient(x, kernels), None), kernels, x)[0]

    x, kernels = shapes()
    jaxpr = jax.make_jaxpr(step)(jax.ShapeDtypeStruct((5, *x.shape), x.dtype), kernels)
    assert kept.activations(jaxpr) == INPUT_BYTES
