"""LLaVA models of random weights on disk, for what measures speed: a Hugging Face directory that vflax and transformers
open alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.setting import llava
from tests.weights import hub
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import hf_images
from vflax.weights.names import EMBEDDING, LM_HEAD
from vflax.weights.source import RandomSource

SIZES = ("tiny", "100m", "7b")
# Numbers that a large model's tensors are cut out of, over and over: billions would take longer than what is measured.
# A prime, so that rows are not alike.
_POOL = 67_108_859


def config_of(size: str) -> LlavaConfig:
    """tiny: the dimensions of configs/stage1.py:tiny; 100m: a decoder of 106 million parameters behind that tower; 7b:
    LLaVA-1.5-7B."""
    if size == "7b":
        return llava(14, (24, 1024, 16, 4096), (32, 4096, 32, 11008))
    vision = VisionConfig(
        image_size=64, patch_size=16, width=128, mlp_dim=384, num_layers=4, num_heads=4, hidden_act="quick_gelu",
        norm_eps=1e-5, feature_layer=-2, keep_cls=False, image_mean=hub.MEAN, image_std=hub.STD,
    )  # fmt: skip
    shape: dict[str, Any] = {
        "tiny": {
            "vocab_size": 1024, "width": 128, "mlp_dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
            "head_dim": 32, "tie_word_embeddings": True,
        },
        "100m": {
            "vocab_size": 32000, "width": 768, "mlp_dim": 2048, "num_layers": 8, "num_heads": 12, "num_kv_heads": 12,
            "head_dim": 64, "tie_word_embeddings": False,
        },
    }[size]  # fmt: skip
    decoder = DecoderConfig(**shape, norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, max_positions=1024)
    return LlavaConfig(vision, BridgeConfig("mlp2x_gelu", 128, shape["width"]), decoder)


def write(folder: Path, size: str) -> None:
    """The weights, in float32 or, of 7b, in bfloat16; config, preprocessor and a small tokenizer."""
    config = config_of(size)
    tensors = _cut_out(config) if size == "7b" else hub.tensors_of(config)
    head = EMBEDDING if config.decoder.tie_word_embeddings else LM_HEAD
    tensors[head][hub.PIECES :] = 0  # tokens that the tokenizer does not know have no text
    hub.write_tokenizer(folder)
    hub.write_llava(folder, config, tensors)
    rules = dataclasses.replace(hub.RULES, size=config.vision.image_size)
    hub.dump(folder / "preprocessor_config.json", hf_images.to_preprocessor(rules))


def _cut_out(config: LlavaConfig) -> dict[str, np.ndarray]:
    pool = np.random.default_rng(0).normal(0, 0.02, _POOL).astype(ml_dtypes.bfloat16)
    source = RandomSource(config, 0)
    return {name: np.resize(pool, source.shape(name)) for name in source.names()}
