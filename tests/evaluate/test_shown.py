"""What the page shows of questions: bounded, each picture once, tables of which answers were taken for which."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest

from tests.evaluate.run_folder import picture, question, verdict
from vflax.evaluate.question import Picture
from vflax.evaluate.shown import browsed, confusions, outcome, yes_shares

ENOUGH = {"text_bytes": 10**6, "picture_bytes": 10**6}
KEY, OUTCOME, PROMPT, PICTURES, GROUPS = 0, 1, 2, 8, 9


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (verdict("1", "yes", "yes"), "right"),
        (verdict("1", "yes", "no"), "wrong"),
        (verdict("1", "yes", "no", score=0.4), "partly"),
        (verdict("1", "yes", "pink", parsed=None), "unparsed"),
        (verdict("1", "yes", None), "missing"),
    ],
)
def test_a_question_ends_in_one_of_five_ways(row: dict[str, Any], found: str) -> None:
    assert outcome(row) == found


def test_questions_stand_in_the_benchmarks_order_with_their_prompts_and_groups() -> None:
    rows = [
        verdict("1", "yes", "no"),
        verdict("2", "yes", "yes", groups={"split": "test"}),
        verdict("3", "no", "no", groups={}),
    ]
    found = browsed(rows, [], {"1": "Is it?", "2": "Is it?"}, **ENOUGH)
    assert [row[KEY] for row in found["rows"]] == ["1", "2", "3"]
    assert [row[OUTCOME] for row in found["rows"]] == ["wrong", "right", "right"]
    assert (found["prompts"], [row[PROMPT] for row in found["rows"]]) == (["Is it?"], [0, 0, -1])
    named = [found["names"][0][row[GROUPS][0]] if row[GROUPS][0] >= 0 else None for row in found["rows"]]
    assert (found["kinds"], named) == (["split"], ["dev", "test", None])


def test_too_much_text_leaves_out_right_and_other_questions_alike() -> None:
    rows = [verdict(str(n), "yes", "yes" if n % 10 else "no" * 40) for n in range(1000)]
    found = browsed(rows, [], {}, text_bytes=10_000, picture_bytes=0)["rows"]
    assert 5_000 < len(json.dumps(found)) < 11_000
    right = sum(row[OUTCOME] == "right" for row in found)
    assert abs(2 * right - len(found)) <= 1


def test_a_picture_of_several_questions_is_held_once() -> None:
    rows = [verdict(key, "yes", "yes") for key in "123"]
    shared, other = picture("a.png"), picture("b.png", colour="blue")
    questions = [question("1", shared), question("2", other, shared), question("3")]
    found = browsed(rows, [replace(own, unit="u") for own in questions], {}, **ENOUGH)
    assert len(found["pictures"]) == 2
    first, second, third = (row[PICTURES] for row in found["rows"])
    assert (first, third) == ([second[1]], [])
    assert second[0] != second[1]


def test_pictures_of_one_name_in_two_units_are_two() -> None:
    questions = [question("1", picture("0.png")), question("2", picture("0.png", colour="blue"))]
    found = browsed([verdict(key, "yes", "yes") for key in "12"], questions, {}, **ENOUGH)
    assert len(set(found["pictures"])) == 2


def test_a_picture_is_small_and_too_many_are_left_out() -> None:
    rows = [verdict(str(n), "yes", "yes") for n in range(20)]
    questions = [question(str(n), picture(f"{n}.png", (2000, 1000))) for n in range(20)]
    whole = browsed(rows, questions, {}, **ENOUGH)["pictures"]
    file = io.BytesIO(base64.b64decode(whole[0].partition(",")[2]))
    assert PIL.Image.open(file).size == (256, 128)
    found = browsed(rows, questions, {}, text_bytes=10**6, picture_bytes=5 * len(whole[0]))
    assert len(found["pictures"]) == 5
    assert sum(row[PICTURES] == [-1] for row in found["rows"]) == 15


def test_a_picture_that_cannot_be_read_is_none() -> None:
    def gone() -> bytes:
        raise FileNotFoundError

    questions = [question("1", Picture("gone", gone)), question("2", Picture("text", lambda: b"no picture"))]
    found = browsed([verdict(key, "yes", "yes") for key in "12"], questions, {}, **ENOUGH)
    assert found["pictures"] == ["", ""]


def test_answers_are_counted_against_what_was_read() -> None:
    rows = [
        verdict("1", "yes", "yes"), verdict("2", "yes", "no"), verdict("3", "yes", "no"), verdict("4", "no", "no"),
        verdict("5", "no", None), verdict("6", "no", "pink", parsed=None),
    ]  # fmt: skip
    (table,) = confusions(rows, {})
    assert table["columns"] == ["yes", "no", "(missing)", "(unparsed)"]
    assert [(row["name"], row["cells"]) for row in table["rows"]] == [
        ("yes", [1, 2, 0, 0]),
        ("no", [0, 1, 1, 1]),
    ]
    assert (table["title"], table["filters"]) == ("", True)


def test_open_questions_are_no_part_of_a_table_of_letters() -> None:
    rows = [verdict("1", "A", "B"), verdict("2", "B", "Z"), verdict("3", "42", "42")]
    (table,) = confusions(rows, {})
    assert table["title"] == "2 of 3 questions"
    assert table["columns"] == ["A", "B", "Z"]
    assert [row["cells"] for row in table["rows"]] == [[0, 1, 0], [0, 0, 1]]


def test_where_answers_are_free_there_is_no_table() -> None:
    assert confusions([verdict("1", "a cat", "a dog"), verdict("2", "a dog", "a dog")], {}) == []


def test_a_table_that_the_scorer_made_is_told() -> None:
    manifest = {"confusion": {"mnist": {"labels": ["0", "1"], "counts": [[5, 1, 2], [0, 8, 0]]}}}
    (table,) = confusions([verdict("1", "zero", "zero")], manifest)
    assert (table["title"], table["columns"]) == ("mnist", ["0", "1", "(no label)"])
    assert [(row["n"], row["cells"]) for row in table["rows"]] == [(8, [5, 1, 2]), (8, [0, 8, 0])]
    assert not table["filters"]


def test_a_large_table_is_drawn_and_its_frequent_mistakes_are_named() -> None:
    labels = [f"l{n}" for n in range(100)]
    counts = [[90 if row == column else 0 for column in range(101)] for row in range(100)]
    counts[3][7], counts[4][100] = 9, 10
    (table,) = confusions(
        [verdict("1", "zero", "zero")], {"confusion": {"c": {"labels": labels, "counts": counts}}}
    )
    assert table["mistakes"] == [("l4", "(no label)", 10), ("l3", "l7", 9)]
    image = PIL.Image.open(io.BytesIO(base64.b64decode(table["picture"].partition(",")[2])))
    strong, weak, nothing = (image.getpixel(place)[3] for place in ((3, 3), (7, 3), (8, 3)))
    assert image.size == (101, 100)
    assert strong > weak > nothing == 0
    assert weak == round(255 * (9 / 99) ** 0.5)  # the root of its share of the row


def test_shares_of_yes_are_told_of_all_and_of_each_group() -> None:
    rows = [
        verdict("1", "yes", "yes", groups={"split": "a"}), verdict("2", "no", "yes", groups={"split": "a"}),
        verdict("3", "no", "no", groups={"split": "b"}), verdict("4", "no", "pink", parsed=None, groups={"split": "b"}),
    ]  # fmt: skip
    assert yes_shares(rows) == [
        {"name": "all", "yes": 50, "no": 25, "true": 25},
        {"name": "a", "yes": 100, "no": 0, "true": 50},
        {"name": "b", "yes": 0, "no": 50, "true": 0},
    ]
    assert yes_shares([verdict("1", "A", "A")]) == []
