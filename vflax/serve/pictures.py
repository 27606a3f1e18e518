"""Pictures that strangers send: looked at before they are decoded, and decoded one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import overload

from PIL import Image

from vflax import images
from vflax.serve.errors import ApiError, bad

# Pillow reads many more; some run other programs (EPS), and none of them comes from a browser.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class Pictures(Sequence[Image.Image]):
    """Pictures that are decoded when they are asked for: of a request's pictures only one is held in pixels.

    encoded: (the field that names it, its bytes) of each.

    Raises:
        ApiError: 400, naming a picture that is of another format, or over `max_pixels` by its header; and, when it is
            asked for, one that is damaged.
    """

    def __init__(self, encoded: Sequence[tuple[str, bytes]], max_pixels: int) -> None:
        for where, data in encoded:
            _look(where, data, max_pixels)
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        where, data = self._encoded[index]
        try:
            return images.decode(data)
        except images.ImageError as error:
            raise _refused(where, str(error)) from None


def _look(where: str, data: bytes, max_pixels: int) -> None:
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise bad(f"{where}: decompression bomb: {error}", where, "image_too_large") from None
    except Exception:  # as with `images.load`, plugins raise what they like
        raise _refused(
            where, f"not a picture that can be read ({len(data)} bytes); send {', '.join(FORMATS)}"
        ) from None
    if width * height > max_pixels:
        raise bad(
            f"{where}: {width} x {height} is more than {max_pixels} pixels; send a smaller picture",
            where,
            "image_too_large",
        )


def _refused(where: str, reason: str) -> ApiError:
    return bad(f"{where}: {reason}", where, "invalid_image")
