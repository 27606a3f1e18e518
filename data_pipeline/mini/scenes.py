"""What can be in a picture: one function per kind of scene, which draws its parameters.

A scene is its kind and a small dictionary of named values: words and whole numbers, never pixels. These values are
all that captions, questions and answers speak of; where exactly a thing lies is up to the renderer's jitter. The
values are also what is held out: `Scene.held_out` is a hash of them, so a scene that a held-out question shows (a
large red heart on the left on navy) is in no training set of any stage. Handwritten digits are held out by
the original image in scikit-learn's set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.mini.draw import BACKGROUNDS, COLORS, SHAPES

COLOR_NAMES = tuple(COLORS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
PLACES = ("top", "left", "right", "bottom")
SIZES = ("large", "small")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
WORDS = (
    "BED", "BOX", "BUS", "CAR", "CAT", "COW", "CUP", "DOG", "EGG", "FAN",
    "FOX", "HAT", "JAM", "KEY", "MAP", "OWL", "PIG", "SUN", "TOY", "ZIP",
)  # fmt: skip
LETTERS = tuple(sorted(set("".join(WORDS))))
DIGITS = tuple("0123456789")
# Of arrows, clockwise; not "left" and "right", which are places: one word for what a sign looks like and for where a
# thing lies is hard on a tiny model.
DIRECTIONS = ("east", "south", "west", "north")
SIDES = {"row": ("left", "right"), "column": ("top", "bottom")}
# Rows and columns of the grid of four by four cells.
ROWS, COLUMNS = ("top", "upper", "lower", "bottom"), ("left", "second", "third", "right")
STRIPES = {"row": ("left", "middle", "right"), "column": ("top", "middle", "bottom")}

_HELD_OUT_PER_MILLE = 200
# What mosaics are made of, with weights: handwriting is the hardest to learn.
_SIGNS: dict[tuple[str, ...], int] = {SHAPES: 3, LETTERS: 3, DIRECTIONS: 1, DIGITS: 4}


@dataclass(frozen=True)
class Scene:
    """One picture's content. `values` holds JSON types only."""

    kind: str
    values: dict[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """The parameters as one line of text: equal scenes have equal keys."""
        return self.kind + json.dumps(self.values, sort_keys=True, separators=(",", ":"))

    @property
    def held_out(self) -> bool:
        """Whether this scene belongs to the held-out side, in every stage."""
        if self.values.get("originals"):
            sides = {original_held_out(index) for index in self.values["originals"]}
            if len(sides) != 1:
                raise ValueError(f"digits of both sides in one scene: {self.key}")
            return sides.pop()
        return _hash(self.key) < _HELD_OUT_PER_MILLE


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 1000


def original_held_out(index: int) -> bool:
    """Whether handwritten digit `index` of scikit-learn's 1,797 is a held-out one."""
    return _hash(f"original {index}") < _HELD_OUT_PER_MILLE


class Sampler:
    """Draws scenes. `digit_labels` are the labels of scikit-learn's digits, in their order."""

    def __init__(self, rng: random.Random, digit_labels: Sequence[int]) -> None:
        self.rng = rng
        self._originals: dict[tuple[bool, int], list[int]] = {}
        for index, label in enumerate(digit_labels):
            self._originals.setdefault((original_held_out(index), int(label)), []).append(index)

    def draw(self, kind: str, held_out: bool, **fixed: Any) -> Scene:
        """A scene of `kind` on the wanted side of the split, with the `fixed` values kept.

        Raises:
            ValueError: no scene on that side carries the fixed values.
        """
        for _ in range(2000):
            values = KINDS[kind](self, held_out, fixed)
            unknown = set(fixed) - set(values)
            if unknown:
                raise ValueError(f"scenes of kind {kind} have no {sorted(unknown)}")
            scene = Scene(kind, values)
            if scene.held_out == held_out:
                return scene
        raise ValueError(f"no {'held-out' if held_out else 'training'} scene of kind {kind} with {fixed}")

    def pick(self, fixed: dict[str, Any], name: str, options: Sequence[Any]) -> Any:
        return fixed[name] if name in fixed else self.rng.choice(options)

    def distinct(self, fixed: dict[str, Any], name: str, options: Sequence[Any], count: int) -> list[Any]:
        """`count` different options; places that `fixed[name]` gives (not None) are kept."""
        given = list(fixed.get(name, [None] * count))
        rest = [option for option in options if option not in given]
        self.rng.shuffle(rest)
        return [value if value is not None else rest.pop() for value in given]

    def original(self, held_out: bool, label: int) -> int:
        return self.rng.choice(self._originals[held_out, label])


def _single(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": s.pick(fixed, "shape", SHAPES),
        "color": s.pick(fixed, "color", COLOR_NAMES),
        "size": s.pick(fixed, "size", SIZES),
        "place": s.pick(fixed, "place", PLACES),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _group(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": s.pick(fixed, "shape", SHAPES),
        "color": s.pick(fixed, "color", COLOR_NAMES),
        "count": s.pick(fixed, "count", range(1, 7)),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _pair(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    """Two objects, first the left or upper one; `larger` says which is larger (0 or 1)."""
    return {
        "layout": s.pick(fixed, "layout", ("row", "column")),
        "shapes": s.distinct(fixed, "shapes", SHAPES, 2),
        "colors": s.distinct(fixed, "colors", COLOR_NAMES, 2),
        "larger": s.pick(fixed, "larger", (0, 1)),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _quad(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    """Four objects, all different in shape and in colour, in the order of PLACES."""
    return {
        "shapes": s.distinct(fixed, "shapes", SHAPES, 4),
        "colors": s.distinct(fixed, "colors", COLOR_NAMES, 4),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _handwritten(count: int) -> Callable[[Sampler, bool, dict[str, Any]], dict[str, Any]]:
    def values(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
        digits = [
            s.rng.randrange(10) if given is None else given for given in fixed.get("digits", [None] * count)
        ]
        color = s.pick(fixed, "color", COLOR_NAMES)
        return {
            "digits": digits,
            "originals": [s.original(held_out, digit) for digit in digits],
            "color": color,
            "background": s.pick(fixed, "background", BACKGROUND_NAMES),
        }

    return values


def _signs(s: Sampler, count: int) -> list[str]:
    """Names of shapes, letters, arrows and digits."""
    return [s.rng.choice(group) for group in s.rng.choices(list(_SIGNS), list(_SIGNS.values()), k=count)]


def _originals(s: Sampler, held_out: bool, names: Sequence[str]) -> list[int]:
    return [s.original(held_out, int(name)) for name in names if name in DIGITS]


def _mosaic(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    """A sign in each of the sixteen cells, in reading order."""
    names = _signs(s, 16)
    return {
        "names": names,
        "originals": _originals(s, held_out, names),
        "colors": [s.rng.choice(COLOR_NAMES) for _ in range(16)],
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _scatter(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    """Different signs in different colours, in a few of the sixteen cells, in reading order."""
    count = s.rng.randint(3, 6)
    names = list(dict.fromkeys(_signs(s, 40)))[:count]
    return {
        "cells": sorted(s.rng.sample(range(16), len(names))),
        "names": names,
        "originals": _originals(s, held_out, names),
        "colors": s.rng.sample(COLOR_NAMES, len(names)),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _word(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    color = s.pick(fixed, "color", COLOR_NAMES)
    return {
        "word": s.pick(fixed, "word", WORDS),
        "color": color,
        "place": s.pick(fixed, "place", ("top", "center", "bottom")),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _bars(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    """Bars from left to right; `ranks` orders their heights, 0 the shortest."""
    count = s.pick(fixed, "count", (3, 4))
    ranks = list(range(count))
    s.rng.shuffle(ranks)
    named = {0: fixed.get("shortest"), count - 1: fixed.get("tallest")}
    colors = s.distinct({"colors": [named.get(rank) for rank in ranks]}, "colors", COLOR_NAMES, count)
    return {
        "count": count,
        "colors": colors,
        "ranks": ranks,
        "tallest": colors[ranks.index(count - 1)],
        "shortest": colors[ranks.index(0)],
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _arrow(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    return {
        "direction": s.pick(fixed, "direction", DIRECTIONS),
        "color": s.pick(fixed, "color", COLOR_NAMES),
        "size": s.pick(fixed, "size", SIZES),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


def _flag(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    return {
        "layout": s.pick(fixed, "layout", ("row", "column")),
        "colors": s.distinct(fixed, "colors", COLOR_NAMES, 3),
    }


def _odd(s: Sampler, held_out: bool, fixed: dict[str, Any]) -> dict[str, Any]:
    """Four equal shapes in a square, one of them (at `place`) in the second colour."""
    return {
        "shape": s.pick(fixed, "shape", SHAPES),
        "colors": s.distinct(fixed, "colors", COLOR_NAMES, 2),
        "place": s.pick(fixed, "place", PLACES),
        "background": s.pick(fixed, "background", BACKGROUND_NAMES),
    }


KINDS: dict[str, Callable[[Sampler, bool, dict[str, Any]], dict[str, Any]]] = {
    "mosaic": _mosaic,
    "scatter": _scatter,
    "single": _single,
    "group": _group,
    "pair": _pair,
    "quad": _quad,
    "digit": _handwritten(1),
    "digits": _handwritten(2),
    "word": _word,
    "bars": _bars,
    "arrow": _arrow,
    "flag": _flag,
    "odd": _odd,
}
