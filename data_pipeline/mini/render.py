"""Scene -> picture: one function per kind of scene.

The random source moves things by a few pixels and shades their colours a little: two pictures of one scene differ,
and nothing that a question asks about depends on it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_pipeline.mini.draw import BACKGROUNDS, COLORS, Canvas, Point, Rgb
from data_pipeline.mini.scenes import DIRECTIONS, PLACES, Scene

_PLACES: dict[str, Point] = {
    "top left": (19, 19),
    "top right": (45, 19),
    "bottom left": (19, 45),
    "bottom right": (45, 45),
    "center": (32, 32),
}
# In the order of scenes.PLACES.
_CORNERS: list[Point] = [(17, 17), (47, 17), (17, 47), (47, 47)]
_INK = (40, 40, 40)
_PAPER = (236, 236, 236)


def render(scene: Scene, rng: random.Random, digits: np.ndarray) -> Image.Image:
    """The picture of a scene, RGB 64 x 64.

    Args:
        scene: what is in it.
        rng: the jitter; the same state gives the same bytes.
        digits: scikit-learn's handwritten digits as ink, uint8 [1797, 8, 8], 255 full ink.
    """
    background = scene.values.get("background", "white")
    canvas = Canvas(BACKGROUNDS[background], rng)
    if "originals" in scene.values:
        _handwritten(scene, rng, canvas, digits)
    else:
        _PAINTERS[scene.kind](scene, rng, canvas)
    return canvas.finish()


def _shift(rng: random.Random, point: Point, reach: float) -> Point:
    return point[0] + rng.uniform(-reach, reach), point[1] + rng.uniform(-reach, reach)


def _color(scene: Scene, canvas: Canvas) -> Rgb:
    return canvas.tint(COLORS[scene.values["color"]])


def _single(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    size = (35 if v["size"] == "large" else 23) + rng.uniform(-1, 1)
    x, y = _shift(rng, _PLACES[v["place"]], 1.5)
    canvas.shape(v["shape"], x, y, size, _color(scene, canvas), v["fill"])


def _scatter(rng: random.Random, canvas: Canvas, shape: str, colors: Sequence[str]) -> None:
    """One object per colour, in different cells of a 3 x 3 grid."""
    cells = [(12 + 20 * column, 12 + 20 * row) for row in range(3) for column in range(3)]
    tints = {name: canvas.tint(COLORS[name]) for name in dict.fromkeys(colors)}
    for cell, name in zip(rng.sample(cells, len(colors)), colors, strict=True):
        x, y = _shift(rng, cell, 1.2)
        canvas.shape(shape, x, y, 16.5, tints[name])


def _group(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    _scatter(rng, canvas, scene.values["shape"], [scene.values["color"]] * scene.values["count"])


def _mix(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    (first, second), (many, more) = scene.values["colors"], scene.values["counts"]
    _scatter(rng, canvas, scene.values["shape"], [first] * many + [second] * more)


def _pair(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    for i in range(2):
        along, across = (17, 47)[i] + rng.uniform(-1.5, 1.5), 32 + rng.uniform(-7, 7)
        x, y = (along, across) if v["layout"] == "row" else (across, along)
        size = (29 if v["larger"] == i else 18) + rng.uniform(-0.5, 0.5)
        canvas.shape(v["shapes"][i], x, y, size, canvas.tint(COLORS[v["colors"][i]]))


def _quad(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    for (x, y), shape, color in zip(_CORNERS, v["shapes"], v["colors"], strict=True):
        x, y = _shift(rng, (x, y), 1.5)
        canvas.shape(shape, x, y, 23, canvas.tint(COLORS[color]))


def _handwritten(scene: Scene, rng: random.Random, canvas: Canvas, digits: np.ndarray) -> None:
    """One digit in the middle, or four in the corners."""
    originals, color = scene.values["originals"], _color(scene, canvas)
    centers = _CORNERS if len(originals) == 4 else [_shift(rng, (32, 32), 3)]
    size = 30 if len(originals) == 4 else rng.uniform(36, 44)
    for center, index in zip(centers, originals, strict=True):
        x, y = _shift(rng, center, 1)
        canvas.stencil(Image.fromarray(digits[index]), x, y, size, size, color)


def _word(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    middle = {"top": 15, "center": 32, "bottom": 49}[scene.values["place"]]
    x, y = _shift(rng, (32, middle), 1)
    canvas.text(scene.values["word"], x, y, 56, 22, _color(scene, canvas))


def _letters(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    color = _color(scene, canvas)
    for center, letter in zip((12, 32, 52), scene.values["letters"], strict=True):
        x, y = _shift(rng, (center, 32), 1)
        canvas.text(letter, x, y, 17, 24, color)


def _bars(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    gap = 56 / v["count"]
    step = 44 / v["count"]
    for i, (name, rank) in enumerate(zip(v["colors"], v["ranks"], strict=True)):
        height = 10 + step * rank + rng.uniform(0, step * 0.3)
        left = 4 + gap * i + 1.5
        canvas.box(left, 60 - height, left + gap - 3, 60, canvas.tint(COLORS[name]))
    axis = _PAPER if v["background"] in ("black", "brown") else _INK
    canvas.box(3, 60, 61, 62, axis)


def _pie(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    shares = (rng.uniform(0.5, 0.56), rng.uniform(0.27, 0.31))
    parts = list(zip(v["colors"], (*shares, 1 - sum(shares)), strict=True))
    if not v["clockwise"]:
        parts.reverse()
    x, y = _shift(rng, (32, 32), 2)
    start = rng.uniform(0, 360)
    for name, share in parts:
        canvas.slice(x, y, 27, start, start + 360 * share, canvas.tint(COLORS[name]))
        start += 360 * share


def _arrow(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    length = 25 if v["size"] == "large" else 18
    angle = math.pi / 4 * DIRECTIONS.index(v["direction"]) + rng.uniform(-0.07, 0.07)
    x, y = _shift(rng, (32, 32), 4)
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))

    def at(forward: float, side: float) -> Point:
        return x + length * (forward * along[0] + side * across[0]), y + length * (
            forward * along[1] + side * across[1]
        )

    shaft = [at(-1, -0.14), at(0.2, -0.14), at(0.2, 0.14), at(-1, 0.14)]
    color = _color(scene, canvas)
    canvas.polygon(shaft, color)
    canvas.polygon([at(1, 0), at(0.1, 0.62), at(0.1, -0.62)], color)


def _texture(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    pitch = 16 if v["pitch"] == "wide" else 10
    color, start = _color(scene, canvas), rng.uniform(-pitch, 0)
    lines = [start + pitch * i for i in range(2 * 64 // pitch + 3)]
    width = pitch / 2 if v["texture"] != "grid" else pitch / 4
    if v["texture"] in ("horizontal stripes", "grid"):
        for at in lines:
            canvas.box(0, at, 64, at + width, color)
    if v["texture"] in ("vertical stripes", "grid"):
        for at in lines:
            canvas.box(at, 0, at + width, 64, color)
    if v["texture"] == "diagonal stripes":
        for at in lines:
            canvas.line([(1.42 * at + 5, -5), (1.42 * at - 74, 74)], color, width)
    if v["texture"] == "dots":
        for row in lines:
            for column in lines:
                canvas.disc(column + pitch / 2, row + pitch / 2, pitch * 0.34, color)
    if v["texture"] == "checks":
        side = pitch / 2 + 2
        for row in range(int(80 / side)):
            for column in range(row % 2, int(80 / side), 2):
                canvas.box(
                    start + column * side,
                    start + row * side,
                    start + (column + 1) * side,
                    start + (row + 1) * side,
                    color,
                )


def _flag(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    edges = [0, 21 + rng.uniform(-2, 2), 43 + rng.uniform(-2, 2), 64]
    for i, name in enumerate(v["colors"]):
        color = canvas.tint(COLORS[name])
        if v["layout"] == "row":
            canvas.box(edges[i], 0, edges[i + 1], 64, color)
        else:
            canvas.box(0, edges[i], 64, edges[i + 1], color)


def _odd(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    usual, odd = (canvas.tint(COLORS[name]) for name in v["colors"])
    for place, corner in zip(PLACES, _CORNERS, strict=False):  # the fifth place is the center
        x, y = _shift(rng, corner, 1.5)
        canvas.shape(v["shape"], x, y, 23, odd if place == v["place"] else usual)


def _face(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    radius = 28 if v["size"] == "large" else 21
    x, y = _shift(rng, (32, 32), 2)
    canvas.disc(x, y, radius, _color(scene, canvas))
    r = radius / 28
    for side in (-1, 1):
        canvas.disc(x + side * 10 * r, y - 8 * r, 4 * r, _INK)
    if v["mood"] == "happy":
        canvas.arc(x, y + 2 * r, 15 * r, 25, 155, _INK, 4.5 * r)
    elif v["mood"] == "sad":
        canvas.arc(x, y + 23 * r, 14 * r, 210, 330, _INK, 4.5 * r)
    elif v["mood"] == "surprised":
        canvas.disc(x, y + 12 * r, 7 * r, _INK)
    else:
        canvas.box(x - 12 * r, y + 10 * r, x + 12 * r, y + 14.5 * r, _INK)


def _die(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    x, y = _shift(rng, (32, 32), 3)
    canvas.box(x - 26, y - 26, x + 26, y + 26, _color(scene, canvas))
    ink = canvas.tint((248, 248, 248) if v["dots"] == "white" else (12, 12, 12))
    corners = [(-1, -1), (1, 1), (1, -1), (-1, 1)]
    spots = {1: [], 2: corners[:2], 3: corners[:2], 4: corners, 5: corners, 6: [*corners, (-1, 0), (1, 0)]}[
        v["count"]
    ]
    for column, row in [*spots, *([(0, 0)] if v["count"] % 2 else [])]:
        canvas.disc(x + 15 * column, y + 15 * row, 5.5, ink)


def _glass(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    """A tumbler with thick walls, filled from the bottom."""
    v = scene.values
    half, tall = (20, 52) if v["size"] == "large" else (14, 40)
    x, y = _shift(rng, (32, 32), 2)
    wall = canvas.tint(_PAPER if v["background"] in ("black", "brown") else _INK)
    canvas.box(x - half, y - tall / 2, x + half, y + tall / 2, wall)
    canvas.box(x - half + 3, y - tall / 2, x + half - 3, y + tall / 2 - 3, canvas.background)
    share = {"quarter": 0.25, "half": 0.5, "three quarters": 0.75, "full": 1.0}[v["level"]]
    height = (tall - 3) * share
    bottom = y + tall / 2 - 3
    canvas.box(x - half + 3, bottom - height, x + half - 3, bottom, _color(scene, canvas))


def _icon(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    x, y = _shift(rng, (32, 32), 3)
    unit = 1.0 if v["size"] == "large" else 0.72

    def at(*points: Point) -> list[Point]:
        return [(x + unit * px, y + unit * py) for px, py in points]

    def disc(px: float, py: float, radius: float, color: Rgb) -> None:
        canvas.disc(x + unit * px, y + unit * py, unit * radius, color)

    _ICONS[v["icon"]](at, disc, canvas, _color(scene, canvas), unit)


_At = Callable[..., list[Point]]
_Disc = Callable[[float, float, float, Rgb], None]


def _house(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    canvas.polygon(at((0, -27), (27, -3), (20, -3), (20, 26), (-20, 26), (-20, -3), (-27, -3)), color)
    canvas.polygon(at((-6, 8), (6, 8), (6, 26), (-6, 26)), canvas.background)


def _tree(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    canvas.polygon(at((0, -28), (16, -6), (-16, -6)), color)
    canvas.polygon(at((0, -14), (22, 14), (-22, 14)), color)
    canvas.polygon(at((-5, 14), (5, 14), (5, 28), (-5, 28)), color)


def _fish(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    body = [(17 * math.cos(a) - 7, 13 * math.sin(a)) for a in [2 * math.pi * i / 24 for i in range(24)]]
    canvas.polygon(at(*body), color)
    canvas.polygon(at((4, 0), (27, -15), (27, 15)), color)
    disc(-15, -3, 2.6, canvas.background)


def _boat(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    canvas.polygon(at((-27, 11), (27, 11), (17, 26), (-17, 26)), color)
    canvas.polygon(at((-2, -27), (2, -27), (2, 11), (-2, 11)), color)
    canvas.polygon(at((5, -25), (24, 5), (5, 5)), color)


def _cup(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    disc(15, -1, 13, color)
    disc(15, -1, 7, canvas.background)
    canvas.polygon(at((-24, -20), (14, -20), (10, 22), (-20, 22)), color)


def _flower(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    canvas.polygon(at((-2.5, -8), (2.5, -8), (2.5, 28), (-2.5, 28)), color)
    for i in range(6):
        disc(12 * math.cos(math.pi * i / 3), -11 + 12 * math.sin(math.pi * i / 3), 6.5, color)
    disc(0, -11, 5.5, canvas.background)


def _umbrella(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    dome = [(27 * math.cos(a), 27 * math.sin(a)) for a in [math.pi + math.pi * i / 16 for i in range(17)]]
    canvas.polygon(at(*dome), color)
    canvas.line(at((0, -2), (0, 20), (3, 24), (8, 24), (10, 19)), color, 4 * unit)


def _car(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    canvas.polygon(
        at((-28, 12), (-28, -1), (-17, -3), (-10, -17), (11, -17), (18, -3), (28, 0), (28, 12)), color
    )
    canvas.polygon(at((-9, -4), (-6, -12), (7, -12), (10, -4)), canvas.background)
    for wheel in (-15, 15):
        disc(wheel, 13, 8, color)
        disc(wheel, 13, 3, canvas.background)


def _mushroom(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    dome = [(26 * math.cos(a), 2 + 26 * math.sin(a)) for a in [math.pi + math.pi * i / 16 for i in range(17)]]
    canvas.polygon(at(*dome), color)
    canvas.polygon(at((-10, 5), (10, 5), (13, 27), (-13, 27)), color)
    for px, py in ((-11, -9), (3, -15), (13, -6)):
        disc(px, py, 3.4, canvas.background)


def _key(at: _At, disc: _Disc, canvas: Canvas, color: Rgb, unit: float) -> None:
    disc(-16, 0, 12, color)
    disc(-16, 0, 5.5, canvas.background)
    canvas.polygon(
        at((-6, -3), (28, -3), (28, 13), (22, 13), (22, 3), (17, 3), (17, 10), (11, 10), (11, 3), (-6, 3)),
        color,
    )


_ICONS: dict[str, Callable[[_At, _Disc, Canvas, Rgb, float], None]] = {
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "boat": _boat,
    "cup": _cup,
    "flower": _flower,
    "umbrella": _umbrella,
    "car": _car,
    "mushroom": _mushroom,
    "key": _key,
}

_PAINTERS: dict[str, Callable[[Scene, random.Random, Canvas], None]] = {
    "single": _single,
    "group": _group,
    "mix": _mix,
    "pair": _pair,
    "quad": _quad,
    "word": _word,
    "letters": _letters,
    "bars": _bars,
    "pie": _pie,
    "arrow": _arrow,
    "texture": _texture,
    "flag": _flag,
    "odd": _odd,
    "face": _face,
    "die": _die,
    "icon": _icon,
    "glass": _glass,
}
