"""Scene -> picture: one function per kind of scene.

The random source moves things by a few pixels and shades their colours a little: two pictures of one scene differ,
and nothing that a question asks about depends on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipeline.mini.draw import BACKGROUNDS, COLORS, SHAPES, Canvas, Point, Rgb
from data_pipeline.mini.scenes import DIGITS, DIRECTIONS, PLACES, Scene

# A cell is what the tiny tower sees as one patch; objects fill a cell or a block of two by two.
_CELL = 16
_SMALL, _LARGE = 13.5, 30.0
_JITTER = 0.5
# Centers of the four blocks of two by two cells, and of the sixteen cells.
_BLOCKS: list[Point] = [(16, 16), (48, 16), (16, 48), (48, 48)]
_CELLS: list[Point] = [(8 + _CELL * column, 8 + _CELL * row) for row in range(4) for column in range(4)]
# In the order of scenes.PLACES: where a large thing has its center, and the two cells at the edge for a small one.
_PLACE_BLOCKS: list[Point] = [(32, 16), (16, 32), (48, 32), (32, 48)]
_PLACE_CELLS: list[tuple[Point, Point]] = [
    ((24, 8), (40, 8)), ((8, 24), (8, 40)), ((56, 24), (56, 40)), ((24, 56), (40, 56)),
]  # fmt: skip


def render(scene: Scene, rng: random.Random, digits: np.ndarray) -> Image.Image:
    """The picture of a scene, RGB 64 x 64.

    Args:
        scene: what is in it.
        rng: the jitter; the same state gives the same bytes.
        digits: scikit-learn's handwritten digits as ink, uint8 [1797, 8, 8], 255 full ink.
    """
    background = scene.values.get("background", "black")  # a flag covers all of it
    canvas = Canvas(BACKGROUNDS[background], rng)
    if scene.kind in ("mosaic", "scatter"):
        _signs(scene, rng, canvas, digits)
    elif "originals" in scene.values:
        _handwritten(scene, rng, canvas, digits)
    else:
        _PAINTERS[scene.kind](scene, rng, canvas)
    return canvas.finish()


def _near(rng: random.Random, point: Point) -> Point:
    return point[0] + rng.uniform(-_JITTER, _JITTER), point[1] + rng.uniform(-_JITTER, _JITTER)


def _cell_of(rng: random.Random, block: Point) -> Point:
    """The center of one of a block's four cells."""
    return block[0] + rng.choice((-8, 8)), block[1] + rng.choice((-8, 8))


def _color(scene: Scene, canvas: Canvas) -> Rgb:
    return canvas.tint(COLORS[scene.values["color"]])


