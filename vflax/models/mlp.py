"""The decoder's feed-forward block, SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vflax.constants import LANES
from vflax.models.attention import platform
from vflax.models.layers import are_plain, linear
from vflax.sharding import batch_shards, inner_shards

# Bytes of a [B, T, f] array that one device holds at a time, where the inner width can be cut. With larger ones the
# kernels' slices, of which several are in use at once, are too large for a v5e chip's 128 MiB of fast memory, and
# products that read them from HBM take up to twice as long.
_PART = 48 * 2**20


class DecoderMlp(nnx.Module):
    """[B, T, D] -> [B, T, D].

    On a TPU the compiler would compute silu(gate) * up, and its gradient, inside the matrix products that come before
    and after, anew for each of their tiles, and such a product takes much longer. So what goes from there into a
    product is finished first.
    """

    def __init__(self, width: int, mlp_dim: int, *, recomputed: bool, rngs: nnx.Rngs, **dtypes: Any) -> None:
        """
        Args:
            width, mlp_dim: D and the inner width F.
            recomputed: the backward pass keeps nothing of this block, whatever it does.
            rngs: of the kernels.
            dtypes: dtype and param_dtype.
        """
        self.gate = linear(width, mlp_dim, use_bias=False, rngs=rngs, **dtypes)
        self.up = linear(width, mlp_dim, use_bias=False, rngs=rngs, **dtypes)
        self.down = linear(mlp_dim, width, use_bias=False, rngs=rngs, **dtypes)
        self.recomputed = recomputed

    def __call__(self, x: jax.Array) -> jax.Array:
        linears = (self.gate, self.up, self.down)
        if platform() == "tpu" and self.recomputed and inner_shards() == 1 and are_plain(*linears):
            dtype = self.gate.dtype
            return swiglu_block(x.astype(dtype), *(part.kernel[...].astype(dtype) for part in linears))
        return self.down(swiglu(self.gate(x), self.up(x)))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise; on a TPU finished before a product uses it, see `DecoderMlp`."""
    return finished_swiglu(gate, up) if platform() == "tpu" else jax.nn.silu(gate) * up


@jax.custom_vjp
def finished_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise; it, and its gradients, are in memory before anything uses them."""
    return _swiglu_forward(gate, up)[0]


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jax.lax.optimization_barrier(jax.nn.silu(gate) * up), (gate, up)


def _swiglu_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = residuals
    return jax.lax.optimization_barrier(_swiglu_gradients(gate, up, grad)[1:])


def _swiglu_gradients(gate: jax.Array, up: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
    """silu(gate) * up, and the gradients of gate and up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    # d silu(x) / dx = s + x s (1 - s), s = sigmoid(x)
    return silu * up, grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


finished_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def swiglu_block(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The whole block, whose backward pass holds a part of the inner width at a time.

    gate(x), up(x), silu(gate(x)) * up(x) and the gradients of all three are the largest arrays of a step, and
    the backward pass needs all at once; but what one slice of the inner width gives does not depend on the others. So
    slices follow one another, and each is computed anew from x.

    Args:
        x: [B, T, D].
        gate, up: kernels [D, F].
        down: kernel [F, D].

    Returns:
        [B, T, D]
    """
    return _block_forward(x, gate, up, down)[0]


def _block_forward(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> tuple[jax.Array, Any]:
    return finished_swiglu(x @ gate, x @ up) @ down, (x, gate, up, down)


def _block_backward(residuals: Any, grad: jax.Array) -> tuple[jax.Array, ...]:
    x, gate, up, down = residuals
    d_x: jax.Array | None = None
    found: list[tuple[jax.Array, ...]] = []
    for begin, end in slices(gate.shape[1], x.size // x.shape[-1] * x.dtype.itemsize):
        if found:
            # A slice begins when the last has ended: nothing of two is in memory at once.
            x, grad, d_x, found[-1] = jax.lax.optimization_barrier((x, grad, d_x, found[-1]))
        own_gate, own_up, own_down = gate[:, begin:end], up[:, begin:end], down[begin:end]
        # [B, T, D] x [D, f] -> [B, T, f]. The gradients are made where the last of the three products ends.
        gated, d_h = jax.lax.optimization_barrier((x @ own_gate, grad @ own_down.T))
        h, d_gate, d_up = jax.lax.optimization_barrier(_swiglu_gradients(gated, x @ own_up, d_h))
        # [B, T, f] x [f, D] -> [B, T, D], each onto the sum of those before: two of them are in memory, not three.
        of_gate = d_gate @ own_gate.T
        d_x = (of_gate if d_x is None else d_x + of_gate) + d_up @ own_up.T
        found.append((_kernel_gradient(x, d_gate), _kernel_gradient(x, d_up), _kernel_gradient(h, grad)))
    assert d_x is not None
    gates, ups, downs = zip(*found, strict=True)
    return d_x, jnp.concatenate(gates, 1), jnp.concatenate(ups, 1), jnp.concatenate(downs, 0)


def _kernel_gradient(inputs: jax.Array, grad: jax.Array) -> jax.Array:
    # [B, T, in] x [B, T, out] -> [in, out]
    return jnp.einsum("bti,bto->io", inputs, grad)


def slices(width: int, column: int) -> list[tuple[int, int]]:
    """[begin, end) of each slice of the inner width; nearly equal, and one where all is small.

    Args:
        width: F.
        column: bytes of one column of [B, T, F], over all devices.
    """
    lanes = -(-width // LANES)  # an inner width is cut at whole ones
    mesh = jax.sharding.get_abstract_mesh()
    own = column / (1 if mesh.empty else batch_shards(mesh))
    parts = min(lanes, math.ceil(own * width / _PART))
    ends = [min(width, lanes * i // parts * LANES) for i in range(parts + 1)]
    return list(itertools.pairwise(ends))


swiglu_block.defvjp(_block_forward, _block_backward)
