"""Text of tokens that come one by one."""

from __future__ import annotations

import random

import pytest

from tests.weights import hub
from vflax.generate.text import Detokenizer, StopFinder
from vflax.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "A red circle.",
    "  two  spaces ",
    "naïve café",
    "漢字と仮名",
    "👩‍👩‍👧 family",
    "a\nb\n\n",
    "</s> <image>",
    "",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    hub.write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_of_all_tokens(words: Tokenizer, text: str) -> None:
    ids = words.encode(text)
    growing = Detokenizer(words)
    pieces = [growing.feed(token) for token in ids]
    assert "".join(pieces) + growing.end() == words.decode(ids)


def test_a_character_is_given_when_it_is_whole(words: Tokenizer) -> None:
    ids = words.encode("漢")
    assert len(ids) > 2  # it is spelled in bytes
    growing = Detokenizer(words)
    pieces = [growing.feed(token) for token in ids]
    assert pieces[-1].endswith("漢") and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_never_becomes_whole_is_told_at_the_end(words: Tokenizer) -> None:
    ids = words.encode("漢")[:-1]
    growing = Detokenizer(words)
    assert "".join(map(growing.feed, ids)) + growing.end() == words.decode(ids)
    assert words.decode(ids).endswith("\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(words: Tokenizer) -> None:
    broken = words.encode("漢")[-1]  # a byte that continues a character
    ids = [broken] * 6 + words.encode("red")
    growing = Detokenizer(words)
    pieces = [growing.feed(token) for token in ids]
    assert "".join(pieces) + growing.end() == words.decode(ids)
    assert "red" in "".join(pieces)


def test_a_space_behind_a_special_token_is_kept(words: Tokenizer) -> None:
    ids = [*words.encode("red"), words.eos_id, *words.encode("blue")]
    growing = Detokenizer(words)
    assert "".join(map(growing.feed, ids)) + growing.end() == words.decode(ids)


def test_a_stop_string_is_found_however_the_text_is_cut() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=12))
        whole = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        finder, given, at = StopFinder(stops), "", 0
        stopped = False
        while at < len(text) and not stopped:
            step = rng.randint(1, 4)
            piece, stopped = finder.feed(text[at : at + step])
            given, at = given + piece, at + step
        if not stopped:
            given += finder.end()
        assert stopped == bool(whole)
        assert given == (text[: min(whole)[1]] if whole else text)


def test_nothing_is_held_back_without_need() -> None:
    finder = StopFinder(["STOP"])
    assert finder.feed("a S") == ("a ", False)
    assert finder.feed("x") == ("Sx", False)
    assert finder.feed("yST") == ("y", False)
    assert finder.feed("OP tail") == ("", True)
