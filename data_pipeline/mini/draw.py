"""Drawing on a 64 x 64 canvas: colours, shapes, text.

Coordinates are floats in output pixels (0..64, y down). Everything is drawn at twice the size and averaged down,
so edges are smooth and a half-pixel shift is visible. Nothing here draws random numbers except `Canvas.tint`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = 64
_ZOOM = 2

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Rgb] = {
    "red": (222, 28, 28),
    "orange": (245, 135, 20),
    "yellow": (248, 222, 34),
    "green": (30, 158, 58),
    "cyan": (52, 208, 226),
    "blue": (32, 70, 220),
    "purple": (134, 44, 172),
    "pink": (250, 138, 194),
}
# Disjoint from COLORS, and darker than each of them: ink then always stands out in the same direction, and a tiny
# tower need not learn every form twice. No ink of a colour is lost on any of them.
BACKGROUNDS: dict[str, Rgb] = {
    "black": (10, 10, 10),
    "navy": (14, 20, 84),
    "brown": (78, 42, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "moon")


def _circle(steps: int = 30) -> list[Point]:
    return [(math.cos(2 * math.pi * i / steps), math.sin(2 * math.pi * i / steps)) for i in range(steps)]


def _star(points: int = 5, inner: float = 0.44) -> list[Point]:
    radii = [1.08 if i % 2 == 0 else inner for i in range(2 * points)]
    angles = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a) + 0.06) for r, a in zip(radii, angles, strict=True)]


def _heart(steps: int = 30) -> list[Point]:
    """The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the unit box."""
    points = []
    for i in range(steps):
        t = 2 * math.pi * i / steps
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 14.5))
    return points


def _moon(steps: int = 18) -> list[Point]:
    outer = [(math.cos(a) + 0.12, math.sin(a)) for a in _angles(0.24 * math.pi, 1.76 * math.pi, steps)]
    inner = [
        (0.72 * math.cos(a) + 0.42, 0.76 * math.sin(a))
        for a in _angles(1.68 * math.pi, 0.32 * math.pi, steps)
    ]
    return outer + inner


def _angles(start: float, end: float, steps: int) -> list[float]:
    return [start + (end - start) * i / (steps - 1) for i in range(steps)]


_ARM = 0.36
OUTLINES: dict[str, list[Point]] = {
    "circle": _circle(),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "diamond": [(0.0, -1.08), (0.72, 0.0), (0.0, 1.08), (-0.72, 0.0)],
    "moon": _moon(),
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class Canvas:
    """A 64 x 64 picture being drawn, with the random source that shifts its colours a little."""

    def __init__(self, background: Rgb, rng: random.Random) -> None:
        self._rng = rng
        self.background = self.tint(background)
        self.image = Image.new("RGB", (SIZE * _ZOOM, SIZE * _ZOOM), self.background)
        self._draw = ImageDraw.Draw(self.image)

    def tint(self, color: Rgb, amount: int = 8) -> Rgb:
        """The colour, each channel moved by at most `amount`, so that no colour is one exact number."""
        red, green, blue = (min(255, max(0, c + self._rng.randint(-amount, amount))) for c in color)
        return red, green, blue

    def polygon(self, points: Sequence[Point], color: Rgb) -> None:
        self._draw.polygon([(x * _ZOOM, y * _ZOOM) for x, y in points], fill=color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Rgb) -> None:
        self._draw.rectangle((x0 * _ZOOM, y0 * _ZOOM, x1 * _ZOOM - 1, y1 * _ZOOM - 1), fill=color)

    def shape(self, name: str, x: float, y: float, size: float, color: Rgb) -> None:
        """A shape of about `size` pixels across around (x, y)."""
        self.polygon([(x + px * size / 2, y + py * size / 2) for px, py in OUTLINES[name]], color)

    def text(self, text: str, x: float, y: float, width: float, height: float, color: Rgb) -> None:
        """Text as large as fits into `width` x `height` pixels, its ink centred on (x, y)."""
        size = 64
        left, top, right, bottom = _font(size).getbbox(text, stroke_width=1)
        size = int(size * _ZOOM * min(width / (right - left), height / (bottom - top)))
        left, top, right, bottom = _font(size).getbbox(text, stroke_width=1)
        corner = (x * _ZOOM - (left + right) / 2, y * _ZOOM - (top + bottom) / 2)
        self._draw.text(corner, text, font=_font(size), fill=color, stroke_width=1, stroke_fill=color)

    def stencil(self, mask: Image.Image, x: float, y: float, width: float, height: float, color: Rgb) -> None:
        """Lets `color` through a grey mask, resized to `width` x `height` pixels around (x, y)."""
        resized = mask.resize((round(width * _ZOOM), round(height * _ZOOM)), Image.Resampling.BICUBIC)
        corner = (round((x - width / 2) * _ZOOM), round((y - height / 2) * _ZOOM))
        self.image.paste(color, (*corner, corner[0] + resized.width, corner[1] + resized.height), resized)

    def finish(self) -> Image.Image:
        """The picture, uint8 RGB [64, 64, 3]."""
        return self.image.reduce(_ZOOM)
