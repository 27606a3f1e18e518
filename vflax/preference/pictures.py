"""The pictures of questions, for a judge and for a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from vflax.errors import UserError
from vflax.preference.questions import ChatQuestion

# What judges and browsers show as it is.
_SHOWN = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


def picture_path(question: ChatQuestion, images: Path) -> Path:
    """Where the picture of a question lies.

    Raises:
        UserError: naming it, where it is not there.
    """
    path = images / question.image
    if not path.is_file():
        raise UserError(f"{path}: not there; question {question.key} is about it. Is --images its folder?")
    return path


def data_url(path: Path, longest: int | None = None) -> str:
    """A picture as a data: URL: its own bytes where these can be shown and no side is longer than `longest` pixels,
    else WebP that is no larger.

    Raises:
        UserError: naming the file, where it cannot be decoded.
    """
    try:
        data = path.read_bytes()
        with PIL.Image.open(io.BytesIO(data)) as opened:
            opened.load()
            kind = _SHOWN.get(opened.format or "")
            if kind is None or (longest is not None and max(opened.size) > longest):
                image = PIL.ImageOps.exif_transpose(opened).convert("RGB")
                if longest is not None:
                    image.thumbnail((longest, longest))
                file = io.BytesIO()
                image.save(file, "WEBP", quality=85)
                kind, data = "image/webp", file.getvalue()
    except Exception as error:  # decoders raise whatever they meet
        raise UserError(f"{path}: cannot be read as a picture ({error}); fetch it again") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
