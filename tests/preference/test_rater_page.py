"""python -m vflax.preference page: a page that does not tell whose answers are where, and a key that does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.preference.question_files import lines, model, named, question, write_set
from vflax.errors import UserError
from vflax.preference.__main__ import main
from vflax.preference.rater_page import draw

QUESTIONS = [question(str(n)) for n in range(40)]
A, B = model("ours", *(f"a{n}" for n in range(40))), model("theirs", *(f"b{n}" for n in range(40)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def page(folder: Path, *more: str, name: str = "page.html") -> int:
    shown = (f"--images={folder / 'images'}", f"--out={folder / name}", "--repeats=2")
    return main(["page", *named(folder), *shown, *more])


def data(folder: Path) -> dict[str, Any]:
    text = (folder / "page.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]


def test_the_page_says_nothing_of_models_and_the_key_says_all(folder: Path) -> None:
    assert page(folder) == 0
    text = (folder / "page.html").read_text()
    assert "short" not in text.replace("aria-keyshortcuts", "")
    assert "chatty" not in text and "jsonl" not in text
    shown, key = data(folder), json.loads((folder / "page.key.json").read_text())
    assert shown["page"] == key["page"]
    assert {item["id"] for item in shown["items"]} == set(key["items"])
    for item in shown["items"]:
        first = key["items"][item["id"]]["first"]
        assert (len(item["first"]) < 20) == (first == "short")
        assert (len(item["second"]) < 20) == (first == "chatty")


def test_some_pairs_come_twice_with_sides_swapped(folder: Path) -> None:
    assert page(folder) == 0
    items = {item["id"]: item for item in data(folder)["items"]}
    again = [item for item in items.values() if item["repeats"]]
    assert (len(items), len(again)) == (8, 2)
    for item in again:
        first = items[item["repeats"]]
        assert (item["question"], item["first"], item["second"]) == (
            first["question"], first["second"], first["first"]
        )  # fmt: skip


def test_pictures_are_in_the_page_each_once(folder: Path) -> None:
    assert page(folder) == 0
    shown = data(folder)
    assert len(shown["pictures"]) == 6
    assert all(url.startswith("data:image/png;base64,") for url in shown["pictures"])
    for item in shown["items"]:
        number = re.search(r"\d", item["question"])[0]  # type: ignore[index]
        others = [i["picture"] for i in shown["items"] if number in i["question"]]
        assert set(others) == {item["picture"]}


def test_nothing_is_fetched_from_anywhere(folder: Path) -> None:
    assert page(folder) == 0
    text = (folder / "page.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_sides_are_drawn_about_evenly_and_by_the_seed() -> None:
    found = draw(QUESTIONS, [A, B], 40, 0, 0)
    assert 10 <= sum(item.first == "ours" for item in found) <= 30
    assert found == draw(QUESTIONS, [A, B], 40, 0, 0)
    assert found != draw(QUESTIONS, [A, B], 40, 0, 1)


def test_pairs_are_a_part_of_the_questions_and_never_the_same_answer_twice() -> None:
    same = model("theirs", *(f"a{n}" if n % 2 else f"b{n}" for n in range(40)))
    found = draw(QUESTIONS, [A, same], 50, 5, 0)
    assert sorted(int(item.question.key) for item in found if not item.repeats) == list(range(0, 40, 2))
    few = draw(QUESTIONS, [A, B], 7, 0, 0)
    assert len({item.question.key for item in few}) == 7


def test_models_that_say_the_same_are_not_compared() -> None:
    with pytest.raises(UserError, match="ours and twin give the same answers to all questions"):
        draw(QUESTIONS, [A, model("twin", *(said.text for said in A.answers))], 5, 0, 0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pairs=0"], "expected at least 1 pair"),
        (["--pairs=3", "--repeats=4"], "from 0 to all of them twice"),
        (["--out=x.html", "--key=x.html"], "is the page itself"),
    ],
)
def test_flags_that_make_no_page_are_refused(
    more: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert page(folder, *more) == 1
    assert said in capsys.readouterr().err
    assert not (folder / "page.html").exists()


def test_a_missing_picture_leaves_no_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images" / "3.png").unlink()
    assert page(folder) == 1
    assert "3.png: not there" in capsys.readouterr().err
    assert not (folder / "page.html").exists() and not (folder / "page.key.json").exists()


def test_an_answer_cannot_end_the_script_that_holds_it(folder: Path) -> None:
    hostile = "</script><script>window.hacked = 1</script>\u2028\ud800"
    lines(folder / "short.jsonl", [{"question_id": n, "text": f"{hostile} {n}"} for n in range(6)])
    assert page(folder) == 0
    assert "window.hacked" in json.dumps(data(folder)["items"])
    assert (folder / "page.html").read_text().count("</script>") == 2
