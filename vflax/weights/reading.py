"""The files of a whole model, read: one function for each format, which two callers share.

open.open_checkpoint ends at the first thing that is wrong; facts.look notes it and goes on (see Reading). Nothing but
headers and small files is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.small_files import Problems, read_json
from vflax.templates import Position
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.values import OBJECT, TEXT
from vflax.weights import adapter, hf_chat, hf_config, hf_images, hub, llava_config, names
from vflax.weights.adapter import Adapter, MergedSource
from vflax.weights.kinds import (
    ADAPTER,
    DECODER,
    HF,
    ORIGINAL,
    PARTS,
    RANDOM,
    WHOLE,
    WORKDIR,
    detect,
    tensor_files,
)
from vflax.weights.source import DescribedSource, FileSource, JoinedSource, TensorSource, WorkdirSource
from vflax.weights.views import RenamedSource
from vflax.workdir import ModelFiles, Origin

T = TypeVar("T")


@dataclass
class Reading:
    """How a directory is read.

    collect: what is wrong is noted in `problems`, and reading goes on; else it is raised.
    fetch: of a tower or a base on the hub, fetch the weights; else their small files alone, which is noted.
    notes: what a person may want to know, and an import does not stop at.
    """

    collect: bool = False
    fetch: bool = True
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """What `read` returns; None where it raises a UserError, which is noted: each line of it once."""
        try:
            return read(*args, **options)
        except UserError as error:
            if not self.collect:
                raise
            told = {line.strip() for problem in self.problems for line in problem.splitlines()}
            head, *rest = str(error).splitlines()
            fresh = [line for line in rest if line.strip() not in told]
            if fresh or (not rest and head not in told):
                self.problems.append("\n".join([head, *fresh]))
            return None

    def note(self, line: str) -> None:
        """Note a line once."""
        if line not in self.notes:
            self.notes.append(line)

    def weights(self, folder: Path) -> TensorSource | None:
        """The weights of a folder; None where they cannot be opened, or of a folder from the hub were not fetched."""
        if not self.fetch and hub.origin(folder) and not tensor_files(folder):
            self.note(f"{hub.origin(folder)}: its weights were not fetched, nor looked at")
            return None
        return self.attempt(FileSource, folder)


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


@dataclass
class Found:
    """A model as far as it can be read; None: not there, or not readable. See Opened, HubFiles and ModelFiles.

    template: of a WORKDIR, with its position; `chat` is that of others.
    tokens: the folder of the tokenizer.
    elsewhere: parts whose tensors are not among `source`, nor need be.
    """

    kind: str
    place: Path
    source: TensorSource | None = None
    vision: VisionConfig | None = None
    bridge: BridgeConfig | None = None
    decoder: DecoderConfig | None = None
    rules: ImageRules | None = None
    tokenizer: Tokenizer | None = None
    tokens: Path | None = None
    chat: str | None = None
    stops: tuple[int, ...] | None = None
    template: tuple[str, Position] | None = None
    tower: str | None = None
    files: ModelFiles | None = None
    lora: Lora | None = None
    step: int | None = None
    elsewhere: set[str] = field(default_factory=set)

    def take(self, config: LlavaConfig | None) -> None:
        """The numbers of a whole model."""
        if config is not None:
            self.vision, self.bridge, self.decoder = config.vision, config.bridge, config.decoder

    def talk(self, reading: Reading, folder: Path, chats: Path, files: tuple[str, ...], stops: Path) -> None:
        """Tokenizer of `folder`, chat template in the first of `files` in `chats`, ends of answers of `stops`."""
        self.tokens, self.tokenizer = folder, reading.attempt(load_tokenizer, folder)
        self.chat = reading.attempt(hf_chat.own_chat_template, chats, files)
        if self.tokenizer is not None:
            self.stops = reading.attempt(hf_chat.own_stops, stops, self.tokenizer)


def read_model(
    reading: Reading, kind: str, place: Path, step: str, vision: Path | None, base: Path | None = None
) -> Found:
    """Read a whole model; the arguments are those of `open_checkpoint`, and `kind` what `detect` says.

    Raises:
        UserError: unless reading.collect.
    """
    if base is not None and kind != ADAPTER:
        reading.attempt(_refuse, f"{place} is {kind}: only {ADAPTER} has a base ({base})")
    if vision is not None and kind in (WORKDIR, HF):
        reading.attempt(
            _refuse, f"{place} is {kind}: only an {ORIGINAL} takes its tower from elsewhere ({vision})"
        )
    if kind == WORKDIR:
        return _read_workdir(reading, place, step)
    if kind == HF:
        return _read_hf(reading, place)
    if kind == ORIGINAL:
        return _read_original(reading, place, vision)
    return _read_adapter(reading, place, step, vision, base)


def _refuse(message: str) -> None:
    raise UserError(message)


def _read_workdir(reading: Reading, place: Path, step: str) -> Found:
    # Orbax takes seconds to import, and other formats need none of it.
    from vflax import workdir
    from vflax.checkpoint import find_step

    found = Found(WORKDIR, place, tokens=place / "model")
    found.files = files = reading.attempt(ModelFiles.load, place)
    if files is not None:
        found.take(files.config)
        found.rules, found.tokenizer = files.rules, files.tokenizer
        found.template = files.template, files.position
    else:  # as far as they go
        found.take(reading.attempt(workdir.read_config, place))
        found.rules = reading.attempt(workdir.read_rules, place)
        found.template = reading.attempt(workdir.read_template, place)
        found.tokenizer = reading.attempt(load_tokenizer, place / "model")
    found.step = reading.attempt(find_step, place, step)
    if found.step is None:
        return found
    found.source = source = reading.attempt(WorkdirSource, place, found.step)
    lora = reading.attempt(workdir.read_lora, place)
    if source is None or lora is None:
        return found
    own = {name: name for name in source.names() if adapter.split_lora(name) or name in source.trained}
    base = reading.attempt(origin_of, place) or Origin("")
    folder = Path(base.checkpoint) if base.checkpoint and Path(base.checkpoint).is_dir() else None
    tensors = RenamedSource(source, own)
    found.lora = Lora(source, tensors, lora.alpha, False, lora.dropout, base.checkpoint, base.kind, folder)
    found.source = reading.attempt(MergedSource, source, source, lora.alpha)
    return found


def origin_of(workdir: Path) -> Origin:
    """What a run started from. One that began before runs wrote that down is asked for its config, and the folder that
    this names, where it is here, for its kind."""
    if (known := Origin.load(workdir)) is not None:
        return known
    path = workdir / "config.json"
    config = read_json(path) if path.is_file() else {}
    problems = Problems(path)
    problems.check(config, {"init": OBJECT, "model": OBJECT})
    problems.stop()
    init, model = config.get("init", {}), config.get("model", {})
    problems.check(init, {"checkpoint": TEXT})
    problems.stop()
    said = init.get("checkpoint", "")
    if not said:
        return Origin(RANDOM if model.get("vision") else PARTS if init.get("decoder") else "")
    if said.startswith("cache:"):
        return Origin(WORKDIR)  # another config made it
    if hub_id := hub.meant_id(said):
        return Origin("", str(hub_id))
    folder = Path(said).expanduser()
    try:
        return Origin(detect(folder), str(folder.absolute()))
    except UserError:
        return Origin("", said)


def _read_hf(reading: Reading, place: Path) -> Found:
    found = Found(HF, place, reading.weights(place))
    found.take(reading.attempt(hf_config.read_llava_config, place))
    found.rules = reading.attempt(hf_images.read_image_rules, place)
    found.talk(reading, place, place, hf_chat.CHATS, place)
    if found.tokenizer is not None:
        reading.attempt(hf_chat.check_image_id, place, found.tokenizer)
    return found


def _read_original(reading: Reading, place: Path, vision: Path | None) -> Found:
    found = Found(ORIGINAL, place, reading.weights(place))
    found.talk(reading, place, place, hf_chat.OWN_CHAT, place)
    original = reading.attempt(llava_config.read, place)
    if original is not None:
        _add_tower(reading, found, original, found.source.names() if found.source else (), vision)
    return found


def _add_tower(
    reading: Reading,
    found: Found,
    original: llava_config.Original,
    there: Iterable[str],
    vision: Path | None,
) -> None:
    """The numbers of an original LLaVA, and its tower's weights, where they are not `there` already."""
    found.tower = original.tower
    found.decoder = reading.attempt(llava_config.read_decoder, original)
    present = any(names.part_of(name) == "vision" for name in there)
    tower = vision
    if tower is None and not (present and llava_config.brings_tower_config(original)):
        tower = reading.attempt(find_tower, original, weights=not present, fetch=reading.fetch)
        if tower is None:
            if not present:
                found.elsewhere.add("vision")  # a problem already
            return
    model = reading.attempt(llava_config.model_config, original, tower)
    if model is not None:
        found.take(model[0])
        found.rules = model[1]
    if present or tower is None or found.source is None:
        return
    reading.note(f"the tower is not among these weights: an import takes {vision or original.tower}")
    weights = reading.weights(tower)
    if weights is None:
        found.elsewhere.add("vision")
    else:
        found.source = reading.attempt(JoinedSource, [found.source, weights])


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


