"""Sizes of the models that the recipes name, for a plan that is made before anything is downloaded.

Whatever lies on disk is read in preference; a size from here is always said to be one. Numbers are those of the
config.json that is published with the weights (openai/clip-vit-large-patch14-336 and -patch14, of 224 px;
lmsys/vicuna-7b-v1.5 and -13b-v1.5, which are those of Llama 2; -v1.3, which are those of the first LLaMA; and
llava-hf/llava-1.5-7b-hf and -13b-hf, whose vocabulary is longer).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vflax.config import load_config
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.start import outline, resolve_path, unmade_start

_CLIP_336: dict[str, Any] = {
    "image_size": 336, "patch_size": 14, "width": 1024, "mlp_dim": 4096, "num_layers": 24, "num_heads": 16,
    "hidden_act": "quick_gelu", "norm_eps": 1e-5,
    "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
TOWERS = {
    "clip-vit-large-patch14-336": _CLIP_336,
    "clip-vit-large-patch14": _CLIP_336 | {"image_size": 224},
}
_LLAMA_2 = DecoderConfig(
    vocab_size=32000, width=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=4096, tie_word_embeddings=False,
)  # fmt: skip
_LLAMA_2_13B = dataclasses.replace(
    _LLAMA_2, width=5120, mlp_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40
)
_LLAMA: dict[str, Any] = {"norm_eps": 1e-6, "max_positions": 2048}
DECODERS = {
    "vicuna-7b-v1.5": _LLAMA_2,
    "vicuna-13b-v1.5": _LLAMA_2_13B,
    "vicuna-7b-v1.3": dataclasses.replace(_LLAMA_2, **_LLAMA),
    "vicuna-13b-v1.3": dataclasses.replace(_LLAMA_2_13B, **_LLAMA),
    "llava-1.5-7b-hf": dataclasses.replace(_LLAMA_2, vocab_size=32064),
    "llava-1.5-13b-hf": dataclasses.replace(_LLAMA_2_13B, vocab_size=32064),
    "llava-v1.5-7b": _LLAMA_2,
    "llava-v1.5-13b": _LLAMA_2_13B,
}
_TOWER = "clip-vit-large-patch14-336"


def model_of(config: ConfigDict) -> tuple[LlavaConfig, str]:
    """The model that a config trains, and where its sizes are from, for a person.

    What is on disk is read (small files only); else the published sizes of what the config names. Where it names the
    WORKDIR of a run that is not here, they are those of the run's config (init.make), and so on.

    Raises:
        UserError: neither is there.
    """
    first = config
    while not is_readable(first) and first.init.checkpoint.startswith("runs/") and first.init.make:
        first = load_config(first.init.make)
    if is_readable(first):
        model, _ = outline(first)
        return model, f"sizes of {_named(first)}, read from its files"
    init = first.init
    decoder = _name(init.checkpoint or init.decoder)
    tower = _name(init.vision) if init.vision else _TOWER
    if decoder not in DECODERS or tower not in TOWERS:
        raise UserError(
            f"the sizes of {_named(config)} are not known: it is not on this machine, and none of "
            f"{', '.join([*DECODERS, *TOWERS])}. Name weights that are here with --config.init.checkpoint=DIR, or "
            "some of the same sizes, such as --config.init.checkpoint=llava-hf/llava-1.5-7b-hf"
        )
    model = first.model
    vision = VisionConfig(**TOWERS[tower], feature_layer=model.feature_layer, keep_cls=model.keep_cls)
    sizes = DECODERS[decoder]
    made = LlavaConfig(vision, BridgeConfig(model.bridge, vision.width, sizes.width), sizes)
    return (
        made,
        f"sizes of {decoder} and {tower} as published; not on this machine, so not read: {_named(config)}",
    )


def is_readable(config: ConfigDict) -> bool:
    """Whether model and tokenizer of a run can be read on this machine, with nothing to be fetched."""
    init = config.init
    if config.model.vision or unmade_start(config) is not None:
        return True
    named = [init.checkpoint] if init.checkpoint else [init.vision, init.decoder]
    return all(value and resolve_path(value, made_by=init.make).exists() for value in named)


def _named(config: ConfigDict) -> str:
    init = config.init
    if config.model.vision:
        return "the random model"
    return init.checkpoint or " and ".join(filter(None, (init.vision, init.decoder))) or "config.init"


def _name(value: str) -> str:
    """The last part of a path or hub id, without its revision, lower case."""
    return Path(value.partition("@")[0]).name.lower()
