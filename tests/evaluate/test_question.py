"""Questions: a digest of all that a number is of, and the first few of them."""

from __future__ import annotations

import dataclasses
import zipfile

import pytest

from vflax.errors import UserError
from vflax.evaluate.question import Picture, Question, by_number, digest, limited


def question(key: str, unit: str, split: str = "one", picture: bytes = b"pixels") -> Question:
    return Question(key, "Is it?", "yes", {"split": split}, unit, (Picture("a.jpg", lambda: picture),))


def test_the_digest_is_of_everything_that_a_number_depends_on():
    own = question("1", "a")
    changed = (
        question("1", "a", picture=b"pixelz"), dataclasses.replace(own, answer="no"),
        dataclasses.replace(own, text="Is?"), dataclasses.replace(own, key="2"),
        dataclasses.replace(own, options={"A": "x"}),
        dataclasses.replace(own, hint="look"), dataclasses.replace(own, pictures=()),
    )  # fmt: skip
    assert len({digest([one]) for one in (own, *changed)}) == 1 + len(changed)
    assert digest([own]) == digest([question("1", "a")])


def test_a_picture_that_cannot_be_read_is_named():
    def broken() -> bytes:
        raise zipfile.BadZipFile("Bad CRC-32")

    own = dataclasses.replace(question("7", "a"), pictures=(Picture("b.jpg", broken),))
    with pytest.raises(UserError, match=r"7: picture b\.jpg: Bad CRC-32; fetch it again"):
        digest([own])


def test_keys_are_sorted_as_the_numbers_in_them():
    assert sorted(["v1_10", "v1_9", "v1_a"], key=by_number) == ["v1_a", "v1_9", "v1_10"]
    assert sorted(["10", "9", "\u0661"], key=by_number) == ["\u0661", "9", "10"]


def test_a_limit_takes_all_questions_of_the_first_pictures_of_each_group():
    questions = [
        question("1", "a"), question("2", "b"), question("3", "a"), question("4", "c"),
        question("5", "a", "two"), question("6", "c", "two"),
    ]  # fmt: skip
    assert [one.key for one in limited(questions, 1)] == ["1", "3", "5"]
    assert [one.key for one in limited(questions, 2)] == ["1", "2", "3", "5", "6"]
    assert limited(questions, None) == questions