def _read_adapter(reading: Reading, place: Path, step: str, vision: Path | None, base: Path | None) -> Found:
    own = reading.attempt(Adapter, place)
    if base is None and own is not None:
        base = reading.attempt(find_base, own, fetch=reading.fetch)
    kind = None if base is None else reading.attempt(detect, base)
    if base is None or kind is None:
        return Found(ADAPTER, place)
    if base.resolve() == place.resolve():
        reading.attempt(
            _refuse, f"{place / adapter.CONFIG}: its base is itself; name another one with --base"
        )
        return Found(ADAPTER, place)
    if kind == DECODER:
        under = _read_decoder_under(reading, place, base, own, vision)
    elif kind in WHOLE:
        under = read_model(reading, kind, base, step, vision)
    else:
        reading.attempt(
            _refuse, f"{base} is {kind}, and the base of an adapter is a whole model, or {DECODER}"
        )
        return Found(ADAPTER, place)
    found = dataclasses.replace(under, kind=ADAPTER, place=place, source=None, lora=None, step=None)
    known = {"vision": under.vision, "bridge": under.bridge, "decoder": under.decoder}
    beneath = under.source
    if beneath is None and reading.collect and under.decoder is not None:
        beneath = DescribedSource(base, [part for part in known.values() if part])
    if own is None or beneath is None:
        return found
    dropout = float(own.raw.get("lora_dropout") or 0.0)
    # A path may be that of another machine, or count from another folder.
    name = str(hub.meant_id(own.base) or base.absolute())
    found.lora = Lora(beneath, own.source, own.alpha, own.rslora, dropout, name, kind, base)
    found.source = reading.attempt(MergedSource, beneath, own.source, own.alpha, own.rslora)
    return found


def _read_decoder_under(
    reading: Reading, place: Path, base: Path, own: Adapter | None, vision: Path | None
) -> Found:
    """What LLaVA's own LoRA runs change: a bare decoder, to which tower and projector come."""
    original = reading.attempt(read_beside, place, base)
    found = Found(DECODER, base, reading.weights(base))
    found.talk(reading, place if hf_chat.has_tokenizer(place) else base, place, hf_chat.OWN_CHAT, base)
    if original is not None:
        there = [*(found.source.names() if found.source else ()), *(own.source.names() if own else ())]
        _add_tower(reading, found, original, there, vision)
    return found


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
