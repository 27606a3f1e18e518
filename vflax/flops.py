"""Floating-point operations of a training step, counted from shapes, and peaks to compare them with."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vflax import freeze
from vflax.models.llava import LlavaConfig

# Dense bfloat16 peak of one device in FLOP/s, as its maker states it, by jax's device_kind.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

_HEAD = "decoder/lm_head/kernel"


def train_step_flops(
    config: LlavaConfig,
    params: Mapping[str, Any],
    verdict: Mapping[str, str],
    *,
    tokens: float,
    supervised: float,
    context: float,
    images: float,
) -> float:
    """Model FLOPs of one optimizer step: what the mathematics needs, recomputation not counted.

    A matrix product of a [n, a] x [a, b] costs 2nab forward; as much again for the gradient of its input where
    something below learns, and again for its own gradient where it learns itself (Kaplan et al., 2020;
    attention scores as in PaLM's appendix B, over the tokens that are really attended to). The product with the
    vocabulary counts at supervised tokens only: nothing else needs it.

    Args:
        params: {path: anything with .shape}.
        verdict: {path: "trainable" | "frozen"}.
        tokens: positions of the step that hold a token, image tokens included (padding is not useful work).
        supervised: tokens that the loss counts.
        context: sum over these positions of the tokens that each attends to, itself included.
        images: images of the step.
    """
    learns = {part: any(v == freeze.TRAINABLE for p, v in verdict.items() if p.startswith(part))
              for part in ("vision", "bridge", "decoder")}  # fmt: skip
    below = {"vision": False, "bridge": learns["vision"], "decoder": learns["vision"] or learns["bridge"]}
    positions = {
        "vision": images * (config.vision.num_patches + 1),
        "bridge": images * config.vision.num_tokens,
        "decoder": tokens,
    }
    total = 0.0
    for path, leaf in params.items():
        part = path.split("/")[0]
        head = path == ("decoder/embed_tokens/embedding" if config.decoder.tie_word_embeddings else _HEAD)
        if not path.endswith(("/kernel", "/lora_a", "/lora_b")) and not head:
            continue
        passes = 1 + (below[part] or learns[part]) + (verdict[path] == freeze.TRAINABLE)
        here = positions[part]
        if head:
            here = supervised
        elif "patch_embedding" in path:
            here = images * config.vision.num_patches
        total += 2.0 * math.prod(leaf.shape) * here * passes
    vision, decoder = config.vision, config.decoder
    total += (
        4.0 * vision.num_computed_layers * vision.width * images * (vision.num_patches + 1) ** 2
        * (3 if learns["vision"] else 1)
    )  # fmt: skip
    total += (
        4.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim * context
        * (3 if learns["decoder"] or below["decoder"] else 1)
    )  # fmt: skip
    return total


def device_peak(device: jax.Device) -> tuple[float, str]:
    """(FLOP/s of one device, where the figure comes from).

    A device that the table does not know, a CPU above all, is measured with a matrix product.
    """
    if device.device_kind in PEAKS:
        return PEAKS[device.device_kind], f"{device.device_kind}, stated bf16 peak"
    size = 1024
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # Simulated devices share the host's cores, so one of them has a part of the measured speed.
    share = jax.local_device_count() if device.platform == "cpu" else 1
    return 2.0 * size**3 / best / share, f"{device.device_kind}, measured float32 matrix product"
