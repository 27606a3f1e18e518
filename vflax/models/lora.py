"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), beside weights that may be held in 8 bits.

A linear that is a target has two more parameters, and computes

    y = x W + b + alpha / rank * dropout(x) A B          W [in, out]   A [in, rank]   B [rank, out]

With base="int8" every linear of the decoder's layers is held as integers with a scale per output, in the way of QLoRA
(Dettmers et al., arXiv 2305.14314), which has 4 bits and blocks:

    W ~ kernel * kernel_scale          kernel int8 [in, out]   kernel_scale float32 [out]
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vflax.errors import UserError
from vflax.freeze import TRAINABLE
from vflax.models.product import product
from vflax.values import NUMBER, TEXT, WHOLE, Kind, missing, wrong

Module = TypeVar("Module", bound=nnx.Module)

A, B, SCALE = "lora_a", "lora_b", "kernel_scale"
BASES = ("", "int8")
# Whose kernels base="int8" turns into integers.
_QUANTISED = r"decoder/layers/.*"
_HEAD = "decoder/lm_head"
_LEVELS = 127  # symmetric: -128 is not used
# What the fields of a LoraConfig that comes from a file must be.
_KINDS: dict[str, Kind] = {
    "rank": WHOLE, "alpha": NUMBER, "dropout": NUMBER, "targets": TEXT.listed(), "base": TEXT
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """What config.lora says of a run that has adapters.

    rank: inner width of an adapter; alpha: its weight is alpha / rank.
    dropout: share of an adapter's inputs that a training step sets to zero.
    targets: regular expressions for whole paths of linears, such as "decoder/layers/attention/q".
    base: "int8" holds the kernels of the decoder's layers as integers; "": all weights as ever.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base: str = ""

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"config.lora.rank={self.rank}: at least 1, or 0 for training without adapters")
        if not self.alpha > 0:
            problems.append(f"config.lora.alpha={self.alpha}: more than 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"config.lora.dropout={self.dropout}: 0 <= dropout < 1")
        if not self.targets:
            problems.append("config.lora.targets is empty: name the linears that get an adapter")
        if self.base not in BASES:
            problems.append(f"config.lora.base={self.base!r}: one of {', '.join(map(repr, BASES))}")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"config.lora.targets: {pattern!r} is no regular expression ({error})")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank

    def is_target(self, path: str) -> bool:
        """Whether the linear at `path` gets an adapter."""
        return any(re.fullmatch(pattern, path) for pattern in self.targets)

    def is_quantised(self, path: str) -> bool:
        """Whether the kernel of the linear at `path` is held as integers."""
        return self.base == "int8" and re.fullmatch(_QUANTISED, path) is not None

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types."""
        return dataclasses.asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LoraConfig:
        """The inverse of to_dict.

        Raises:
            UserError: naming every missing, unknown and impossible key.
        """
        problems = [*missing(cls, plain, "config.lora."), *wrong(plain, _KINDS, "config.lora.").values()]
        if problems:
            raise UserError("; ".join(problems))
        return cls(**{**plain, "targets": tuple(plain["targets"])})


def read(options: Mapping[str, Any]) -> LoraConfig | None:
    """config.lora as a LoraConfig; None where its rank is 0.

    Raises:
        UserError: for keys that are impossible, or that would be without effect.
    """
    if options["rank"] == 0:
        if options["base"]:
            raise UserError(
                f"config.lora.base={options['base']!r} is for weights beside adapters: set config.lora.rank too"
            )
        return None
    return LoraConfig.from_dict(dict(options))


def check_targets(lora: LoraConfig, linears: Iterable[str]) -> None:
    """Refuse targets that the model does not have, or that cannot have an adapter.

    Args:
        lora: what is wanted.
        linears: paths of the model's linears.

    Raises:
        UserError: naming every such pattern.
    """
    paths = list(linears)
    problems = [
        f"{pattern!r} matches no linear; there are {', '.join(paths)}"
        for pattern in lora.targets
        if not any(re.fullmatch(pattern, path) for path in paths)
    ]
    problems += [
        f"{pattern!r} matches {_HEAD}, which makes logits and takes no adapter: narrow it"
        for pattern in lora.targets
        if re.fullmatch(pattern, _HEAD)
    ]
    outside = [path for path in paths if lora.is_target(path) and not path.startswith("decoder/")]
    if lora.dropout and outside:
        problems.append(
            f"adapters with dropout are for the decoder only, but the targets have {', '.join(outside)}: "
            "set config.lora.dropout=0"
        )
    if problems:
        raise UserError("config.lora.targets: " + "; ".join(problems))


def check_frozen(lora: LoraConfig | None, verdict: Mapping[str, str]) -> None:
    """Refuse to train what is held as integers.

    Args:
        lora: the run's adapters.
        verdict: {parameter path: "trainable" | "frozen"}.

    Raises:
        UserError: naming all such parameters.
    """
    wrong = [
        path
        for path, found in verdict.items()
        if found == TRAINABLE
        and path.endswith(("/kernel", f"/{SCALE}"))
        and lora is not None
        and lora.is_quantised(path.rpartition("/")[0])
    ]
    if wrong:
        raise UserError(
            f"config.lora.base='int8', but config.freeze makes {', '.join(wrong)} trainable: integers do not learn. "
            "Freeze them, or set config.lora.base=''"
        )


def is_integers(path: str, leaf: Any) -> bool:
    """Whether a parameter is an int8 kernel or its scales, which keep their dtypes whatever is computed in."""
    return leaf.dtype == jnp.int8 or path.endswith(f"/{SCALE}")


class LoraLinear(nnx.Module):
    """A dense layer with an adapter, with its kernel held as integers, or with both: [..., in] -> [..., out].

    Like other linears it may be one of a stack, every parameter having a leading layer axis outside the scan.
    """

    def __init__(
        self, linear: nnx.Linear, lora: LoraConfig, *, adapted: bool, quantised: bool, rngs: nnx.Rngs
    ) -> None:
        """Take the place of `linear`, whose kernel may be stacked: [in, out] or [L, in, out]."""
        kernel = linear.kernel[...]
        *stacked, fan_in, fan_out = kernel.shape
        self.kernel, self.kernel_scale = linear.kernel, nnx.data(None)
        if quantised:
            integers, scale = quantise(kernel, jnp)
            self.kernel, self.kernel_scale = nnx.Param(integers), nnx.Param(scale)
        self.bias = nnx.data(None) if linear.bias is None else linear.bias
        self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
        if adapted:
            # PEFT's: Kaiming's uniform with a = sqrt(5), that is 1 / sqrt(in); and zeros, so that W comes out first.
            uniform = jax.random.uniform(
                rngs.params(), (*stacked, fan_in, lora.rank), linear.param_dtype, -1, 1
            )
            self.lora_a = nnx.Param(uniform / fan_in**0.5)
            self.lora_b = nnx.Param(jnp.zeros((*stacked, lora.rank, fan_out), linear.param_dtype))
        self.scale, self.dropout = lora.scale, lora.dropout
        self.keys = nnx.data(None)
        self.dtype = linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        if self.kernel_scale is None:
            y = product(x, self.kernel[...].astype(self.dtype))
        else:
            y = int8_product(x, self.kernel[...], self.kernel_scale[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is None or self.lora_b is None:
            return y
        if self.keys is not None:
            x = drop(x, self.keys, self.dropout)
        # [..., in] x [in, rank] -> [..., rank] x [rank, out] -> [..., out]
        low = product(x, self.lora_a[...].astype(self.dtype))
        return y + self.scale * product(low, self.lora_b[...].astype(self.dtype))


def adapt(model: nnx.Module, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Put a LoraLinear in the place of each linear of `model` that is a target or whose kernel becomes integers.

    Raises:
        UserError: for targets that are none.
    """
    linears = _linears(model)
    check_targets(lora, linears)
    for path, linear in linears.items():
        adapted, quantised = lora.is_target(path), lora.is_quantised(path)
        if adapted or quantised:
            _replace(model, path, LoraLinear(linear, lora, adapted=adapted, quantised=quantised, rngs=rngs))


def hold_as_integers(module: nnx.Module) -> None:
    """Put a LoraLinear without an adapter, whose kernel is integers, in the place of each linear of `module`."""
    no_adapters = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=("",), base="int8")
    for path, linear in _linears(module).items():
        held = LoraLinear(linear, no_adapters, adapted=False, quantised=True, rngs=nnx.Rngs(0))
        _replace(module, path, held)


def _linears(module: nnx.Module) -> dict[str, nnx.Linear]:
    """{path: linear}"""
    return {
        "/".join(map(str, path)): found
        for path, found in nnx.iter_modules(module)
        if isinstance(found, nnx.Linear)
    }


def _replace(module: nnx.Module, path: str, new: nnx.Module) -> None:
    *above, name = path.split("/")
    parent: Any = module
    for part in above:
        parent = getattr(parent, part)
    setattr(parent, name, new)


# --- dropout ----------------------------------------------------------------------------------------------------------


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """Keys of a step's dropout, one for each of its rows: key array [rows].

    A mask depends on the seed, the step and the row's number in it, on layer and linear; not on the mesh, on hosts, or
    on how the step is divided into micro-batches.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def fold(keys: jax.Array, count: int) -> jax.Array:
    """`count` keys of each: key array [B] -> [count, B]."""
    numbers = jnp.arange(count)
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(keys, numbers)


def with_keys(module: Module, keys: jax.Array | None) -> Module:
    """The module, its adapters having keys for the dropout of rows: key array [B]; None: it is as it was."""
    if keys is None:
        return module
    module = jax.tree.map(lambda leaf: leaf, module)  # a new object; the one that is given stays
    found = [part for _, part in nnx.iter_modules(module) if isinstance(part, LoraLinear)]
    for linear, own in zip(found, fold(keys, len(found)), strict=True):
        linear.keys = own
    return module


def drop(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Set a share of x [B, T, D] to zero, and scale up what stays; keys [B]."""
    # [B] -> bool [B, T, D]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    # Else a TPU's compiler makes random bits inside the products that use them, anew for each of their tiles.
    kept = jax.lax.optimization_barrier(kept)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


# --- integers ---------------------------------------------------------------------------------------------------------


def quantise(kernel: Any, xp: Any = np) -> tuple[Any, Any]:
    """Kernels [..., in, out] to (int8 [..., in, out], float32 scale [..., out]); |W - q s| <= s / 2.

    Symmetric, by the largest absolute value of each column, so a column must be there whole.

    Args:
        kernel: any float dtype.
        xp: numpy or jax.numpy, as the kernel is an array of.
    """
    kernel = kernel.astype(xp.float32)
    largest = xp.abs(kernel).max(axis=-2)
    scale = xp.where(largest > 0, largest / _LEVELS, 1).astype(xp.float32)
    return xp.rint(kernel / scale[..., None, :]).astype(xp.int8), scale


@jax.custom_vjp
def int8_product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., in], kernel int8 [in, out], scale float32 [out] -> [..., out] in x's dtype.

    The gradient, of x alone, is written out because autodiff would keep the integers as floats for it.
    """
    return _int8_forward(x, kernel, scale)[0]


def _int8_forward(
    x: jax.Array, kernel: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # [..., in] x [in, out] -> [..., out]; 127 is exact in bfloat16
    y = product(x, kernel.astype(x.dtype))
    return (y.astype(jnp.float32) * scale).astype(x.dtype), (kernel, scale)


def _int8_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, None, None]:
    kernel, scale = residuals
    scaled = (grad.astype(jnp.float32) * scale).astype(grad.dtype)
    # [..., out] x [out, in] -> [..., in]
    return product(scaled, kernel.astype(grad.dtype).T), None, None


int8_product.defvjp(_int8_forward, _int8_backward)
