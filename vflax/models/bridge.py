"""The bridge: image features into the decoder's width (LLaVA-1.5, arXiv 2310.03744, section 3.3)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from vflax.errors import UserError
from vflax.models.clip_vit import exact_gelu
from vflax.models.layers import linear
from vflax.sharding import BATCH_AXES, constrain
from vflax.values import COUNT, TEXT, Kind


@dataclass(frozen=True)
class BridgeConfig:
    """kind: "linear", or "mlpNx_gelu" for N linears with an exact GELU between each two."""

    kind: str
    in_width: int
    out_width: int

    def __post_init__(self) -> None:
        if self.kind != "linear" and not re.fullmatch(r"mlp[1-9]\d?x_gelu", self.kind):
            raise UserError(
                f"bridge config: kind={self.kind!r}: expected 'linear' or 'mlpNx_gelu', N from 1 to 99"
            )

    @property
    def num_linears(self) -> int:
        """How many dense layers the kind has."""
        match = re.fullmatch(r"mlp(\d+)x_gelu", self.kind)
        return int(match[1]) if match else 1


# What the fields of a BridgeConfig that comes from a file must be.
BRIDGE_KINDS: dict[str, Kind] = {"kind": TEXT, "in_width": COUNT, "out_width": COUNT}


class Bridge(nnx.Module):
    """[..., in_width] -> [..., out_width]."""

    def __init__(self, config: BridgeConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        for i in range(config.num_linears):
            in_width = config.in_width if i == 0 else config.out_width
            layer = linear(
                in_width, config.out_width, use_bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )
            setattr(self, f"layers_{i}", layer)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.num_linears):
            if i:
                x = exact_gelu(x)
            # Not for speed alone: without this pin XLA's partitioner gave a wrong gradient of the first linear on a
            # (2, 2, 2) mesh (tests/test_mesh.py holds it).
            x = constrain(getattr(self, f"layers_{i}")(x), BATCH_AXES)
        return x
