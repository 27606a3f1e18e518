"""python -m vflax.preference aggregate: what made-up raters said, and files of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.preference.question_files import lines, named, write_set
from vflax.preference.__main__ import main

PAIRS, REPEATS = 6, 2
Choose = Callable[[dict[str, str]], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With page.html and its key, of six pairs and two of them twice."""
    folder = write_set(tmp_path / "set")
    shown = (f"--images={folder / 'images'}", f"--out={folder / 'page.html'}", f"--repeats={REPEATS}")
    assert main(["page", *named(folder), *shown]) == 0
    return folder


def key(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "page.key.json").read_text())


def rate(folder: Path, name: str, choose: Choose, **change: Any) -> Path:
    """The file of a rater who chooses so of each item's facts in the key."""
    found = key(folder)
    ratings = [
        {"id": item, "choice": choose(facts), "seconds": 2.5} for item, facts in found["items"].items()
    ]
    result = {
        "format": "vflax preference ratings 1",
        "page": found["page"],
        "rater": name,
        "ratings": ratings,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**result, **change}))
    return path


def prefers(name: str) -> Choose:
    return lambda facts: "first" if facts["first"] == name else "second"


def first(facts: dict[str, str]) -> str:
    return "first"


def aggregate(folder: Path, *paths: Path, more: tuple[str, ...] = ()) -> int:
    files = [str(path) for path in paths]
    return main(["aggregate", *files, f"--key={folder / 'page.key.json'}", f"--out={folder / 'out'}", *more])


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "aggregate.json").read_text())


def test_a_rater_who_always_likes_one_model_makes_it_win(folder: Path) -> None:
    assert aggregate(folder, rate(folder, "Anna", prefers("short"))) == 0
    found = result(folder)
    assert (found["win_rate"]["value"], found["wins_a"], found["ratings"]) == (1, PAIRS, PAIRS)
    assert found["p"] == pytest.approx(2 / 2**PAIRS)
    anna = found["raters"]["Anna"]
    assert (anna["repeats"], anna["consistent"], anna["seconds"]) == (REPEATS, REPEATS, 2.5)
    assert found["agreement"]["pairs"] == []


def test_a_rater_who_likes_a_place_is_not_consistent(folder: Path) -> None:
    assert aggregate(folder, rate(folder, "Ben", first)) == 0
    ben = result(folder)["raters"]["Ben"]
    assert (ben["consistent"], ben["first_place"], ben["second_place"]) == (0, PAIRS + REPEATS, 0)


def test_raters_who_disagree_make_ties(folder: Path) -> None:
    paths = [rate(folder, "Anna", prefers("short")), rate(folder, "Ben", prefers("chatty"))]
    assert aggregate(folder, *paths) == 0
    found = result(folder)
    assert (found["win_rate"]["value"], found["ties"], found["p"]) == (0.5, PAIRS, 1)
    assert found["agreement"]["share"] == 0
    assert found["agreement"]["pairs"][0]["kappa"] == 0
    assert found["agreement"]["alpha"] == pytest.approx(1 - 11 * 12 / (12 * 11 - 2 * 6 * 5))
    text = (folder / "out" / "aggregate.md").read_text()
    assert "| Anna | 6 | 100.0 % (100.0 to 100.0) | 2 of 2 |" in text
    assert "| Anna, Ben | 6 | 0.0 % | 0.00 |" in text


def test_a_rater_may_have_rated_a_part(folder: Path) -> None:
    whole = rate(folder, "Anna", prefers("short"))
    once = [item for item, facts in key(folder)["items"].items() if not facts["repeats"]]
    some = [{"id": item, "choice": "tie", "seconds": 1} for item in once[:2]]
    assert aggregate(folder, whole, rate(folder, "Ben", first, ratings=some)) == 0
    found = result(folder)
    assert found["ratings"] == PAIRS + 2
    assert found["raters"]["Ben"]["win_rate"]["value"] == 0.5
    assert found["raters"]["Ben"]["repeats"] == 0
    # Four pairs with 1 and two with the mean of 1 and a half.
    assert found["win_rate"]["value"] == pytest.approx((4 + 2 * 0.75) / PAIRS)


def write_judge(folder: Path, verdict: str | None, **models: str) -> tuple[str]:
    rows = [{"question_id": str(n), "a": "short", "b": "chatty", "verdict": verdict} for n in range(PAIRS)]
    lines(folder / "judged" / "verdicts.jsonl", rows)
    (folder / "judged" / "judge.json").write_text(json.dumps({"models": {**key(folder)["models"], **models}}))
    return (f"--judge={folder / 'judged'}",)


def test_agreement_with_a_judge_is_told(folder: Path) -> None:
    paths = [rate(folder, "Anna", prefers("short")), rate(folder, "Ben", prefers("chatty"))]
    assert aggregate(folder, *paths, more=write_judge(folder, "short")) == 0
    found = result(folder)["judge"]
    assert {name: own["share"] for name, own in found.items()} == {"majority": 0, "Anna": 1, "Ben": 0}


def test_verdicts_that_a_judge_did_not_give_are_left_out(folder: Path) -> None:
    path = rate(folder, "Anna", prefers("short"))
    assert aggregate(folder, path, more=write_judge(folder, None)) == 0
    assert result(folder)["judge"]["Anna"] == {"n": 0, "share": None, "kappa": None}


def test_a_judge_of_other_answers_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rate(folder, "Anna", first)
    assert aggregate(folder, path, more=write_judge(folder, "short", chatty="another")) == 1
    assert "judge.json: of other answers of chatty than those on the page" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"page": "0123"}, "ratings of page 0123, but"),
        ({"format": "x"}, "is no file of ratings"),
        ({"ratings": []}, "no ratings in it"),
        ({"ratings": [{"id": "x", "choice": "first", "seconds": 1}]}, "rating 1: x is no pair of this page"),
        ({"ratings": [{"id": "x", "choice": "left", "seconds": 1}]}, "choice='left': expected one of first"),
        ({"ratings": [{"id": "x"}]}, "rating 1: lacks choice, seconds"),
        ({"ratings": {}}, "ratings={}: expected a list"),
        ({"rater": ""}, "rater='': expected a name"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(
    change: dict[str, Any], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rate(folder, "Anna", first, **change)
    assert aggregate(folder, path) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {path}") and said in told
    assert not (folder / "out").exists()


def test_a_pair_that_is_rated_twice_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": next(iter(key(folder)["items"])), "choice": "first", "seconds": 1}
    assert aggregate(folder, rate(folder, "Anna", first, ratings=[row, row])) == 1
    assert "is rated twice" in capsys.readouterr().err


def test_a_rater_who_is_there_twice_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rate(folder, "Anna", first)
    assert aggregate(folder, path, path) == 1
    assert "ratings of Anna are there twice" in capsys.readouterr().err


def test_a_key_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rate(folder, "Anna", first)
    assert main(["aggregate", str(path), f"--key={path}", f"--out={folder / 'out'}"]) == 1
    assert f"{path}: is no key of a page" in capsys.readouterr().err
