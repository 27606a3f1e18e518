"""Asking a model all questions, on one host or several, until all are answered."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.evaluate.hosts import Hosts
from vflax.evaluate.infer import Ask, OnAnswer, digest, infer
from vflax.evaluate.question import Picture

ALONE = Hosts()
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
            on_answer(ask.key, f" {ask.text}\n", "stop", (5, 2))
        return ""


def run(folder: Path, model: Echo, asked: list[Ask] = ASKED, hosts: Hosts = ALONE) -> str:
    return infer(model, folder, asked, {"style": "llava"}, hosts, show_progress=False)


def run_together(folders: Sequence[Path], models: Sequence[Echo]) -> list[str]:
    """Each host in a thread."""
    barrier = threading.Barrier(len(models), timeout=20)

    def one(process: int) -> str:
        try:
            return run(folders[process], models[process], hosts=Hosts(process, len(models), barrier.wait))
        except threading.BrokenBarrierError:
            return "another host has failed"
        except UserError as error:
            barrier.abort()
            return f"error: {error}"

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(one, range(len(models))))


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
    assert run_together([tmp_path / "three"] * 3, models) == ["", "", ""]
    assert [model.asked for model in models] == [4, 3, 3]
    run(tmp_path / "one", Echo())
    for name in ("predictions.jsonl", "run.json"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_another_number_of_hosts_goes_on(tmp_path: Path) -> None:
    assert "1 questions have no prediction" in run_together([tmp_path] * 3, [Echo(), Echo(), Echo(most=2)])[0]
    alone = Echo()
    assert run(tmp_path, alone) == ""
    assert alone.asked == 1


def test_hosts_that_do_not_share_the_folder_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    models = [Echo(), Echo()]
    said = run_together([tmp_path / "here", tmp_path / "there"], models)
    assert "there/run.json: not there" in said[1] and "one folder that all hosts share" in said[1]
    assert models[1].asked == 0


def test_what_it_took_is_kept_over_stops(tmp_path: Path) -> None:
    picture = Picture("a.png", lambda: b"")
    asked = [Ask(ask.key, ask.text, (picture,) * 2, 8) for ask in ASKED]
    run(tmp_path, Echo(most=4), asked)
    run(tmp_path, Echo(), asked)
    facts = json.loads((tmp_path / "infer.json").read_text())
    assert facts.pop("seconds") >= 0
    facts.pop("pictures_per_second")
    assert facts == {
        "questions": 10, "pictures": 20, "prompt_tokens": 50, "answer_tokens": 20, "finish": {"stop": 10},
        "hosts": 1, "starts": 2,
    }  # fmt: skip


def test_progress_is_told_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(Echo(), tmp_path / "exam", ASKED, {})
    assert "exam: 10 of 10 questions, 0.0 pictures/s, 0 s left" in capsys.readouterr().err


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(tmp_path, Echo(most=3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free the disk"):
            run(tmp_path, Echo())
    again = Echo()
    assert run(tmp_path, again) == ""
    assert len(rows(tmp_path)) == 10


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/exam.*cannot be written"):
        run(tmp_path / "file" / "exam", Echo())


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
