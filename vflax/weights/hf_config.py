"""Hugging Face's config.json to our model config, and back.

Keys that a file leaves out equal the defaults of Hugging Face's classes (llava-hf/llava-1.5-7b-hf names no
decoder width, for one), so those classes resolve them; no default of ours stands in. What the model cannot
compute is refused by name, all of it at once.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from vflax.errors import UserError, naming
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VISION_KINDS, VisionConfig
from vflax.models.llama import DECODER_KINDS, DecoderConfig, RopeScaling
from vflax.models.llava import LlavaConfig
from vflax.small_files import Problems, read_json
from vflax.values import COUNT, EVEN, FLAG, LAYERS, OBJECT, POSITIVE, TEXT, WHOLE, Kind
from vflax.weights.hf_images import read_or_note

HF_BRIDGE = "mlp2x_gelu"
DECODER_TYPES = ("llama", "mistral")

# {field of our config: Hugging Face's key}, as far as one is the other.
_DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
_VISION_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
# What these and the other keys that are read must be, where a file gives them.
_HF_DECODER_KINDS: dict[str, Kind] = {key: DECODER_KINDS[field] for field, key in _DECODER_KEYS.items()} | {
    "num_key_value_heads": COUNT.or_null(),
    "head_dim": EVEN.or_null(),
    "hidden_act": TEXT,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "sliding_window": COUNT.or_null(),
    "tie_word_embeddings": FLAG,
    "rope_theta": POSITIVE,
    "rope_scaling": OBJECT.or_null(),
    "rope_parameters": OBJECT.or_null(),
}
_HF_VISION_KINDS: dict[str, Kind] = {key: VISION_KINDS[field] for field, key in _VISION_KEYS.items()}
_LAYER = Kind("one layer, a whole number", lambda value: WHOLE.holds(value) or WHOLE.listed(1).holds(value))
_LLAVA_KINDS: dict[str, Kind] = {
    "vision_feature_layer": _LAYER,
    "tie_word_embeddings": FLAG,
    "multimodal_projector_bias": FLAG,
    "projector_hidden_act": TEXT,
}
# (number, what it must be a multiple of).
_DECODER_MULTIPLES = (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))
_VISION_MULTIPLES = (("image_size", "patch_size"), ("hidden_size", "num_attention_heads"))
# Of each type of rope_scaling, what else it says.
_ROPE_KINDS: dict[str, dict[str, Kind]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "llama3": {
        "factor": POSITIVE,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        "original_max_position_embeddings": COUNT,
    },
}


def read_llava_config(folder: Path) -> LlavaConfig:
    """Read the config of a Hugging Face LLaVA directory.

    Raises:
        UserError: naming every key that is not supported, and files that are missing.
    """
    path = folder / "config.json"
    raw = read_json(path)
    problems = Problems(path)
    problems.expect("model_type", raw.get("model_type"), ("llava",))
    if problems.check(raw, {"text_config": OBJECT.or_null(), "vision_config": OBJECT.or_null()}):
        problems.stop()
    text, vision = raw.get("text_config") or {}, raw.get("vision_config") or {}
    problems.expect("text_config.model_type", text.get("model_type", "llama"), DECODER_TYPES)
    problems.expect(
        "vision_config.model_type", vision.get("model_type", "clip_vision_model"), ("clip_vision_model",)
    )
    problems.stop()
    from transformers import LlavaConfig as HfLlavaConfig

    strategy = raw.get("vision_feature_select_strategy", "default")
    problems.expect("vision_feature_select_strategy", strategy, ("default", "full"))
    sound = {key: raw[key] for key in raw.keys() - problems.check(raw, _LLAVA_KINDS)}
    _refuse_quantised(sound, "", problems)
    # null is not the same as an empty object: Hugging Face's class has a tower and a decoder for it.
    if raw.get("text_config") is not None:
        sound["text_config"] = _sound_decoder(text, "text_config.", problems)
    if raw.get("vision_config") is not None:
        sound["vision_config"] = _sound_vision(vision, "vision_config.", problems)
    full = _resolve(HfLlavaConfig, sound, problems)
    layer = full["vision_feature_layer"]
    layer = layer[0] if isinstance(layer, list) else layer
    layers = vision.get("num_hidden_layers", full["vision_config"]["num_hidden_layers"])
    _check_layer("vision_feature_layer", layer, "vision_config.num_hidden_layers", layers, problems)
    problems.expect("projector_hidden_act", full["projector_hidden_act"], ("gelu",))
    problems.expect("multimodal_projector_bias", full["multimodal_projector_bias"], (True,))
    _check_decoder(full["text_config"], "text_config.", problems)
    _check_vision(full["vision_config"], "vision_config.", problems)
    size = vision.get("image_size", full["vision_config"]["image_size"])
    rules = read_or_note(folder, problems, size)
    problems.stop()
    assert rules is not None  # a missing one is a problem, and problems have stopped
    tied = bool(full["tie_word_embeddings"] or full["text_config"]["tie_word_embeddings"])
    keep_cls = strategy == "full"
    tower = _vision_config(full["vision_config"], layer, keep_cls, rules, path)
    decoder = _decoder_config(full["text_config"], tied, path)
    return LlavaConfig(tower, BridgeConfig(HF_BRIDGE, tower.width, decoder.width), decoder)


def read_vision(
    folder: Path, feature_layer: int, keep_cls: bool, layer_key: str = "config.model.feature_layer"
) -> VisionConfig:
    """Read the tower's config of an OpenAI-CLIP directory (CLIPModel or CLIPVisionModel).

    Args:
        folder: holds config.json and preprocessor_config.json.
        feature_layer: which hidden state is used, as Hugging Face counts, for example -2.
        keep_cls: whether the CLS token is among the features.
        layer_key: where feature_layer was said, for messages.

    Raises:
        UserError: naming every key that is not supported, and files that are missing.
    """
    path = folder / "config.json"
    raw = read_json(path)
    problems = Problems(path)
    problems.expect("model_type", raw.get("model_type"), ("clip", "clip_vision_model"))
    problems.check(raw, {"vision_config": OBJECT.or_null()})
    problems.stop()
    from transformers import CLIPConfig, CLIPVisionConfig

    if raw["model_type"] == "clip":
        prefix, section = "vision_config.", raw.get("vision_config") or {}
        sound = _sound_vision(section, prefix, problems)
        full = _resolve(CLIPConfig, {**raw, "vision_config": sound}, problems)["vision_config"]
    else:
        prefix, section = "", raw
        full = _resolve(CLIPVisionConfig, _sound_vision(section, prefix, problems), problems)
    _check_vision(full, prefix, problems)
    layers = section.get("num_hidden_layers", full["num_hidden_layers"])
    _check_layer(layer_key, feature_layer, f"{prefix}num_hidden_layers", layers, problems)
    rules = read_or_note(folder, problems, section.get("image_size", full["image_size"]))
    problems.stop()
    assert rules is not None  # a missing one is a problem, and problems have stopped
    return _vision_config(full, feature_layer, keep_cls, rules, path)


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

    kind = LlamaConfig if raw["model_type"] == "llama" else MistralConfig
    full = _resolve(kind, _sound_decoder(raw, "", problems), problems)
    _check_decoder(full, "", problems)
    problems.stop()
    return _decoder_config(full, bool(full["tie_word_embeddings"]), path)


def tower_config(
    raw: dict[str, Any], rules: ImageRules, feature_layer: int, keep_cls: bool, path: Path, layer_key: str
) -> VisionConfig:
    """The tower that a "vision_config" and image rules describe; the rest is as for `read_vision`."""
    from transformers import CLIPVisionConfig

    problems = Problems(path)
    full = _resolve(CLIPVisionConfig, _sound_vision(raw, "vision_config.", problems), problems)
    _check_vision(full, "vision_config.", problems)
    layers = raw.get("num_hidden_layers", full["num_hidden_layers"])
    _check_layer(layer_key, feature_layer, "vision_config.num_hidden_layers", layers, problems)
    problems.stop()
    return _vision_config(full, feature_layer, keep_cls, rules, path)


def _resolve(kind: Any, sound: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """All keys, with Hugging Face's class defaults for those that the file leaves out."""
    try:
        # A copy: transformers writes into the scaling.
        resolved: dict[str, Any] = kind.from_dict(copy.deepcopy(sound)).to_dict()
    # transformers raises errors of many kinds for values it does not accept, some of them bare Exceptions.
    except Exception as error:
        said = " ".join(str(error).split())
        problems.lines.append(f"transformers' {kind.__name__} does not accept it: {said}")
        problems.stop()
    return resolved


