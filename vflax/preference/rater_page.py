"""A page on which people say which of two answers is better, without knowing whose they are.

    python -m vflax.preference page A=FILE B=FILE --questions=questions.jsonl --images=DIR --out=page.html --pairs=50

The page is one file that works offline; each rater saves a file of ratings on it. Which side is whose is drawn for each
pair and stands in page.key.json alone, which `aggregate` reads and raters must not get. Some pairs come twice, the
sides swapped.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vflax.constants import EXIT_DONE
from vflax.errors import UserError
from vflax.preference.pictures import data_url, picture_path
from vflax.preference.questions import ChatQuestion, Model, read_models, read_questions
from vflax.preference.ratings import KEY_FORMAT
from vflax.preference.saving import save_json
from vflax.whole_file import replace

_PIXELS = 1024  # of the longer side of a picture on the page


@dataclass(frozen=True)
class Item:
    """A pair on the page. first: the model whose answer is Answer 1; texts: both answers; repeats: the id of the item
    that this one is again, "" for none."""

    id: str
    question: ChatQuestion
    first: str
    texts: tuple[str, str]
    repeats: str = ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add = parser.add_argument
    add("models", nargs=2, metavar="NAME=ANSWERS", help="the two models")
    add("--questions", required=True, type=Path, metavar="FILE", help="questions.jsonl")
    add("--images", required=True, type=Path, metavar="DIR", help="the folder of their pictures")
    add("--out", required=True, type=Path, metavar="PAGE.html")
    add("--key", type=Path, metavar="KEY.json", help="whose answers are where (default: PAGE.key.json)")
    add("--pairs", type=int, default=50, metavar="N", help="drawn by --seed (default: 50, or all there are)")
    add("--repeats", type=int, default=5, metavar="N", help="pairs that come twice (default: 5)")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn and of the sides (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Write page and key; status 0."""
    if args.pairs < 1 or not 0 <= args.repeats <= args.pairs:
        raise UserError(
            f"--pairs={args.pairs} --repeats={args.repeats}: expected at least 1 pair, and from 0 to all of them twice"
        )
    key = args.key or args.out.with_suffix(".key.json")
    if key.resolve() == args.out.resolve():
        raise UserError(f"--key={key}: is the page itself; name another file")
    questions = read_questions(args.questions)
    models = read_models(args.models, questions)
    items = draw(questions, models, args.pairs, args.repeats, args.seed)
    page, content = render(items, args.images)
    save_json(key, key_of(page, items, models))
    replace(args.out, content)
    repeated = sum(bool(item.repeats) for item in items)
    print(
        f"{args.out}: {len(items) - repeated} pairs, {repeated} of them twice, {len(content) / 1e6:.1f} MB\n"
        f"{key}: whose answers are where; keep it from raters"
    )
    return EXIT_DONE


def draw(
    questions: Sequence[ChatQuestion], models: Sequence[Model], pairs: int, repeats: int, seed: int
) -> list[Item]:
    """Pairs of different answers, each with a side drawn for each model, and some of them again with sides swapped.

    Raises:
        UserError: all answers are the same.
    """
    a, b = models
    # The names are in the seed, so that who knows the seed alone cannot draw again what side is whose.
    rng = random.Random(f"{seed} {a.sha256} {b.sha256} {a.name} {b.name}")
    differing = [n for n in range(len(questions)) if a.answers[n].text != b.answers[n].text]
    if not differing:
        raise UserError(
            f"{a.name} and {b.name} give the same answers to all questions; there is nothing to compare"
        )
    found = []
    for n in sorted(rng.sample(differing, min(pairs, len(differing)))):
        one, other = rng.sample((a, b), 2)
        texts = (one.answers[n].text, other.answers[n].text)
        found.append(Item(f"{rng.getrandbits(64):016x}", questions[n], one.name, texts))
    for item in rng.sample(found, min(repeats, len(found))):
        other_name = b.name if item.first == a.name else a.name
        texts = (item.texts[1], item.texts[0])
        found.append(Item(f"{rng.getrandbits(64):016x}", item.question, other_name, texts, item.id))
    rng.shuffle(found)
    return found


def render(items: Sequence[Item], images: Path) -> tuple[str, str]:
    """The page's id, which is of its content, and the page. Nothing on it tells a model.

    Raises:
        UserError: a picture is missing or cannot be read.
    """
    urls = {
        name: data_url(picture_path(item.question, images), _PIXELS)
        for item in items
        if (name := item.question.image)
    }
    places = {name: place for place, name in enumerate(urls)}
    shown = {
        "pictures": list(urls.values()),
        "items": [
            {
                "id": item.id, "repeats": item.repeats, "question": item.question.text, "first": item.texts[0],
                "second": item.texts[1], "picture": places.get(item.question.image),
            }
            for item in items
        ],
    }  # fmt: skip
    page = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    loader = jinja2.PackageLoader("vflax.preference", "pages")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    style, script = (loader.get_source(environment, f"rater.{kind}.j2")[0] for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # "<" as an escape: whatever an answer says, it does not end the script element that holds it.
    data = json.dumps({"page": page, **shown}).replace("<", "\\u003c")
    content = environment.get_template("rater.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        data=Markup(data),
        total=len(items),
        twice=any(item.repeats for item in items),
    )
    return page, content


def key_of(page: str, items: Sequence[Item], models: Sequence[Model]) -> dict[str, Any]:
    """What the key file holds: of each item the question, whose answer is Answer 1 (`first`), and what it repeats."""
    return {
        "format": KEY_FORMAT,
        "page": page,
        "models": {model.name: model.sha256 for model in models},
        "items": {
            item.id: {
                "question_id": item.question.key, "kind": item.question.kind, "category": item.question.category,
                "first": item.first, "repeats": item.repeats,
            }
            for item in items
        },
    }  # fmt: skip
