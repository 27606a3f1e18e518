"""Open a model in any format that vflax reads; which one it is, its files say, never its name.

A vflax WORKDIR; Hugging Face LLaVA in all its namings; the original LLaVA, with or without its tower; a LoRA adapter on
any of these. Parts of a model (a CLIP tower, a LLaMA decoder, a projector) are joined by `join`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.templates import TEMPLATES, Position, chat_template
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.weights import adapter, hf_config, hf_images, hub, llava_config, names
from vflax.weights.adapter import Adapter, MergedSource
from vflax.weights.hf_files import read_json
from vflax.weights.hf_tokenizer import special_ids
from vflax.weights.source import FileSource, JoinedSource, RandomSource, TensorSource, WorkdirSource
from vflax.weights.views import RenamedSource
from vflax.workdir import ModelFiles, Origin

# What a directory can be; the words are those that messages use.
WORKDIR, HF, ORIGINAL, ADAPTER = "a vflax WORKDIR", "Hugging Face LLaVA", "original LLaVA", "a LoRA adapter"
CLIP, DECODER, PROJECTOR = "a CLIP vision tower", "a LLaMA-shaped decoder", "a projector"
WHOLE = (WORKDIR, HF, ORIGINAL, ADAPTER)
# What else a run can start from; see workdir.Origin.
PARTS, RANDOM = "a tower and a decoder, joined", "random weights"


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
class Lora:
    """An adapter beside the base that it was merged into.

    tensors: NAME.lora_A.weight and NAME.lora_B.weight, and whole weights that replace the base's.
    alpha, rslora, dropout: its settings; see adapter.scaling.
    base_name: what the base is called: a hub id, an absolute path, or "" where it has no name.
    base_kind: what the base is: what `detect` says, PARTS or RANDOM; "" where nobody knows.
    folder: where the base lies; None where only its name is known.
    """

    base: TensorSource
    tensors: TensorSource
    alpha: float
    rslora: bool
    dropout: float
    base_name: str
    base_kind: str
    folder: Path | None = None


@dataclass(frozen=True)
class Opened:
    """A model: its weights under canonical names, an adapter merged into them, and what belongs to them.

    kind: one of WHOLE.
    place: its folder.
    lora: where the weights are a base and an adapter, these two.
    step: of a WORKDIR.
    """

    kind: str
    place: Path
    source: TensorSource
    files: ModelFiles | HubFiles
    lora: Lora | None = None
    step: int | None = None


def detect(place: Path) -> str:
    """What a directory, or a file, is.

    Raises:
        UserError: when it is nothing that vflax reads.
    """
    if place.is_file():
        return _detect_tensors(place)
    if (place / "model" / "config.json").is_file():
        return WORKDIR
    if (place / adapter.CONFIG).is_file():
        return ADAPTER
    if not (place / "config.json").is_file():
        return _detect_tensors(place)
    raw = read_json(place / "config.json")
    kind = raw.get("model_type")
    if llava_config.is_original(raw):
        return PROJECTOR if _holds_projector_alone(place) else ORIGINAL
    if kind == "llava":
        return HF
    if kind in ("clip", "clip_vision_model"):
        return CLIP
    if kind in hf_config.DECODER_TYPES:
        return DECODER
    raise UserError(
        f"{place / 'config.json'}: model_type={kind!r}: vflax reads llava (Hugging Face's and the original's), "
        f"clip, clip_vision_model, {' and '.join(hf_config.DECODER_TYPES)}"
    )


def _holds_projector_alone(place: Path) -> bool:
    """Whether it is what LLaVA's first stage leaves: the config.json of the whole model, and the bridge."""
    whole = [*place.glob("model*.safetensors*"), *place.glob("pytorch_model*.bin*")]
    return not whole and any((place / name).is_file() for name in hub.PROJECTORS)


def _detect_tensors(place: Path) -> str:
    """A folder without a config, or a file, by the names of its tensors."""
    for path in tensor_files(place):
        found = {names.part_of(name) for name in FileSource.file(path).names()}
        if found == {"bridge"}:
            return PROJECTOR
    if not place.exists():
        raise UserError(f"{place}: not there; expected a vflax WORKDIR or a directory of weights")
    raise UserError(
        f"{place}: neither a vflax WORKDIR (no model/ in it), nor weights with a config.json or adapter_config.json, "
        "nor a projector"
    )


