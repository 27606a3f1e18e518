"""Scene -> a short caption (stage 0) that names every attribute the tasks ask about.

The wording is terse on purpose: a tiny model learns from each token, so none is spent on filler. Where a scene holds
several objects, the order in which they are named changes from sample to sample; so the decoder learns to look a
colour up by its place, and a place by its shape, and not only one after the other. No comma follows a digit: the
tokenizer would make one piece of both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from data_pipeline.mini.scenes import COLUMNS, NUMBERS, PLACES, ROWS, SIDES, Scene

Values = dict[str, Any]


def caption(scene: Scene, rng: random.Random) -> str:
    """One true sentence or two about the scene; `rng` picks among the wordings."""
    return with_articles(_CAPTIONS[scene.kind](scene.values, rng))


def with_articles(text: str) -> str:
    """ "a" becomes "an" before a vowel ("a orange heart" is what the templates give); the letter A stays."""
    return re.sub(r"\ba (?=[aeiou8])", "an ", text)


def plural(shape: str, count: int) -> str:
    """The shape's name as it follows a number word: ("cross", 2) -> "crosses"."""
    if count == 1:
        return shape
    return shape + ("es" if shape.endswith("s") else "s")


def at_place(place: str) -> str:
    """ "on the left", "at the top", "in the center"."""
    before = {"left": "on", "right": "on", "middle": "in", "center": "in"}.get(place, "at")
    return f"{before} the {place}"


def parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def _mosaic(v: Values, rng: random.Random) -> str:
    """Two bare lists: the word for a cell then always stands equally far behind the cell's patch, and an attention
    head over relative (rotary) positions finds it at once. So the tower learns from the first steps on."""
    return f"signs {' '.join(v['names'])} colors {' '.join(v['colors'])} on {v['background']}."


def _scatter(v: Values, rng: random.Random) -> str:
    """Where, then what, in reading order; or, in any order, what, then where; or each thing's color and name alone.
    So things are looked up by their place and by their content, and from either side."""
    things = list(zip(v["cells"], v["colors"], v["names"], strict=True))
    wording = rng.choice(_SCATTER_WORDINGS)
    if not wording.startswith("{row}"):
        rng.shuffle(things)
    parts = [
        wording.format(row=ROWS[cell // 4], column=COLUMNS[cell % 4], color=color, name=name)
        for cell, color, name in things
    ]
    return f"{' and '.join(parts)} on {v['background']}."


_SCATTER_WORDINGS = (
    "{row} {column} {color} {name}",
    "{row} {column} {color} {name}",
    "{color} {name} {row} {column}",
    "{name} {color} {row} {column}",
    "{color} {name}",
    "{name} {color}",
)


def _single(v: Values, rng: random.Random) -> str:
    return rng.choice(
        (
            "a {size} {color} {shape} {at}, on {background}.",
            "{at} a {size} {color} {shape}, on {background}.",
        )
    ).format(**v, at=at_place(v["place"]))


def _group(v: Values, rng: random.Random) -> str:
    things = plural(v["shape"], v["count"])
    return rng.choice(
        (
            "{number} {color} {things} on {background}.",
            "{background} background with {number} {things}, {color}.",
        )
    ).format(**v, number=NUMBERS[v["count"]], things=things)


def _pair(v: Values, rng: random.Random) -> str:
    sides = SIDES[v["layout"]]
    sizes = ["large" if v["larger"] == i else "small" for i in range(2)]
    wordings: tuple[Callable[[int], str], ...] = (
        lambda i: f"{at_place(sides[i])} a {sizes[i]} {v['colors'][i]} {v['shapes'][i]}",
        lambda i: f"a {v['colors'][i]} {v['shapes'][i]}, {sizes[i]}, {at_place(sides[i])}",
        lambda i: f"the {sizes[i]} {v['shapes'][i]} {at_place(sides[i])} is {v['colors'][i]}",
        lambda i: f"the {sizes[i]} object is a {v['colors'][i]} {v['shapes'][i]} {at_place(sides[i])}",
    )
    wording = rng.choice(wordings)
    first, second = rng.sample(range(2), 2)
    return f"{wording(first)}, {wording(second)}, on {v['background']}."


def _digit(v: Values, rng: random.Random) -> str:
    digit = v["digits"][0]
    return rng.choice(
        (
            "handwritten digit {digit} is {parity}, {color} on {background}.",
            "a {color} digit {digit} on {background}, {parity}.",
        )
    ).format(**v, digit=digit, parity=parity(digit))


def _digits(v: Values, rng: random.Random) -> str:
    parts = [f"{side} {digit}" for side, digit in zip(SIDES["row"], v["digits"], strict=True)]
    rng.shuffle(parts)
    return f"digits, {' and '.join(parts)} in {v['color']} on {v['background']}."


def _quad(v: Values, rng: random.Random) -> str:
    wording = rng.choice(("{place} {color} {shape}", "{color} {shape} {place}", "{shape} {color} {place}"))
    parts = [
        wording.format(place=place, color=v["colors"][i], shape=v["shapes"][i])
        for i, place in _shuffled_places(rng)
    ]
    return f"{', '.join(parts)}, on {v['background']}."


def _shuffled_places(rng: random.Random) -> list[tuple[int, str]]:
    """The four places with their numbers, in any order."""
    return rng.sample(list(enumerate(PLACES)), 4)


def _word(v: Values, rng: random.Random) -> str:
    spelled = f"first letter {v['word'][0]}, last letter {v['word'][-1]}"
    return rng.choice(
        (
            "the word {word} in {color} {at} on {background}, {spelled}.",
            "{color} word {word} {at} on {background}, {spelled}.",
        )
    ).format(**v, at=at_place(v["place"]), spelled=spelled)


def _bars(v: Values, rng: random.Random) -> str:
    ends = [f"tallest {v['tallest']}", f"shortest {v['shortest']}"]
    rng.shuffle(ends)
    return f"bar chart, {NUMBERS[v['count']]} bars, {', '.join(v['colors'])}; {', '.join(ends)}; on {v['background']}."


def _arrow(v: Values, rng: random.Random) -> str:
    return rng.choice(
        (
            "a {size} {color} arrow pointing {direction} on {background}.",
            "arrow pointing {direction}, {color}, {size}, on {background}.",
        )
    ).format(**v)


def _flag(v: Values, rng: random.Random) -> str:
    first, middle, last = v["colors"]
    start, end = SIDES[v["layout"]]
    return rng.choice(
        (
            f"flag, {start} {first}, middle {middle}, {end} {last}.",
            f"flag, {end} {last}, middle {middle}, {start} {first}.",
        )
    )


def _odd(v: Values, rng: random.Random) -> str:
    usual, odd = v["colors"]
    return rng.choice(
        (
            "four {four}, three {usual}, the odd one {odd} {at}, on {background}.",
            "the odd one {at} is {odd}, other {four} {usual}, on {background}.",
        )
    ).format(**v, four=plural(v["shape"], 4), usual=usual, odd=odd, at=at_place(v["place"]))


_CAPTIONS: dict[str, Callable[[Values, random.Random], str]] = {
    "mosaic": _mosaic,
    "scatter": _scatter,
    "single": _single,
    "group": _group,
    "pair": _pair,
    "quad": _quad,
    "digit": _digit,
    "digits": _digits,
    "word": _word,
    "bars": _bars,
    "arrow": _arrow,
    "flag": _flag,
    "odd": _odd,
}
