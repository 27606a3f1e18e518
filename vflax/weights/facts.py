"""What a directory of weights is, from headers and small files alone: no tensor is read.

Reading goes on past everything that is wrong, which is noted; an import (open.open_checkpoint) ends at the first of it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from vflax.weights import adapter, hf_config, hf_images, hub, llava_config, names
from vflax.weights.adapter import Adapter, MergedSource
from vflax.weights.hf_files import read_json
from vflax.weights.load import compare
from vflax.weights.open import (
    ADAPTER,
    CHATS,
    CLIP,
    DECODER,
    HF,
    ORIGINAL,
    OWN_CHAT,
    PROJECTOR,
    WORKDIR,
    base_name,
    check_image_id,
    check_tokenizer,
    detect,
    find_base,
    find_tower,
    has_tokenizer,
    known_template,
    own_chat_template,
    read_beside,
    tensor_files,
)
from vflax.weights.source import FileSource, JoinedSource, RandomSource, TensorSource, WorkdirSource

T = TypeVar("T")

PARTS = ("vision", "bridge", "decoder", "adapter", "other")
OWN_JINJA = "its own Jinja"


@dataclass(frozen=True)
class Part:
    """The tensors of one part, as the files hold them.

    dtypes: {dtype: tensors in it}.
    """

    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Facts:
    """What a directory, or a file, of weights is. Plain JSON types, but for the dataclasses of `parts`.

    place: its path.
    kind: one of the words that `open.detect` gives.
    naming: of a Hugging Face LLaVA, which of its namings the tensors have; see names.hf_naming.
    origin: "org/name@COMMIT" of what came from the hub.
    step: of a WORKDIR.
    files, bytes: that hold the tensors, on disk.
    parts: {one of PARTS: its tensors}; "other" are tensors that no model of vflax has.
    model: {"vision" | "bridge" | "decoder": its numbers}, as far as the configs can be read.
    tokenizer: {file, vocabulary, adds_bos}.
    template: the conversation template's name, OWN_JINJA, or None where there is none.
    position: where `template` puts images; None where it is not one of vflax's.
    images: ImageRules.to_dict().
    tower: what an original LLaVA calls its tower.
    adapter: {rank, alpha, scaling, base, changes, replaces}.
    misfit: {"missing" | "of another shape" | "unexpected": [a line for each tensor]}.
    problems: what an import would stop at.
    notes: what it would not.
    """

    place: str
    kind: str
    naming: str | None
    origin: str | None
    step: int | None
    files: int
    bytes: int
    parts: dict[str, Part]
    model: dict[str, dict[str, Any]]
    tokenizer: dict[str, Any] | None
    template: str | None
    position: str | None
    images: dict[str, Any] | None
    tower: str | None
    adapter: dict[str, Any] | None
    misfit: dict[str, list[str]]
    problems: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain JSON types."""
        return dataclasses.asdict(self)


