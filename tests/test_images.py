"""Decoding refuses damage with a reason; padding and cropping keep the promised geometry."""

from __future__ import annotations

import pickle
from io import BytesIO

import numpy as np
import PIL
import pytest
from PIL import Image

from vflax import images
from vflax.errors import UserError
from vflax.images import ImageError, ImageRules, decode, preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RULES = ImageRules("pad", 32, MEAN, STD)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_a_whole_picture_decodes_to_rgb_of_its_size(kind):
    data = encoded(noise(40, 30), kind)
    assert (decode(data).mode, decode(data).size) == ("RGB", (40, 30))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_refused(kind, share):
    data = encoded(noise(64, 64), kind)
    with pytest.raises(ImageError, match=r"damaged image|not an image"):
        decode(data[: int(len(data) * share)])


def test_a_flipped_bit_in_compressed_data_is_refused():
    data = bytearray(encoded(noise(64, 64), "PNG"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(ImageError, match="damaged image"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "0 bytes"), (b"<html>404 not found</html>", "not an image.*html"), (b"\xff\xd8\xff", "image")],
)
def test_what_is_no_picture_is_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason) as error:
        decode(data)
    assert "\n" not in error.value.reason


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    # A PNG header that claims 30000 x 30000; there is no pixel data behind it at all.
    data = encoded(noise(8, 8), "PNG")
    header = b"IHDR" + (30000).to_bytes(4, "big") * 2 + data[24:29]
    data = data[:12] + header + PIL.PngImagePlugin.o32(PIL.PngImagePlugin._crc32(header)) + data[33:]
    with pytest.raises(ImageError, match="decompression bomb") as error:
        decode(data)
    assert error.value.kind == "bomb"


def test_a_picture_over_the_limit_is_refused_where_pillow_only_warns(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="decompression bomb: 10 x 10"):
        decode(encoded(noise(10, 10), "PNG"))


def test_truncated_pictures_cannot_be_let_through_by_a_global_switch(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded(noise(8, 8), "PNG"))


SIXTEEN = np.array([[0, 255, 256, 511, 512, 32768, 65535]], np.uint16)


def _sixteen_bit(kind: str) -> bytes:
    if kind == "PGM":
        return b"P5 7 1 65535\n" + SIXTEEN.astype(">u2").tobytes()
    if kind == "TIFF, other byte order":
        return encoded(Image.frombytes("I;16B", (7, 1), SIXTEEN.astype(">u2").tobytes()), "TIFF")
    if kind == "TIFF of 32 bits":
        return encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF")
    return encoded(Image.fromarray(SIXTEEN), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, other byte order", "TIFF of 32 bits", "PGM"])
def test_sixteen_bits_are_scaled_to_eight_not_clipped(kind):
    pixels = np.asarray(decode(_sixteen_bit(kind)))
    np.testing.assert_array_equal(pixels[0, :, 0], SIXTEEN[0] // 256)
    np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=2))


def test_whole_numbers_outside_of_sixteen_bits_are_clipped():
    data = encoded(Image.fromarray(np.array([[-7, 1 << 20]], np.int32)), "TIFF")
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 255]


def test_floats_are_clipped_as_pillow_does():
    data = encoded(Image.fromarray(np.array([[-1, 7.9, 200, 999]], np.float32)), "TIFF")
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 7, 200, 255]


def test_an_error_keeps_its_kind_on_the_way_between_processes():
    for data, kind in [(b"", "empty"), (b"<html>", "unknown")]:
        with pytest.raises(ImageError) as error:
            decode(data)
        copy = pickle.loads(pickle.dumps(error.value))
        assert (copy.kind, copy.reason) == (kind, error.value.reason)


def test_the_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    assert decode(encoded(noise(40, 30), "JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize(
    ("size", "kept"),
    # An odd row or column of padding goes below or to the right.
    [((4, 1), np.s_[1:2, :]), ((1, 4), np.s_[:, 1:2]), ((5, 2), np.s_[1:3, :]), ((4, 4), np.s_[:, :])],
)
def test_pad_puts_the_picture_in_the_middle_of_the_mean_colour(size, kept):
    image, side = noise(*size), max(size)
    expected = np.full((side, side, 3), (122, 116, 104), np.uint8)
    expected[kept] = np.asarray(image)
    result = preprocess(image, ImageRules("pad", side, MEAN, STD))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (1, 1)])
def test_any_aspect_fits_in_memory(mode, size):
    result = preprocess(noise(*size), ImageRules(mode, 336, MEAN, STD))
    assert (result.shape, result.dtype) == ((336, 336, 3), np.uint8)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(20, 900), (900, 20), (21, 905), (905, 21)])
def test_the_way_of_pictures_too_narrow_for_memory_agrees_with_the_plain_one(mode, size, monkeypatch):
    x, y = np.meshgrid(np.arange(size[0]) / size[0], np.arange(size[1]) / size[1])
    image = Image.fromarray((255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8))
    rules = ImageRules(mode, 32, MEAN, STD)
    plain = preprocess(image, rules).astype(int)
    monkeypatch.setattr(images, "MAX_PIXELS", 33 * 33)
    assert np.abs(preprocess(image, rules) - plain).max() <= 1


def test_rules_go_through_json_types_and_back():
    assert ImageRules.from_dict(RULES.to_dict()) == RULES
    assert RULES.to_dict() == {"mode": "pad", "size": 32, "mean": list(MEAN), "std": list(STD)}


def test_wrong_rules_are_refused_all_at_once():
    with pytest.raises(UserError, match=r"mode is 'stretch'.*size is 0.*mean.*std"):
        ImageRules("stretch", 0, (0.5, 0.5, 128.0), (1.0, 0.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"missing keys \['std'\], unknown keys \['sdt'\]"):
        ImageRules.from_dict({"mode": "pad", "size": 32, "mean": MEAN, "sdt": STD})


def _scene(seed: int) -> Image.Image:
    """Smooth shapes: a hash is of what is seen, and noise has nothing to be seen."""
    return noise(6, 5, seed).resize((600, 400), Image.Resampling.BICUBIC)


def test_the_hash_of_a_smaller_or_recompressed_copy_is_near_and_that_of_another_picture_is_far():
    hashes = [images.perceptual_hash(_scene(seed)) for seed in range(20)]
    for seed in range(20):
        copy = decode(encoded(_scene(seed).resize((300, 210)), "JPEG", quality=40))
        distances = [(images.perceptual_hash(copy) ^ other).bit_count() for other in hashes]
        assert distances[seed] <= 6
        assert all(d > 10 for i, d in enumerate(distances) if i != seed)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 2)])
def test_pictures_of_any_shape_have_a_hash_of_64_bits(size):
    assert 0 <= images.perceptual_hash(noise(*size)) < 2**64
