"""What a directory of weights is, from headers and small files alone: no tensor is read.

The reading (reading.py) is that of an import; but where this ends at the first thing that is wrong, it is noted here.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.small_files import read_json
from vflax.tokenizer import tokenizer_file
from vflax.values import POSITIVE
from vflax.weights import adapter, hf_chat, hf_config, hf_images, hub, names
from vflax.weights.kinds import (
    ADAPTER,
    CLIP,
    DECODER,
    HF,
    ORIGINAL,
    PROJECTOR,
    WHOLE,
    WORKDIR,
    detect,
    tensor_files,
)
from vflax.weights.load import compare
from vflax.weights.open import bridge_of
from vflax.weights.reading import Found, Reading, read_model
from vflax.weights.source import FileSource, JoinedSource, TensorSource

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
    kind: one of the words that `kinds.detect` gives.
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
    adapter: {rank, alpha, scaling, base, base_kind, changes, replaces}; see reading.Lora.
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
    reading = Reading(collect=True, fetch=False)
    if kind in WHOLE:
        found = read_model(reading, kind, place, step, vision, base)
    else:
        found = _read_part(reading, kind, place)
    template, position = _template(found)
    if kind in (HF, ORIGINAL) and template is None:
        reading.note("no chat template: an export with --format=hf needs --template")
    stored = _stored(reading, found)
    parts, files = _count(reading, stored, adapter.RULES if kind == ADAPTER else names.RULES)
    misfit = _compare(reading, found)
    sizes = [file.stat().st_size for file in _on_disk(files)]
    return Facts(
        place=str(place),
        kind=kind,
        naming=names.hf_naming(stored.names()) if kind == HF and stored else None,
        origin=hub.origin(place),
        step=found.step,
        files=len(sizes),
        bytes=sum(sizes),
        parts=parts,
        model=_numbers(found),
        tokenizer=_tokenizer(reading, found),
        template=template,
        position=position,
        images=None if found.rules is None else found.rules.to_dict(),
        tower=found.tower,
        adapter=_adapter(reading, found, stored),
        misfit=misfit,
        problems=reading.problems,
        notes=reading.notes,
    )


def _read_part(reading: Reading, kind: str, place: Path) -> Found:
    """What open_checkpoint does not open by itself."""
    if kind == PROJECTOR:
        # A folder may hold it twice, which an import refuses; the facts are those of the first.
        file = reading.attempt(hub.projector_file, place) or tensor_files(place)[0]
        found = Found(kind, place, reading.attempt(FileSource.file, file))
        if found.source is not None:
            found.bridge = reading.attempt(bridge_of, found.source, file)
        return found
    found = Found(kind, place, reading.weights(place))
    if kind == CLIP:
        found.vision = reading.attempt(hf_config.read_vision, place, feature_layer=-1, keep_cls=False)
        found.rules = reading.attempt(hf_images.read_image_rules, place)
    else:
        assert kind == DECODER
        found.talk(reading, place, place, hf_chat.CHATS, place)
        found.decoder = reading.attempt(hf_config.read_decoder, place)
    return found


# --- what is made of it -------------------------------------------------------------------------------------


def _stored(reading: Reading, found: Found) -> TensorSource | None:
    """The tensors of a path under the names that its files have; an adapter's alone, of what it changes."""
    place = found.place
    if found.kind == WORKDIR:
        return found.lora.base if found.lora else found.source
    if found.kind == PROJECTOR:
        file = found.source.place if isinstance(found.source, FileSource) else place
        return reading.attempt(FileSource.file, file, ())
    if found.kind != ADAPTER:
        return reading.attempt(FileSource, place, ())
    parts = [reading.attempt(FileSource, place, (), adapter.STEM)]
    if (place / adapter.NON_LORA).is_file():
        parts.append(reading.attempt(FileSource.file, place / adapter.NON_LORA, ()))
    return reading.attempt(JoinedSource, [part for part in parts if part is not None])


def _template(found: Found) -> tuple[str | None, str | None]:
    """What stands in Facts.template and Facts.position."""
    if found.template is not None:
        return found.template
    if found.chat is None:
        return None, None
    return hf_chat.known_template(found.chat) or (OWN_JINJA, None)


