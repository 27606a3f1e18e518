"""Where a run starts from: resolve the config's paths, open the weights, read off the model's shape.

A fresh run reads what config.init names, a continued one its WORKDIR and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import vflax
from vflax import bucket, freeze, mirror
from vflax import config as configs
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.mirror import cache_root
from vflax.models import lora
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.step import ModelShapes, shape_model
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.weights import hf_config, hub, names
from vflax.weights.frozen import FrozenSource, save_frozen
from vflax.weights.hf_chat import check_tokenizer
from vflax.weights.kinds import ADAPTER, PARTS, RANDOM, WORKDIR, detect
from vflax.weights.load import check
from vflax.weights.open import join, open_checkpoint
from vflax.weights.reading import Reading, read_model
from vflax.weights.source import LoraSource, RandomSource, TensorSource
from vflax.workdir import ModelFiles, Origin

# What to do about the tokenizer of other weights.
_OWN = "name that of these weights in config.tokenizer"


@dataclass(frozen=True)
class Start:
    """Weights to start from, the model they make, the tokenizer that belongs to them, and where they are from."""

    source: TensorSource
    config: LlavaConfig
    tokenizer: Tokenizer
    origin: Origin


def resolve_path(value: str, *, made_by: str = "") -> Path:
    """A path of a config.

    Args:
        value: a path; or gs://BUCKET/FOLDER, of which a copy is made, see `mirror.fetch`; or "mini:stage0",
            "mini:stage1", "mini:stage2", "mini:scienceqa", "mini:benchmarks", "mini:tokenizer", the built-in data, made
            on first use; or "cache:NAME", a folder under `cache_root` that is private to the config `made_by`.
    """
    kind, colon, name = value.partition(":")
    if colon and kind == "mini":
        from data_pipeline import built_in  # only runs on built-in data need the offline side

        return built_in.path(name)
    if colon and kind == "cache":
        recipe = json.dumps(configs.plain(configs.load_config(made_by)), sort_keys=True)
        parts = [vflax.__version__, recipe]
        if "mini:" in recipe:
            from data_pipeline import built_in

            parts.append(built_in.version(recipe))
        return cache_root() / f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"
    if bucket.is_url(value):
        return mirror.fetch(value)
    if "://" in value:
        raise UserError(f"{value}: give gs://BUCKET/FOLDER, or a folder of a mounted file system")
    return Path(value).expanduser()


def weights_path(value: str, *, made_by: str = "", weights: bool = True, only: tuple[str, ...] = ()) -> Path:
    """A path of a config that may also be a Hugging Face hub id, which is fetched.

    Args:
        value, made_by: see `resolve_path`; a hub id is "org/name", "org/name@revision" or either after "hf:".
        weights, only: what of a hub id to fetch, see `hub.fetch`.

    Raises:
        UserError: a path that cannot be one, or an id that cannot be fetched.
    """
    if value.startswith(("mini:", "cache:")) or ("://" in value and not bucket.is_url(value)):
        return resolve_path(value, made_by=made_by)
    return hub.resolve(value, weights=weights, only=only)


def checkpoint_path(config: ConfigDict) -> Path | None:
    """The folder that config.init.checkpoint names, or None."""
    if not config.init.checkpoint:
        return None
    return weights_path(config.init.checkpoint, made_by=config.init.make)


def unmade_start(config: ConfigDict) -> Path | None:
    """The folder of a start that config.init.make makes and that is not there yet, else None.

    Only what is named cache:NAME is ever made; a folder of the user's own that is not there is refused when opened.
    """
    if not config.init.make or not config.init.checkpoint.startswith("cache:"):
        return None
    start = checkpoint_path(config)
    assert start is not None
    return None if (start / "summary.json").is_file() else start


def outline(config: ConfigDict) -> tuple[LlavaConfig, Tokenizer]:
    """The model and the tokenizer that a fresh run has, from small files: no weights are fetched, made or read.

    Of a start that is not made yet they are those of the config that makes it.

    Raises:
        UserError: as `open_start` does.
    """
    _check_one_start(config)
    init = config.init
    if unmade_start(config) is not None:
        return outline(configs.load_config(init.make))
    if config.model.vision:
        start = _random_start(config)
        return start.config, start.tokenizer
    if not init.checkpoint:
        _, decoder, joined = _joined_parts(config, weights=False)
        return joined, _tokenizer(config, decoder, joined)
    try:
        # An adapter is small, and its tensors say what it is.
        place = weights_path(init.checkpoint, made_by=init.make, weights=False)
        if detect(place) == ADAPTER:
            place = weights_path(init.checkpoint, made_by=init.make)
        apart = [weights_path(path, weights=False) if path else None for path in (init.vision, init.decoder)]
        found = read_model(Reading(fetch=False), detect(place), place, "latest", *apart)
    except UserError as error:
        raise UserError(
            f"config.init.checkpoint={init.checkpoint}: {error}. Only its tokenizer and sizes are needed here: until "
            "it is there, name any weights that have the same ones, --config.init.checkpoint=DIR|HUB_ID, or "
            "--config.init.checkpoint= --config.init.vision=DIR|HUB_ID --config.init.decoder=DIR|HUB_ID"
        ) from None
    assert found.vision and found.bridge and found.decoder and found.tokenizer
    model = LlavaConfig(found.vision, found.bridge, found.decoder)
    return model, _tokenizer_of_checkpoint(config, place, found.kind, model, found.tokenizer)


def image_rules(config: ConfigDict, model: LlavaConfig) -> ImageRules:
    """How a run prepares its pictures."""
    vision = model.vision
    return ImageRules(config.image.mode, vision.image_size, vision.image_mean, vision.image_std)


def open_start(config: ConfigDict) -> Start:
    """Open the weights that config.init and config.model name; nothing large is read yet.

    Raises:
        UserError: nothing to start from, several things to start from, or a folder that is not what it should be.
    """
    _check_one_start(config)
    if config.model.vision:
        return _random_start(config)
    return _start_from_checkpoint(config) if config.init.checkpoint else _start_from_parts(config)


def _check_one_start(config: ConfigDict) -> None:
    init = config.init
    random = bool(config.model.vision)
    parts = bool(init.vision or init.decoder or init.bridge) and not init.checkpoint
    if bool(init.checkpoint) + parts + random != 1:
        raise UserError(
            "config.init must name one start: init.checkpoint (a WORKDIR, or weights of any LLaVA format), or "
            "init.vision and init.decoder (CLIP and LLaMA directories, with an optional init.bridge), each a path or a "
            "hub id, ORG/NAME[@REVISION]; or config.model.vision and .decoder give the dimensions of a random model"
        )


def _start_from_parts(config: ConfigDict) -> Start:
    """A CLIP directory and a decoder directory, with a projector file or a random bridge."""
    vision, decoder, joined = _joined_parts(config)
    init = config.init
    bridge = hub.projector_file(weights_path(init.bridge, only=hub.PROJECTORS)) if init.bridge else None
    source = join(joined, vision, decoder, bridge, config.seed)
    return Start(source, joined, _tokenizer(config, decoder, joined), Origin(PARTS))


def _joined_parts(config: ConfigDict, *, weights: bool = True) -> tuple[Path, Path, LlavaConfig]:
    """The directories of tower and decoder, and the model that they make."""
    init = config.init
    missing = [f"config.init.{key}" for key in ("vision", "decoder") if not init[key]]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given too: the bridge needs a tower and a decoder")
    vision, decoder = (weights_path(path, weights=weights) for path in (init.vision, init.decoder))
    joined = hf_config.join_configs(
        vision, decoder, bridge=config.model.bridge, feature_layer=config.model.feature_layer,
        keep_cls=config.model.keep_cls,
    )  # fmt: skip
    return vision, decoder, joined


def _start_from_checkpoint(config: ConfigDict) -> Start:
    """A WORKDIR, or weights of any LLaVA format."""
    init = config.init
    if init.bridge:
        raise UserError(
            "config.init.bridge goes with init.vision and init.decoder: init.checkpoint brings its own"
        )
    checkpoint = checkpoint_path(config)
    assert checkpoint is not None
    # An original LLaVA may lie apart from its tower, and a LoRA adapter does from its base.
    apart = [weights_path(path) if path else None for path in (init.vision, init.decoder)]
    try:
        opened = open_checkpoint(checkpoint, vision=apart[0], base=apart[1])
    except UserError as error:
        raise UserError(f"config.init.checkpoint={config.init.checkpoint}: {error}") from None
    files = opened.files
    tokenizer = _tokenizer_of_checkpoint(config, checkpoint, opened.kind, files.config, files.tokenizer)
    # A hub id with the commit that was fetched: its branch may go on.
    named = hub.origin(checkpoint) if hub.meant_id(init.checkpoint) else None
    origin = Origin(opened.kind, named or str(mirror.remote(checkpoint.absolute())), opened.step)
    return Start(opened.source, opened.files.config, tokenizer, origin)


def _tokenizer_of_checkpoint(
    config: ConfigDict, checkpoint: Path, kind: str, model: LlavaConfig, own: Tokenizer
) -> Tokenizer:
    """The weights' own tokenizer, or the one that the config names; it must go with the weights, and so the config."""
    _check_model_keys(config, model)
    tokenizer = own
    if config.tokenizer:
        tokenizer = _tokenizer(config, checkpoint, model)
        if kind == WORKDIR and tokenizer.fingerprint != own.fingerprint:
            raise UserError(
                f"config.tokenizer={config.tokenizer}: the weights in {checkpoint} were trained with another "
                "tokenizer, which lies beside them. Leave config.tokenizer empty"
            )
    check_tokenizer(tokenizer, model.decoder, str(checkpoint), _OWN)
    return tokenizer


