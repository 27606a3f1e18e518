"""The product of activations with a kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vflax.models.attention import platform


def product(x: jax.Array, kernel: jax.Array, *, preferred_element_type: Any = None) -> jax.Array:
    """x [..., in] times a kernel [in, out] -> [..., out].

    On one CPU device all axes of x but the last are made one. The kernel's gradient is then the product of two
    matrices; of [B, T, in] and [B, T, out] XLA's CPU compiler first writes transposed copies, and does the elementwise
    work before them in an order that suits neither. A step takes about two thirds of the time.
    """
    if x.ndim < 3 or not on_one_cpu():
        return jnp.matmul(x, kernel, preferred_element_type=preferred_element_type)
    # [..., in] -> [rows, in] x [in, out] -> [rows, out]
    rows = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=preferred_element_type)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def on_one_cpu() -> bool:
    """Whether this is for a CPU, and rows are not shared out among devices: an axis made of two would lose that."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)
