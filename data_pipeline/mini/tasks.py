"""The tasks of stage 1: what is asked of which scene, in our own words, and the answer.

A task lists its possible answers; samples go through them in turn, so every answer is equally frequent and a guess
without the picture is right once in `len(answers)` times. For a wanted answer, `wish` names the values that a scene
must have, and `truth` reads the answer back from the finished scene: both must agree (checked for every sample).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.mini.captions import at_place, parity
from data_pipeline.mini.draw import SHAPES
from data_pipeline.mini.scenes import (
    BACKGROUND_NAMES,
    COLOR_NAMES,
    DIRECTIONS,
    NUMBERS,
    PLACES,
    SIDES,
    STRIPES,
    WORDS,
    Scene,
)

Values = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: DATASET+task, as Vision-Flan names its tasks.
        kind: the kind of scene (a key of scenes.KINDS).
        answers: every answer the task can have.
        wish: (rng, answer) -> (scene values to keep, slots of the question).
        truth: (scene values, slots) -> the right answer.
        questions: the phrasings; `{options}` stands for the answers, lettered, in changing order.
    """

    name: str
    kind: str
    answers: tuple[str, ...]
    wish: Callable[[random.Random, str], tuple[Values, Values]]
    truth: Callable[[Values, Values], str]
    questions: tuple[str, ...]

    def ask(self, rng: random.Random, scene: Scene, slots: Values) -> str:
        """One phrasing of the question, without the image marker."""
        options = rng.sample(self.answers, len(self.answers))
        listed = " ".join(f"({'abcdefgh'[i]}) {option}" for i, option in enumerate(options[:8]))
        return rng.choice(self.questions).format(**slots, options="Options: " + listed)


def _value(name: str) -> tuple[Callable[..., tuple[Values, Values]], Callable[[Values, Values], str]]:
    """wish and truth of a task that asks for one value of the scene, word for word."""
    return lambda rng, answer: ({name: answer}, {}), lambda v, slots: v[name]


def _plain(name: str, kind: str, value: str, answers: tuple[str, ...], *questions: str) -> Task:
    wish, truth = _value(value)
    return Task(name, kind, answers, wish, truth, questions)


def _slot(rng: random.Random, answer: str, size: int) -> tuple[list[str | None], int]:
    """`answer` at a random one of `size` places, None at the others."""
    at = rng.randrange(size)
    return [answer if i == at else None for i in range(size)], at


def _side_wish(name: str) -> Callable[[random.Random, str], tuple[Values, Values]]:
    def wish(rng: random.Random, answer: str) -> tuple[Values, Values]:
        values, at = _slot(rng, answer, 2)
        layout = rng.choice(("row", "column"))
        return {name: values, "layout": layout}, {"side": at_place(SIDES[layout][at]), "at": at}

    return wish


def _corner_wish(name: str) -> Callable[[random.Random, str], tuple[Values, Values]]:
    def wish(rng: random.Random, answer: str) -> tuple[Values, Values]:
        values, at = _slot(rng, answer, 4)
        return {name: values}, {"side": at_place(PLACES[at]), "at": at}

    return wish


def _other_of(
    asked: str, key: str, options: Sequence[str], count: int
) -> Callable[[random.Random, str], tuple[Values, Values]]:
    """One of `count` things, known by its `key` (color or shape), is asked for its other name."""

    def wish(rng: random.Random, answer: str) -> tuple[Values, Values]:
        values, at = _slot(rng, answer, count)
        known = rng.choice(options)
        return {asked: values, key: [known if i == at else None for i in range(count)]}, {"key": known}

    return wish


def _larger(rng: random.Random, answer: str) -> tuple[Values, Values]:
    colors, at = _slot(rng, answer, 2)
    size = rng.choice(("larger", "smaller"))
    return {"colors": colors, "larger": at if size == "larger" else 1 - at}, {"size": size}


def _larger_truth(v: Values, slots: Values) -> str:
    return v["colors"][v["larger"] if slots["size"] == "larger" else 1 - v["larger"]]


def _where(rng: random.Random, answer: str, places: Sequence[str] = PLACES) -> tuple[Values, Values]:
    shape = rng.choice(SHAPES)
    return {"shapes": [shape if place == answer else None for place in places]}, {"key": shape}


def _where_of_two(rng: random.Random, answer: str) -> tuple[Values, Values]:
    layout = next(layout for layout, sides in SIDES.items() if answer in sides)
    values, slots = _where(rng, answer, SIDES[layout])
    return values | {"layout": layout}, slots


def _presence(rng: random.Random, answer: str) -> tuple[Values, Values]:
    asked, *others = rng.sample(SHAPES, len(SHAPES))
    shapes = _slot(rng, asked, 4)[0] if answer == "yes" else others[:4]
    return {"shapes": shapes}, {"shape": asked}


def _parity(rng: random.Random, answer: str) -> tuple[Values, Values]:
    return {"digits": [rng.choice([d for d in range(10) if parity(d) == answer])]}, {}


