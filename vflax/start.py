"""Where a run starts from: resolve the config's paths, open the weights, read off the model's shape."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

import vflax
from vflax import config as configs
from vflax.checkpoint import find_step
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.weights import hf_config
from vflax.weights.source import JoinedSource, RandomSource, SafetensorsSource, TensorSource, WorkdirSource
from vflax.workdir import ModelFiles


@dataclass(frozen=True)
class Start:
    """Weights to start from, the model they make, and the tokenizer that belongs to them."""

    source: TensorSource
    config: LlavaConfig
    tokenizer: Tokenizer


def cache_root() -> Path:
    """Where things that can be made again are kept: $VFLAX_CACHE, else ~/.cache/vflax."""
    return Path(os.environ.get("VFLAX_CACHE") or Path.home() / ".cache" / "vflax")


def resolve_path(value: str, *, made_by: str = "") -> Path:
    """A path of a config.

    Args:
        value: a path; or "mini:stage0", "mini:stage1", "mini:stage2", "mini:tokenizer", the built-in data, made on
            first use; or "cache:NAME", a folder under `cache_root` that is private to the config `made_by`.
    """
    kind, colon, name = value.partition(":")
    if colon and kind == "mini":
        from data_pipeline import mini  # only runs on built-in data need the offline side

        paths = mini.ensure()
        known = {
            "stage0": paths.stage0,
            "stage1": paths.stage1,
            "stage2": paths.stage2,
            "tokenizer": paths.tokenizer,
        }
        if name not in known:
            raise UserError(f"{value!r}: the built-in data has {', '.join(f'mini:{k}' for k in known)}")
        return known[name]
    if colon and kind == "cache":
        recipe = json.dumps([vflax.__version__, configs.plain(configs.load_config(made_by))], sort_keys=True)
        return cache_root() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    return Path(value).expanduser()


def checkpoint_path(config: ConfigDict) -> Path | None:
    """The folder that config.init.checkpoint names, or None."""
    if not config.init.checkpoint:
        return None
    return resolve_path(config.init.checkpoint, made_by=config.init.make)


def open_start(config: ConfigDict) -> Start:
    """Open the weights that config.init and config.model name; nothing large is read yet.

    Raises:
        UserError: nothing to start from, several things to start from, or a folder that is not what it should be.
    """
    checkpoint, init = checkpoint_path(config), config.init
    parts = bool(init.vision or init.decoder or init.bridge)
    random = bool(config.model.vision)
    if (checkpoint is not None) + parts + random != 1:
        raise UserError(
            "config.init must name one start: init.checkpoint (a WORKDIR or a Hugging Face LLaVA directory), or "
            "init.vision and init.decoder (CLIP and LLaMA directories, with an optional init.bridge); "
            "or config.model.vision and .decoder give the dimensions of a random model"
        )
    if random:
        return _random_start(config)
    if parts:
        missing = [f"config.init.{key}" for key in ("vision", "decoder") if not init[key]]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} must be given too: the bridge needs a tower and a decoder"
            )
        vision, decoder = Path(init.vision).expanduser(), Path(init.decoder).expanduser()
        llava = hf_config.join_configs(
            vision, decoder, bridge=config.model.bridge, feature_layer=config.model.feature_layer,
            keep_cls=config.model.keep_cls,
        )  # fmt: skip
        bridge = Path(init.bridge).expanduser() if init.bridge else None
        source: TensorSource = JoinedSource(llava, vision, decoder, bridge, config.seed)
        return Start(source, llava, _tokenizer(config, decoder))
    assert checkpoint is not None
    if (checkpoint / "model").is_dir():
        files = ModelFiles.load(checkpoint)
        _check_model_keys(config, files.config)
        last = WorkdirSource(checkpoint, find_step(checkpoint, "latest"))
        return Start(last, files.config, _tokenizer(config, checkpoint / "model"))
    if not (checkpoint / "config.json").is_file():
        raise UserError(
            f"config.init.checkpoint={config.init.checkpoint}: {checkpoint} is neither a vflax WORKDIR (no model/) "
            "nor a Hugging Face LLaVA directory (no config.json)"
        )
    llava = hf_config.read_llava_config(checkpoint)
    _check_model_keys(config, llava)
    return Start(SafetensorsSource(checkpoint), llava, _tokenizer(config, checkpoint))


def _check_model_keys(config: ConfigDict, llava: LlavaConfig) -> None:
    """The weights decide; a config that says something else is refused, not ignored."""
    found = {
        "bridge": llava.bridge.kind,
        "feature_layer": llava.vision.feature_layer,
        "keep_cls": llava.vision.keep_cls,
    }
    wrong = [
        f"config.model.{key}={config.model[key]!r}, but the weights have {value!r}"
        for key, value in found.items()
        if config.model[key] != value
    ]
    if wrong:
        raise UserError(f"config.init.checkpoint={config.init.checkpoint}: " + "; ".join(wrong))


def _tokenizer(config: ConfigDict, beside_weights: Path) -> Tokenizer:
    return load_tokenizer(resolve_path(config.tokenizer) if config.tokenizer else beside_weights)


def _random_start(config: ConfigDict) -> Start:
    if not config.tokenizer:
        raise UserError("config.tokenizer must name a directory: a random model brings no tokenizer")
    tokenizer = load_tokenizer(resolve_path(config.tokenizer))
    model = config.model
    vision = VisionConfig(**configs.plain(model.vision) | {
        "image_mean": tuple(model.vision.image_mean), "image_std": tuple(model.vision.image_std),
        "feature_layer": model.feature_layer, "keep_cls": model.keep_cls,
    })  # fmt: skip
    decoder = DecoderConfig(
        **configs.plain(model.decoder), rope_scaling=None, vocab_size=tokenizer.vocab_size
    )
    bridge = BridgeConfig(kind=model.bridge, in_width=vision.width, out_width=decoder.width)
    llava = LlavaConfig(vision, bridge, decoder)
    return Start(RandomSource(llava, config.seed), llava, tokenizer)
