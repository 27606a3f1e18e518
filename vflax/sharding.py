"""Mesh, path rules and the check that nothing large is left unsharded."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

# Every batch dimension is spread over both of these.
BATCH_AXES = ("data", "fsdp")


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Pin the sharding of an activation inside jit; a no-op where no mesh is set.

    GSPMD loses the batch sharding in a reshape such as [B, S, ...] -> [B * S, ...] and then silently
    replicates everything behind it, so images and features are pinned by hand.

    Args:
        x: an array of any shape.
        spec: one entry per leading dimension: a mesh axis, several, or None. Missing entries are None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