@dataclass
class _Found:
    """What was found of a model so far; None: not there, or not readable.

    stored: the tensors under the names that the files have; `rules` bring them to the canonical form.
    source: the tensors of the whole model under canonical names.
    elsewhere: parts whose tensors are not among these, nor need be.
    """

    problems: list[str]
    notes: list[str]
    stored: TensorSource | None = None
    rules: names.Rules = names.RULES
    source: TensorSource | None = None
    elsewhere: set[str] = field(default_factory=set)
    vision: VisionConfig | None = None
    bridge: BridgeConfig | None = None
    decoder: DecoderConfig | None = None
    images: ImageRules | None = None
    tokenizer: Tokenizer | None = None
    tokenizer_file: Path | None = None
    template: str | None = None
    position: str | None = None
    tower: str | None = None
    adapter: dict[str, Any] | None = None
    step: int | None = None

    def attempt(self, read: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """What `read` returns; None where it raises a UserError, which is noted: each line of it once."""
        try:
            return read(*args, **options)
        except UserError as error:
            told = {line.strip() for problem in self.problems for line in problem.splitlines()}
            head, *rest = str(error).splitlines()
            fresh = [line for line in rest if line.strip() not in told]
            if fresh or (not rest and head not in told):
                self.problems.append("\n".join([head, *fresh]))
            return None

    def take(self, config: LlavaConfig | None) -> None:
        """The numbers of a whole model."""
        if config is not None:
            self.vision, self.bridge, self.decoder = config.vision, config.bridge, config.decoder

    @property
    def tokenizer_facts(self) -> dict[str, Any] | None:
        """What stands in Facts.tokenizer."""
        if self.tokenizer is None:
            return None
        return {
            "file": str(self.tokenizer_file),
            "vocabulary": self.tokenizer.vocab_size,
            "adds_bos": self.tokenizer.adds_bos,
        }


def look(place: Path, *, step: str = "latest", vision: Path | None = None, base: Path | None = None) -> Facts:
    """Find out what a path holds.

    Of a tower or a base that lies on the hub, small files are fetched, and no weights.

    Args:
        place: a directory, or a projector file.
        step, vision, base: see open.open_checkpoint.

    Raises:
        UserError: when it is nothing that vflax reads. Whatever else is wrong is among the facts.
    """
    kind = detect(place)
    found = _Found([], [])
    _read(found, kind, place, step, vision, base)
    if kind in (HF, ORIGINAL) and found.template is None:
        found.notes.append("no chat template: an export with --format=hf needs --template")
    parts, files = _count(found)
    misfit = _compare(found)
    sizes = [file.stat().st_size for file in _on_disk(files)]
    return Facts(
        place=str(place),
        kind=kind,
        naming=names.hf_naming(found.stored.names()) if kind == HF and found.stored else None,
        origin=hub.origin(place),
        step=found.step,
        files=len(sizes),
        bytes=sum(sizes),
        parts=parts,
        model=_numbers(found, kind),
        tokenizer=found.tokenizer_facts,
        template=found.template,
        position=found.position,
        images=None if found.images is None else found.images.to_dict(),
        tower=found.tower,
        adapter=found.adapter,
        misfit=misfit,
        problems=found.problems,
        notes=found.notes,
    )


# --- one function for each kind -----------------------------------------------------------------------------


def _read(
    found: _Found, kind: str, place: Path, step: str, vision: Path | None, base: Path | None = None
) -> None:
    if kind == WORKDIR:
        _read_workdir(found, place, step)
    elif kind == HF:
        _read_hf(found, place)
    elif kind == ORIGINAL:
        _read_weights(found, place)
        _read_talk(found, place, OWN_CHAT)
        _read_original(found, found.attempt(llava_config.read, place), vision)
    elif kind == ADAPTER:
        _read_adapter(found, place, step, vision, base)
    elif kind == CLIP:
        _read_weights(found, place)
        found.vision = found.attempt(hf_config.read_vision, place, feature_layer=-1, keep_cls=False)
        found.images = found.attempt(hf_images.read_image_rules, place)
    elif kind == DECODER:
        _read_weights(found, place)
        _read_talk(found, place)
        found.decoder = found.attempt(hf_config.read_decoder, place)
    else:
        assert kind == PROJECTOR
        _read_projector(found, place)


def _read_workdir(found: _Found, place: Path, step: str) -> None:
    # Orbax takes seconds to import, and other formats need none of it.
    from vflax import workdir
    from vflax.checkpoint import find_step

    folder = place / "model"
    found.take(found.attempt(lambda: LlavaConfig.from_dict(workdir.read_json(folder / "config.json"))))
    found.images = found.attempt(lambda: ImageRules.from_dict(workdir.read_json(folder / "image_rules.json")))
    _read_tokenizer(found, folder)
    template = found.attempt(workdir.read_json, folder / "template.json")
    if template is not None:
        found.template, found.position = template["template"], template["position"]
    found.step = found.attempt(find_step, place, step)
    if found.step is None:
        return
    source = found.attempt(WorkdirSource, place, found.step)
    found.stored = found.source = source
    lora = found.attempt(workdir.read_lora, place)
    if source is not None and lora is not None:
        found.source = found.attempt(MergedSource, source, source, lora.alpha)
        replaced = sorted(name for name in source.trained if not adapter.split_lora(name))
        said = {"lora_alpha": lora.alpha, "base_model_name_or_path": base_name(place)}
        found.adapter = _adapter_facts(found, said) | {"replaces": replaced}


def _read_hf(found: _Found, place: Path) -> None:
    _read_weights(found, place)
    found.take(found.attempt(hf_config.read_llava_config, place))
    found.images = found.attempt(hf_images.read_image_rules, place)
    _read_talk(found, place)
    if found.tokenizer is not None:
        found.attempt(check_image_id, place, found.tokenizer)


def _read_original(found: _Found, original: llava_config.Original | None, vision: Path | None) -> None:
    """The numbers of an original LLaVA, and its tower's weights, where they are not among `found.source`."""
    if original is None:
        return
    found.tower = original.tower
    found.decoder = found.attempt(llava_config.read_decoder, original)
    present = found.source is not None and any(names.part_of(n) == "vision" for n in found.source.names())
    tower = vision
    if tower is None and not (present and llava_config.brings_tower_config(original)):
        tower = found.attempt(find_tower, original, weights=not present, fetch=False)
        if tower is None:
            if not present:
                found.elsewhere.add("vision")  # a problem already
            return
    model = found.attempt(llava_config.model_config, original, tower)
    if model is not None:
        found.take(model[0])
        found.images = model[1]
    if present or tower is None or found.source is None:
        return
    found.notes.append(f"the tower is not among these weights: an import takes {vision or original.tower}")
    weights = _open_weights(found, tower)
    if weights is None:
        found.elsewhere.add("vision")
    else:
        found.source = found.attempt(JoinedSource, [found.source, weights])


def _read_adapter(
    found: _Found, place: Path, step: str, vision: Path | None, base: Path | None = None
) -> None:
    found.rules = adapter.RULES
    stored = [found.attempt(FileSource, place, (), adapter.STEM)]
    if (place / adapter.NON_LORA).is_file():
        stored.append(found.attempt(FileSource.file, place / adapter.NON_LORA, ()))
    found.stored = found.attempt(JoinedSource, [part for part in stored if part is not None])
    found.adapter = _adapter_facts(found, read_json(place / adapter.CONFIG))
    own = found.attempt(Adapter, place)
    if base is None and own is not None:
        base = found.attempt(find_base, own, fetch=False)
    kind = None if base is None else found.attempt(detect, base)
    if base is None or kind is None:
        return
    under = _Found(found.problems, found.notes)
    original = None
    if kind == DECODER:
        original = found.attempt(read_beside, place, base)
        _read_weights(under, base)
        _read_talk(under, place if has_tokenizer(place) else base, OWN_CHAT)
        under.decoder = found.attempt(llava_config.read_decoder, original) if original else None
    else:
        _read(under, kind, base, step, vision)
    for name in ("images", "tokenizer", "tokenizer_file", "template", "position", "tower", "elsewhere"):
        setattr(found, name, getattr(under, name))
    found.vision, found.bridge, found.decoder = under.vision, under.bridge, under.decoder
    if under.source is None and under.decoder is not None:
        under.source = _Described(base, under)
    if own is not None and under.source is not None:
        found.source = found.attempt(MergedSource, under.source, own.source, own.alpha, own.rslora)
    _read_original(found, original, vision)


def _read_projector(found: _Found, place: Path) -> None:
    # A folder may hold it twice, which an import refuses; the facts are those of the first.
    file = found.attempt(hub.projector_file, place) or tensor_files(place)[0]
    found.stored = found.attempt(FileSource.file, file, ())
    found.source = found.attempt(FileSource.file, file)
    if found.source is not None:
        found.bridge = found.attempt(_bridge_of, found.source, file)


def _bridge_of(source: TensorSource, file: Path) -> BridgeConfig:
    """The bridge that a projector's tensors make."""
    linears = {
        int(match[1]): source.shape(match[0])
        for name in source.names()
        if (match := re.fullmatch(rf"{names.BRIDGE}\.linear_(\d+)\.weight", name))
    }
    if 1 not in linears or any(len(shape) != 2 for shape in linears.values()):
        raise UserError(f"{file}: no projector of linear layers: it holds {', '.join(source.names())}")
    out, inner = linears[1]
    return BridgeConfig("linear" if max(linears) == 1 else f"mlp{max(linears)}x_gelu", inner, out)


# --- what several kinds share -------------------------------------------------------------------------------


class _Described(RandomSource):
    """The tensors that a base's config asks for, where its weights were not fetched."""

    def __init__(self, place: Path, found: _Found) -> None:
        self._place = place
        parts = (found.vision, found.bridge, found.decoder)
        self._shapes = {n: s for part in parts if part for n, s in names.expected_part(part).items()}

    def where(self, name: str) -> str:
        return f"{self._place} (by its config)"


def _read_weights(found: _Found, place: Path) -> None:
    found.stored = _open_weights(found, place, ())
    found.source = _open_weights(found, place) if found.stored else None


def _open_weights(found: _Found, place: Path, rules: names.Rules = names.RULES) -> TensorSource | None:
    """The weights of a folder; None where they cannot be opened, or of a folder from the hub were not fetched."""
    if hub.origin(place) and not tensor_files(place):
        note = f"{hub.origin(place)}: its weights were not fetched, nor looked at"
        found.notes += [] if note in found.notes else [note]
        return None
    return found.attempt(FileSource, place, rules)


def _read_talk(found: _Found, folder: Path, files: tuple[str, ...] = CHATS) -> None:
    """Tokenizer and chat template, in the first of `files` that has one."""
    _read_tokenizer(found, folder)
    chat = found.attempt(own_chat_template, folder, files)
    if chat is not None:
        found.template, found.position = known_template(chat) or (OWN_JINJA, None)


def _read_tokenizer(found: _Found, folder: Path) -> None:
    file = found.attempt(tokenizer_file, folder)
    if file is not None:
        found.tokenizer_file, found.tokenizer = file, found.attempt(load_tokenizer, file)


def _adapter_facts(found: _Found, raw: dict[str, Any]) -> dict[str, Any]:
    ranks: set[int] = set()
    changes: collections.Counter[str] = collections.Counter()
    replaces = []
    for name in found.stored.names() if found.stored else ():
        canonical = names.canonical(name, found.rules) or name
        changed = adapter.split_lora(canonical)
        if changed is None:
            replaces.append(canonical)
        elif changed[1] == "A":
            assert found.stored is not None
            ranks.add(found.stored.shape(name)[0])
            changes[changed[0].split(".")[-2]] += 1
    alpha, rslora = raw.get("lora_alpha"), bool(raw.get("use_rslora"))
    one = isinstance(alpha, int | float) and len(ranks) == 1
    return {
        "rank": sorted(ranks),
        "alpha": alpha,
        "scaling": adapter.scaling(float(alpha or 0), min(ranks), rslora) if one else None,
        "base": raw.get("base_model_name_or_path"),
        "changes": dict(sorted(changes.items())),
        "replaces": replaces,
    }


# --- what is made of it -------------------------------------------------------------------------------------


def _count(found: _Found) -> tuple[dict[str, Part], set[Path]]:
    """The tensors by part, and the files and folders that they lie in."""
    parts: dict[str, list[tuple[int, int, str]]] = {name: [] for name in PARTS}
    files, unreadable = set(), []
    for name in found.stored.names() if found.stored else ():
        assert found.stored is not None
        files.add(Path(found.stored.where(name)))
        canonical = names.canonical(name, found.rules) or ""
        part = "adapter" if adapter.split_lora(canonical) else names.part_of(canonical) or "other"
        size = math.prod(found.stored.shape(name))
        try:
            dtype = found.stored.dtype(name)
            parts[part].append((size, size * dtype.itemsize, dtype.name))
        except UserError as error:
            unreadable.append(str(error))
            parts[part].append((size, 0, "unknown"))
    if unreadable:
        more = f"; so have {len(unreadable) - 1} more tensors" if len(unreadable) > 1 else ""
        found.problems.append(unreadable[0] + more)
    counted = {
        name: Part(
            len(tensors),
            sum(size for size, _, _ in tensors),
            sum(nbytes for _, nbytes, _ in tensors),
            dict(collections.Counter(dtype for _, _, dtype in tensors).most_common()),
        )
        for name, tensors in parts.items()
        if tensors
    }
    return counted, files


def _on_disk(paths: set[Path]) -> set[Path]:
    """Files, and those in folders."""
    inside = {file for path in paths if path.is_dir() for file in path.rglob("*") if file.is_file()}
    return {path for path in paths if path.is_file()} | inside


def _compare(found: _Found) -> dict[str, list[str]]:
    """Hold the weights against the config, as far as both are known."""
    if found.tokenizer is not None and found.decoder is not None:
        found.attempt(check_tokenizer, found.tokenizer, found.decoder, str(found.tokenizer_file))
    known = {"vision": found.vision, "bridge": found.bridge, "decoder": found.decoder}
    if found.source is None or not any(known.values()):
        return {}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, part in known.items():
        if part is not None and name not in found.elsewhere:
            wanted |= names.expected_part(part)
    spare = set(names.spare(found.decoder)) if found.decoder else set()
    # Of parts that the config leaves open nothing is unexpected.
    left_open = {name for name, part in known.items() if part is None} | found.elsewhere
    spare |= {name for name in found.source.names() if names.part_of(name) in left_open}
    kinds = {kind: lines for kind, lines in compare(found.source, wanted, spare).items() if lines}
    if kinds:
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in kinds.items())
        found.problems.append(f"the tensors do not fit the config: {counts}")
    return kinds


def _numbers(found: _Found, kind: str) -> dict[str, dict[str, Any]]:
    """The model's numbers, by part."""
    model = {}
    if found.vision is not None:
        vision = dataclasses.asdict(found.vision) | {"tokens_per_image": found.vision.num_tokens}
        # What is done with a tower by itself, its files do not say; mean and spread are among the image rules.
        left_out = ["image_mean", "image_std", *(["feature_layer", "keep_cls"] if kind == CLIP else [])]
        model["vision"] = {key: value for key, value in vision.items() if key not in left_out}
    for name, part in (("bridge", found.bridge), ("decoder", found.decoder)):
        if part is not None:
            model[name] = dataclasses.asdict(part)
    return model
