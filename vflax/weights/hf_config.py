"""Hugging Face's config.json to our model config, and back.

Keys that a file leaves out equal the defaults of Hugging Face's classes (llava-hf/llava-1.5-7b-hf names no
decoder width, for one), so those classes resolve them; no default of ours stands in. What the model cannot
compute is refused by name, all of it at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig, RopeScaling
from vflax.models.llava import LlavaConfig
from vflax.weights.hf_files import Problems, read_json
from vflax.weights.hf_images import read_or_note

HF_BRIDGE = "mlp2x_gelu"
DECODER_TYPES = ("llama", "mistral")


def read_llava_config(folder: Path) -> LlavaConfig:
    """Read the config of a Hugging Face LLaVA directory.

    Raises:
        UserError: naming every key that is not supported, and files that are missing.
    """
    path = folder / "config.json"
    raw = read_json(path)
    problems = Problems(path)
    text, vision = raw.get("text_config") or {}, raw.get("vision_config") or {}
    problems.expect("model_type", raw.get("model_type"), ("llava",))
    problems.expect("text_config.model_type", text.get("model_type", "llama"), DECODER_TYPES)
    problems.expect(
        "vision_config.model_type", vision.get("model_type", "clip_vision_model"), ("clip_vision_model",)
    )
    problems.stop()
    from transformers import LlavaConfig as HfLlavaConfig

    full = _resolve(HfLlavaConfig, raw, path)
    layer = full["vision_feature_layer"]
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        problems.lines.append(f"vision_feature_layer={layer!r}: vflax uses the output of one layer")
    problems.expect("projector_hidden_act", full["projector_hidden_act"], ("gelu",))
    problems.expect("multimodal_projector_bias", full["multimodal_projector_bias"], (True,))
    problems.expect(
        "quantization_config", raw.get("quantization_config"), (None,), "take the unquantised weights"
    )
    _check_decoder(full["text_config"], "text_config.", problems)
    _check_vision(full["vision_config"], "vision_config.", problems)
    rules = read_or_note(folder, problems, full["vision_config"]["image_size"])
    problems.stop()
    assert rules is not None  # a missing one is a problem, and problems have stopped
    tied = bool(full["tie_word_embeddings"] or full["text_config"]["tie_word_embeddings"])
    keep_cls = full["vision_feature_select_strategy"] == "full"
    tower = _vision_config(full["vision_config"], layer, keep_cls, rules)
    decoder = _decoder_config(full["text_config"], tied)
    return LlavaConfig(tower, BridgeConfig(HF_BRIDGE, tower.width, decoder.width), decoder)


def read_vision(folder: Path, feature_layer: int, keep_cls: bool) -> VisionConfig:
    """Read the tower's config of an OpenAI-CLIP directory (CLIPModel or CLIPVisionModel).

    Args:
        folder: holds config.json and preprocessor_config.json.
        feature_layer: which hidden state is used, as Hugging Face counts, for example -2.
        keep_cls: whether the CLS token is among the features.

    Raises:
        UserError: naming every key that is not supported, and files that are missing.
    """
    path = folder / "config.json"
    raw = read_json(path)
    problems = Problems(path)
    problems.expect("model_type", raw.get("model_type"), ("clip", "clip_vision_model"))
    problems.stop()
    from transformers import CLIPConfig, CLIPVisionConfig

    if raw["model_type"] == "clip":
        full = _resolve(CLIPConfig, raw, path)["vision_config"]
        _check_vision(full, "vision_config.", problems)
    else:
        full = _resolve(CLIPVisionConfig, raw, path)
        _check_vision(full, "", problems)
    rules = read_or_note(folder, problems, full["image_size"])
    problems.stop()
    assert rules is not None  # a missing one is a problem, and problems have stopped
    return _vision_config(full, feature_layer, keep_cls, rules)


def join_configs(
    vision: Path, decoder: Path, *, bridge: str, feature_layer: int, keep_cls: bool
) -> LlavaConfig:
    """The model that a CLIP directory, a bridge and a decoder directory make.

    Args:
        vision, decoder: see `read_vision` and `read_decoder`.
        bridge: its kind, "linear" or "mlpNx_gelu".
        feature_layer, keep_cls: see `read_vision`.

    Raises:
        UserError: naming every key that is not supported, and files that are missing.
    """
    tower, words = read_vision(vision, feature_layer, keep_cls), read_decoder(decoder)
    return LlavaConfig(tower, BridgeConfig(bridge, tower.width, words.width), words)


def read_decoder(folder: Path) -> DecoderConfig:
    """Read the config of a LLaMA, Vicuna or Mistral directory.

    Raises:
        UserError: naming every key that is not supported.
    """
    path = folder / "config.json"
    return decoder_config(read_json(path), path)


def decoder_config(raw: dict[str, Any], path: Path) -> DecoderConfig:
    """The decoder that the keys of a config.json describe; the rest is as for `read_decoder`."""
    problems = Problems(path)
    problems.expect("model_type", raw.get("model_type"), DECODER_TYPES)
    problems.stop()
    from transformers import LlamaConfig, MistralConfig

    full = _resolve(LlamaConfig if raw["model_type"] == "llama" else MistralConfig, raw, path)
    problems.expect(
        "quantization_config", raw.get("quantization_config"), (None,), "take the unquantised weights"
    )
    _check_decoder(full, "", problems)
    problems.stop()
    return _decoder_config(full, bool(full["tie_word_embeddings"]))


def tower_config(
    raw: dict[str, Any], rules: ImageRules, feature_layer: int, keep_cls: bool, path: Path
) -> VisionConfig:
    """The tower that a "vision_config" and image rules describe; the rest is as for `read_vision`."""
    from transformers import CLIPVisionConfig

    problems = Problems(path)
    full = _resolve(CLIPVisionConfig, raw, path)
    _check_vision(full, "vision_config.", problems)
    problems.stop()
    return _vision_config(full, feature_layer, keep_cls, rules)


def _resolve(kind: Any, raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """All keys, with Hugging Face's class defaults for those that the file leaves out."""
    try:
        resolved: dict[str, Any] = kind.from_dict(raw).to_dict()
    # transformers raises errors of many kinds for values it does not accept, some of them bare Exceptions.
    except Exception as error:
        raise UserError(f"{path}: transformers' {kind.__name__} does not accept it: {error}") from error
    return resolved