def _check_model_keys(config: ConfigDict, weights: LlavaConfig) -> None:
    """The weights decide; a config that says something else is refused, not ignored."""
    found = {
        "bridge": weights.bridge.kind,
        "feature_layer": weights.vision.feature_layer,
        "keep_cls": weights.vision.keep_cls,
    }
    wrong = [
        f"config.model.{key}={config.model[key]!r}, but the weights have {value!r}"
        for key, value in found.items()
        if config.model[key] != value
    ]
    if wrong:
        raise UserError(f"config.init.checkpoint={config.init.checkpoint}: " + "; ".join(wrong))


def _tokenizer(config: ConfigDict, beside_weights: Path, weights: LlavaConfig) -> Tokenizer:
    folder = weights_path(config.tokenizer, weights=False) if config.tokenizer else beside_weights
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, weights.decoder, str(folder), _OWN)
    return tokenizer


def _random_start(config: ConfigDict) -> Start:
    if not config.tokenizer:
        raise UserError("config.tokenizer must name a directory: a random model brings no tokenizer")
    tokenizer = load_tokenizer(weights_path(config.tokenizer, weights=False))
    model = config.model
    vision = VisionConfig(**configs.plain(model.vision) | {
        "image_mean": tuple(model.vision.image_mean), "image_std": tuple(model.vision.image_std),
        "feature_layer": model.feature_layer, "keep_cls": model.keep_cls,
    })  # fmt: skip
    decoder = DecoderConfig(
        **configs.plain(model.decoder), rope_scaling=None, vocab_size=tokenizer.vocab_size
    )
    bridge = BridgeConfig(kind=model.bridge, in_width=vision.width, out_width=decoder.width)
    drawn = LlavaConfig(vision, bridge, decoder)
    return Start(RandomSource(drawn, config.seed), drawn, tokenizer, Origin(RANDOM))


