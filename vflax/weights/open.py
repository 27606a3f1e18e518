"""Open a model in any format that vflax reads; which one it is, its files say, never its name.

A vflax WORKDIR; Hugging Face LLaVA in all its namings; the original LLaVA, with or without its tower; a LoRA adapter on
any of these; a tower, a decoder and a projector that make one together.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.llava import LlavaConfig
from vflax.templates import Position
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.weights import hf_chat, hf_config, hf_images, hub, llava_config, names
from vflax.weights.kinds import CLIP, DECODER, PARTS, PROJECTOR, WHOLE, detect
from vflax.weights.reading import Found, Lora, Reading, find_tower, read_model
from vflax.weights.source import FileSource, JoinedSource, RandomSource, TensorSource
from vflax.workdir import ModelFiles


@dataclass(frozen=True)
class HubFiles:
    """What a directory of weights says beside them.

    chat: its chat template, known as Jinja only; None where it brings none.
    stops: ids that end an answer.
    tower: what an original LLaVA's config calls its tower.
    """

    config: LlavaConfig
    tokenizer: Tokenizer
    rules: ImageRules
    chat: str | None
    stops: tuple[int, ...]
    tower: str | None = None


@dataclass(frozen=True)
class Opened:
    """A model: its weights under canonical names, an adapter merged into them, and what belongs to them.

    kind: one of WHOLE, or PARTS.
    place: its folder; of parts the decoder's.
    lora: where the weights are a base and an adapter, these two.
    step: of a WORKDIR.
    """

    kind: str
    place: Path
    source: TensorSource
    files: ModelFiles | HubFiles
    lora: Lora | None = None
    step: int | None = None


def open_checkpoint(
    place: Path,
    *,
    step: str = "latest",
    vision: Path | None = None,
    base: Path | None = None,
) -> Opened:
    """Open a whole model; nothing but headers and small files is read.

    Args:
        place: its folder.
        step: of a WORKDIR: "latest", "best" or a number.
        vision: the CLIP directory of an original LLaVA's tower; None: where its config.json says.
        base: the model that a LoRA adapter changes; None: where its adapter_config.json says.

    Raises:
        UserError: for a part of a model, files that are missing or damaged, settings that are not supported, and an
            argument that the format does not need.
    """
    kind = detect(place)
    if kind not in WHOLE:
        raise UserError(
            f"{place} is {kind}, a part of a model: name the parts, --vision=CLIP --decoder=LLAMA --bridge=PROJECTOR "
            "(of a run: --config.init.vision, .decoder and .bridge)"
        )
    return _opened(read_model(Reading(), kind, place, step, vision, base))


def _opened(found: Found) -> Opened:
    """A model of which everything could be read."""
    files: ModelFiles | HubFiles | None = found.files
    if files is None:
        assert found.vision and found.bridge and found.decoder
        assert found.tokenizer and found.rules and found.stops
        config = LlavaConfig(found.vision, found.bridge, found.decoder)
        files = HubFiles(config, found.tokenizer, found.rules, found.chat, found.stops, found.tower)
    assert found.source is not None
    return Opened(found.kind, found.place, found.source, files, found.lora, found.step)


def open_parts(
    vision: Path | None, decoder: Path, bridge: Path, feature_layer: int | None, keep_cls: bool | None
) -> Opened:
    """Open the model that a tower, a decoder and a trained projector make.

    Args:
        vision: CLIP directory; None: what the config.json beside the projector names.
        decoder: LLaMA, Vicuna or Mistral directory; the tokenizer is its own.
        bridge: projector file, or its folder, as the first stage of LLaVA leaves it.
        feature_layer, keep_cls: which of the tower's outputs the projector was trained on, see VisionConfig; None:
            what the config.json beside it says.

    Raises:
        UserError: for parts that do not fit each other, are missing or damaged, and what nobody says.
    """
    if (kind := detect(decoder)) != DECODER:
        raise UserError(f"{decoder} is {kind}, expected {DECODER}")
    if (kind := detect(bridge)) != PROJECTOR:
        raise UserError(f"{bridge} is {kind}, expected {PROJECTOR}")
    file = hub.projector_file(bridge)
    said = llava_config.read(file.parent) if (file.parent / "config.json").is_file() else None
    if said is None and (vision is None or feature_layer is None):
        raise UserError(
            f"{file}: there is no config.json of LLaVA's beside it that says what it was trained on: name the tower "
            "with --vision and the layer whose output it takes with --feature-layer (LLaVA's is -2)"
        )
    mode = None
    if said is not None:
        vision = vision or find_tower(said, weights=True)
        feature_layer = said.feature_layer if feature_layer is None else feature_layer
        keep_cls = said.keep_cls if keep_cls is None else keep_cls
        mode = said.mode
    assert vision is not None and feature_layer is not None
    if (kind := detect(vision)) != CLIP:
        raise UserError(f"{vision} is {kind}, expected {CLIP}")
    own = FileSource.file(file)
    config = hf_config.join_configs(
        vision, decoder, bridge=bridge_of(own, file).kind, feature_layer=feature_layer, keep_cls=bool(keep_cls)
    )  # fmt: skip
    rules = hf_images.read_image_rules(vision)
    files = HubFiles(
        config,
        tokenizer := load_tokenizer(decoder),
        dataclasses.replace(rules, mode=mode or rules.mode),
        hf_chat.own_chat_template(file.parent, hf_chat.OWN_CHAT),
        hf_chat.own_stops(decoder, tokenizer),
        said.tower if said else None,
    )
    return Opened(PARTS, decoder, join(config, vision, decoder, file, 0), files)


def join(config: LlavaConfig, vision: Path, decoder: Path, bridge: Path | None, seed: int) -> TensorSource:
    """The tower from here, the decoder from there, the bridge from a third place or at random.

    Args:
        config: of the whole, from hf_config.join_configs.
        vision: OpenAI-CLIP directory (CLIPModel or CLIPVisionModel).
        decoder: LLaMA, Vicuna or Mistral directory.
        bridge: file with multi_modal_projector.* or mm_projector.*; None: a random bridge.
        seed: of the random bridge.

    Raises:
        UserError: when two parts hold the same tensor, or files are missing or damaged.
    """
    middle: TensorSource
    if bridge is None:
        middle = RandomSource(config, seed, only=names.BRIDGE)
    else:
        middle = FileSource.file(bridge)
    return JoinedSource([FileSource(vision), middle, FileSource(decoder)])


def bridge_of(source: TensorSource, file: Path) -> BridgeConfig:
    """The bridge that a projector's tensors make.

    Raises:
        UserError: when they make none.
    """
    linears = {
        int(match[1]): source.shape(match[0])
        for name in source.names()
        if (match := re.fullmatch(rf"{names.BRIDGE}\.linear_(\d+)\.weight", name))
    }
    if 1 not in linears or any(len(shape) != 2 for shape in linears.values()):
        raise UserError(f"{file}: no projector of linear layers: it holds {', '.join(source.names())}")
    out, inner = linears[1]
    return BridgeConfig("linear" if max(linears) == 1 else f"mlp{max(linears)}x_gelu", inner, out)


def template_of(opened: Opened) -> tuple[str, Position]:
    """The conversation template of a model and where its images go.

    Raises:
        UserError: the weights bring no template that vflax has.
    """
    files = opened.files
    if isinstance(files, ModelFiles):  # a WORKDIR, or an adapter on one
        return files.template, files.position
    known = hf_chat.known_template(files.chat)
    if known is None:
        state = "brings no chat template" if files.chat is None else "brings a chat template of its own"
        raise UserError(
            f"{opened.place} {state}, and no template of vflax renders like it: name the one it was trained with, such "
            "as --template=vicuna_v1"
        )
    return known
