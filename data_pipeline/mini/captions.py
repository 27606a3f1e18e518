"""Scene -> a short caption (stage 0) that names every attribute the tasks ask about.

The wording is terse on purpose: a tiny model learns from each token, so none is spent on filler. Two kinds of caption
alternate. A description names the things one after the other, in changing order. Statements ("color heart red", "shape
of top is star") say by what a thing is known and which attribute is told; they give the words "color", "shape" and
"place" the meaning that they have in the questions of stage 1, and put the answer where an answer stands, behind them.
No comma follows a digit: the tokenizer would make one piece of both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from data_pipeline.mini.scenes import COLUMNS, NUMBERS, PLACES, ROWS, SIDES, STRIPES, Scene

Values = dict[str, Any]


def caption(scene: Scene, rng: random.Random) -> str:
    """One true sentence or two about the scene; `rng` picks among the wordings."""
    if rng.random() >= _STATED.get(scene.kind, 0.5):
        return with_articles(_DESCRIPTIONS[scene.kind](scene.values, rng))
    told = _STATEMENTS[scene.kind](scene.values, rng)
    if "background" in scene.values:
        told.append(f"background {scene.values['background']}")
    rng.shuffle(told)
    return f"{' and '.join(told)}."


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


_DESCRIPTIONS: dict[str, Callable[[Values, random.Random], str]] = {
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


def _state_single(v: Values, rng: random.Random) -> list[str]:
    return [f"{attribute} {v[attribute]}" for attribute in ("shape", "color", "place", "size")]


def _state_group(v: Values, rng: random.Random) -> list[str]:
    return [f"number {NUMBERS[v['count']]}", f"color {v['color']}", f"shape {v['shape']}"]


def _state(attribute: str, key: str, value: Any, rng: random.Random) -> str:
    """What is told (color), of what (star), and then the answer (red), not always right behind what it hangs on: a
    decoder that only ever looked one word back would not find the key in a question."""
    return rng.choice(_STATEMENT_WORDINGS).format(attribute=attribute, key=key, value=value)


_STATEMENT_WORDINGS = (
    "{attribute} {key} {value}",
    "{key} {attribute} {value}",
    "{attribute} of {key} is {value}",
)


def _state_thing(place: str, color: str, shape: str, rng: random.Random) -> list[str]:
    """Two statements that lead from one of the three to the others, each time from another end."""
    value = {"place": place, "color": color, "shape": shape}
    first, second, third = rng.sample(tuple(value), 3)
    known = rng.choice((first, second))
    return [
        _state(second, value[first], value[second], rng),
        _state(third, value[known], value[third], rng),
    ]


def _state_pair(v: Values, rng: random.Random) -> list[str]:
    sizes = ["larger" if v["larger"] == i else "smaller" for i in range(2)]
    told = [_state("color", size, color, rng) for size, color in zip(sizes, v["colors"], strict=True)]
    for thing in zip(SIDES[v["layout"]], v["colors"], v["shapes"], strict=True):
        told += _state_thing(*thing, rng)
    return told


def _state_quad(v: Values, rng: random.Random) -> list[str]:
    things = zip(PLACES, v["colors"], v["shapes"], strict=True)
    return [statement for thing in things for statement in _state_thing(*thing, rng)]


def _state_digit(v: Values, rng: random.Random) -> list[str]:
    digit = v["digits"][0]
    return [f"digit {digit}", f"number {parity(digit)}", f"color {v['color']}"]


def _state_digits(v: Values, rng: random.Random) -> list[str]:
    digits = [
        _state("digit", side, digit, rng) for side, digit in zip(SIDES["row"], v["digits"], strict=True)
    ]
    return [*digits, f"color {v['color']}"]


def _state_word(v: Values, rng: random.Random) -> list[str]:
    word = v["word"]
    letters = [f"first letter {word[0]}", f"last letter {word[-1]}"]
    return [f"word {word}", *letters, f"color word {v['color']}", f"place {v['place']}"]


def _state_bars(v: Values, rng: random.Random) -> list[str]:
    ends = [_state("color", f"{end} bar", v[end], rng) for end in ("tallest", "shortest")]
    return [*ends, f"number {NUMBERS[v['count']]}", f"colors {' '.join(v['colors'])}"]


def _state_arrow(v: Values, rng: random.Random) -> list[str]:
    return [f"direction {v['direction']}", f"color {v['color']}", f"size {v['size']}"]


def _state_flag(v: Values, rng: random.Random) -> list[str]:
    return [
        f"color {side} part {color}" for side, color in zip(STRIPES[v["layout"]], v["colors"], strict=True)
    ]


def _state_odd(v: Values, rng: random.Random) -> list[str]:
    usual, odd = v["colors"]
    colors = [_state("color", name, odd, rng) for name in ("odd one", "different")]
    place = _state("place", "odd one", v["place"], rng)
    return [*colors, f"color others {usual}", place, f"shape {v['shape']}"]


_STATEMENTS: dict[str, Callable[[Values, random.Random], list[str]]] = {
    "single": _state_single,
    "group": _state_group,
    "pair": _state_pair,
    "quad": _state_quad,
    "digit": _state_digit,
    "digits": _state_digits,
    "word": _state_word,
    "bars": _state_bars,
    "arrow": _state_arrow,
    "flag": _state_flag,
    "odd": _state_odd,
}
# Share of statements among the captions of a kind, where it is not a half: a mosaic's lists are what the tower learns
# to see from, scattered signs are told in many ways as it is.
_STATED = {"mosaic": 0.0, "scatter": 0.0}
