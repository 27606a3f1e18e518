"""What tower and decoder share: norms computed in float32, layers stacked for a scan, remat policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vflax.errors import UserError
from vflax.models.attention import CUDNN_FORWARD, OUTPUT, platform
from vflax.models.lora import with_keys
from vflax.models.product import on_one_cpu, product

Layer = TypeVar("Layer", bound=nnx.Module)

# One object, not one per module: a graphdef compares its static parts, and two calls of normal() differ.
KERNEL_INIT = nnx.initializers.normal(stddev=0.02)

# See _mean.
_FEW_ROWS = 8

# The name under which a remat policy finds what goes into a layer.
INPUT = "layer_input"


class _Remat(NamedTuple):
    """keep: jax.checkpoint's policy, what the backward pass finds of a layer's forward pass; words: what that is."""

    keep: Callable[..., Any]
    words: str


_policies = jax.checkpoint_policies
_weight_products = _policies.dots_with_no_batch_dims_saveable


def _with_attention(keep: Callable[..., Any]) -> Callable[..., Any]:
    """A policy, and what cuDNN's attention hands to its backward pass: JAX gives that no name, so it goes by the
    operation that makes it."""
    return lambda operation, *shapes, **settings: (
        operation.name == CUDNN_FORWARD or keep(operation, *shapes, **settings)
    )


def _offload(*kept: str) -> Callable[..., Any]:
    """Each layer's input goes to the host's memory; what is named stays on the device."""
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept), names_which_can_be_offloaded=[INPUT],
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip


# What the backward pass may keep of a layer's forward pass, from the least memory on the device to the most. "none" is
# not a policy: nothing is recomputed.
_POLICIES: dict[str, _Remat] = {
    "offload": _Remat(_offload(), "as full, with every layer's input in the host's memory"),
    "full": _Remat(_policies.nothing_saveable, "a layer is recomputed from its input"),
    "offload_attention": _Remat(
        _with_attention(_offload(OUTPUT)), "as attention, with every layer's input in the host's memory"
    ),
    "attention": _Remat(
        _with_attention(_policies.save_only_these_names(OUTPUT)),
        "as full, but what attention gives is kept: its forward kernel runs once",
    ),
    "dots_no_batch": _Remat(_weight_products, "products with weights are kept"),
    "dots": _Remat(
        _with_attention(
            _policies.save_from_both_policies(_weight_products, _policies.save_only_these_names(OUTPUT))
        ),
        "products with weights and what attention gives are kept",
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
        x = x * jax.lax.rsqrt(_mean(jnp.square(x)) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


def _mean(x: jax.Array) -> jax.Array:
    """[..., D] -> [..., 1].

    For a CPU XLA writes the sums of a few rows as another loop than those of many, which adds up in another order. Few
    rows are filled up, so that a row's mean is the same bits in an answer that is written alone and in one of several.
    """
    rows = x.size // x.shape[-1]
    if rows >= _FEW_ROWS or not on_one_cpu():
        return x.mean(-1, keepdims=True)
    # [..., D] -> [_FEW_ROWS, D]
    filled_up = jnp.pad(x.reshape(rows, -1), ((0, _FEW_ROWS - rows), (0, 0)))
    return filled_up.mean(-1)[:rows].reshape(*x.shape[:-1], 1)


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """`product` as nnx.Linear calls it: it contracts the last axis of x with the first of the kernel, in its dtype."""
    return product(x, kernel)


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
        dot_general=_dot_general,
        rngs=rngs,
    )


def are_plain(*linears: nnx.Module) -> bool:
    """Whether none of them has an adapter or is held as integers: nothing but a product with its kernel."""
    return all(isinstance(linear, nnx.Linear) for linear in linears)


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
    def own(layer: Layer, keys: jax.Array | None, x: jax.Array) -> jax.Array:
        return body(with_keys(layer, keys), checkpoint_name(x, INPUT))

    step = rematerialised(own, remat)
    x, _ = jax.lax.scan(lambda carry, xs: (step(*xs, carry), None), x, (layers, keys))
    return x


def rematerialised(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wrap a layer's step so that its backward pass recomputes what the policy does not keep."""
    check_remat(remat)
    if remat == "none":
        return body
    # Inside a scan XLA cannot merge the two forward passes, so the barrier against that only costs time.
    return jax.checkpoint(body, policy=_POLICIES[remat].keep, prevent_cse=False)


def recomputes_products(remat: str) -> bool:
    """Whether the backward pass computes a layer's products with weights anew."""
    return remat not in ("none", "dots_no_batch", "dots")


def inputs_anew(run: Callable[..., Any], recomputed: bool) -> Callable[..., Any]:
    """`run`, whose backward pass makes what it needs from run's own arguments, and not before it begins.

    For linear functions, which need their inputs alone, not their results. Where a layer is recomputed, the compiler
    would make such inputs, or copies of them in another layout, with the forward pass, and hold them until the end.
    (jax.checkpoint would do this, too, but puts a barrier before the forward pass as well.)
    """
    if platform() != "tpu" or not recomputed:
        return run
    anew = jax.custom_vjp(run)

    def backward(inputs: tuple[Any, ...], grad: Any) -> Any:
        inputs, grad = jax.lax.optimization_barrier((inputs, grad))
        return jax.vjp(run, *inputs)[1](grad)

    anew.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return anew


def check_remat(remat: str) -> None:
    """Raise UserError unless `remat` names a policy."""
    if remat not in REMAT_POLICIES:
        choices = [
            "none (nothing is recomputed)",
            *(f"{name} ({policy.words})" for name, policy in _POLICIES.items()),
        ]
        raise UserError(f"remat={remat!r} is not a policy: choose one of {'; '.join(choices)}")
