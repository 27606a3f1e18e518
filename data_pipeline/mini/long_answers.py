"""Scene -> answers in full sentences, every word of them true: one sentence (stage 1's generation tasks) or a long
answer of at least 45 words (stage 2).

A long answer is an opening, the facts, a reason ("I can tell because ..."), and a closing remark; each comes in a few
wordings, and facts and reasons change places with the prompt. Vision-Flan, too, has tasks that ask for a sentence; so
what stage 2 changes is how much is said, as in the paper, and not the language.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from data_pipeline.mini.captions import at_place, parity, plural, with_articles
from data_pipeline.mini.scenes import NUMBERS, SIDES, Scene

Values = dict[str, Any]
MIN_WORDS = 45

# task name -> prompts. None of them looks like a short question: they ask for detail, length or reasons.
PROMPTS: dict[str, tuple[str, ...]] = {
    "LONG+detail": (
        "Describe the image in detail.",
        "Give a long and detailed description of this image.",
        "Write a paragraph about everything that the image shows.",
    ),
    "LONG+explain": (
        "Explain what you see and how you can tell.",
        "Explain in full sentences what the image shows and why you think so.",
        "Describe the image at length and give your reasons.",
    ),
    "LONG+conversation": (
        "I cannot see this image. Please describe it to me in detail.",
        "Can you tell me, in full sentences, everything about this image?",
        "Please explain this image to a friend who cannot see it.",
    ),
}
# The same for the tasks of stage 1 that are answered with one sentence.
SENTENCE_PROMPTS: dict[str, tuple[str, ...]] = {
    "GENERATION+caption": (
        "Write a caption for this image.",
        "Say in one sentence what the image shows.",
        "Give this image a short description.",
    ),
    "GENERATION+fact": (
        "Write one sentence about a detail of this image.",
        "Tell me one fact about the image.",
        "Point out something in this image.",
    ),
    "GENERATION+reason": (
        "Give one reason for what you see in the image.",
        "Say in one sentence how you can tell.",
        "Justify in a sentence what you see.",
    ),
}
_GREETINGS = ("Of course.", "Sure, I can do that.", "Gladly.")
_OPENINGS = ("The image shows {what}.", "In this image I can see {what}.", "This is a small image of {what}.")
_BACKGROUNDS = (
    "The background is plain {background}.",
    "Everything is drawn on a plain {background} background.",
    "Behind everything there is only a plain {background} background.",
)
_CLOSINGS = (
    "There is nothing else in the image.",
    "I do not see any other object in the image.",
    "Apart from that, the image is empty.",
    "That is all there is to see in this image.",
)


def sentence(scene: Scene, task: str, rng: random.Random) -> str:
    """A one-sentence answer to a prompt of `task`, one of SENTENCE_PROMPTS."""
    what, facts, reasons = _story(scene, rng)
    answers = {
        "GENERATION+caption": [opening.format(what=what) for opening in _OPENINGS],
        "GENERATION+fact": facts,
        "GENERATION+reason": reasons,
    }
    return with_articles(rng.choice(answers[task]))


def long_answer(scene: Scene, task: str, rng: random.Random) -> str:
    """A long answer to a prompt of `task`, one of PROMPTS."""
    what, facts, reasons = _story(scene, rng)
    body = [*facts, *reasons]
    if task == "LONG+explain":
        body = [*reasons, *facts]
    sentences = [rng.choice(_OPENINGS).format(what=what), *body, rng.choice(_CLOSINGS)]
    if task == "LONG+conversation":
        sentences.insert(0, rng.choice(_GREETINGS))
    return with_articles(" ".join(sentences))


# What is shown (a noun phrase), the facts, the reasons.
Story = tuple[str, list[str], list[str]]


def _story(scene: Scene, rng: random.Random) -> Story:
    what, facts, reasons = _STORIES[scene.kind](scene.values, rng)
    if "background" in scene.values:
        facts.append(rng.choice(_BACKGROUNDS).format(**scene.values))
    return what, facts, reasons


_SHAPE_REASONS = {
    "circle": "it is round and has no corners",
    "square": "it has four equal sides and four corners",
    "triangle": "it has three sides and three corners",
    "star": "it has five points around the middle",
    "heart": "it has two round parts at the top and one point at the bottom",
    "cross": "it has four arms of the same length",
    "diamond": "it has four sides and stands on a point",
    "moon": "it is thin and round like a new moon",
}
_SIZE_FACTS = {
    "large": "The {thing} is large and takes up a good part of the image.",
    "small": "The {thing} is small and leaves a good part of the image empty.",
}


def _single(v: Values, rng: random.Random) -> Story:
    facts = [
        f"The {v['shape']} is {at_place(v['place'])} of the image.",
        _SIZE_FACTS[v["size"]].format(thing=v["shape"]),
    ]
    return (
        f"a {v['color']} {v['shape']}",
        facts,
        [f"I can tell that it is a {v['shape']} because {_SHAPE_REASONS[v['shape']]}."],
    )


def _group(v: Values, rng: random.Random) -> Story:
    count, things = NUMBERS[v["count"]], plural(v["shape"], v["count"])
    what = f"{count} {v['color']} {things}" if v["count"] > 1 else f"one {v['color']} {things}"
    alone = "It stands alone, and there is no other shape next to it."
    facts = [
        alone if v["count"] == 1 else "All of them have the same color, the same shape and the same size.",
        f"I counted the shapes one after the other, and the number is {count}.",
    ]
    reason = f"I can tell that the shape is a {v['shape']} because {_SHAPE_REASONS[v['shape']]}."
    return what, facts, [reason, f"The color is {v['color']} and it is easy to see."]


def _pair(v: Values, rng: random.Random) -> Story:
    sides = [at_place(side) for side in SIDES[v["layout"]]]
    things = [f"{v['colors'][i]} {v['shapes'][i]}" for i in range(2)]
    large, small = v["larger"], 1 - v["larger"]
    facts = [
        f"The {things[0]} is {sides[0]} of the image, and the {things[1]} is {sides[1]} of it.",
        f"The {things[large]} is the larger one of the two, and the {things[small]} is the smaller one.",
    ]
    i = rng.randrange(2)
    reason = f"I can tell that there is a {v['shapes'][i]} because {_SHAPE_REASONS[v['shapes'][i]]}."
    return (
        f"a {things[0]} and a {things[1]}",
        facts,
        ["They have different shapes and different colors.", reason],
    )


_DIGIT_REASONS = (
    "it is one closed round line",
    "it is hardly more than one line from top to bottom",
    "it has a round line at the top and a flat line at the bottom",
    "it has two round parts that are open on the left",
    "two of its lines meet and one line crosses them",
    "it has a flat line at the top and a round part at the bottom",
    "it has a closed round part at the bottom",
    "it has a flat line at the top and one long line below",
    "it has two closed round parts, one at the top and one at the bottom",
    "it has a closed round part at the top",
)


def _digit(v: Values, rng: random.Random) -> Story:
    digit = v["digits"][0]
    facts = [
        f"It was written by hand in {v['color']} with a thick pen.",
        f"The number {digit} is {parity(digit)}, so it can{'not' if digit % 2 else ''} be divided by two.",
        "The digit is large and easy to read, and there is only this one.",
    ]
    return (
        f"the handwritten digit {digit}",
        facts,
        [f"I can tell that it is a {digit} because {_DIGIT_REASONS[digit]}."],
    )


def _digits(v: Values, rng: random.Random) -> Story:
    digits = [str(digit) for digit in v["digits"]]
    facts = [
        f"There is a {digits[0]} on the left and a {digits[1]} on the right.",
        f"Both of them were written by hand in {v['color']} with a thick pen.",
    ]
    digit = rng.choice(v["digits"])
    return (
        "two handwritten digits",
        facts,
        [f"I can tell that there is a {digit} because {_DIGIT_REASONS[digit]}."],
    )


def _quad(v: Values, rng: random.Random) -> Story:
    things = [f"{color} {shape}" for color, shape in zip(v["colors"], v["shapes"], strict=True)]
    facts = [
        f"The {things[0]} is at the top, and the {things[3]} is at the bottom.",
        f"The {things[1]} is on the left of the image, and the {things[2]} is on the right of it.",
    ]
    shape = rng.choice(v["shapes"])
    reason = f"I can tell that there is a {shape} because {_SHAPE_REASONS[shape]}."
    return "four different shapes", facts, [reason, "No two of them have the same color."]


def _word(v: Values, rng: random.Random) -> Story:
    facts = [
        f"The word is {at_place(v['place'])} of the image, and all of its letters are {v['color']}.",
        "It is written in large letters, which are easy to read.",
    ]
    letters = ", ".join(v["word"][:-1]) + f" and {v['word'][-1]}"
    return (
        f"the word {v['word']}",
        facts,
        [f"I read the letters {letters} from left to right, so the word is {v['word']}."],
    )


def _bars(v: Values, rng: random.Random) -> Story:
    names = ", ".join(v["colors"][:-1]) + f" and {v['colors'][-1]}"
    facts = [
        f"From left to right the bars are {names}.",
        f"The {v['tallest']} bar is the tallest one, and the {v['shortest']} bar is the shortest one.",
    ]
    reason = f"I can tell because the top of the {v['tallest']} bar is above all other bars."
    return (
        f"a bar chart with {NUMBERS[v['count']]} bars",
        facts,
        [reason, "All bars stand on one line at the bottom."],
    )


def _arrow(v: Values, rng: random.Random) -> Story:
    facts = [
        f"The arrow is pointing {v['direction']}, and its color is {v['color']}.",
        _SIZE_FACTS[v["size"]].format(thing="arrow"),
    ]
    reason = f"I can tell the direction because the wide head of the arrow is at the end that points {v['direction']}."
    return f"a {v['color']} arrow", facts, [reason]


def _flag(v: Values, rng: random.Random) -> Story:
    first, middle, last = v["colors"]
    start, end = SIDES[v["layout"]]
    facts = [
        f"The {start} part of the flag is {first}, the middle part is {middle}, and the {end} part is {last}.",
        "The three parts have about the same size and cover the whole image.",
    ]
    lines = "from top to bottom" if v["layout"] == "row" else "from left to right"
    return (
        "a flag with three parts",
        facts,
        [f"I can tell the parts because the lines between them go {lines}."],
    )


def _odd(v: Values, rng: random.Random) -> Story:
    usual, odd = v["colors"]
    things = plural(v["shape"], 4)
    facts = [
        f"Three of the {things} are {usual}, and only one of them is {odd}.",
        f"The odd one is {at_place(v['place'])} of the image.",
    ]
    reason = f"I can tell that it is the odd one because its color is {odd}, and no other {v['shape']} has that color."
    return f"four {things}", facts, [reason]


# One for each kind of scene that stages 1 and 2 show; sixteen things at once would make too long a story.
_STORIES: dict[str, Callable[[Values, random.Random], Story]] = {
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

KINDS = tuple(_STORIES)
