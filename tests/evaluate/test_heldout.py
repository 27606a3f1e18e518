"""Held-out samples: loss of each task, exact match, majority, blind."""

from __future__ import annotations

import dataclasses

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


def test_a_permuted_image_is_another_one_wherever_the_task_has_another_as_many():
    """Questions on one picture follow each other in most data; one of a task may have two pictures."""
    shared = [dataclasses.replace(question(i, "a", "x"), images=question(n, "a", "x").images) for i, n in
              enumerate((1, 1, 1, 2))]  # fmt: skip
    pair = dataclasses.replace(question(4, "a", "x"), images=np.zeros((2, 2, 2, 3), np.uint8))
    questions = [*shared[:2], pair, *shared[2:]]
    permuted = heldout.permute_images(questions)
    assert [int(q.images[0, 0, 0, 0]) for q in permuted] == [2, 2, 0, 2, 1]
    assert permuted[2].images is pair.images  # there is none to give it
    assert [q.sample_id for q in permuted] == [q.sample_id for q in questions]


def test_what_is_kept_of_a_question_adds_up_to_its_score():
    long = "a long answer with many words in it"
    answered = [
        Answered(question(0, "colour", "red"), "Red.", "blue"),
        Answered(question(1, "colour", "blue"), "dark red", "blue"),
        Answered(question(2, "describe", long), "something else", ""),
    ]
    rows, score = heldout.records(answered), heldout.score(answered)
    assert [(row["id"], row["right"], row["blind_right"], row["words"], row["short"]) for row in rows] == [
        ("id0", True, False, 1, True), ("id1", False, True, 2, True), ("id2", False, False, 2, False)
    ]  # fmt: skip
    short = [row for row in rows if row["short"]]
    assert sum(row["right"] for row in short) / len(short) == score["accuracy"]


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


def test_a_task_stands_above_blind_from_25_points_on():
    def task(name: str, right: int, blind: int) -> list[Answered]:
        return [
            Answered(question(n, name, "x"), "x" if n < right else "y", "x" if n < blind else "y") for n in range(20)
        ]  # fmt: skip

    score = heldout.score([*task("a", 12, 7), *task("b", 11, 7), *task("c", 7, 12)])
    assert (score["short_tasks"], score["above_blind"]) == (3, 1)


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