def _sound(
    raw: dict[str, Any],
    kinds: dict[str, Kind],
    numbers: dict[str, str],
    multiples: tuple[tuple[str, str], ...],
    prefix: str,
    problems: Problems,
) -> dict[str, Any]:
    """The keys of a file without those that cannot be, which are noted.

    Where one of `numbers` (the values of this dict are keys) is wrong, all of them are left out: beside the others the
    class default that takes its place would be one more misfit.
    """
    wrong = problems.check(raw, kinds, prefix)
    misfits = [
        (key, of)
        for key, of in multiples
        if not wrong & {key, of} and raw.get(key) and raw.get(of) and raw[key] % raw[of]
    ]
    for key, of in misfits:
        problems.lines.append(f"{prefix}{key}={raw[key]} is no multiple of {prefix}{of}={raw[of]}")
        wrong.add(key)
    if wrong & set(numbers.values()):
        wrong |= set(numbers.values())
    sound = {key: value for key, value in raw.items() if key not in wrong}
    _refuse_quantised(sound, prefix, problems)
    return sound


def _sound_vision(raw: dict[str, Any], prefix: str, problems: Problems) -> dict[str, Any]:
    return _sound(raw, _HF_VISION_KINDS, _VISION_KEYS, _VISION_MULTIPLES, prefix, problems)


