"""A model of a few thousand parameters and batches for it, for tests of what surrounds the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.models import llava
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.lora import LoraConfig

CONFIG = llava.LlavaConfig(
    VisionConfig(
        image_size=8, patch_size=4, width=16, mlp_dim=32, num_layers=3, num_heads=2, hidden_act="quick_gelu",
        norm_eps=1e-5, feature_layer=-2, keep_cls=False, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4),
    ),
    BridgeConfig(kind="mlp2x_gelu", in_width=16, out_width=32),
    DecoderConfig(
        vocab_size=64, width=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5,
        rope_theta=1e4, rope_scaling=None, max_positions=64, tie_word_embeddings=False,
    ),
)  # fmt: skip
KW = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "auto"}


def build(lora: LoraConfig | None = None) -> tuple:
    """(graphdef, random flat parameters)."""
    graphdef, _ = llava.abstract(CONFIG, lora=lora, **KW)
    return graphdef, llava.init(CONFIG, jax.random.key(0), lora=lora, **KW)


def batch(rows: int, seed: int = 0, length: int = 24, slots: int = 2) -> dict[str, np.ndarray]:
    """Rows with one or two segments of one image each, a text-only segment, and padding; answers of any length."""
    rng = np.random.default_rng(seed)
    result = {
        "ids": np.zeros((rows, length), np.int32),
        "labels": np.full((rows, length), IGNORE_LABEL, np.int32),
        "segments": np.zeros((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32),
        "images": rng.integers(0, 256, (rows, slots, 8, 8, 3), dtype=np.uint8),
    }
    image_tokens = CONFIG.vision.num_tokens
    for row in range(rows):
        at = 0
        for segment in range(1, int(rng.integers(2, 4))):
            images = image_tokens if segment <= slots else 0
            text = int(rng.integers(4, 8))
            end = at + 1 + images + text
            if end > length:
                break
            result["ids"][row, at:end] = rng.integers(3, 64, end - at)
            result["ids"][row, at + 1 : at + 1 + images] = IMAGE_TOKEN_ID
            answer = slice(end - int(rng.integers(1, 4)), end)
            result["labels"][row, answer] = result["ids"][row, answer]
            result["segments"][row, at:end] = segment
            result["positions"][row, at:end] = np.arange(end - at)
            at = end
    return result


def stacked(rows: dict[str, np.ndarray], accumulation: int) -> dict[str, jax.Array]:
    """[A * B, ...] -> [A, B, ...]."""
    return {key: jnp.asarray(x.reshape(accumulation, -1, *x.shape[1:])) for key, x in rows.items()}
