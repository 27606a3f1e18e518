"""Small checkpoints on disk in Hugging Face's layouts, and a small tokenizer, made without torch."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import hf_config, hf_images, names
from vflax.weights.safetensors_io import TensorSpec, write_shards
from vflax.weights.source import RandomSource

PIECES = 360
MEAN, STD = (0.48, 0.42, 0.37), (0.27, 0.23, 0.31)

# All dimensions differ pairwise, queries are grouped, and no number is a default of any library.
CONFIG = LlavaConfig(
    VisionConfig(
        image_size=30,
        patch_size=5,
        width=32,
        mlp_dim=44,
        num_layers=4,
        num_heads=4,
        hidden_act="quick_gelu",
        norm_eps=2e-4,
        feature_layer=-2,
        keep_cls=False,
        image_mean=MEAN,
        image_std=STD,
    ),
    BridgeConfig("mlp2x_gelu", 32, 42),
    DecoderConfig(
        vocab_size=PIECES,
        width=42,
        mlp_dim=52,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        norm_eps=3e-4,
        rope_theta=700.0,
        rope_scaling=None,
        max_positions=509,
        tie_word_embeddings=False,
    ),
)
RULES = ImageRules("pad", 30, MEAN, STD)


def with_decoder(config: LlavaConfig, **fields: Any) -> LlavaConfig:
    """The config with single decoder fields changed."""
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **fields))


def with_vision(config: LlavaConfig, **fields: Any) -> LlavaConfig:
    """The config with single tower fields changed."""
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **fields))


def write_tokenizer(folder: Path, lines: Sequence[str] = (), **options: Any) -> None:
    """Train a SentencePiece model of PIECES pieces the way LLaMA's was, on these lines or on some of its own, and write
    tokenizer.model."""
    own = (
        line
        for i in range(300)
        for line in (
            f"USER: What is in picture {i}? ASSISTANT: There are {i * 7 % 50} dogs, cats and birds.",
            "A chat between a curious user and an artificial intelligence assistant.",
        )
    )
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": PIECES,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "allow_whitespace_only_pieces": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines or own), model_writer=model, **(settings | options)
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], max_bytes: int = 1 << 40) -> None:
    """Write tensors as model.safetensors, or sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_shards(folder, "model", specs, max_bytes, lambda name, index: tensors[name][index])


def tensors_of(config: LlavaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a whole model under canonical names; norms and biases are perturbed, too."""
    source = RandomSource(config, seed)
    rng = np.random.default_rng(seed)
    return {
        name: source.read(name) + rng.normal(0, 0.1, source.shape(name)).astype(np.float32)
        for name in source.names()
    }


def write_llava(
    folder: Path, config: LlavaConfig, tensors: dict[str, np.ndarray], max_bytes: int = 1 << 40
) -> None:
    """Write weights, config.json and preprocessor_config.json of a LLaVA directory."""
    write_tensors(folder, tensors, max_bytes)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PIECES + 1}
    dump(folder / "config.json", hf_config.to_llava(config, PIECES, tokens, "float32"))
    dump(folder / "preprocessor_config.json", hf_images.to_preprocessor(RULES))


def write_clip(folder: Path, config: LlavaConfig, tensors: dict[str, np.ndarray], prefix: str) -> None:
    """Write the tower as a CLIP directory, with what else such a directory holds."""
    tower = {
        name.replace("vision_tower.vision_model.", prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_tower.")
    }
    positions = np.arange(config.vision.num_patches + 1, dtype=np.int64)[None]
    tower[f"{prefix}embeddings.position_ids"] = positions
    whole = hf_config.vision_config(config.vision)
    if prefix:
        tower |= {
            "logit_scale": np.float32(2.6).reshape(()),
            "text_model.embeddings.position_ids": np.arange(7)[None],
            "text_projection.weight": np.ones((3, 3), np.float32),
            "visual_projection.weight": np.ones((3, 3), np.float32),
        }
        whole = {"model_type": "clip", "vision_config": whole, "text_config": {}}
    write_tensors(folder, tower)
    dump(folder / "config.json", whole)
    preprocessor = {"crop_size": 30, "size": 30, "image_mean": MEAN, "image_std": STD}
    dump(
        folder / "preprocessor_config.json",
        {**preprocessor, "feature_extractor_type": "CLIPFeatureExtractor"},
    )


def write_decoder(folder: Path, config: LlavaConfig, tensors: dict[str, np.ndarray]) -> None:
    """Write the decoder as a LlamaForCausalLM directory."""
    words = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("language_model.")
    }
    words["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    write_tensors(folder, words)
    dump(folder / "config.json", hf_config.text_config(config.decoder))


def original_names(config: LlavaConfig) -> dict[str, str]:
    """{canonical name: name in the original LLaVA's files}, written down apart from vflax/weights/names.py."""
    result = {}
    for name in names.expected(config):
        part, rest = name.split(".", 1)
        if part == "vision_tower":
            result[name] = f"model.vision_tower.vision_tower.{rest}"
        elif part == "multi_modal_projector":
            linear, kind = rest.removeprefix("linear_").split(".")
            number = "" if config.bridge.kind == "linear" else f".{2 * int(linear) - 2}"
            result[name] = f"model.mm_projector{number}.{kind}"
        else:
            result[name] = rest
    return result


def write_original(
    folder: Path,
    config: LlavaConfig,
    tensors: dict[str, np.ndarray],
    max_bytes: int = 1 << 40,
    tower: str = "clip",
    **fields: Any,
) -> dict[str, np.ndarray]:
    """Write what LlavaLlamaForCausalLM.save_pretrained leaves; `tensors` with the tower, or without.

    Args:
        tower: mm_vision_tower.
        fields: keys of config.json to change.

    Returns:
        The tensors under the names in the files.
    """
    theirs = {original_names(config)[name]: tensor for name, tensor in tensors.items()}
    write_tensors(folder, theirs, max_bytes)
    write_tokenizer(folder)
    llava = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": config.vision.width,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": config.bridge.kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if config.vision.keep_cls else "patch",
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_tower": tower,
        "pretraining_tp": 1,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
    }
    dump(folder / "config.json", hf_config.text_config(config.decoder) | llava)
    edit(folder / "config.json", **fields)
    return theirs


def dump(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=1))


def edit(path: Path, **fields: Any) -> None:
    """Change keys of a JSON object on disk; None removes a key, a dict is merged one level deep."""
    value = json.loads(path.read_text())
    for key, field in fields.items():
        if field is None:
            value.pop(key, None)
        elif isinstance(field, dict) and isinstance(value.get(key), dict):
            value[key] |= field
        else:
            value[key] = field
    dump(path, value)