def _sound_decoder(raw: dict[str, Any], prefix: str, problems: Problems) -> dict[str, Any]:
    sound = _sound(raw, _HF_DECODER_KINDS, _DECODER_KEYS, _DECODER_MULTIPLES, prefix, problems)
    if set(_DECODER_KEYS.values()) & (raw.keys() - sound.keys()):
        # Mistral's class has a window, which would be held against its own number of positions.
        sound["sliding_window"] = None
    for key in ("rope_scaling", "rope_parameters"):
        noted = len(problems.lines)
        if sound.get(key):
            _check_rope(sound[key], f"{prefix}{key}", problems)
        if len(problems.lines) > noted:
            del sound[key]
    return sound


def _check_rope(rope: dict[str, Any], name: str, problems: Problems) -> None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None:
        problems.lines.append(f"{name} has no type: expected {' or '.join(map(repr, _ROPE_KINDS))}")
        return
    problems.expect(f"{name} type", kind, tuple(_ROPE_KINDS))
    kinds = _ROPE_KINDS.get(kind, {}) if isinstance(kind, str) else {}
    problems.lines += [
        f"{name} has no {key}, which its type {kind} needs" for key in kinds if key not in rope
    ]
    problems.check(rope, kinds | {"rope_theta": POSITIVE}, f"{name}.")


def _refuse_quantised(sound: dict[str, Any], prefix: str, problems: Problems) -> None:
    """Note a quantization_config, and take it out: transformers refuses some of them in its own words."""
    said = sound.pop("quantization_config", None)
    problems.expect(f"{prefix}quantization_config", said, (None,), "take the unquantised weights")


def _check_layer(key: str, layer: int, layers_key: str, layers: Any, problems: Problems) -> None:
    """Note a feature layer that the tower does not have; layers: their number, if it is one."""
    if LAYERS.holds(layers) and not -layers - 1 <= layer <= layers:
        problems.lines.append(
            f"{key}={layer} is outside the {layers + 1} hidden states of {layers_key}={layers}"
        )


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
    problems.expect(f"{prefix}partial_rotary_factor", full.get("partial_rotary_factor", 1.0), (1.0,))


def _check_vision(full: dict[str, Any], prefix: str, problems: Problems) -> None:
    problems.expect(f"{prefix}hidden_act", full["hidden_act"], ("quick_gelu", "gelu"))
    problems.expect(f"{prefix}num_channels", full["num_channels"], (3,))


def _vision_config(
    full: dict[str, Any], feature_layer: int, keep_cls: bool, rules: ImageRules, path: Path
) -> VisionConfig:
    numbers = {field: full[key] for field, key in _VISION_KEYS.items()}
    with naming(path):  # what a file gives may not fit what it leaves out
        return VisionConfig(
            **numbers,
            feature_layer=feature_layer,
            keep_cls=keep_cls,
            image_mean=rules.mean,
            image_std=rules.std,
        )


def _decoder_config(full: dict[str, Any], tied: bool, path: Path) -> DecoderConfig:
    rope = full["rope_parameters"]
    numbers = {field: full[key] for field, key in _DECODER_KEYS.items()}
    with naming(path):  # as above
        scaling = None
        if rope["rope_type"] != "default":
            llama3 = rope["rope_type"] == "llama3"
            scaling = RopeScaling(
                kind=rope["rope_type"],
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]) if llama3 else None,
                high_freq_factor=float(rope["high_freq_factor"]) if llama3 else None,
                original_max_positions=rope["original_max_position_embeddings"] if llama3 else None,
            )
        return DecoderConfig(
            **numbers,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=scaling,
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
