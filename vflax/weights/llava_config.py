"""The config.json of the original LLaVA code (model_type "llava_llama") to our model config, and back.

Its keys are read as llava/model/llava_arch.py and multimodal_encoder/clip_encoder.py of LLaVA 1.2.2 read them, the
values that these use for a missing key included. The tower's own numbers are not among them: they are in the CLIP
directory that mm_vision_tower names, or under "vision_config", which exports of vflax add.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.small_files import Problems, read_json
from vflax.values import COUNT, NAME, OBJECT, TEXT, WHOLE, Kind
from vflax.weights import hf_config, hf_images

# model_type (older files: "llava") -> Hugging Face's decoder whose keys the file has.
_TYPES = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}
# Towers by shape that LLaVA's code can fetch by name: (width, layers, patch, image size).
_KNOWN_TOWERS = {
    (1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 224): "openai/clip-vit-large-patch14",
}
# What keys must be, where a file gives them.
_KINDS: dict[str, Kind] = {
    "mm_projector_type": TEXT,
    "mm_vision_tower": NAME,
    "mm_vision_select_layer": WHOLE,
    "mm_hidden_size": COUNT,
    "vision_config": OBJECT,
}
_MODES: dict[str | None, Literal["pad", "crop"]] = {"pad": "pad", "square": "crop", None: "crop"}


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is the original LLaVA's."""
    return "text_config" not in raw and any(key.startswith("mm_") for key in raw)


@dataclass(frozen=True)
class Original:
    """What the file says of itself.

    bridge: the kind; tower: mm_vision_tower; feature_layer, keep_cls: see VisionConfig; mode: of the images.
    """

    raw: dict[str, Any]
    path: Path
    bridge: str
    tower: str
    feature_layer: int
    keep_cls: bool
    mode: Literal["pad", "crop"]


def read(folder: Path) -> Original:
    """Read config.json.

    Raises:
        UserError: naming every key that is not supported.
    """
    path = folder / "config.json"
    raw = read_json(path)
    problems = Problems(path)
    problems.expect("model_type", raw.get("model_type"), tuple(_TYPES))
    wrong = problems.check(raw, _KINDS)
    required = ("mm_vision_tower", "mm_vision_select_layer")
    problems.lines += [f"{key}: not there" for key in required if key not in raw]
    bridge = raw.get("mm_projector_type", "linear")
    try:
        if "mm_projector_type" not in wrong:
            BridgeConfig(bridge, 1, 1)
    except UserError:
        problems.lines.append(f"mm_projector_type={bridge!r}: vflax supports 'linear' and 'mlpNx_gelu'")
    problems.expect(
        "mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), ("patch", "cls_patch")
    )
    problems.expect("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat"), ("flat",))
    start_end = raw.get("mm_use_im_start_end", False)
    problems.expect(
        "mm_use_im_start_end", start_end, (False, None), "such models wrap an image in two tokens"
    )
    problems.expect("s2", raw.get("s2", False), (False, None))
    problems.expect("image_aspect_ratio", raw.get("image_aspect_ratio"), tuple(_MODES))
    problems.expect(
        "quantization_config", raw.get("quantization_config"), (None,), "take the unquantised weights"
    )
    problems.stop()
    keep_cls = raw.get("mm_vision_select_feature") == "cls_patch"
    mode = _MODES[raw.get("image_aspect_ratio")]
    return Original(raw, path, bridge, raw["mm_vision_tower"], raw["mm_vision_select_layer"], keep_cls, mode)


def model_config(original: Original, tower: Path | None) -> tuple[LlavaConfig, ImageRules]:
    """The model that the file and its tower make.

    Args:
        original: see `read`.
        tower: the CLIP directory; None: the file brings the tower's numbers itself (`brings_tower_config`).

    Raises:
        UserError: naming every key that is not supported, and files that are missing.
    """
    raw, path = original.raw, original.path
    words, layer_key = read_decoder(original), f"{path}: mm_vision_select_layer"
    if tower is None:
        rules = hf_images.read_image_rules(path.parent)
        seen = hf_config.tower_config(
            raw["vision_config"], rules, original.feature_layer, original.keep_cls, path, layer_key
        )
    else:
        seen = hf_config.read_vision(tower, original.feature_layer, original.keep_cls, layer_key)
    rules = ImageRules(original.mode, seen.image_size, seen.image_mean, seen.image_std)
    if raw.get("mm_hidden_size", seen.width) != seen.width:
        raise UserError(
            f"{path}: mm_hidden_size is {raw['mm_hidden_size']}, but the tower {tower or 'beside it'} is "
            f"{seen.width} wide"
        )
    return LlavaConfig(seen, BridgeConfig(original.bridge, seen.width, words.width), words), rules


def read_decoder(original: Original) -> DecoderConfig:
    """The decoder that the file describes.

    Raises:
        UserError: naming every key that is not supported.
    """
    return hf_config.decoder_config(
        {**original.raw, "model_type": _TYPES[original.raw["model_type"]]}, original.path
    )


def brings_tower_config(original: Original) -> bool:
    """Whether the tower's numbers lie beside the weights."""
    return "vision_config" in original.raw


def tower_name(config: VisionConfig) -> str | None:
    """The hub id of OpenAI's tower of this shape, or None: what LLaVA's code fetches processor and config from."""
    return _KNOWN_TOWERS.get((config.width, config.num_layers, config.patch_size, config.image_size))


def to_original(
    config: LlavaConfig, rules: ImageRules, tower: str, tokens: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Write config.json.

    Args:
        config: the model.
        rules: its image rules.
        tower: mm_vision_tower.
        tokens: bos_token_id, eos_token_id and pad_token_id.
        dtype: what the weights are in.
    """
    vision = config.vision
    return {
        **hf_config.text_config(config.decoder),
        **tokens,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": dtype,
        "use_cache": True,
        "use_mm_proj": True,
        "mm_vision_tower": tower,
        # The tower's weights are among these: LLaVA's code then takes them in place of the hub's.
        "unfreeze_mm_vision_tower": True,
        "mm_projector_type": config.bridge.kind,
        "mm_hidden_size": vision.width,
        "mm_vision_select_layer": vision.feature_layer,
        "mm_vision_select_feature": "cls_patch" if vision.keep_cls else "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if rules.mode == "pad" else "square",
        # LLaVA's code cuts longer prompts off; the decoder's own limit cuts off what it cannot take anyway.
        "tokenizer_model_max_length": config.decoder.max_positions,
        "tokenizer_padding_side": "right",
        "vision_config": hf_config.vision_config(vision),
    }