def _tokenizer(reading: Reading, found: Found) -> dict[str, Any] | None:
    """What stands in Facts.tokenizer."""
    if found.tokenizer is None or found.tokens is None:
        return None
    file = tokenizer_file(found.tokens)
    if found.decoder is not None:
        reading.attempt(hf_chat.check_tokenizer, found.tokenizer, found.decoder, str(file), hf_chat.BESIDE)
    return {
        "file": str(file),
        "vocabulary": found.tokenizer.vocab_size,
        "adds_bos": found.tokenizer.adds_bos,
    }


def _adapter(reading: Reading, found: Found, stored: TensorSource | None) -> dict[str, Any] | None:
    """What stands in Facts.adapter."""
    if found.kind == ADAPTER:
        raw = reading.attempt(read_json, found.place / adapter.CONFIG) or {}
        return _adapter_facts(found, stored, adapter.RULES, raw)
    if found.kind != WORKDIR or found.lora is None:
        return None
    said = {"lora_alpha": found.lora.alpha, "base_model_name_or_path": found.lora.base_name}
    replaced = sorted(name for name in found.lora.tensors.names() if not adapter.split_lora(name))
    return _adapter_facts(found, stored, names.RULES, said) | {"replaces": replaced}


def _adapter_facts(
    found: Found, stored: TensorSource | None, rules: names.Rules, raw: dict[str, Any]
) -> dict[str, Any]:
    ranks: set[int] = set()
    changes: collections.Counter[str] = collections.Counter()
    replaces = []
    for name in stored.names() if stored else ():
        canonical = names.canonical(name, rules) or name
        changed = adapter.split_lora(canonical)
        if changed is None:
            replaces.append(canonical)
        elif changed[1] == "A":
            assert stored is not None
            ranks.update(stored.shape(name)[:1])
            changes[changed[0].split(".")[-2]] += 1
    alpha, rslora = raw.get("lora_alpha"), bool(raw.get("use_rslora"))
    one = POSITIVE.holds(alpha) and len(ranks) == 1 and min(ranks) > 0
    return {
        "rank": sorted(ranks),
        "alpha": alpha,
        "scaling": adapter.scaling(float(alpha or 0), min(ranks), rslora) if one else None,
        "base": raw.get("base_model_name_or_path"),
        "base_kind": "" if found.lora is None else found.lora.base_kind,
        "changes": dict(sorted(changes.items())),
        "replaces": replaces,
    }


def _count(
    reading: Reading, stored: TensorSource | None, rules: names.Rules
) -> tuple[dict[str, Part], set[Path]]:
    """The tensors by part, and the files and folders that they lie in."""
    parts: dict[str, list[tuple[int, int, str]]] = {name: [] for name in PARTS}
    files, unreadable = set(), []
    for name in stored.names() if stored else ():
        assert stored is not None
        files.add(Path(stored.where(name)))
        canonical = names.canonical(name, rules) or ""
        part = "adapter" if adapter.split_lora(canonical) else names.part_of(canonical) or "other"
        size = math.prod(stored.shape(name))
        try:
            dtype = stored.dtype(name)
            parts[part].append((size, size * dtype.itemsize, dtype.name))
        except UserError as error:
            unreadable.append(str(error))
            parts[part].append((size, 0, "unknown"))
    if unreadable:
        more = f"; so have {len(unreadable) - 1} more tensors" if len(unreadable) > 1 else ""
        reading.problems.append(unreadable[0] + more)
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


def _compare(reading: Reading, found: Found) -> dict[str, list[str]]:
    """Hold the weights against the config, as far as both are known."""
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
        reading.problems.append(f"the tensors do not fit the config: {counts}")
    return kinds


def _numbers(found: Found) -> dict[str, dict[str, Any]]:
    """The model's numbers, by part."""
    model = {}
    if found.vision is not None:
        vision = dataclasses.asdict(found.vision) | {"tokens_per_image": found.vision.num_tokens}
        # What is done with a tower by itself, its files do not say; mean and spread are among the image rules.
        left_out = ["image_mean", "image_std", *(["feature_layer", "keep_cls"] if found.kind == CLIP else [])]
        model["vision"] = {key: value for key, value in vision.items() if key not in left_out}
    for name, part in (("bridge", found.bridge), ("decoder", found.decoder)):
        if part is not None:
            model[name] = dataclasses.asdict(part)
    return model