def _check_decoder(full: dict[str, Any], prefix: str, problems: Problems) -> None:
    problems.expect(f"{prefix}hidden_act", full["hidden_act"], ("silu",))
    # Mistral's class knows no biases; a file may still ask for them.
    for key in ("attention_bias", "mlp_bias"):
        problems.expect(f"{prefix}{key}", full.get(key, False), (False,))
    window = full.get("sliding_window")
    # A window as long as the longest sequence cuts nothing off.
    if window is not None and window < full["max_position_embeddings"]:
        remedy = f'sequences of up to {window} tokens compute the same with "sliding_window": null, which you may set'
        problems.expect(f"{prefix}sliding_window", window, (None,), remedy)
    rope = full["rope_parameters"]
    kind = rope["rope_type"]
    problems.expect(f"{prefix}rope_scaling type", kind, ("default", "linear", "llama3"))
    problems.expect(f"{prefix}partial_rotary_factor", full.get("partial_rotary_factor", 1.0), (1.0,))
    if kind == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if key not in rope:
                problems.lines.append(f"{prefix}rope_scaling has no {key}, which its type llama3 needs")
    elif kind == "linear" and "factor" not in rope:
        problems.lines.append(f"{prefix}rope_scaling has no factor, which its type linear needs")


def _check_vision(full: dict[str, Any], prefix: str, problems: Problems) -> None:
    problems.expect(f"{prefix}hidden_act", full["hidden_act"], ("quick_gelu", "gelu"))
    problems.expect(f"{prefix}num_channels", full["num_channels"], (3,))
    for key in ("image_size", "patch_size"):
        if not isinstance(full[key], int):
            problems.lines.append(f"{prefix}{key}={full[key]!r}: vflax supports squares, one whole number")


