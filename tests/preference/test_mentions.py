"""Mentions of objects, and of those that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.preference.question_files import question
from vflax.errors import UserError
from vflax.evaluate.files import json_lines
from vflax.preference import mentions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A man holds two hot dogs.", ["person", "hot dog"]),
        ("Buses, knives and a Teddy-Bear", ["bus", "knife", "teddy bear"]),
        ("a dog, a dog and a cat", ["dog", "dog", "cat"]),
        ("people wait at the bus stop", ["person"]),
        ("a catalogue of carpets", []),
    ],
)
def test_categories_of_coco_are_found_in_whole_words_the_longest_first(text: str, found: list[str]) -> None:
    assert mentions.load("coco").mentions(text) == found


def test_coco_has_eighty_categories() -> None:
    names = mentions.load("coco")._meant.values()
    assert len({name for name in names if name}) == 80


def test_the_mini_datasets_vocabulary_has_its_shapes_colours_digits_and_words() -> None:
    found = mentions.load("mini").mentions(
        "Two crosses, a red heart on navy, the digit 6, a CAT to the west."
    )
    assert found == ["cross", "red", "heart", "navy", "6", "CAT", "west"]


def test_a_mention_is_hallucinated_where_nothing_says_that_it_is_there() -> None:
    asked = question(
        text="What is the dog doing?", reference="It runs after a ball.", objects=("tree", "frisbee")
    )
    said = "The dog runs with a frisbee and a cat. The cat runs."
    assert mentions.load("coco").hallucinated(asked, said) == (["cat", "cat"], 4)


def test_of_a_question_without_reference_and_objects_nothing_is_said() -> None:
    assert mentions.load("coco").hallucinated(question(), "a cat") is None


def test_a_vocabulary_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("# comment\ngnu, wildebeest\n- gnu licence\n")
    assert mentions.load(str(path)).mentions("a gnu, two Wildebeests, the GNU licence") == ["gnu", "gnu"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("gnu, ox\ncow, ox\n", "line 2: ox stands for gnu already"), ("# nothing\n", "no objects")],
)
def test_a_broken_vocabulary_is_refused_by_name(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(content)
    with pytest.raises(UserError, match=rf"own\.txt.*{said}"):
        mentions.load(str(tmp_path / "own.txt"))


@pytest.mark.real_data
def test_answers_that_gpt_4_wrote_from_captions_mention_hardly_anything_else(shared_data: Path) -> None:
    """LLaVA's evaluation on COCO: 90 answers made from the captions and boxes of 30 pictures."""
    folder = shared_data / "llava-gpt4"
    pictures = {row["image"]: row for row in json_lines(folder / "caps_boxes_coco2014_val_80.jsonl")}
    said = {row["question_id"]: row["text"] for row in json_lines(folder / "qa90_gpt4_answer.jsonl")}
    vocabulary = mentions.load("coco")
    hallucinated = mentioned = 0
    for row in json_lines(folder / "qa90_questions.jsonl"):
        picture = pictures[row["image"]]
        there = [box["category"] for box in picture["instances"]]
        assert [vocabulary.mentions(name) for name in there] == [[name] for name in there]
        asked = question(text=row["text"], objects=(*there, *picture["captions"]))
        found = vocabulary.hallucinated(asked, said[row["question_id"]])
        assert found is not None
        hallucinated, mentioned = hallucinated + len(found[0]), mentioned + found[1]
    assert mentioned > 400
    assert hallucinated / mentioned < 0.03