def _stripe(rng: random.Random, answer: str) -> tuple[Values, Values]:
    colors, at = _slot(rng, answer, 3)
    layout = rng.choice(("row", "column"))
    return {"colors": colors, "layout": layout}, {"side": STRIPES[layout][at], "at": at}


_DIGITS = tuple("0123456789")
_COLORED_SHAPES = tuple(f"{color} {shape}" for color in COLOR_NAMES for shape in SHAPES)


def _digit_at_side(rng: random.Random, answer: str) -> tuple[Values, Values]:
    digits, at = _slot(rng, answer, 2)
    return {"digits": [None if digit is None else int(digit) for digit in digits]}, {
        "side": at_place(SIDES["row"][at]),
        "at": at,
    }


def _ends(at: int) -> tuple[str, ...]:
    """The letters that stand at the beginning (0) or end (-1) of a word."""
    return tuple(sorted({word[at] for word in WORDS}))


def _word_with(at: int) -> Callable[[random.Random, str], tuple[Values, Values]]:
    return lambda rng, answer: ({"word": rng.choice([word for word in WORDS if word[at] == answer])}, {})


def _look_up(name: str, kind: str, asked: str, key: str, count: int, *questions: str) -> Task:
    """One attribute of the one of `count` things that has another: `asked` and `key` are colors or shapes."""
    names = {"colors": COLOR_NAMES, "shapes": SHAPES}
    return Task(
        name, kind, names[asked], _other_of(asked, key, names[key], count),
        lambda v, slots: v[asked][v[key].index(slots["key"])],
        questions,
    )  # fmt: skip


def _by_key(group: str, kind: str, count: int) -> tuple[Task, Task]:
    """The color of the one of `count` things that has a shape, and the shape of the one that has a color."""
    return (
        _look_up(
            f"{group}+color_of_shape", kind, "colors", "shapes", count,
            "What color is the {key}?",
            "Name the color of the {key}.",
            "Which color does the {key} have?",
        ),
        _look_up(
            f"{group}+shape_of_color", kind, "shapes", "colors", count,
            "What shape is {key}?",
            "Name the shape that is {key}.",
            "What is the shape of the {key} object?",
        ),
    )  # fmt: skip


_WHERE = (
    "Where is the {key}? {options}",
    "In which part of the picture is the {key}?",
    "Where do you see the {key}?",
)


