"""Floating-point operations that a traced program makes, counted from its jaxpr.

XLA's own count takes the body of a loop once, so of a scan over layers it says nothing. A jaxpr tells how often a scan
turns, and it holds what rematerialisation computes again. Counted are matrix products and convolutions, two operations
for a multiplication and its addition, and the Pallas kernels that `KERNELS` has a formula for. Left out are what no
result needs, which a compiler drops, and everything elementwise (in a transformer a per mille). A jaxpr is the program
of all devices together, so the sum is theirs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from vflax.models import splash

KernelFormula = Callable[[Any], float]
"""From the equation of a pallas_call to what one call of it computes."""


@dataclasses.dataclass
class Flops:
    """What was counted.

    Attributes:
        products: of matrix products and convolutions.
        kernels: {name of a Pallas kernel: operations of all its calls}.
        notes: what could not be counted, each once.
    """

    products: float = 0.0
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def in_kernels(self) -> float:
        return float(sum(self.kernels.values()))

    @property
    def total(self) -> float:
        return self.products + self.in_kernels

    def add(self, other: Flops, times: float = 1.0) -> None:
        """Add what was counted elsewhere, so many times."""
        self.products += other.products * times
        for name, value in other.kernels.items():
            self.kernels[name] += value * times  # type: ignore[assignment]
        self.notes += [note for note in other.notes if note not in self.notes]


def count(jaxpr: Any) -> Flops:
    """Count a Jaxpr or ClosedJaxpr, such as jax.stages.Traced.jaxpr or what jax.make_jaxpr gives.

    A branch of lax.cond counts as the dearest one. A while loop whose turns nobody knows counts once, with a note.
    """
    opened = _open(jaxpr)
    needed, _ = dce_jaxpr(opened, [True] * len(opened.outvars))
    found = Flops()
    for equation in needed.eqns:
        found.add(_count_equation(equation))
    return found


def _count_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_dot_general(equation))
    if name == "conv_general_dilated":
        return Flops(_convolution(equation))
    if name == "pallas_call":
        return _kernel(equation)
    if name == "cond":
        return max((count(branch) for branch in params["branches"]), key=lambda flops: flops.total)
    found = Flops()
    times = 1.0
    if name == "scan":
        times = params["length"]
    elif name == "while":
        inner = count(params["body_jaxpr"])
        found.add(inner)
        if inner.total:
            found.notes.append("a while loop is counted once: how often it turns is known only when it runs")
        return found
    elif name == "shard_map":
        # Its body is the program of one device, for every device of the axes that it is manual over.
        sizes: Mapping[str, int] = dict(params["mesh"].shape)
        times = math.prod(sizes[axis] for axis in params.get("manual_axes") or sizes)
    for inner_jaxpr in _inside(equation):
        found.add(count(inner_jaxpr), times)
    return found


def _inside(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs once: of a custom derivative its forward rule only is left in a traced step."""
    for key, value in equation.params.items():
        if key.endswith("_thunk") or key in ("fwd", "bwd", "jvp_jaxpr_fun"):
            continue
        for candidate in value if isinstance(value, list | tuple) else (value,):
            if isinstance(candidate, core.Jaxpr | core.ClosedJaxpr):
                yield candidate


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _dot_general(equation: Any) -> float:
    """2 x elements of the result x length of what is summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """2 x elements of the result x taps x input channels of a group; what lies in the padding counts too."""
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    _, in_channels, *window = numbers.rhs_spec  # kernel's channels are those of one group already
    taps = math.prod(kernel[axis] for axis in window) * kernel[in_channels]
    result = 2.0 * math.prod(equation.outvars[0].aval.shape) * taps
    return result / equation.params["batch_group_count"]


def _kernel(equation: Any) -> Flops:
    name = str(equation.params.get("name") or equation.params.get("name_and_src_info") or "pallas_call")
    for pattern, formula in KERNELS.items():
        if re.match(pattern, name):
            return Flops(kernels=Counter({name: formula(equation)}))
    estimate = equation.params.get("cost_estimate")
    if estimate is not None:
        return Flops(kernels=Counter({name: float(estimate.flops)}))
    return Flops(notes=[f"the Pallas kernel {name} is not counted: nothing says what it computes"])


def _splash(equation: Any) -> float:
    """The three kernels of splash attention, over the blocks that they do not skip.

    Products of a block: forward q k and p v; for dq these scores again, do v and ds k; for dk and dv the scores, do v,
    p do and ds q, and in the fused kernel ds k as well (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """
    phase = re.match(_SPLASH, equation.params["name"])
    assert phase is not None
    q = next(v.aval.shape for v in equation.invars if len(v.aval.shape) > 2 and v.aval.dtype.kind not in "iu")
    *lead, heads, length, width = q
    products = {"fwd": 2, "dq": 3, "dkv": 4}[phase[1]]
    if phase[1] == "dkv":
        gradients = [
            v.aval.shape for v in equation.outvars if len(v.aval.shape) >= len(q)
        ]  # the rest is scratch
        products += sum(shape[-2:] == (length, width) for shape in gradients) > 2
    # Beside the segments of queries and keys, a causal kernel is given the queries' positions.
    causal = sum(v.aval.dtype == jnp.int32 for v in equation.invars) == 3
    return splash.flops(math.prod(lead), length, heads, width, 1, causal=causal) * products / 2


_SPLASH = r"splash_m[hq]a_(fwd|dq|dkv)"
# {pattern at the beginning of a kernel's name: its formula}.
KERNELS: dict[str, KernelFormula] = {_SPLASH: _splash}


def count_function(function: Callable[..., Any], *arguments: Any) -> Flops:
    """Count what a function of arrays, or of their ShapeDtypeStructs, computes."""
    return count(jax.make_jaxpr(function)(*arguments))
