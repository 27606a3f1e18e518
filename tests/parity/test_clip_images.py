"""Pixels after float32 normalisation, bit for bit those of the Hugging Face processors that use Pillow."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vflax.images import ImageError, ImageRules, decode, preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def processor(mode: str, size: int):
    kind, extra = (LlavaImageProcessorPil, {"do_pad": True}) if mode == "pad" else (CLIPImageProcessorPil, {})
    return kind(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(MEAN),
        image_std=list(STD),
        **extra,
    )


def assert_equal_pixels(data: bytes, mode: str, size: int, reference) -> None:
    pixels = preprocess(decode(data), ImageRules(mode, size, MEAN, STD))
    # As the model does on the device, in float32.
    ours = (pixels.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    # RGB first, as LLaVA hands its processor a picture; transformers >= 5 by itself lays transparency on white.
    image = Image.open(BytesIO(data)).convert("RGB")
    theirs = reference(image, return_tensors="np")["pixel_values"][0]
    assert theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.transpose(2, 0, 1), theirs)


def noise(width: int, height: int, mode: str) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
    if mode == "P":
        image = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8), "P")
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return image
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode if mode == "CMYK" else None)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [336, 224, 35])
def test_odd_sizes_equal_hugging_face(mode, size):
    reference = processor(mode, size)
    sides = [(1, 1), (1, 2), (3, 3), (1, 90), (90, 1), (337, 336), (335, 1001), (640, 481), (5, 99), (36, 35)]
    for width, height in sides:
        buffer = BytesIO()
        noise(width, height, "RGB").save(buffer, "PNG")
        assert_equal_pixels(buffer.getvalue(), mode, size, reference)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("colours", ["P", "RGBA", "L", "LA", "CMYK", "1"])
def test_other_colour_modes_equal_hugging_face(mode, colours):
    """Not 16 bits: vflax scales them where Pillow's `.convert("RGB")` clips (tests/test_images.py)."""
    buffer = BytesIO()
    noise(101, 64, colours).save(buffer, "TIFF" if colours == "CMYK" else "PNG")
    assert_equal_pixels(buffer.getvalue(), mode, 336, processor(mode, 336))


def test_every_byte_normalises_to_the_same_float():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    assert_equal_pixels(buffer.getvalue(), "crop", 16, processor("crop", 16))


@pytest.mark.real_data
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_real_photographs_equal_hugging_face(mode, shared_data: Path):
    folder = shared_data / "vision-flan-samples"
    names = sorted({sample["image"] for sample in json.loads((folder / "annotation.json").read_text())})
    reference = processor(mode, 336)
    compared, refused = 0, []
    for name in names[::5]:
        data = (folder / "images" / name).read_bytes()
        try:
            decode(data)
        except ImageError:
            refused.append(name)
            continue
        assert_equal_pixels(data, mode, 336, reference)
        compared += 1
    assert compared + len(refused) == len(names[::5])
    assert compared >= 40


@pytest.mark.real_data
def test_real_photographs_decode_whole_and_never_when_cut(shared_data: Path):
    whole, damaged = 0, {}
    for file in sorted((shared_data / "vision-flan-samples/images").iterdir()):
        data = file.read_bytes()
        try:
            decode(data)
        except ImageError as error:
            damaged[file.name] = error.reason
            continue
        whole += 1
        with pytest.raises(ImageError):
            decode(data[: len(data) * 9 // 10])
    # At most the one that is known to be truncated.
    assert whole >= 203 and all("truncated" in reason for reason in damaged.values())
