"""What the tiny ScienceQA asks: one function per skill, which draws a question in our own words and its answer.

Some are about a picture of the mini dataset, some about a text that stands beside the question, some about both, and
some are answered from what is known. Words are those of the mini dataset as far as they go: others take its tokenizer
a piece for every letter or two. Every solution ends with the right choice, at one distance from the letter that follows
("The answer is B."), for a tiny decoder looks there first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipeline.mini.captions import at_place, parity, plural, with_articles
from data_pipeline.mini.draw import SHAPES
from data_pipeline.mini.scenes import (
    COLOR_NAMES,
    DIGITS,
    DIRECTIONS,
    NUMBERS,
    PLACES,
    SIDES,
    SIZES,
    STRIPES,
    WORDS,
    Sampler,
    Scene,
)

_CORNERS = {
    "circle": "no", "heart": "one", "moon": "two", "triangle": "three", "square": "four", "diamond": "four",
    "star": "five",
}  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """A question before its choices are drawn.

    question, right, solution, hint: as they will stand in the problem; hint "": none.
    names: what the wrong choices are drawn from; the right one may be among them.
    scene: what its picture shows; None: it has none.
    """

    question: str
    right: str
    names: Sequence[str]
    solution: str
    hint: str = ""
    scene: Scene | None = None


@dataclass(frozen=True)
class Skill:
    """What ScienceQA says of a question beside the question itself.

    grades: the first and the last in which it is asked.
    choices: so many, or all there are.
    draw: (where scenes and random numbers come from, whether the scene is to be a held-out one) -> a question.
    """

    subject: str
    topic: str
    category: str
    skill: str
    grades: tuple[int, int]
    lecture: str
    choices: int
    draw: Callable[[Sampler, bool], Draft]


# --- natural science --------------------------------------------------------------------------------------------------


def _color(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("single", held_out)
    shape, color = scene.values["shape"], scene.values["color"]
    return Draft(f"What color is the {shape}?", color, COLOR_NAMES, f"The {shape} is {color}.", scene=scene)


def _shape(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("single", held_out)
    shape, color = scene.values["shape"], scene.values["color"]
    solution = with_articles(f"The {color} object is a {shape}.")
    return Draft(f"What is the shape of the {color} object?", shape, SHAPES, solution, scene=scene)


def _count(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("group", held_out)
    count, shape = scene.values["count"], scene.values["shape"]
    solution = f"The number of {plural(shape, 2)} is {NUMBERS[count]}."
    return Draft(
        f"How many {plural(shape, 2)} are there?", NUMBERS[count], NUMBERS[1:7], solution, scene=scene
    )


def _size(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("pair", held_out)
    size, at = s.rng.choice((("large", scene.values["larger"]), ("small", 1 - scene.values["larger"])))
    colors = scene.values["colors"]
    solution = f"The {size} object is {colors[at]}."
    return Draft(f"What color is the {size} object?", colors[at], colors, solution, scene=scene)


def _chart(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("bars", held_out)
    end = s.rng.choice(("tallest", "shortest"))
    color = scene.values[end]
    solution = f"The {end} bar is {color}."
    return Draft(f"Which bar is the {end}?", color, scene.values["colors"], solution, scene=scene)


def _push(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("arrow", held_out)
    direction = scene.values["direction"]
    return Draft(
        "What is the direction of the push?", direction, DIRECTIONS, f"The arrow is pointing {direction}.",
        "The arrow in the picture shows a push.", scene,
    )  # fmt: skip


def _parity(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("digit", held_out)
    digit = scene.values["digits"][0]
    right = parity(digit)
    return Draft(
        "Is the digit odd or even?", right, ("odd", "even"), f"The digit {digit} is {right}.", scene=scene
    )


def _cups(s: Sampler, held_out: bool) -> Draft:
    colors, states = s.rng.sample(COLOR_NAMES, 2), s.rng.sample(("hot", "cold"), 2)
    hint = " ".join(f"The {color} cup is {state}." for color, state in zip(colors, states, strict=True))
    at = s.rng.randrange(2)
    return Draft(
        f"Which cup is {states[at]}?", colors[at], colors, f"The {states[at]} cup is {colors[at]}.", hint
    )


def _corners(s: Sampler, held_out: bool) -> Draft:
    shape = s.rng.choice(tuple(_CORNERS))
    number = _CORNERS[shape]
    others = [name for name, own in _CORNERS.items() if own != number]
    things = "corner" if number == "one" else "corners"
    solution = f"The shape that has {number} {things} is the {shape}."
    return Draft(f"Which shape has {number} {things}?", shape, others, solution)


def _even(s: Sampler, held_out: bool) -> Draft:
    digit = s.rng.choice(DIGITS)
    kind = parity(int(digit))
    others = [one for one in DIGITS if parity(int(one)) != kind]
    return Draft(f"Which number is {kind}?", digit, others, f"The number that is {kind} is {digit}.")


# --- social science ---------------------------------------------------------------------------------------------------


def _way(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("arrow", held_out)
    direction, color = scene.values["direction"], scene.values["color"]
    return Draft(
        f"Where is the {color} arrow on the map pointing?", direction, DIRECTIONS,
        f"The arrow is pointing {direction}.", scene=scene,
    )  # fmt: skip


def _flag(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("flag", held_out)
    at = s.rng.randrange(3)
    part, color = STRIPES[scene.values["layout"]][at], scene.values["colors"][at]
    question = f"What color is the {part} of the flag?"
    return Draft(question, color, scene.values["colors"], f"The {part} is {color}.", scene=scene)


def _place(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("single", held_out)
    shape, place = scene.values["shape"], scene.values["place"]
    return Draft(
        f"Where on the map is the {shape}?", place, PLACES, f"The {shape} is {at_place(place)}.",
        "The picture is a map.", scene,
    )  # fmt: skip


def _side(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("pair", held_out)
    at = s.rng.randrange(2)
    sides = SIDES[scene.values["layout"]]
    thing = f"{scene.values['colors'][at]} {scene.values['shapes'][at]}"
    return Draft(
        f"Where on the map is the {thing}?", sides[at], sides, f"The {thing} is {at_place(sides[at])}.",
        scene=scene,
    )  # fmt: skip


def _goods(s: Sampler, held_out: bool) -> Draft:
    teams, goods = s.rng.sample(COLOR_NAMES, 2), s.rng.sample(SHAPES, 2)
    hint = " ".join(f"The {team} team has a {thing}." for team, thing in zip(teams, goods, strict=True))
    at = s.rng.randrange(2)
    solution = f"The team that has the {goods[at]} is {teams[at]}."
    return Draft(f"Which team has the {goods[at]}?", teams[at], teams, solution, with_articles(hint))


def _more(s: Sampler, held_out: bool) -> Draft:
    teams, counts = s.rng.sample(COLOR_NAMES, 2), s.rng.sample(range(1, 7), 2)
    hint = " ".join(f"The {team} team has {NUMBERS[n]}." for team, n in zip(teams, counts, strict=True))
    most = counts.index(max(counts))
    solution = f"{NUMBERS[counts[most]].capitalize()} is more, so the team is {teams[most]}."
    return Draft("Which team has more?", teams[most], teams, solution, hint)


def _behind(s: Sampler, held_out: bool) -> Draft:
    at = s.rng.randrange(4)
    ahead, behind = DIRECTIONS[at], DIRECTIONS[(at + 2) % 4]
    question = (
        f"The {s.rng.choice(COLOR_NAMES)} {s.rng.choice(SHAPES)} goes {ahead}. Which direction is behind it?"
    )
    return Draft(question, behind, DIRECTIONS, f"Behind {ahead} is {behind}.")


# --- language science -------------------------------------------------------------------------------------------------


def _word(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("word", held_out)
    word = scene.values["word"]
    return Draft("Which word is written here?", word, WORDS, f"The word is {word}.", scene=scene)


def _ink(s: Sampler, held_out: bool) -> Draft:
    scene = s.draw("word", held_out)
    word, color = scene.values["word"], scene.values["color"]
    return Draft(
        "What color is the word?", color, COLOR_NAMES, f"The word is {color}.", f"The word is {word}.", scene
    )


def _letter(end: str, at: int) -> Callable[[Sampler, bool], Draft]:
    def draw(s: Sampler, held_out: bool) -> Draft:
        word = s.rng.choice(WORDS)
        others = [one for one in WORDS if one[at] != word[at]]
        solution = f"The word that has the {end} letter {word[at]} is {word}."
        return Draft(f"Which word has the {end} letter {word[at]}?", word, others, solution)

    return draw


def _adjective(s: Sampler, held_out: bool) -> Draft:
    named = {"size": s.rng.choice(SIZES), "color": s.rng.choice(COLOR_NAMES), "shape": s.rng.choice(SHAPES)}
    hint = with_articles(f"I see a {' '.join(named.values())}.")
    kind = s.rng.choice(tuple(named))
    solution = f"The word that tells the {kind} is {named[kind]}."
    return Draft(f"Which word tells the {kind}?", named[kind], tuple(named.values()), solution, hint)


def _kind(s: Sampler, held_out: bool) -> Draft:
    kind, own, others = s.rng.choice((("color", COLOR_NAMES, SHAPES), ("shape", SHAPES, COLOR_NAMES)))
    word = s.rng.choice(own)
    return Draft(f"Which word is a {kind}?", word, others, f"The word that is a {kind} is {word}.")


_NATURAL, _SOCIAL, _LANGUAGE = "natural science", "social science", "language science"
_MEASURE, _PRACTICE = "units-and-measurement", "science-and-engineering-practices"
_NAMING, _VOWELS = "word-study", "phonological-awareness"

SKILLS = (
    Skill(_NATURAL, "physics", "Light", "Name the color of an object", (1, 3),
          "Light has many colors.", 4, _color),
    Skill(_NATURAL, "physics", "Objects", "Name the shape of an object", (1, 4),
          "An object has a shape.", 4, _shape),
    Skill(_NATURAL, _MEASURE, "Counting", "Count objects in a picture", (1, 6),
          "I count one after the other.", 4, _count),
    Skill(_NATURAL, _MEASURE, "Size", "Compare the sizes of objects", (2, 7),
          "Objects are large or small.", 2, _size),
    Skill(_NATURAL, _PRACTICE, "Charts", "Read a bar chart", (5, 12),
          "A chart has a bar for each number.", 4, _chart),
    Skill(_NATURAL, "physics", "Forces", "Tell the direction of a push", (4, 9),
          "A push has a direction.", 4, _push),
    Skill(_NATURAL, _PRACTICE, "Numbers", "Tell odd from even in handwriting", (3, 8),
          "A digit is odd or even.", 2, _parity),
    Skill(_NATURAL, "physics", "Heat", "Find out what is hot and what is cold", (3, 10),
          "The text says what is hot.", 2, _cups),
    Skill(_NATURAL, _PRACTICE, "Geometry", "Tell shapes by their corners", (4, 12),
          "Shapes differ in their corners.", 4, _corners),
    Skill(_NATURAL, _PRACTICE, "Numbers", "Choose odd and even numbers", (3, 11),
          "An even number can be divided by two.", 3, _even),
    Skill(_SOCIAL, "geography", "Maps", "Read the direction of an arrow on a map", (2, 8),
          "A map has four directions.", 4, _way),
    Skill(_SOCIAL, "geography", "Flags", "Describe a flag", (3, 12),
          "A flag has three parts.", 3, _flag),
    Skill(_SOCIAL, "geography", "Maps", "Find one thing on a map", (1, 6),
          "A thing on a map has a place.", 4, _place),
    Skill(_SOCIAL, "geography", "Maps", "Find one of two things on a map", (5, 11),
          "Two things have two places.", 2, _side),
    Skill(_SOCIAL, "economics", "Goods", "Find out who has something", (2, 9),
          "The text says who has what.", 2, _goods),
    Skill(_SOCIAL, "economics", "Goods", "Find out who has more", (6, 12),
          "The larger number is more.", 2, _more),
    Skill(_SOCIAL, "geography", "Directions", "Name the opposite direction", (4, 10),
          "North is not south and east is not west.", 4, _behind),
    Skill(_LANGUAGE, "reading-comprehension", "Words", "Read a word", (1, 4),
          "A word has letters.", 4, _word),
    Skill(_LANGUAGE, "reading-comprehension", "Words", "Tell the color of a word", (1, 7),
          "A word has a color, too.", 4, _ink),
    Skill(_LANGUAGE, _VOWELS, "Letters", "Find the first letter of a word", (1, 5),
          "We read a word from left to right.", 3, _letter("first", 0)),
    Skill(_LANGUAGE, _VOWELS, "Letters", "Find the last letter of a word", (2, 7),
          "The last letter is on the right.", 3, _letter("last", -1)),
    Skill(_LANGUAGE, _NAMING, "Adjectives", "Tell what a word says of a thing", (4, 12),
          "A word tells one thing.", 3, _adjective),
    Skill(_LANGUAGE, _NAMING, "Nouns", "Tell words for colors from words for shapes", (5, 12),
          "Words name colors and shapes.", 3, _kind),
)  # fmt: skip