def tensor_files(place: Path) -> list[Path]:
    """The files of tensors that a path may mean, those that need no torch first."""
    if place.is_file():
        return [place]
    return [path for kind in ("safetensors", "bin") for path in sorted(place.glob(f"*.{kind}"))]


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
    if kind == ADAPTER:
        return _open_adapter(place, step, vision, base)
    if base is not None:
        raise UserError(f"{place} is {kind}: only {ADAPTER} has a base ({base})")
    if kind == ORIGINAL:
        return _open_original(place, vision)
    if vision is not None:
        raise UserError(f"{place} is {kind}: only an {ORIGINAL} takes its tower from elsewhere ({vision})")
    if kind == WORKDIR:
        # Orbax takes seconds to import, and other formats need none of it.
        from vflax.checkpoint import find_step

        return _open_workdir(place, find_step(place, step))
    if kind != HF:
        raise UserError(
            f"{place} is {kind}, a part of a model: name the parts in --config.init.vision, .decoder and .bridge"
        )
    return _open_hf(place)


def _open_workdir(place: Path, step: int) -> Opened:
    files, source = ModelFiles.load(place), WorkdirSource(place, step)
    if files.lora is None:
        return Opened(WORKDIR, place, source, files, step=step)
    own = {name: name for name in source.names() if adapter.split_lora(name) or name in source.trained}
    alpha, dropout, base = files.lora.alpha, files.lora.dropout, origin_of(place)
    folder = Path(base.checkpoint) if base.checkpoint and Path(base.checkpoint).is_dir() else None
    tensors = RenamedSource(source, own)
    lora = Lora(source, tensors, alpha, False, dropout, base.checkpoint, base.kind, folder)
    return Opened(WORKDIR, place, MergedSource(source, source, alpha), files, lora, step)


def origin_of(workdir: Path) -> Origin:
    """What a run started from. One that began before runs wrote that down is asked for its config, and the folder that
    this names, where it is here, for its kind."""
    if (known := Origin.load(workdir)) is not None:
        return known
    config = read_json(workdir / "config.json") if (workdir / "config.json").is_file() else {}
    init, said = config.get("init", {}), config.get("init", {}).get("checkpoint", "")
    if not said:
        drawn = bool(config.get("model", {}).get("vision"))
        return Origin(RANDOM if drawn else PARTS if init.get("decoder") else "")
    if said.startswith("cache:"):
        return Origin(WORKDIR)  # another config made it
    if hub_id := hub.meant_id(said):
        return Origin("", str(hub_id))
    folder = Path(said).expanduser()
    try:
        return Origin(detect(folder), str(folder.absolute()))
    except UserError:
        return Origin("", said)


def base_name(workdir: Path) -> str:
    """What a run's base is called: the checkpoint that it started from; "" where that has no name for others."""
    return origin_of(workdir).checkpoint


def _open_hf(place: Path) -> Opened:
    config, tokenizer = hf_config.read_llava_config(place), load_tokenizer(place)
    rules, chat = hf_images.read_image_rules(place), own_chat_template(place)
    check_image_id(place, tokenizer)
    files = HubFiles(config, tokenizer, rules, chat, _own_stops(place, tokenizer))
    return Opened(HF, place, FileSource(place), files)


def check_image_id(place: Path, tokenizer: Tokenizer) -> None:
    """Hold the config's id of "<image>" against the tokenizer's.

    Raises:
        UserError: when they differ.
    """
    raw, ids = read_json(place / "config.json"), special_ids(tokenizer)
    said = raw.get("image_token_index", raw.get("image_token_id", ids.image))
    if said != ids.image:
        raise UserError(
            f"{place / 'config.json'}: image_token_index is {said}, but by the tokenizer files beside it the id of "
            f"<image> is {ids.image}; these tokenizer files are not those of the weights"
        )


def _open_original(place: Path, vision: Path | None) -> Opened:
    original = llava_config.read(place)
    source = FileSource(place)
    tower, config, rules = _tower_of(original, source.names(), vision)
    tokenizer = load_tokenizer(place)
    chat = own_chat_template(place, OWN_CHAT)
    files = HubFiles(config, tokenizer, rules, chat, _own_stops(place, tokenizer), original.tower)
    return Opened(ORIGINAL, place, JoinedSource([source, *tower]), files)


def _tower_of(
    original: llava_config.Original, there: Iterable[str], vision: Path | None
) -> tuple[list[TensorSource], LlavaConfig, ImageRules]:
    """The tower that has to be joined to the tensors `there`, which may be none, and what model they make."""
    present = any(names.part_of(name) == "vision" for name in there)
    tower = vision
    if tower is None and not (present and llava_config.brings_tower_config(original)):
        tower = find_tower(original, weights=not present)
    config, rules = llava_config.model_config(original, tower)
    if present:
        return [], config, rules
    assert tower is not None
    return [FileSource(tower)], config, rules


