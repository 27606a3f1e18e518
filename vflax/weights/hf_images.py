"""Hugging Face's preprocessor files to image rules, and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vflax.images import ImageRules
from vflax.small_files import Problems, read_json
from vflax.values import COUNT, FLAG, OBJECT, POSITIVE, SHARE, Kind

# Pillow's number of the bicubic filter, as the preprocessor files write it.
_BICUBIC = 3
_LLAVA_PROCESSORS = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")
_CLIP_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)
_KINDS: dict[str, Kind] = {
    "image_mean": SHARE.listed(3),
    "image_std": POSITIVE.listed(3),
    "rescale_factor": POSITIVE,
    "do_pad": FLAG.or_null(),
}


def read_image_rules(folder: Path) -> ImageRules:
    """Read preprocessor_config.json, or the image_processor of a processor_config.json (transformers 5.x).

    Raises:
        UserError: when there is neither, or for every key that is not supported.
    """
    problems = Problems(folder / "preprocessor_config.json")
    rules = read_or_note(folder, problems, None)
    problems.stop()
    assert rules is not None  # a missing one is a problem, and problems have stopped
    return rules


def read_or_note(folder: Path, problems: Problems, size: Any) -> ImageRules | None:
    """As read_image_rules, but what is wrong goes to `problems`.

    size: the tower's image size to hold them against, if it is one: what is none is told by whoever read it.
    """
    path, raw = folder / "preprocessor_config.json", None
    own = Problems(path)
    if path.is_file():
        raw = read_json(path)
    elif (folder / "processor_config.json").is_file():
        own = Problems(folder / "processor_config.json")
        whole = read_json(own.file)
        raw = whole.get("image_processor")
        if own.check(whole, {"image_processor": OBJECT.or_null()}):
            problems.add(own)
            return None
    if raw is None:
        problems.lines.append(
            f"{folder / 'preprocessor_config.json'}: not there. It says how images are normalised for these weights; "
            "it comes with them (for CLIP ViT-L/14-336: openai/clip-vit-large-patch14-336 on the hub): put it there"
        )
        return None
    rules = _image_rules(raw, own, size)
    problems.add(own)
    return rules


def _image_rules(raw: dict[str, Any], problems: Problems, size: Any) -> ImageRules | None:
    """The rules of a preprocessor file; what it leaves out are CLIPImageProcessor's defaults."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    wrong = problems.check(raw, _KINDS)
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type", "CLIPImageProcessor"))
    problems.expect("image_processor_type", kind, (*_CLIP_PROCESSORS, *_LLAVA_PROCESSORS))
    crop = _side(raw.get("crop_size", 224), ("height", "width"))
    short = _side(raw.get("size", 224), ("shortest_edge",), ("height", "width"))
    if crop is None or crop != short:
        problems.lines.append(
            f"size={raw.get('size')!r} and crop_size={raw.get('crop_size')!r}: vflax supports one square size for both"
        )
    if COUNT.holds(size) and crop is not None and crop != size:
        problems.lines.append(f"crop_size={crop}, but the tower's image_size is {size}")
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        problems.expect(key, raw.get(key, True), (True,))
    problems.expect("resample", raw.get("resample", _BICUBIC), (_BICUBIC,))
    factor = raw.get("rescale_factor", 1 / 255)
    if "rescale_factor" not in wrong and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        problems.lines.append(f"rescale_factor={factor!r}: vflax supports 1/255")
    pad = bool(raw.get("do_pad", False))
    if pad and kind in _CLIP_PROCESSORS:
        problems.lines.append(
            f"do_pad=true with {kind}: vflax pads as LlavaImageProcessor does; name that type"
        )
    mean, std = raw.get("image_mean", OPENAI_CLIP_MEAN), raw.get("image_std", OPENAI_CLIP_STD)
    if problems.lines or crop is None:
        return None
    return ImageRules("pad" if pad else "crop", crop, _three(mean), _three(std))


def _side(value: Any, *keys: tuple[str, ...]) -> int | None:
    """Side of a square given as a number or as an object with one of the key sets; None when it is no square."""
    if COUNT.holds(value):
        return int(value)
    if isinstance(value, dict):
        # transformers 5.x writes every key and null for those that do not apply.
        given = {key: side for key, side in value.items() if side is not None}
        for names in keys:
            if set(given) == set(names) and all(map(COUNT.holds, given.values())):
                first, *rest = given.values()
                return int(first) if set(rest) <= {first} else None
    return None


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def to_preprocessor(rules: ImageRules) -> dict[str, Any]:
    """Write preprocessor_config.json: LlavaImageProcessor for padding, CLIPImageProcessor for the centre crop."""
    kind = "LlavaImageProcessor" if rules.mode == "pad" else "CLIPImageProcessor"
    result: dict[str, Any] = {
        "image_processor_type": kind,
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": rules.size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": rules.size, "width": rules.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(rules.mean),
        "image_std": list(rules.std),
    }
    return result | ({"do_pad": True} if rules.mode == "pad" else {})