TASKS: tuple[Task, ...] = (
    _plain(
        "SHAPES+shape_naming", "single", "shape", SHAPES,
        "What shape is this?",
        "Name the shape in the picture.",
        "Which shape do you see?",
        "What is the shape of the object?",
    ),
    _plain(
        "SHAPES+color_naming", "single", "color", COLOR_NAMES,
        "What color is the object?",
        "Name the color of the object.",
        "Which color does the shape have?",
        "In what color is the shape drawn?",
    ),
    _plain(
        "SHAPES+background_color", "single", "background", BACKGROUND_NAMES,
        "What color is the background?",
        "Name the background color.",
        "What is the color behind the object?",
        "Which color is the background of this picture? {options}",
    ),
    _plain(
        "SHAPES+position", "single", "place", PLACES,
        "Where is the object?",
        "In which part of the picture is the shape?",
        "Name the place of the object.",
        "Where in the picture is the shape? {options}",
    ),
    Task(
        "SHAPES+color_and_shape", "single", _COLORED_SHAPES,
        lambda rng, answer: (dict(zip(("color", "shape"), answer.split(), strict=True)), {}),
        lambda v, slots: f"{v['color']} {v['shape']}",
        (
            "What object is this? Answer with its color and shape.",
            "Name the object by color and shape.",
            "Say in two words what you see: color and shape.",
        ),
    ),
    Task(
        "COUNTING+how_many", "group", NUMBERS[1:7],
        lambda rng, answer: ({"count": NUMBERS.index(answer)}, {}),
        lambda v, slots: NUMBERS[v["count"]],
        (
            "How many objects are there?",
            "Count the shapes.",
            "What is the number of objects in the picture?",
            "How many shapes do you see?",
        ),
    ),
    Task(
        "PAIRS+color_at_side", "pair", COLOR_NAMES,
        _side_wish("colors"), lambda v, slots: v["colors"][slots["at"]],
        (
            "What color is the object {side}?",
            "Name the color of the shape {side}.",
            "Which color do you see {side}?",
        ),
    ),
    Task(
        "PAIRS+shape_at_side", "pair", SHAPES,
        _side_wish("shapes"), lambda v, slots: v["shapes"][slots["at"]],
        (
            "What shape is {side}?",
            "Name the shape {side}.",
            "Which shape do you see {side}?",
        ),
    ),
    Task(
        "PAIRS+size_comparison", "pair", COLOR_NAMES, _larger, _larger_truth,
        (
            "What color is the {size} object?",
            "Which color does the {size} shape have?",
            "Name the color of the {size} one of the two objects.",
        ),
    ),
    *_by_key("PAIRS", "pair", 2),
    Task(
        "PAIRS+where", "pair", PLACES,
        _where_of_two, lambda v, slots: SIDES[v["layout"]][v["shapes"].index(slots["key"])],
        _WHERE,
    ),
    Task(
        "GRID+color_at_place", "quad", COLOR_NAMES,
        _corner_wish("colors"), lambda v, slots: v["colors"][slots["at"]],
        (
            "What color is the object {side}?",
            "Name the color of the shape {side}.",
            "Which color do you see {side}?",
        ),
    ),
    Task(
        "GRID+shape_at_place", "quad", SHAPES,
        _corner_wish("shapes"), lambda v, slots: v["shapes"][slots["at"]],
        (
            "What shape is {side}?",
            "Name the shape {side}.",
            "Which shape do you see {side}?",
        ),
    ),
    *_by_key("GRID", "quad", 4),
    Task(
        "GRID+where", "quad", PLACES,
        _where, lambda v, slots: PLACES[v["shapes"].index(slots["key"])],
        _WHERE,
    ),
    Task(
        "GRID+presence", "quad", ("yes", "no"),
        _presence, lambda v, slots: "yes" if slots["shape"] in v["shapes"] else "no",
        (
            "Is there a {shape} in the picture? Answer yes or no.",
            "Do you see a {shape}? Answer yes or no.",
            "Does the picture show a {shape}? Options: (a) yes (b) no",
        ),
    ),
    Task(
        "HANDWRITING+digit", "digit", _DIGITS,
        lambda rng, answer: ({"digits": [int(answer)]}, {}), lambda v, slots: str(v["digits"][0]),
        (
            "Which digit is this?",
            "Read the handwritten digit.",
            "What number was written by hand?",
            "Name the digit from 0 to 9 that you see.",
        ),
    ),
    Task(
        "HANDWRITING+odd_or_even", "digit", ("odd", "even"),
        _parity, lambda v, slots: parity(v["digits"][0]),
        (
            "Is the digit odd or even?",
            "Is this number odd or even?",
            "Say if the handwritten number is odd or even. Options: (a) odd (b) even",
        ),
    ),
    Task(
        "HANDWRITING+digit_at_side", "digits", _DIGITS,
        _digit_at_side, lambda v, slots: str(v["digits"][slots["at"]]),
        (
            "Which digit is {side}?",
            "Read the digit {side}.",
            "What is the digit {side}?",
        ),
    ),
    _plain(
        "READING+word", "word", "word", WORDS,
        "Read the word.",
        "What word is written here?",
        "Which word do you see?",
        "What does the text say?",
    ),
    _plain(
        "READING+text_color", "word", "color", COLOR_NAMES,
        "What color is the text?",
        "In what color is the word written?",
        "Name the color of the word.",
    ),
    Task(
        "READING+first_letter", "word", _ends(0), _word_with(0), lambda v, slots: v["word"][0],
        (
            "What is the first letter of the word?",
            "Which letter does the word begin with?",
            "Name the first letter.",
        ),
    ),
    Task(
        "READING+last_letter", "word", _ends(-1), _word_with(-1), lambda v, slots: v["word"][-1],
        (
            "What is the last letter of the word?",
            "Which letter does the word end with?",
            "Name the last letter.",
        ),
    ),
    _plain(
        "CHARTS+tallest_bar", "bars", "tallest", COLOR_NAMES,
        "What color is the tallest bar?",
        "Which bar is the tallest? Answer with its color.",
        "Name the color of the tallest bar in the chart.",
    ),
    _plain(
        "CHARTS+shortest_bar", "bars", "shortest", COLOR_NAMES,
        "What color is the shortest bar?",
        "Which bar is the shortest? Answer with its color.",
        "Name the color of the shortest bar in the chart.",
    ),
    _plain(
        "SIGNS+arrow_direction", "arrow", "direction", DIRECTIONS,
        "Where does the arrow point: north, east, south or west?",
        "In which direction does the arrow point?",
        "Name the direction of the arrow.",
    ),
    Task(
        "SIGNS+flag_color", "flag", COLOR_NAMES, _stripe, lambda v, slots: v["colors"][slots["at"]],
        (
            "What color is the {side} part of the flag?",
            "Which color has the {side} part of the flag?",
            "Name the color of the {side} part.",
        ),
    ),
    Task(
        "PATTERNS+odd_color", "odd", COLOR_NAMES,
        lambda rng, answer: ({"colors": [None, answer]}, {}), lambda v, slots: v["colors"][1],
        (
            "What color is the odd one?",
            "One shape has another color. Which color?",
            "Name the color of the one that is different.",
        ),
    ),
    _plain(
        "PATTERNS+odd_position", "odd", "place", PLACES,
        "Where is the odd one?",
        "One shape has another color. Where is it? {options}",
        "Name the place of the one that is different.",
    ),
)  # fmt: skip
