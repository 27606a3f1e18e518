"""vflax/data/questions.py: the prompt is the training sample up to its answer."""

from __future__ import annotations

import numpy as np
import pytest

from vflax import images
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.data.questions import ask, choose
from vflax.data.rows import encode
from vflax.data.source import Sample


def make(make_example, conversations=None, **kw) -> Sample:
    e = make_example(3, **kw)
    return Sample(e["id"], e["task"], conversations or e["conversations"], e["images"])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_prompt_is_what_comes_before_the_answer_in_training(make_example, row_format, count):
    sample = make(make_example, images=count)
    question = ask(sample, row_format)
    encoded = encode(sample.conversations, count, row_format, "s")
    first = int(np.flatnonzero(encoded.labels != IGNORE_LABEL)[0])
    np.testing.assert_array_equal(question.ids, encoded.ids[:first])
    assert (question.ids == IMAGE_TOKEN_ID).sum() == 4 * count
    assert question.ids.dtype == np.int32
    assert question.images.shape == (count, 8, 8, 3) and question.images.dtype == np.uint8
    for k in range(count):
        expected = images.preprocess(images.decode(sample.images[k]), row_format.rules)
        np.testing.assert_array_equal(question.images[k], expected)
    assert question.reference == sample.conversations[1]["value"]
    assert question.text == "what colour is this"


def test_of_several_answers_the_last_one_is_asked_for(make_example, row_format):
    values = ["<image>\none", "red", "two", "green"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    question = ask(make(make_example, turns), row_format)
    assert (question.text, question.reference) == ("two", "green")
    unanswered = ask(make(make_example, [*turns, {"from": "human", "value": "three"}]), row_format)
    np.testing.assert_array_equal(question.ids, unanswered.ids)


def test_a_choice_takes_so_many_usable_ones_of_each_task_by_the_seed():
    tasks = ["a", "b", "a", "a", "b", "c"] * 5
    usable = np.ones(30, bool)
    usable[[0, 1]] = False
    chosen = choose(tasks, usable, 4, seed=0)
    assert chosen == sorted(chosen) == choose(tasks, usable, 4, seed=0)
    assert chosen != choose(tasks, usable, 4, seed=1)
    assert not {0, 1} & set(chosen)
    assert {t: sum(tasks[i] == t for i in chosen) for t in "abc"} == {"a": 4, "b": 4, "c": 4}
    assert choose(tasks, usable, 99, seed=0) == list(range(2, 30))
