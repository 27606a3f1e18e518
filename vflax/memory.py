"""Will it fit: an estimate of the bytes on a device, made before anything is allocated."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vflax import freeze
from vflax.constants import GIB
from vflax.errors import UserError
from vflax.loss import chunk_width
from vflax.models.llava import LlavaConfig

# Share of a device's memory that a run may plan with; the rest is the runtime's and the estimate's error.
USABLE = 0.92


def estimate(
    config: LlavaConfig,
    params: Mapping[str, Any],
    shardings: Mapping[str, Any],
    verdict: Mapping[str, str],
    *,
    rows: int,
    max_length: int,
    capacity: int,
    slots: int,
    accumulation: int,
    dtype: str,
    moment_dtype: str,
    remat: str,
    scores: bool,
) -> dict[str, int]:
    """Bytes on one device at the peak of a training step.

    Args:
        params: {path: anything with .shape and .dtype}, as held on the devices.
        shardings: {path: NamedSharding}.
        rows: rows of one micro-batch on one device.
        max_length, slots: tokens and images of a row.
        capacity: supervised tokens of a row, where alone logits are made.
        accumulation: micro-batches of a step; with several, their gradients are summed in a second tree.
        scores: whether attention writes its scores to memory (the reference backend does).

    Returns:
        {"parameters", "optimizer", "gradients", "activations", "logits", "images", "total"} in bytes. Activations
        are the layer inputs that rematerialisation keeps plus one layer's working set (or, without it, every
        layer's), a formula and not a measurement.
    """
    item = jnp.dtype(dtype).itemsize

    def local(path: str) -> int:
        return math.prod(shardings[path].shard_shape(tuple(params[path].shape)))

    trainable = [path for path in params if verdict[path] == freeze.TRAINABLE]
    sizes = {
        "parameters": sum(local(path) * params[path].dtype.itemsize for path in params),
        "optimizer": sum(local(path) * (4 + jnp.dtype(moment_dtype).itemsize) for path in trainable),
        # Kernels' in the compute dtype (llava.cast_kernels); summed over micro-batches in that of the masters.
        "gradients": sum(
            local(path) * (item if path.endswith("/kernel") else params[path].dtype.itemsize)
            + local(path) * (params[path].dtype.itemsize if accumulation > 1 else 0)
            for path in trainable
        ),
    }
    decoder, vision = config.decoder, config.vision
    tokens = rows * max_length
    # Inputs, normed inputs, q, k, v, attention output, gate, up and their product, each kept for the backward pass.
    layer = tokens * item * (
        4 * decoder.width + (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim + 3 * decoder.mlp_dim
    )  # fmt: skip
    for path in params:
        if path.startswith("decoder/layers/") and path.endswith("/lora_a"):
            # What dropout has left of an adapter's input, and its narrow product: [tokens, in] and [tokens, rank].
            layer += tokens * item * sum(params[path].shape[-2:])
    inputs = tokens * decoder.width * item
    mixed = tokens * decoder.num_heads * decoder.head_dim * item
    # Of each layer; those that the host keeps are on their way there, or back, two at a time.
    kept = {"offload": 0, "full": inputs, "offload_attention": mixed, "attention": inputs + mixed}
    sizes["activations"] = layer + kept.get(remat, inputs + layer) * decoder.num_layers
    if remat.startswith("offload"):
        sizes["activations"] += 2 * inputs
    if scores:
        # Scores, their exponentials and the gradient of these, float32 [B, H, T, T] of one layer.
        sizes["activations"] += 3 * rows * decoder.num_heads * max_length**2 * 4
    # An int8 kernel becomes floats where it is multiplied with, one layer's at a time.
    sizes["activations"] += max(
        (local(path) // params[path].shape[0] * item for path in params if params[path].dtype == jnp.int8),
        default=0,
    )
    patches = rows * slots * (vision.num_patches + 1)
    tower_layer = patches * item * (8 * vision.width + 2 * vision.mlp_dim)
    tower_learns = any(path.startswith("vision/") for path in trainable)
    sizes["activations"] += tower_layer * (
        vision.num_computed_layers if tower_learns and remat not in kept else 2
    )
    sizes["logits"] = 2 * rows * capacity * chunk_width(rows, capacity, decoder.vocab_size) * 4
    sizes["images"] = rows * slots * vision.image_size**2 * 3 * (1 + 4)
    sizes["total"] = sum(sizes.values())
    return {name: int(size) for name, size in sizes.items()}


def device_limit() -> tuple[int | None, str]:
    """(bytes that one local device can hold, or None where that is not known; how to call them).

    Devices of a CPU share the host's free memory.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count(), "free"
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit"), "in all"


def host_memory() -> int:
    """Bytes that this host can give without swapping; all that it has, where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(sizes: Mapping[str, int], limit: int | None, kind: str) -> None:
    """Refuse what cannot fit.

    Raises:
        UserError: with the estimate by kind, the limit, and what to change.
    """
    if limit is None or sizes["total"] <= limit * USABLE:
        return
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if name != "total")
    raise UserError(
        f"this run needs about {sizes['total'] / GIB:.2f} GiB per device ({parts}), but a device here has "
        f"{limit / GIB:.2f} GiB {kind}, of which {USABLE:.0%} can be planned with. Use more devices "
        "(config.mesh.fsdp), fewer rows at a time (config.batch.accumulation), config.remat=full, or try the variant "
        "that runs anywhere: --config=configs/stage1.py:tiny"
    )


def give_back_freed_memory() -> None:
    """Have what is freed go back to the system at once, from here on, in this process.

    glibc learns from large blocks that are freed to keep blocks of up to 32 MiB, and work that reads a model block by
    block then holds several times what it uses. Elsewhere than on glibc this does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_mmap_threshold = -3  # malloc.h
    libc.mallopt(m_mmap_threshold, 4 << 20)
