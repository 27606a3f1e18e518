"""The files around a page for raters: its key, what raters saved, what a judge said of the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.evaluate.files import json_lines, need
from vflax.preference.questions import TIE
from vflax.small_files import read_json
from vflax.values import NAME, NUMBER, OBJECT, Kind, wrong

KEY_FORMAT = "vflax preference key 1"
RATINGS_FORMAT = "vflax preference ratings 1"
VERDICTS = "verdicts.jsonl"
_CHOICES = ("first", "second", TIE)
_RATING = {
    "id": NAME,
    "choice": Kind(f"one of {', '.join(_CHOICES)}", lambda value: value in _CHOICES),
    "seconds": NUMBER,
}
_FILE = {"page": NAME, "rater": NAME, "ratings": OBJECT.listed()}


@dataclass(frozen=True)
class Key:
    """Of a page. models: {name: sha256 of its answers}, two; items: see `vflax.preference.rater_page.key_of`."""

    page: str
    models: Mapping[str, str]
    items: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Rated:
    """A rater's ratings. choices: {item: "first", "second" or "tie"}; preferred: {item: the model, or "tie"}; seconds:
    of each."""

    name: str
    choices: Mapping[str, str]
    preferred: Mapping[str, str]
    seconds: tuple[float, ...]


def read_key(path: Path) -> Key:
    """The key of a page.

    Raises:
        UserError: naming the file, where it is something else.
    """
    found = read_json(path)
    if found.get("format") != KEY_FORMAT:
        raise UserError(
            f"{path}: is no key of a page; name the file that was written beside the page, PAGE.key.json"
        )
    need(found, ("page", "models", "items"), str(path))
    return Key(found["page"], found["models"], found["items"])


def read_ratings(path: Path, key: Key, key_path: Path) -> Rated:
    """A rater's file.

    Raises:
        UserError: naming the file, where it is of another page or is damaged.
    """
    found = read_json(path)
    if found.get("format") != RATINGS_FORMAT:
        raise UserError(f"{path}: is no file of ratings; name what a rater saved on the page")
    _check(found, _FILE, str(path))
    if found["page"] != key.page:
        raise UserError(
            f"{path}: ratings of page {found['page']}, but {key_path} is the key of page {key.page}; name the key of "
            "that page"
        )
    choices: dict[str, str] = {}
    seconds = []
    for number, row in enumerate(found["ratings"], 1):
        where = f"{path}, rating {number}"
        _check(row, _RATING, where)
        if row["id"] not in key.items:
            raise UserError(f"{where}: {row['id']} is no pair of this page; save it again there")
        if row["id"] in choices:
            raise UserError(f"{where}: {row['id']} is rated twice; save it again on the page")
        choices[row["id"]] = row["choice"]
        seconds.append(float(row["seconds"]))
    if not choices:
        raise UserError(f"{path}: no ratings in it; leave it out")
    preferred = {item: _preferred(key, item, choice) for item, choice in choices.items()}
    return Rated(found["rater"], choices, preferred, tuple(seconds))


def _check(row: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    need(row, tuple(kinds), where)
    if problems := wrong(row, kinds):
        raise UserError(f"{where}: {'; '.join(problems.values())}; save it again on the page")


def _preferred(key: Key, item: str, choice: str) -> str:
    if choice == TIE:
        return TIE
    first = key.items[item]["first"]
    (second,) = key.models.keys() - {first}
    return first if choice == "first" else second


def read_judge(folder: Path, key: Key, names: Sequence[str]) -> dict[str, str]:
    """What the judge command wrote into a folder: {question_id: the model that it prefers, or "tie"}; without those it
    gave no verdict on.

    Raises:
        UserError: naming the file, where it is of other models, or of other answers of theirs.
    """
    path = folder / "judge.json"
    found = read_json(path)
    need(found, ("models",), str(path))
    for name in names:
        if name not in found["models"]:
            raise UserError(
                f"{path}: of {', '.join(found['models'])}, and the page of {' and '.join(names)}; judge these"
            )
        if found["models"][name] != key.models[name]:
            raise UserError(f"{path}: of other answers of {name} than those on the page; judge these")
    verdicts: dict[str, str] = {}
    for line, row in enumerate(json_lines(folder / VERDICTS), 1):
        need(row, ("question_id", "a", "b", "verdict"), f"{folder / VERDICTS}, line {line}")
        if {row["a"], row["b"]} == {*names} and row["verdict"] is not None:
            verdicts[row["question_id"]] = row["verdict"]
    return verdicts
