"""What tower and decoder share: norms computed in float32, layers stacked for a scan, remat policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vflax.errors import UserError
from vflax.models.attention import OUTPUT
from vflax.models.lora import with_keys

Layer = TypeVar("Layer", bound=nnx.Module)

# One object, not one per module: a graphdef compares its static parts, and two calls of normal() differ.
KERNEL_INIT = nnx.initializers.normal(stddev=0.02)

_weight_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# What the backward pass may keep of a layer's forward pass. "none" is not a policy: nothing is recomputed.
_POLICIES: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_no_batch": _weight_products,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _weight_products, jax.checkpoint_policies.save_only_these_names(OUTPUT)
    ),
}
REMAT_POLICIES = ("none", *_POLICIES)


class LayerNorm(nnx.Module):
    """LayerNorm (Ba et al., arXiv 1607.06450) with float32 statistics: [..., D] -> [..., D] in `dtype`."""

    def __init__(self, width: int, eps: float, *, dtype: Any, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (x * scale + bias).astype(self.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in float32: [..., D] -> [..., D] in `dtype`."""

    def __init__(self, width: int, eps: float, *, dtype: Any, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


def linear(
    in_width: int, out_width: int, *, use_bias: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
) -> nnx.Linear:
    """A dense layer, kernel [in, out], that casts its parameters to `dtype` where it uses them."""
    return nnx.Linear(
        in_width,
        out_width,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=KERNEL_INIT,
        rngs=rngs,
    )


def stack(make: Callable[[nnx.Rngs], Layer], num_layers: int, rngs: nnx.Rngs) -> Layer:
    """Build `num_layers` layers as one module whose every parameter has a leading layer axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Layer:
        return make(rngs)

    return build(rngs)


def scan_layers(
    body: Callable[[Layer, jax.Array], jax.Array],
    layers: Layer | Iterable[Layer],
    x: jax.Array,
    remat: str,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Run x through layers: x = body(layer, x) for each layer in turn.

    Only the carry comes back: a scan that also returned the layers would stack a second copy of the weights.

    Args:
        body: one layer's step.
        layers: a module built by `stack`; or single layers one after the other, for weights that are read as they are
            used (vflax/weights/streamed.py).
        x: the carry, same shape and dtype in and out.
        remat: a name from REMAT_POLICIES.
        keys: of the adapters' dropout, key array [L, B]; None: without dropout.
    """
    if not isinstance(layers, nnx.Module):
        for layer in layers:
            x = body(layer, x)
        return x
    # The keys are an argument, so that what is recomputed has the masks of the first time.
    step = rematerialised(lambda layer, keys, x: body(with_keys(layer, keys), x), remat)
    x, _ = jax.lax.scan(lambda carry, own: (step(*own, carry), None), x, (layers, keys))
    return x


def rematerialised(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wrap a layer's step so that its backward pass recomputes what the policy does not keep."""
    check_remat(remat)
    if remat == "none":
        return body
    # Inside a scan XLA cannot merge the two forward passes, so the barrier against that only costs time.
    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)


def check_remat(remat: str) -> None:
    """Raise UserError unless `remat` names a policy."""
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat={remat!r} is not a policy: choose one of {', '.join(REMAT_POLICIES)}")
