"""Hugging Face configs become ours and back; what is not supported is refused by name, all at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.weights import hub
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.llama import RopeScaling
from vflax.models.llava import LlavaConfig
from vflax.weights import hf_config, hf_images

CLIP_PREPROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
# What llava-hf/llava-1.5-7b-hf leaves out are the defaults of the classes: all the decoder's dimensions, for
# one.
LLAVA_7B = {
    "model_type": "llava",
    "image_token_index": 32000,
    "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Path:
    hub.dump(folder / "config.json", config)
    if preprocessor is not None:
        hub.dump(folder / "preprocessor_config.json", preprocessor)
    return folder


def test_keys_that_the_hub_file_of_llava_7b_leaves_out_are_those_of_the_classes(tmp_path: Path) -> None:
    config = hf_config.read_llava_config(write(tmp_path, LLAVA_7B, CLIP_PREPROCESSOR))
    decoder, vision = config.decoder, config.vision
    assert (decoder.width, decoder.mlp_dim, decoder.num_layers, decoder.num_heads) == (4096, 11008, 32, 32)
    assert (decoder.num_kv_heads, decoder.head_dim, decoder.rope_theta, decoder.norm_eps) == (
        32,
        128,
        1e4,
        1e-5,
    )
    assert (decoder.vocab_size, decoder.max_positions, decoder.tie_word_embeddings) == (32064, 4096, False)
    assert (vision.width, vision.num_layers, vision.num_tokens, vision.hidden_act) == (
        1024,
        24,
        576,
        "quick_gelu",
    )
    assert (vision.feature_layer, vision.keep_cls, vision.norm_eps) == (-2, False, 1e-5)
    assert config.bridge.kind == "mlp2x_gelu"
    assert vision.image_mean == tuple(CLIP_PREPROCESSOR["image_mean"])


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0, None, None, None),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 128),
}
ROUND_TRIPS = {
    "scaled linear": hub.with_decoder(hub.CONFIG, rope_scaling=SCALINGS["linear"]),
    "scaled llama3": hub.with_decoder(hub.CONFIG, rope_scaling=SCALINGS["llama3"]),
    "tied": hub.with_decoder(hub.CONFIG, tie_word_embeddings=True),
    "with CLS and gelu": hub.with_vision(hub.CONFIG, keep_cls=True, hidden_act="gelu", feature_layer=3),
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_a_config_written_for_hugging_face_reads_back_equal(tmp_path: Path, config: LlavaConfig) -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    write(tmp_path, hf_config.to_llava(config, 4, tokens, "float32"), hf_images.to_preprocessor(hub.RULES))
    assert hf_config.read_llava_config(tmp_path) == config


def test_everything_that_is_not_supported_is_told_at_once(tmp_path: Path) -> None:
    config = {
        **LLAVA_7B,
        "projector_hidden_act": "relu",
        "vision_feature_layer": [-2, -5],
        "quantization_config": {"load_in_4bit": True},
        "text_config": {
            "model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768, "hidden_act": "gelu",
            "attention_bias": True, "rope_scaling": {"type": "yarn", "factor": 2.0},
        },
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        hf_config.read_llava_config(write(tmp_path, config))
    message = str(caught.value)
    for expected in (
        str(tmp_path / "config.json"),
        "projector_hidden_act='relu'",
        "vision_feature_layer=[-2, -5]",
        "quantization_config",
        "text_config.sliding_window=4096",
        "text_config.hidden_act='gelu'",
        "text_config.attention_bias=True",
        "text_config.rope_scaling type='yarn'",
        "preprocessor_config.json: not there",
    ):
        assert expected in message, expected


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llava_next"},
        {"text_config": {"model_type": "qwen2"}},
        {"vision_config": {"model_type": "siglip_vision_model"}},
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path, {**LLAVA_7B, **change}, CLIP_PREPROCESSOR)
    wanted = change.get("model_type") or next(iter(change.values()))["model_type"]
    with pytest.raises(UserError, match=f"model_type='{wanted}'"):
        hf_config.read_llava_config(tmp_path)


def test_a_value_that_transformers_does_not_accept_is_refused_with_the_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        {**LLAVA_7B, "text_config": {"model_type": "llama", "bos_token_id": "first"}},
        CLIP_PREPROCESSOR,
    )
    with pytest.raises(UserError, match=r"(?s)config\.json .*transformers' LlavaConfig .*bos_token_id"):
        hf_config.read_llava_config(tmp_path)


def test_a_window_as_long_as_the_longest_sequence_is_no_window(tmp_path: Path) -> None:
    mistral = {
        "model_type": "mistral",
        "sliding_window": 4096,
        "max_position_embeddings": 4096,
        "vocab_size": 50,
    }
    config = hf_config.read_decoder(write(tmp_path, mistral))
    assert (config.num_kv_heads, config.mlp_dim, config.vocab_size) == (8, 14336, 50)


def test_clip_weights_without_a_preprocessor_config_are_refused_with_the_remedy(tmp_path: Path) -> None:
    hub.write_clip(tmp_path, hub.CONFIG, {}, "vision_model.")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json: not there.*openai/clip"):
        hf_config.read_vision(tmp_path, -2, False)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_clip_directory_gives_the_tower_s_config(tmp_path: Path, prefix: str) -> None:
    hub.write_clip(tmp_path, hub.CONFIG, {}, prefix)
    assert hf_config.read_vision(tmp_path, -2, False) == hub.CONFIG.vision


RULES = {
    "llava-hf": (CLIP_PREPROCESSOR, "crop"),
    "openai's old file": (
        {key: CLIP_PREPROCESSOR[key] for key in ("image_mean", "image_std", "resample")}
        | {"crop_size": 336, "size": 336, "feature_extractor_type": "CLIPFeatureExtractor"},
        "crop",
    ),
    "padded": ({**CLIP_PREPROCESSOR, "image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
    "transformers 5": (
        {**CLIP_PREPROCESSOR, "size": {"shortest_edge": 336, "height": None, "width": None}, "do_pad": None},
        "crop",
    ),
}


@pytest.mark.parametrize(("raw", "mode"), RULES.values(), ids=RULES.keys())
def test_preprocessor_files_of_all_ages_give_the_image_rules(
    tmp_path: Path, raw: dict[str, Any], mode: Any
) -> None:
    hub.dump(tmp_path / "preprocessor_config.json", raw)
    mean, std = tuple(CLIP_PREPROCESSOR["image_mean"]), tuple(CLIP_PREPROCESSOR["image_std"])
    assert hf_images.read_image_rules(tmp_path) == ImageRules(mode, 336, mean, std)


def test_the_image_processor_inside_a_processor_config_is_read(tmp_path: Path) -> None:
    hub.dump(tmp_path / "processor_config.json", {"image_processor": CLIP_PREPROCESSOR, "patch_size": 14})
    assert hf_images.read_image_rules(tmp_path).size == 336


def test_preprocessing_that_is_not_supported_is_told_at_once(tmp_path: Path) -> None:
    raw = {
        **CLIP_PREPROCESSOR, "resample": 2, "do_center_crop": False, "rescale_factor": 1.0,
        "size": {"shortest_edge": 400},
        "image_mean": 0.5,
    }  # fmt: skip
    hub.dump(tmp_path / "preprocessor_config.json", raw)
    with pytest.raises(UserError) as caught:
        hf_images.read_image_rules(tmp_path)
    for expected in (
        "resample=2",
        "do_center_crop=False",
        "rescale_factor=1.0",
        "crop_size=",
        "image_mean=0.5",
    ):
        assert expected in str(caught.value)


def test_pixels_of_another_size_than_the_tower_s_are_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        {**LLAVA_7B, "vision_config": {**LLAVA_7B["vision_config"], "image_size": 224}},
        CLIP_PREPROCESSOR,
    )
    with pytest.raises(UserError, match=r"crop_size=336, but the tower's image_size is 224"):
        hf_config.read_llava_config(tmp_path)


def test_broken_json_is_refused_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_7B)[:-5])
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        hf_config.read_llava_config(tmp_path)


def test_a_bridge_that_hugging_face_does_not_have_is_refused_with_the_remedy() -> None:
    config = dataclasses.replace(hub.CONFIG, bridge=BridgeConfig("linear", 32, 42))
    with pytest.raises(UserError, match=r"'linear'.*mlp2x_gelu"):
        hf_config.check_expressible(config)
