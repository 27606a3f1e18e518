"""Jobs run after what they need, on as many slots as there are, and what fails takes only its own with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.study.execute import Executor, Job, Slots, check_slots

ROOT = Path(__file__).parents[2]


def slots(count: int = 1, **on: str) -> Slots:
    return Slots([f"s{i}" for i in range(count)], on, os.environ | {"PYTHONPATH": str(ROOT)})


def job(folder: Path, name: str, *arguments: str, needs: tuple[str, ...] = (), **more: object) -> Job:
    file = folder / name

    def done() -> bool:
        return file.exists() and file.read_text().endswith("done\n")

    return Job(
        name, name, "tests.study.touch", (str(file), *arguments), needs, done, folder / f"{name}.log", **more
    )  # type: ignore[arg-type]


def execute(jobs: list[Job], where: Slots) -> tuple[Executor, list[str]]:
    said: list[str] = []
    executor = Executor(jobs, where, said.append)
    executor.run()
    return executor, said


def test_a_job_runs_after_those_that_it_needs(tmp_path: Path):
    executor, said = execute([job(tmp_path, "b", needs=("a",)), job(tmp_path, "a")], slots(2))
    assert not executor.failed
    starts = [line.partition(":")[0] for line in said if "starts" in line]
    assert starts == ["a", "b"]
    assert [line for line in said if line.startswith("[2/2] b: done")]


def test_what_is_done_before_its_turn_comes_is_not_run(tmp_path: Path):
    (tmp_path / "a").write_text("begun\ndone\n")
    executor, said = execute([job(tmp_path, "b", needs=("a",)), job(tmp_path, "a")], slots())
    assert not executor.failed and (tmp_path / "b").exists()
    assert [line for line in said if "starts" in line] == ["b: starts"]
    assert not (tmp_path / "a.log").exists()


def test_what_fails_is_told_with_its_own_words_and_only_what_needs_it_is_left_out(tmp_path: Path):
    jobs = [
        job(tmp_path, "a", "1"), job(tmp_path, "b", needs=("a",)), job(tmp_path, "c", needs=("b",)), job(tmp_path, "d"),
    ]  # fmt: skip
    executor, _ = execute(jobs, slots())
    assert list(executor.failed) == ["a"]
    assert "status 1: error: it went wrong" in executor.failed["a"]
    assert executor.skipped == ["b", "c"]
    assert (tmp_path / "d").read_text() == "begun\ndone\n"
    assert not (tmp_path / "b").exists()


def test_a_job_that_saved_and_asks_to_be_run_again_is_but_not_for_ever(tmp_path: Path):
    executor, _ = execute([job(tmp_path, "a", "75")], slots())
    assert "status 75" in executor.failed["a"]
    assert (tmp_path / "a").read_text() == 6 * "begun\n"


def test_a_job_that_ends_well_and_has_left_nothing_is_a_failure(tmp_path: Path):
    wrong = Job(
        "a", "a", "tests.study.touch", (str(tmp_path / "other"),), (), lambda: False, tmp_path / "a.log"
    )
    executor, _ = execute([wrong], slots())
    assert "is not done" in executor.failed["a"]


def test_two_slots_run_two_jobs_at_a_time(tmp_path: Path):
    began = time.monotonic()
    execute([job(tmp_path, name, "0", "1.5") for name in "ab"], slots(2))
    assert time.monotonic() - began < 2.9


def test_a_job_that_another_process_works_on_is_waited_for_and_not_run(tmp_path: Path):
    until = time.monotonic() + 1.0

    def busy() -> bool:
        if time.monotonic() < until:
            return True
        (tmp_path / "a").write_text("done\n")
        return False

    executor, said = execute([job(tmp_path, "a", busy=busy)], slots())
    assert not executor.failed
    assert "still works on it" in said[0]
    assert (tmp_path / "a").read_text() == "done\n"


def test_a_signal_stops_what_runs_and_starts_nothing_more(tmp_path: Path):
    jobs = [job(tmp_path, "a", "0", "60"), job(tmp_path, "b")]

    def stop() -> None:
        while not (tmp_path / "a").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    executor, _ = execute(jobs, slots())
    assert executor.stopped and not executor.failed
    assert (tmp_path / "a").read_text() == "begun\n"
    assert not (tmp_path / "b").exists()


def test_a_slice_gets_its_command_with_its_name_and_the_arguments_one_by_one(tmp_path: Path):
    where = Slots(["x", "y"], {"m": "ssh {slice} 'run {index}' -- {arguments}"}, {})
    one = Job("a", "a", "m", ("--k=v w", "--b"), (), lambda: True, tmp_path / "log")
    assert where.command(one, 1) == ["ssh", "y", "run 1", "--", "--k=v w", "--b"]


def test_lanes_of_this_machine_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    one = Job("a", "a", "m", (), (), lambda: True, tmp_path / "log")
    assert slots(2).command(one, 1)[:3] == ["taskset", "--cpu-list", "1,3"]
    assert slots(1).command(one, 0)[1:] == ["-m", "m"]
    assert slots(5).command(one, 0)[1:] == ["-m", "m"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("ssh {slice} run", "must be a word"), ("ssh {host} {arguments}", "unknown placeholder 'host'")],
)
def test_a_command_that_runs_nothing_is_refused(pattern: str, said: str):
    with pytest.raises(UserError, match=said):
        check_slots(Slots(["x"], {"vflax.launch": pattern}, {}))
