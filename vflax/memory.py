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
from vflax.models.llama import DecoderConfig
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
    tensor = next(iter(shardings.values())).mesh.shape["tensor"]

    def local(path: str) -> int:
        return math.prod(shardings[path].shard_shape(tuple(params[path].shape)))

    trainable = [path for path in params if verdict[path] == freeze.TRAINABLE]
    sizes = {
        "parameters": sum(local(path) * params[path].dtype.itemsize for path in params),
        "optimizer": sum(local(path) * 2 * jnp.dtype(moment_dtype).itemsize for path in trainable),
        # Kernels' in the compute dtype (llava.cast_kernels); summed over micro-batches in that of the masters.
        "gradients": sum(
            local(path) * (item if path.endswith("/kernel") else params[path].dtype.itemsize)
            + local(path) * (params[path].dtype.itemsize if accumulation > 1 else 0)
            for path in trainable
        ),
    }
    decoder, vision = config.decoder, config.vision
    tokens = rows * max_length
    # A layer's residuals, normed inputs, q, k, v, gate, up and their product, while the backward pass is in it.
    working = kept_width(decoder, "none", tensor) - decoder.width
    kept = kept_width(decoder, remat, tensor)
    for path in params:
        if path.startswith("decoder/layers/") and path.endswith("/lora_a"):
            # What dropout has left of an adapter's input, and its narrow product: [tokens, in] and [tokens, rank].
            dropped, narrow = (_along_tensor(path, axis, params, shardings) for axis in (1, 2))
            working += dropped + narrow
            kept += {"none": dropped + narrow, "dots": narrow, "dots_no_batch": narrow}.get(remat, 0)
    sizes["activations"] = tokens * item * (working + kept * decoder.num_layers)
    if remat.startswith("offload"):
        # Inputs that are on their way to the host, or back, two at a time.
        sizes["activations"] += 2 * tokens * decoder.width * item
    if scores:
        # Scores, their exponentials and the gradient of these, float32 [B, H, T, T] of one layer.
        heads = decoder.num_heads // _parts(decoder.num_kv_heads, tensor)
        sizes["activations"] += 3 * rows * heads * max_length**2 * 4
    # An int8 kernel becomes floats where it is multiplied with, one layer's at a time.
    sizes["activations"] += max(
        (local(path) // params[path].shape[0] * item for path in params if params[path].dtype == jnp.int8),
        default=0,
    )
    patches = rows * slots * (vision.num_patches + 1)
    heads, inner = _parts(vision.num_heads, tensor), _parts(vision.mlp_dim, tensor)
    tower_layer = patches * item * (4 * vision.width * (1 + 1 / heads) + 2 * vision.mlp_dim / inner)
    tower_learns = any(path.startswith("vision/") for path in trainable)
    sizes["activations"] += tower_layer * (
        vision.num_computed_layers if tower_learns and remat in ("none", "dots", "dots_no_batch") else 2
    )
    columns = chunk_width(rows, capacity, decoder.vocab_size)
    if tensor > 1:  # the loss takes no chunks then (head_loss_sum)
        embedding, head = ("decoder/embed_tokens/embedding", 0), ("decoder/lm_head/kernel", 1)
        columns = _along_tensor(*(embedding if decoder.tie_word_embeddings else head), params, shardings)
    sizes["logits"] = 2 * rows * capacity * columns * 4
    sizes["images"] = rows * slots * vision.image_size**2 * 3 * (1 + 4)
    sizes["total"] = sum(sizes.values())
    return {name: int(size) for name, size in sizes.items()}


def kept_width(decoder: DecoderConfig, remat: str, tensor: int = 1) -> int:
    """How many numbers of a token and a layer a device keeps for the backward pass, by rematerialisation policy.

    What goes in and out of a layer is whole on every device along `tensor`; what belongs to a head, or to a column of
    the inner width, is split.
    """
    width, inner = decoder.width, decoder.mlp_dim // _parts(decoder.mlp_dim, tensor)
    parts = _parts(decoder.num_kv_heads, tensor)
    mixed = decoder.num_heads // parts * decoder.head_dim
    queries_keys_values = mixed + 2 * decoder.num_kv_heads // parts * decoder.head_dim
    # The layer's input, q, k, v, the residual behind attention, gate, up.
    products = 2 * width + queries_keys_values + 2 * inner
    kept = {
        "offload": 0,
        "full": width,
        "offload_attention": mixed,
        "attention": width + mixed,
        "dots_no_batch": products,
        "dots": products + mixed,
        "none": 5 * width + queries_keys_values + 3 * inner,
    }
    return kept[remat]


def _parts(count: int, tensor: int) -> int:
    """Into how many parts the axis `tensor` splits so many heads or columns: all, or one where they do not divide."""
    return tensor if count % tensor == 0 else 1


def _along_tensor(path: str, axis: int, params: Mapping[str, Any], shardings: Mapping[str, Any]) -> int:
    """Of a parameter's axis, and so of what it multiplies, what a device has when `tensor` alone splits it."""
    spec, size = shardings[path].spec, params[path].shape[axis]
    split = axis < len(spec) and spec[axis] == "tensor"
    return size // shardings[path].mesh.shape["tensor"] if split else size


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
