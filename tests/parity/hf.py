"""Random Hugging Face models as a reference: fp32, every tensor perturbed, their weights as flat parameters.

A fresh model's norms are ones and its biases zeros, and equal dimensions let a transposed matrix pass: so
every tensor is drawn anew and all dimensions of `config()` differ pairwise.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers

from tests.weights import hub
from vflax.constants import IMAGE_TOKEN_ID
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import hf_images, names, verify

torch.set_num_threads(1)

# The reference needs an id inside its vocabulary for what is IMAGE_TOKEN_ID here.
IMAGE_ID_IN_VOCABULARY = 112


def config(vision: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None) -> LlavaConfig:
    """A tiny model with 36 patches per image; `vision` and `decoder` change single fields."""
    vision_config = VisionConfig(
        image_size=30,
        patch_size=5,
        width=32,
        mlp_dim=44,
        num_layers=7,
        num_heads=4,
        hidden_act="quick_gelu",
        norm_eps=2e-4,
        feature_layer=-2,
        keep_cls=False,
        image_mean=(0.48, 0.42, 0.37),
        image_std=(0.27, 0.23, 0.31),
    )
    decoder_config = DecoderConfig(
        vocab_size=113,
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
    )
    return LlavaConfig(
        dataclasses.replace(vision_config, **(vision or {})),
        BridgeConfig("mlp2x_gelu", 32, 42),
        dataclasses.replace(decoder_config, **(decoder or {})),
    )


def text_config(config: DecoderConfig, model_type: str = "llama") -> transformers.PretrainedConfig:
    """The decoder as a Hugging Face config of `model_type` llama or mistral."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    kinds = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}
    extra = {"sliding_window": None} if model_type == "mistral" else {}
    return kinds[model_type](
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_word_embeddings,
        **extra,
    )


def llava_config(config: LlavaConfig, model_type: str = "llama") -> transformers.LlavaConfig:
    """The whole model as a Hugging Face config; the bridge must be mlp2x_gelu, the only kind HF has."""
    vision = config.vision
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_dim,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.norm_eps,
        ),
        text_config=text_config(config.decoder, model_type),
        image_token_id=IMAGE_ID_IN_VOCABULARY,
        projector_hidden_act="gelu",
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="full" if vision.keep_cls else "default",
        image_seq_length=vision.num_tokens,
        tie_word_embeddings=config.decoder.tie_word_embeddings,
    )


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew, at scales that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "embed" not in name:
                parameter.copy_(noise / np.sqrt(parameter.shape[1:].numel()))
            elif re.search(r"norm.*weight$", name):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)


def llava(
    config: LlavaConfig, seed: int = 0, model_type: str = "llama"
) -> transformers.LlavaForConditionalGeneration:
    """A random reference model in fp32 with plain attention, in evaluation mode."""
    hf_config = llava_config(config, model_type)
    hf_config._attn_implementation = "eager"
    model = transformers.LlavaForConditionalGeneration(hf_config).float().eval()
    perturb(model, seed)
    return model


def params(tensors: dict[str, torch.Tensor], config: LlavaConfig) -> dict[str, np.ndarray]:
    """A Llava module's tensors (its state_dict, or its gradients by name) -> our flat parameters."""
    flat = {path: _take(tensors, name, transform) for path, name, transform in _single_names(config)}
    for prefix, hf_prefix, count, entries in _stacked_names(config):
        for path, name, transform in entries:
            layers = [_take(tensors, f"{hf_prefix}.{i}.{name}", transform) for i in range(count)]
            flat[f"{prefix}/{path}"] = np.stack(layers)
    return flat


def _take(tensors: dict[str, torch.Tensor], name: str, transform: str) -> np.ndarray:
    array = tensors[name].detach().numpy().copy()
    # A torch Linear holds [out, in], a torch Conv2d [out, in, height, width].
    axes = {"": None, "linear": (1, 0), "conv": (2, 3, 1, 0)}[transform]
    return array if axes is None else array.transpose(axes)


