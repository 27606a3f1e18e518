"""The original LLaVA's config.json is read whole, refused by name where vflax computes something else, and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.weights import hub
from tests.weights.test_hf_config import SCALINGS
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import hf_images, llava_config

CONFIG = hub.CONFIG


def write(folder: Path, **fields: Any) -> Path:
    hub.write_original(folder, CONFIG, {}, **fields)
    return folder


UNSUPPORTED: dict[str, Any] = {
    "model_type": "llava_mpt",
    "mm_projector_type": "identity",
    "mm_vision_tower": 7,
    "mm_vision_select_layer": [-2, -5],
    "mm_vision_select_feature": "cls",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_use_im_start_end": True,
    "s2": True,
    "image_aspect_ratio": "anyres",
    "quantization_config": {"load_in_4bit": True},
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_vflax_does_not_compute_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"config\.json is not supported:\n  {key}="):
        llava_config.read(write(tmp_path, **{key: UNSUPPORTED[key]}))


def test_all_that_is_not_supported_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        llava_config.read(write(tmp_path, **UNSUPPORTED))
    assert all(f"  {key}=" in str(caught.value) for key in UNSUPPORTED)


@pytest.mark.parametrize("key", ["mm_vision_tower", "mm_vision_select_layer"])
def test_what_no_default_stands_in_for_is_asked_for(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: not there"):
        llava_config.read(write(tmp_path, **{key: None}))


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_scalings_of_positions_that_vflax_does_not_compute_are_refused_by_name(
    tmp_path: Path, kind: str
) -> None:
    scaling: dict[str, Any] = {"type": kind, "factor": 2.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 5, "long_factor": [2.0] * 5}
    write(tmp_path, rope_scaling=scaling)
    hub.write_clip(tmp_path / "clip", CONFIG, hub.tensors_of(CONFIG), "")
    with pytest.raises(UserError, match=f"rope_scaling type='{kind}'"):
        llava_config.model_config(llava_config.read(tmp_path), tmp_path / "clip")


def test_a_tower_of_another_width_than_the_file_says_is_refused(tmp_path: Path) -> None:
    write(tmp_path, mm_hidden_size=1024)
    hub.write_clip(tmp_path / "clip", CONFIG, hub.tensors_of(CONFIG), "")
    with pytest.raises(UserError, match=r"mm_hidden_size is 1024, but the tower .*clip is 32 wide"):
        llava_config.model_config(llava_config.read(tmp_path), tmp_path / "clip")


MODELS: dict[str, LlavaConfig] = {
    "plain": CONFIG,
    "linear": dataclasses.replace(CONFIG, bridge=BridgeConfig("linear", 32, 42)),
    "three linears": dataclasses.replace(CONFIG, bridge=BridgeConfig("mlp3x_gelu", 32, 42)),
    "CLS kept, tied": hub.with_vision(
        hub.with_decoder(CONFIG, tie_word_embeddings=True), keep_cls=True, feature_layer=3
    ),
    "scaled linear": hub.with_decoder(CONFIG, rope_scaling=SCALINGS["linear"]),
    "scaled llama3": hub.with_decoder(CONFIG, rope_scaling=SCALINGS["llama3"]),
}


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_what_is_written_reads_back_as_it_was(tmp_path: Path, config: LlavaConfig, mode: Any) -> None:
    rules = ImageRules(mode, 30, hub.MEAN, hub.STD)
    raw = llava_config.to_original(config, rules, "somebody/tower", {"bos_token_id": 1}, "float16")
    hub.dump(tmp_path / "config.json", raw)
    hub.dump(tmp_path / "preprocessor_config.json", hf_images.to_preprocessor(rules))
    original = llava_config.read(tmp_path)
    assert original.tower == "somebody/tower"
    assert llava_config.model_config(original, None) == (config, rules)


def test_a_linear_scaling_is_written_with_the_two_keys_that_old_transformers_take(tmp_path: Path) -> None:
    config = MODELS["scaled linear"]
    raw = llava_config.to_original(config, hub.RULES, "x", {}, "float16")
    assert raw["rope_scaling"] == {"type": "linear", "factor": SCALINGS["linear"].factor}


def test_a_tower_of_openai_s_shape_is_called_by_openai_s_name() -> None:
    large = dataclasses.replace(
        CONFIG.vision, width=1024, num_layers=24, num_heads=16, patch_size=14, image_size=336
    )
    assert llava_config.tower_name(large) == "openai/clip-vit-large-patch14-336"
    assert (
        llava_config.tower_name(dataclasses.replace(large, image_size=224)) == "openai/clip-vit-large-patch14"
    )
    assert llava_config.tower_name(CONFIG.vision) is None


def test_every_key_of_the_original_code_is_written() -> None:
    """The keys of LLaVA-1.5's config.json that llava_arch.py, clip_encoder.py and builder.py read."""
    raw = json.loads(json.dumps(llava_config.to_original(CONFIG, hub.RULES, "tower", {}, "float16")))
    assert {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "vocab_size": 360,
    }.items() <= raw.items()
