"""Image decoding and preprocessing: the only one in the project.

Equal, value for value, to what LLaVA and Hugging Face do with Pillow (CLIPImageProcessor,
LlavaImageProcessor), but for pictures of 16 bits (`to_rgb`): an image becomes RGB, is padded to a square or
centre-cropped, and is resized with
Pillow's antialiased bicubic filter. The result stays uint8; the model normalises it on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageFile

from vflax.errors import UserError
from vflax.values import COUNT, NUMBER, Kind, wrong

Mode = Literal["pad", "crop"]

# What the fields of ImageRules that come from a file must be, before what they say is looked at.
_KINDS: dict[str, Kind] = {"size": COUNT, "mean": NUMBER.listed(3), "std": NUMBER.listed(3)}

# Pillow refuses pictures over this size as decompression bombs (twice its MAX_IMAGE_PIXELS). No larger one is
# ever held here either: a picture of 1 x 60000 padded to a square would take 10 GB, its resized strip 20 GB.
MAX_PIXELS = 178_956_970

# How JPEG, PNG, GIF, WebP and TIFF files begin: one that Pillow does not know all the same is damaged.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")


class ImageError(UserError):
    """An image that cannot be used.

    reason: one line for a report.
    kind: for counting: "empty" (no bytes), "unknown" (no format that Pillow reads), "bomb" (over MAX_PIXELS) or
        "damaged" (all else: truncated, a checksum that does not fit, ...).
    """

    def __init__(self, reason: str, kind: str = "damaged"):
        super().__init__(reason)
        self.reason = reason
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.kind)


@dataclass(frozen=True)
class ImageRules:
    """How a picture becomes the model's input.

    mode: "pad" (to a square in the mean colour: LLaVA's image_aspect_ratio=pad) or "crop" (resize the
        shortest side, cut out the centre: CLIP's own way).
    size: side of the result in pixels.
    mean, std: per channel, of values in [0, 1]; they come with the vision tower's weights.
    """

    mode: Mode
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in get_args(Mode):
            problems.append(f'mode is {self.mode!r}, expected "pad" or "crop"')
        if not isinstance(self.size, int) or self.size < 1:
            problems.append(f"size is {self.size!r}, expected the tower's image size in pixels, such as 336")
        if len(self.mean) != 3 or not all(0 <= m <= 1 for m in self.mean):
            problems.append(f"mean is {self.mean!r}, expected three numbers from 0 to 1")
        if len(self.std) != 3 or not all(s > 0 for s in self.std):
            problems.append(f"std is {self.std!r}, expected three numbers above 0")
        if problems:
            raise UserError("image rules: " + "; ".join(problems))

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour of the padding: the mean in 0..255, rounded down as LLaVA does."""
        red, green, blue = (int(255 * m) for m in self.mean)
        return red, green, blue

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageRules:
        """Raises UserError on a missing, unknown or wrong key."""
        names = set(cls.__dataclass_fields__)
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
            raise UserError(f"image rules: missing keys {missing}, unknown keys {unknown}")
        if problems := wrong(values, _KINDS):
            raise UserError(f"image rules: {'; '.join(problems.values())}")
        return cls(values["mode"], values["size"], tuple(values["mean"]), tuple(values["std"]))


def decode(data: bytes) -> Image.Image:
    """Decodes an encoded picture (JPEG, PNG, ... whatever Pillow reads) to the last byte, as RGB.

    `load`, then `to_rgb`: see there for what becomes of animations, transparency and 16 bits.

    Raises:
        ImageError: empty, not a picture, truncated or damaged, or over MAX_PIXELS.
    """
    return to_rgb(load(data))


def load(data: bytes) -> Image.Image:
    """Decodes an encoded picture to the last byte, in the colours that it is stored in.

    The EXIF orientation is not applied, as in LLaVA and Hugging Face. Of an animation the first frame is taken.

    Raises:
        ImageError: empty, not a picture, truncated or damaged, or over MAX_PIXELS.
    """
    if not data:
        raise ImageError("empty file (0 bytes)", "empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated pictures would pass as whole"
        )
    with _as_image_error(data):
        image = Image.open(BytesIO(data))
        _refuse_bomb(*image.size)
        image.load()
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: Pillow's plain `.convert("RGB")`, as in LLaVA and Hugging Face, with one exception.

    Transparency is dropped (what lies under it shows), CMYK and palettes become RGB by Pillow's rules. The exception
    are whole numbers of more than 8 bits (modes I;16, I;16B and I: PNG, TIFF and PGM of 16 bits): they are divided by
    256, rounded down, and what is over 255 then is 255. Pillow would clip them instead, so that all but the darkest
    256th of a picture were white. Mode F has no agreed range and is clipped to 0..255 as Pillow does.

    Raises:
        ImageError: the pixels cannot be converted.
    """
    with _as_image_error():
        if image.mode == "I" or image.mode.startswith("I;16"):
            values = np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255)
            image = Image.fromarray(values.astype(np.uint8))
        return image.convert("RGB")


@contextlib.contextmanager
def _as_image_error(data: bytes = b"") -> Iterator[None]:
    """What Pillow raises on a bad picture, as an ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        what = f"({len(data)} bytes beginning with {data[:8]!r})"
        if data.startswith(_MAGIC):
            raise ImageError(f"damaged image: truncated or broken in its header {what}") from None
        raise ImageError(f"not an image {what}", "unknown") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"decompression bomb: {error}", "bomb") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error ...
        raise ImageError(f"damaged image: {error or type(error).__name__}") from error


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that differ in few places between copies of a picture in other sizes or qualities.

    ImageHash's phash: signs of the lowest 8 x 8 DCT coefficients of a 32 x 32 grey copy. The picture is first averaged
    down to about 128 pixels, which makes it five times as fast and changes hardly a bit.
    """
    import imagehash  # only here: it brings SciPy, and who only trains does not need it

    grey = image.convert("L")
    found = imagehash.phash(grey.reduce(max(1, min(grey.size) // 128)))
    return int(str(found), 16)


def preprocess(image: Image.Image, rules: ImageRules) -> np.ndarray:
    """The model's input for one picture: uint8 [size, size, 3]."""
    if image.mode != "RGB":
        image = to_rgb(image)
    resized = _pad(image, rules) if rules.mode == "pad" else _crop(image, rules.size)
    return np.asarray(resized)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"decompression bomb: {width} x {height} is over {MAX_PIXELS:,} pixels", "bomb")


def _pad(image: Image.Image, rules: ImageRules) -> Image.Image:
    """Padding to a square in the middle, an odd pixel right or below (LLaVA's expand2square), then resize."""
    (width, height), size = image.size, rules.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    if side * side <= MAX_PIXELS:
        square = Image.new("RGB", (side, side), rules.background)
        square.paste(image, (left, top))
        return _resize(square, size, size)
    # Only the long side is resized before padding. Equal but for the rounding between the two passes.
    if width > height:
        narrow = Image.new("RGB", (size, side), rules.background)
        narrow.paste(_resize(image, size, height), (0, top))
    else:
        narrow = Image.new("RGB", (side, size), rules.background)
        narrow.paste(_resize(image, width, size), (left, 0))
    return _resize(narrow, size, size)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """The shortest side resized to `size`, then the centre cut out (CLIPImageProcessor)."""
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    new_width, new_height = (size, long) if width <= height else (long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if new_width * new_height <= MAX_PIXELS:
        return _resize(image, new_width, new_height).crop((left, top, left + size, top + size))
    # Only the centre is computed. Equal but for the rounding between the two passes.
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)