def _single(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    place, large = PLACES.index(v["place"]), v["size"] == "large"
    x, y = _near(rng, _PLACE_BLOCKS[place] if large else rng.choice(_PLACE_CELLS[place]))
    canvas.shape(v["shape"], x, y, _LARGE if large else _SMALL, _color(scene, canvas))


def _group(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    color = _color(scene, canvas)
    for cell in rng.sample(_CELLS, scene.values["count"]):
        canvas.shape(scene.values["shape"], *_near(rng, cell), _SMALL, color)


def _pair(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    for i in range(2):
        block = (16 + 32 * i, 32) if v["layout"] == "row" else (32, 16 + 32 * i)
        large = v["larger"] == i
        x, y = _near(rng, block if large else _cell_of(rng, block))
        canvas.shape(v["shapes"][i], x, y, _LARGE if large else _SMALL, canvas.tint(COLORS[v["colors"][i]]))


def _quad(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    for cells, shape, color in zip(_PLACE_CELLS, v["shapes"], v["colors"], strict=True):
        canvas.shape(shape, *_near(rng, rng.choice(cells)), _SMALL, canvas.tint(COLORS[color]))


def _odd(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    usual, odd = (canvas.tint(COLORS[name]) for name in v["colors"])
    for place, cells in zip(PLACES, _PLACE_CELLS, strict=True):
        color = odd if place == v["place"] else usual
        canvas.shape(v["shape"], *_near(rng, rng.choice(cells)), _SMALL, color)


def _signs(scene: Scene, rng: random.Random, canvas: Canvas, digits: np.ndarray) -> None:
    """Signs, one to a cell: in each of them, or in those that the scene names."""
    v = scene.values
    originals = iter(v["originals"])
    for cell, name, color in zip(v.get("cells", range(16)), v["names"], v["colors"], strict=True):
        x, y = _near(rng, _CELLS[cell])
        ink = canvas.tint(COLORS[color])
        if name in SHAPES:
            canvas.shape(name, x, y, _SMALL, ink)
        elif name in DIRECTIONS:
            _draw_arrow(canvas, name, x, y, _SMALL, ink)
        elif name in DIGITS:
            canvas.stencil(Image.fromarray(digits[next(originals)]), x, y, _CELL, _CELL, ink)
        else:
            canvas.text(name, x, y, 13, 14, ink)


def _handwritten(scene: Scene, rng: random.Random, canvas: Canvas, digits: np.ndarray) -> None:
    """One digit anywhere, or two side by side, each in a cell."""
    originals, color = scene.values["originals"], _color(scene, canvas)
    blocks: list[Point] = [rng.choice(_BLOCKS)] if len(originals) == 1 else [(16, 32), (48, 32)]
    for block, index in zip(blocks, originals, strict=True):
        x, y = _near(rng, _cell_of(rng, block))
        canvas.stencil(Image.fromarray(digits[index]), x, y, _CELL, _CELL, color)


def _word(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    """Three letters, one to a cell, beginning at the first or second column."""
    row = {"top": 8, "center": rng.choice((24, 40)), "bottom": 56}[scene.values["place"]]
    column, color = rng.choice((8, 24)), _color(scene, canvas)
    for i, letter in enumerate(scene.values["word"]):
        x, y = _near(rng, (column + _CELL * i, row))
        canvas.text(letter, x, y, 13, 14, color)


def _bars(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    """Bars a cell wide and a whole number of cells tall."""
    v = scene.values
    for i, (name, rank) in enumerate(zip(v["colors"], v["ranks"], strict=True)):
        height = _CELL * (rank + 1) - rng.uniform(1, 3)
        canvas.box(_CELL * i + 2, 64 - height, _CELL * (i + 1) - 2, 64, canvas.tint(COLORS[name]))


def _arrow(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    v = scene.values
    large = v["size"] == "large"
    block = rng.choice(_BLOCKS)
    x, y = _near(rng, block if large else _cell_of(rng, block))
    _draw_arrow(canvas, v["direction"], x, y, _LARGE if large else _SMALL, _color(scene, canvas))


def _draw_arrow(canvas: Canvas, direction: str, x: float, y: float, size: float, color: Rgb) -> None:
    outline = [(-1.0, -0.25), (0.1, -0.25), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.25), (-1.0, 0.25)]
    for _ in range(DIRECTIONS.index(direction)):  # a quarter turn clockwise each
        outline = [(-py, px) for px, py in outline]
    canvas.polygon([(x + px * size / 2, y + py * size / 2) for px, py in outline], color)


def _flag(scene: Scene, rng: random.Random, canvas: Canvas) -> None:
    """Three stripes, the middle one twice as wide."""
    v = scene.values
    edges = (0, 16, 48, 64)
    for i, name in enumerate(v["colors"]):
        color = canvas.tint(COLORS[name])
        if v["layout"] == "row":
            canvas.box(edges[i], 0, edges[i + 1], 64, color)
        else:
            canvas.box(0, edges[i], 64, edges[i + 1], color)


_PAINTERS: dict[str, Callable[[Scene, random.Random, Canvas], None]] = {
    "single": _single,
    "group": _group,
    "pair": _pair,
    "quad": _quad,
    "word": _word,
    "bars": _bars,
    "arrow": _arrow,
    "flag": _flag,
    "odd": _odd,
}