@dataclass(frozen=True)
class Model:
    """The model of a run without its numbers, and where these are.

    files: what WORKDIR/model holds; files.frozen is empty until `keep` has written it.
    shapes: its parameters' shapes, dtypes, verdicts and shardings.
    source, origin: the weights that a fresh run starts from, and what they are; None: a continued run.
    """

    files: ModelFiles
    shapes: ModelShapes
    source: TensorSource | None
    origin: Origin | None

    @property
    def graphdef(self) -> Any:
        return self.shapes.graphdef

    @property
    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.shapes.abstract

    @property
    def verdict(self) -> dict[str, str]:
        return self.shapes.verdict

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return self.shapes.shardings

    @property
    def trainable_paths(self) -> list[str]:
        return [path for path, verdict in self.verdict.items() if verdict == freeze.TRAINABLE]

    @property
    def trainable_shardings(self) -> dict[str, NamedSharding]:
        return freeze.split(self.shardings, self.verdict)[0]

    @property
    def frozen_shardings(self) -> dict[str, NamedSharding]:
        return freeze.split(self.shardings, self.verdict)[1]

    @property
    def dtypes(self) -> dict[str, Any]:
        return {path: leaf.dtype for path, leaf in self.abstract.items()}

    def frozen_source(self, workdir: Path) -> TensorSource:
        """The frozen leaves as they came, from WORKDIR."""
        return FrozenSource(workdir / "frozen" / self.files.frozen)


def open_model(config: ConfigDict, workdir: Path, mesh: Mesh, resumed: int | None) -> Model:
    """Open the model of a fresh run (from config.init) or of a continued one (from WORKDIR). Writes nothing."""
    if resumed is not None:
        files, source, origin = ModelFiles.load(workdir), None, None
    else:
        start, adapters = open_start(config), lora.read(configs.plain(config.lora))
        source, origin = start.source, start.origin
        if adapters is not None:
            source = LoraSource(source, start.config, adapters, config.seed)
        check(source, start.config, lora=adapters)
        files = ModelFiles(
            config=start.config,
            tokenizer=start.tokenizer,
            template=config.template,
            position=config.image.position,
            rules=image_rules(config, start.config),
            source_dtypes={
                name: source.source_dtype(name).name for name in names.expected(start.config, adapters)
            },
            frozen="",
            lora=adapters,
        )
    return Model(files, shape_model(config, files.config, files.lora, mesh), source, origin)


def keep(model: Model, workdir: Path) -> Model:
    """Write WORKDIR/model and WORKDIR/frozen of a fresh run: from then on it reads nothing else."""
    assert model.source is not None and model.origin is not None
    if jax.process_index() == 0:
        frozen = [path for path, verdict in model.verdict.items() if verdict == freeze.FROZEN]
        digest = save_frozen(model.source, model.files.config, frozen, workdir, model.files.lora)
        dataclasses.replace(model.files, frozen=digest).save(workdir)
        model.origin.save(workdir)
        mirror.push(workdir)
    multihost_utils.sync_global_devices("model files")
    mirror.pull(workdir)
    return dataclasses.replace(model, files=ModelFiles.load(workdir))
