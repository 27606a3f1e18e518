"""Held-out samples: loss of each task, exact match, majority, blind."""

from __future__ import annotations

import numpy as np

from vflax.data.questions import Question
from vflax.evaluate import heldout
from vflax.evaluate.heldout import Answered


def question(i: int, task: str, reference: str) -> Question:
    return Question(f"id{i}", task, "what?", reference, np.array([1]), np.full((1, 2, 2, 3), i, np.uint8))


def test_exact_match_ignores_case_spaces_and_a_full_stop():
    assert heldout.matches(" Dark  Red.", "dark red")
    assert not heldout.matches("red", "dark red")


def test_permuted_images_come_from_the_same_task():
    questions = [question(0, "a", "x"), question(1, "b", "y"), question(2, "a", "z"), question(3, "a", "x")]
    permuted = heldout.permute_images(questions)
    assert [int(q.images[0, 0, 0, 0]) for q in permuted] == [2, 1, 3, 0]
    assert [q.reference for q in permuted] == ["x", "y", "z", "x"]


def test_scores_are_means_over_tasks_with_short_answers():
    long = "a long answer with many words in it"
    answered = [
        Answered(question(0, "colour", "red"), "red", "blue"),
        Answered(question(1, "colour", "red"), "red", "red"),
        Answered(question(2, "colour", "blue"), "blue", "blue"),
        Answered(question(3, "colour", "green"), "red", "blue"),
        Answered(question(4, "digit", "7"), "7", "1"),
        Answered(question(5, "describe", long), "something else entirely", "nothing"),
    ]
    score = heldout.score(answered)
    assert score["tasks"]["colour"] == {
        "n": 4, "accuracy": 0.75, "majority": 0.5, "blind": 0.5, "words": 1, "short": True,
    }  # fmt: skip
    assert score["accuracy"] == (0.75 + 1.0) / 2
    assert score["blind"] == (0.5 + 0.0) / 2
    assert (score["short_tasks"], score["above_blind"]) == (2, 2)
    assert (score["words_short"], score["words_long"]) == (1, 3)


def test_without_short_answers_there_is_no_accuracy():
    score = heldout.score([Answered(question(0, "describe", "one two three four five six"), "a", "b")])
    assert score["accuracy"] is None and score["words_short"] is None


def test_held_out_loss_is_a_mean_over_tokens_in_all_and_of_each_task():
    batches = [
        ({"row": 0}, [["colour", "digit"], ["colour"]]),
        ({"row": 1}, [["digit"], []]),
    ]
    results = [
        {"losses": [[1.0, 3.0, 5.0], [7.0, 0.0, 0.0]], "segments": [[1, 2, 2], [1, 0, 0]]},
        {"losses": [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "segments": [[1, 0, 0], [0, 0, 0]]},
    ]

    def eval_step(params, batch):
        return {key: np.array(value) for key, value in results[batch["row"]].items()}

    total, tasks = heldout.heldout_loss(eval_step, {}, batches)
    assert total == 18 / 5
    assert tasks == {"colour": 8 / 2, "digit": 10 / 3}


def test_without_a_supervised_token_there_is_no_loss():
    def eval_step(params, batch):
        return {"losses": np.zeros((1, 2)), "segments": np.zeros((1, 2), int)}

    total, tasks = heldout.heldout_loss(eval_step, {}, [({}, [["colour"]])])
    assert np.isnan(total) and tasks == {}