def _vision_config(
    full: dict[str, Any], feature_layer: int, keep_cls: bool, rules: ImageRules
) -> VisionConfig:
    return VisionConfig(
        image_size=full["image_size"],
        patch_size=full["patch_size"],
        width=full["hidden_size"],
        mlp_dim=full["intermediate_size"],
        num_layers=full["num_hidden_layers"],
        num_heads=full["num_attention_heads"],
        hidden_act=full["hidden_act"],
        norm_eps=full["layer_norm_eps"],
        feature_layer=feature_layer,
        keep_cls=keep_cls,
        image_mean=rules.mean,
        image_std=rules.std,
    )


def _decoder_config(full: dict[str, Any], tied: bool) -> DecoderConfig:
    rope = full["rope_parameters"]
    scaling = None
    if rope["rope_type"] != "default":
        llama3 = rope["rope_type"] == "llama3"
        scaling = RopeScaling(
            kind=rope["rope_type"],
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]) if llama3 else None,
            high_freq_factor=float(rope["high_freq_factor"]) if llama3 else None,
            original_max_positions=int(rope["original_max_position_embeddings"]) if llama3 else None,
        )
    return DecoderConfig(
        vocab_size=full["vocab_size"],
        width=full["hidden_size"],
        mlp_dim=full["intermediate_size"],
        num_layers=full["num_hidden_layers"],
        num_heads=full["num_attention_heads"],
        num_kv_heads=full["num_key_value_heads"],
        head_dim=full["head_dim"],
        norm_eps=full["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=scaling,
        max_positions=full["max_position_embeddings"],
        tie_word_embeddings=tied,
    )


# --- our config to Hugging Face's ---------------------------------------------------------------------------


def check_expressible(config: LlavaConfig) -> None:
    """Refuse what Hugging Face's LLaVA cannot express.

    Raises:
        UserError: for a bridge other than the two-layer GELU one.
    """
    if config.bridge.kind != HF_BRIDGE:
        raise UserError(
            f"the bridge is {config.bridge.kind!r}, and Hugging Face's LlavaForConditionalGeneration has only "
            f"{HF_BRIDGE!r} (two linears with a GELU between them): such a model cannot be written as a Hugging Face "
            f"directory. Train with the bridge {HF_BRIDGE!r} if the result has to go there"
        )


def to_llava(config: LlavaConfig, image_token_id: int, tokens: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Write config.json with the keys of transformers 4.x, which 5.x reads too; no key is left to a class default.

    Args:
        config: the model, its vocabulary as exported (padding rows included).
        image_token_id: id of "<image>".
        tokens: bos_token_id, eos_token_id and pad_token_id.
        dtype: what the weights are in, for example "bfloat16".

    Raises:
        UserError: when Hugging Face's classes cannot express the model.
    """
    check_expressible(config)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "image_seq_length": config.vision.num_tokens,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": "full" if config.vision.keep_cls else "default",
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        "torch_dtype": dtype,
        **tokens,
        "text_config": {**text_config(config.decoder), **tokens, "torch_dtype": dtype},
        "vision_config": {**vision_config(config.vision), "torch_dtype": dtype},
    }


def text_config(decoder: DecoderConfig) -> dict[str, Any]:
    """The decoder's part of config.json."""
    scaling: dict[str, Any] | None = None
    if decoder.rope_scaling is not None:
        rope = decoder.rope_scaling
        # Transformers before 4.43 knows no llama3, and of the others takes these two keys and no third.
        scaling = {"type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            scaling |= {
                "rope_type": rope.kind,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_positions,
            }
    return {
        # Mistral without a window computes what LLaMA computes, so one type serves both.
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_dim,
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "vocab_size": decoder.vocab_size,
    }


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    """The tower's part of config.json."""
    return {
        "model_type": "clip_vision_model",
        "hidden_act": vision.hidden_act,
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "intermediate_size": vision.mlp_dim,
        "layer_norm_eps": vision.norm_eps,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
    }


def to_processor(config: LlavaConfig) -> dict[str, Any]:
    """Write processor_config.json: what the processor must know to put the right number of `<image>` into a prompt."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.vision.patch_size,
        # CLIP puts one CLS token before its patches; "default" takes it off again.
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "full" if config.vision.keep_cls else "default",
    }
