"""Random weights that are the same to the bit wherever they are drawn: in numpy, JAX or torch, on any device.

Element i of a tensor is a 32-bit hash (MurmurHash3's finaliser) of i and the tensor's name, as a multiple of 2^-24; all
scales are powers of two, so no framework rounds anywhere. Nothing is carried from one process to another.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

_MASK = 0xFFFFFFFF


def seed_of(name: str) -> int:
    """Of a tensor, 32 bits."""
    return zlib.crc32(name.encode())


def scale_and_shift(name: str) -> tuple[float, float]:
    """Of a tensor's values: norms' weights lie about one, all others about zero, kernels with a deviation of 0.018."""
    if name.endswith("weight") and "norm" in name.replace("layrnorm", "layernorm"):
        return 0.25, 1.0
    return 0.0625, 0.0


def in_jax(seed: Any, shape: tuple[int, ...], scale: Any, shift: Any) -> Any:
    """float32 of that shape; can be jitted with the shape static."""
    import jax
    import jax.numpy as jnp

    h = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B9) + jnp.asarray(seed, jnp.uint32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
    unit = (h >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
    return (unit * scale + shift).reshape(shape)


def in_torch(name: str, parameter: Any) -> None:
    """Fill a parameter in place, where it lies, block by block."""
    import torch

    scale, shift = scale_and_shift(name)
    flat = parameter.detach().view(-1)
    block = 1 << 24  # int64 takes 128 MiB of it
    for start in range(0, flat.numel(), block):
        i = torch.arange(start, min(start + block, flat.numel()), dtype=torch.int64, device=flat.device)
        h = (i * 0x9E3779B9 + seed_of(name)) & _MASK
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
        h = h ^ (h >> 16)
        unit = (h >> 8).float() * 2.0**-24 - 0.5
        flat[start : start + block] = (unit * scale + shift).to(flat.dtype)
