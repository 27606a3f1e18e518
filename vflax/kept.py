"""What a traced step keeps of its forward pass for the backward pass, counted from its jaxpr.

A scan over layers that is differentiated becomes two: the first one's stacked results are what the second one reads,
layer by layer, to go back: with remat="full" each layer's input. Nothing else of a step's activations lives as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core


def activations(jaxpr: Any) -> int:
    """Bytes, over all devices, in the devices' own memory; what is offloaded to a host does not count.

    Args:
        jaxpr: a Jaxpr or ClosedJaxpr, such as jax.stages.Traced.jaxpr. Of several micro-batches one counts: the next
            one takes the place of the last.
    """
    opened = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    stacked: set[Any] = set()
    found = 0
    for equation in opened.eqns:
        if equation.primitive.name == "scan":
            body = equation.params["jaxpr"]
            read = _by_layer(equation.invars, body.in_avals)
            kept = {var for var in read if isinstance(var, core.Var)} & stacked
            found += sum(_bytes(var.aval) for var in kept)
            stacked |= set(_by_layer(equation.outvars, body.out_avals))
        found += sum(activations(inner) for inner in _inside(equation))
    return found


def _by_layer(outside: Sequence[Any], inside: Sequence[Any]) -> list[Any]:
    """What a scan reads or writes step by step: its body has it without the first axis.

    (How a scan's parameters tell that is another matter in each version of JAX.)
    """
    return [
        var
        for var, own in zip(outside, inside, strict=True)
        if var.aval.shape[1:] == own.shape != var.aval.shape
    ]


def _bytes(aval: Any) -> int:
    # Its type has another home in each version of JAX, its name has not.
    if getattr(getattr(aval, "memory_space", None), "name", "") == "Host":
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def _inside(equation: Any) -> list[Any]:
    values = [
        v
        for value in equation.params.values()
        for v in (value if isinstance(value, list | tuple) else (value,))
    ]
    return [value for value in values if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
