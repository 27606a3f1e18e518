"""What a directory of weights is: its files say it, never its name."""

from __future__ import annotations

from pathlib import Path

from vflax.errors import UserError
from vflax.small_files import read_json
from vflax.weights import adapter, hf_config, hub, llava_config, names
from vflax.weights.file_source import FileSource

# The words are those that messages use.
WORKDIR, HF, ORIGINAL, ADAPTER = "a vflax WORKDIR", "Hugging Face LLaVA", "original LLaVA", "a LoRA adapter"
CLIP, DECODER, PROJECTOR = "a CLIP vision tower", "a LLaMA-shaped decoder", "a projector"
WHOLE = (WORKDIR, HF, ORIGINAL, ADAPTER)
# What else a model can be made of.
PARTS, RANDOM = "a tower, a decoder and a projector", "random weights"


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