def _single_names(config: LlavaConfig) -> list[tuple[str, str, str]]:
    tower, text = "model.vision_tower", "model.language_model"
    names = [
        ("vision/class_embedding", f"{tower}.embeddings.class_embedding", ""),
        ("vision/patch_embedding/kernel", f"{tower}.embeddings.patch_embedding.weight", "conv"),
        ("vision/position_embedding", f"{tower}.embeddings.position_embedding.weight", ""),
        ("vision/pre_norm/scale", f"{tower}.pre_layrnorm.weight", ""),
        ("vision/pre_norm/bias", f"{tower}.pre_layrnorm.bias", ""),
        ("decoder/embed_tokens/embedding", f"{text}.embed_tokens.weight", ""),
        ("decoder/norm/scale", f"{text}.norm.weight", ""),
    ]
    for i in range(config.bridge.num_linears):
        linear = f"model.multi_modal_projector.linear_{i + 1}"
        names += [
            (f"bridge/layers_{i}/kernel", f"{linear}.weight", "linear"),
            (f"bridge/layers_{i}/bias", f"{linear}.bias", ""),
        ]
    if not config.decoder.tie_word_embeddings:
        names.append(("decoder/lm_head/kernel", "lm_head.weight", "linear"))
    return names


def _stacked_names(config: LlavaConfig) -> list[tuple[str, str, int, list[tuple[str, str, str]]]]:
    vision = []
    for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        vision += [(f"{ours}/scale", f"{theirs}.weight", ""), (f"{ours}/bias", f"{theirs}.bias", "")]
    linears = [(f"attention/{x}", f"self_attn.{x}_proj") for x in ("q", "k", "v", "out")]
    for ours, theirs in [*linears, ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")]:
        vision += [(f"{ours}/kernel", f"{theirs}.weight", "linear"), (f"{ours}/bias", f"{theirs}.bias", "")]
    decoder = [
        ("input_norm/scale", "input_layernorm.weight", ""),
        ("post_attention_norm/scale", "post_attention_layernorm.weight", ""),
    ]
    decoder += [(f"attention/{x}/kernel", f"self_attn.{x}_proj.weight", "linear") for x in "qkvo"]
    decoder += [(f"mlp/{x}/kernel", f"mlp.{x}_proj.weight", "linear") for x in ("gate", "up", "down")]
    stacks = [("decoder/layers", "model.language_model.layers", config.decoder.num_layers, decoder)]
    if config.vision.num_computed_layers:
        tower = "model.vision_tower.encoder.layers"
        stacks.append(("vision/layers", tower, config.vision.num_computed_layers, vision))
    return stacks


def pixel_values(images: np.ndarray, config: VisionConfig) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> what the reference takes: normalised fp32 [n, 3, H, W]."""
    scaled = images.astype(np.float32) / np.float32(255)
    normalised = (scaled - np.float32(config.image_mean)) / np.float32(config.image_std)
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())


def input_ids(ids: np.ndarray) -> torch.Tensor:
    """Our ids -> the reference's, which keep the image id inside the vocabulary."""
    return torch.from_numpy(np.where(ids == IMAGE_TOKEN_ID, IMAGE_ID_IN_VOCABULARY, ids).astype(np.int64))


def sample(config: LlavaConfig, pieces: list[int | str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random sample: ids [n] and images [s, H, W, 3]; pieces are numbers of text tokens, or "image"."""
    rng = np.random.default_rng(seed)
    tokens = config.vision.num_tokens
    ids = [
        np.full(tokens, IMAGE_TOKEN_ID)
        if piece == "image"
        else rng.integers(1, IMAGE_ID_IN_VOCABULARY, int(piece))
        for piece in pieces
    ]
    size = config.vision.image_size
    images = rng.integers(0, 256, (pieces.count("image"), size, size, 3), np.uint8)
    return np.concatenate(ids).astype(np.int32), images


def hub_llava(config: LlavaConfig, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """As `llava`, with <image> where tests/weights/hub.py's tokenizer puts it; needs rows for added tokens."""
    model = llava(config, seed)
    model.config.image_token_id = hub.PIECES
    return model


def write(folder: Path, model: transformers.PreTrainedModel, max_shard_size: str = "5GB") -> Path:
    """Save a model with the small files of a LLaVA directory."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    hub.dump(folder / "preprocessor_config.json", hf_images.to_preprocessor(hub.RULES))
    hub.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


def fixed_logits(model: Any, config: LlavaConfig) -> np.ndarray:
    """Logits [1, T, V] of a hub_llava, or of one in PEFT's wrapper, for verify.fixed_batch of all ids that are text."""
    ids, images = verify.fixed_batch(config, hub.PIECES)
    tokens = torch.from_numpy(np.where(ids == IMAGE_TOKEN_ID, hub.PIECES, ids).astype(np.int64))
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pixel_values(images[0], config.vision))
    return out.logits.numpy()


def canonical_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A Llava module's tensors under canonical names."""
    found = {names.canonical(name): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in found.items() if name is not None}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy has it, bfloat16 too."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()
