"""Asking a model all questions, on one host or several, until all are answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.evaluate.infer import Ask, OnAnswer, digest, infer
from vflax.evaluate.question import Picture

ASKED = [Ask(f"q{n}", f"question {n}", (), 8) for n in range(10)]


class Echo:
    """Answers with the question, the last one first; gives up after so many."""

    def __init__(self, most: int = 1000) -> None:
        self.identity, self.most, self.asked = {"name": "echo"}, most, 0

    def answer(self, asked: Sequence[Ask], on_answer: OnAnswer) -> str:
        for ask in reversed(asked):
            if self.asked == self.most:
                return "it was enough"
            self.asked += 1
            on_answer(ask.key, f" {ask.text}\n", "stop")
        return ""


def run(folder: Path, model: Echo, asked: list[Ask] = ASKED, **options: int) -> str:
    return infer(model, folder, asked, {"style": "llava"}, show_progress=False, **options)


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_every_question_has_its_stripped_answer_in_order(tmp_path: Path) -> None:
    assert run(tmp_path, Echo()) == ""
    assert rows(tmp_path) == [{"key": ask.key, "prediction": ask.text, "finish": "stop"} for ask in ASKED]


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = Echo(most=4), Echo()
    assert run(tmp_path, first) == "it was enough"
    assert not (tmp_path / "predictions.jsonl").exists()
    assert run(tmp_path, second) == ""
    assert (first.asked, second.asked) == (4, 6)
    assert len(rows(tmp_path)) == 10


def test_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    run(tmp_path, Echo())
    again = Echo()
    assert run(tmp_path, again) == ""
    assert again.asked == 0


def test_hosts_share_the_questions_whatever_their_number(tmp_path: Path) -> None:
    models = [Echo() for _ in range(3)]
    for process in (2, 1, 0):
        run(tmp_path / "three", models[process], process=process, processes=3)
    assert [model.asked for model in models] == [4, 3, 3]
    run(tmp_path / "one", Echo())
    assert (tmp_path / "three" / "predictions.jsonl").read_bytes() == (
        tmp_path / "one" / "predictions.jsonl"
    ).read_bytes()


def test_another_number_of_hosts_goes_on(tmp_path: Path) -> None:
    run(tmp_path, Echo(most=2), process=1, processes=3)
    alone = Echo()
    assert run(tmp_path, alone) == ""
    assert alone.asked == 8


def test_a_host_that_is_missing_is_told(tmp_path: Path) -> None:
    assert "have no prediction, the first: q1" in run(tmp_path, Echo(), process=0, processes=2)


def test_other_questions_are_another_run(tmp_path: Path) -> None:
    run(tmp_path, Echo())
    with pytest.raises(UserError, match="questions was"):
        run(tmp_path, Echo(), ASKED[:5])


def test_a_digest_is_of_all_that_is_asked() -> None:
    picture = Picture("a.png", lambda: b"")
    others = [
        [Ask("q0", "question 0", (), 9)],
        [Ask("q0", "question 1", (), 8)],
        [Ask("q0", "question 0", (picture,), 8)],
        [Ask("q1", "question 0", (), 8)],
    ]
    assert len({digest(one) for one in (ASKED[:1], *others)}) == 5