def find_tower(original: llava_config.Original, weights: bool, fetch: bool = True) -> Path:
    """The folder that mm_vision_tower names: beside the weights, a path, or a hub id.

    Args:
        weights: whether its weights are needed, too.
        fetch: of a hub id, fetch these.

    Raises:
        UserError: when there is none.
    """
    beside = original.path.parent / original.tower
    found = beside if beside.is_dir() else hub.resolve(original.tower, weights=weights and fetch)
    if found.is_dir():
        return found
    raise UserError(
        f"{original.path}: mm_vision_tower is {original.tower}, and there is no such directory; its "
        f"{'weights are' if weights else 'config.json and preprocessor_config.json are'} needed: give that CLIP "
        "directory with --vision (or --config.init.vision)"
    )


def _open_adapter(place: Path, step: str, vision: Path | None, base: Path | None) -> Opened:
    found = Adapter(place)
    if base is None:
        base = find_base(found)
    kind = detect(base)
    if kind == DECODER:
        original = read_beside(place, base)
        words = FileSource(base)
        tower, config, rules = _tower_of(original, (*words.names(), *found.source.names()), vision)
        lora, merged = _merge(JoinedSource([words, *tower]), found, base)
        folder = place if has_tokenizer(place) else base
        tokenizer = load_tokenizer(folder)
        chat, stops = own_chat_template(place, OWN_CHAT), _own_stops(base, tokenizer)
        files = HubFiles(config, tokenizer, rules, chat, stops, original.tower)
        return Opened(ADAPTER, place, merged, files, lora)
    under = open_checkpoint(base, step=step, vision=vision)
    lora, merged = _merge(under.source, found, base)
    return Opened(ADAPTER, place, merged, under.files, lora)


def read_beside(place: Path, base: Path) -> llava_config.Original:
    """The original LLaVA's config.json beside an adapter of a decoder, as LLaVA's own LoRA runs write it.

    Raises:
        UserError: when it is not there, or not supported.
    """
    own = read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if not llava_config.is_original(own):
        raise UserError(
            f"{place}: its base {base} is {DECODER}, and without the original LLaVA's config.json beside the adapter "
            "nothing says which tower and projector belong to it"
        )
    return llava_config.read(place)


def _merge(base: TensorSource, found: Adapter, folder: Path) -> tuple[Lora, TensorSource]:
    dropout = float(found.raw.get("lora_dropout") or 0.0)
    # A path may be that of another machine, or count from another folder.
    name = str(hub.meant_id(found.base) or folder.absolute())
    kind = detect(folder)
    lora = Lora(base, found.source, found.alpha, found.rslora, dropout, name, kind, folder)
    return lora, MergedSource(base, found.source, found.alpha, found.rslora)


def find_base(found: Adapter, fetch: bool = True) -> Path:
    """The folder of the base that an adapter names: a path or a hub id.

    Args:
        fetch: of a hub id, fetch the weights, too.

    Raises:
        UserError: when there is none.
    """
    if found.base and (path := hub.resolve(found.base, weights=fetch)).is_dir():
        return path
    raise UserError(
        f"{found.folder / adapter.CONFIG}: base_model_name_or_path is {found.base!r}, and there is no such directory: "
        "give the base with --base (or --config.init.decoder)"
    )


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


# --- small files --------------------------------------------------------------------------------------------


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory brings a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def check_tokenizer(tokenizer: Tokenizer, decoder: DecoderConfig, place: str) -> None:
    """Hold a tokenizer against the embeddings of the weights.

    Raises:
        UserError: when it has ids without an embedding.
    """
    if tokenizer.vocab_size > decoder.vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} pieces, but the weights have "
            f"{decoder.vocab_size} embeddings; name the tokenizer of these weights in config.tokenizer"
        )


CHATS = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
# The original LLaVA never reads tokenizer_config.json's: that is the bare decoder's, and renders no image.
OWN_CHAT = CHATS[:1]


def own_chat_template(folder: Path, files: tuple[str, ...] = CHATS) -> str | None:
    """The chat template that came with a directory, in the first of `files` that has one."""
    for path in (folder / name for name in files):
        if path.suffix == ".jinja" and path.is_file():
            return path.read_text(encoding="utf-8")
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, str):
            return found
    return None


def _own_stops(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer by a directory's generation_config.json, else the tokenizer's EOS."""
    path = folder / "generation_config.json"
    said: Any = read_json(path).get("eos_token_id") if path.is_file() else None
    if said is None:
        return (tokenizer.eos_id,)
    return tuple(said) if isinstance(said, list) else (int(said),)


def known_template(chat: str | None) -> tuple[str, Position] | None:
    """(template, position) whose Jinja this is, to the letter; None where it is none of vflax's."""
    positions: tuple[Position, ...] = ("auto", "front", "inline")
    for template in TEMPLATES:
        for position in positions:
            if chat == chat_template(template, position):
                return template, position
    return None
