"""A hang that no heartbeat sees ends the process, with the stacks of all threads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tests import small
from vflax import give_up, watchdog
from vflax.watchdog import Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def watched(clock: Clock, *turns: float, **options: float) -> Watchdog:
    """A watchdog after a first turn of 50 s and then these."""
    result = Watchdog(ConfigDict({"factor": 20.0, "least": 30.0, "longest": 600.0} | options))
    for seconds in (50.0, *turns):
        clock.now += seconds
        result.step_done()
    return result


@pytest.mark.parametrize(
    ("turns", "limit", "what"),
    [
        pytest.param([2.0, 2, 3, 2, 2], 40, "a step has not", id="so many times the median"),
        pytest.param([0.1] * 9, 30, "a step has not", id="the least seconds where steps are short"),
        pytest.param(
            [2.0, 2], 600, "step 4 since this start has not", id="a compile's time while no median is known"
        ),
    ],
)
def test_a_step_may_take(clock: Clock, turns: list[float], limit: int, what: str):
    dog = watched(clock, *turns)
    clock.now += limit - 1
    assert dog.overdue() is None
    clock.now += 2
    words = f"{what} come to its end for {limit + 1} s; it may take {limit} s"
    assert str(dog.overdue()).startswith(words)


def test_an_evaluation_has_its_own_limit_and_leaves_the_step_s_time_as_it_was(clock: Clock):
    dog = watched(clock, *[2.0] * 9)
    clock.now += 25
    with dog.other("an evaluation"):
        clock.now += 599
        assert dog.overdue() is None
        clock.now += 2
        assert str(dog.overdue()).startswith("an evaluation has not come to its end for 601 s")
    clock.now += 14
    assert dog.overdue() is None
    clock.now += 2
    assert "for 41 s; it may take 40 s" in str(dog.overdue())


def test_an_evaluation_does_not_move_the_median(clock: Clock):
    dog = watched(clock, *[2.0] * 5)
    for _ in range(20):
        clock.now += 2
        with dog.other("an evaluation"):
            clock.now += 500
        dog.step_done()
    clock.now += 41
    assert "times the median, 2 s" in str(dog.overdue())


SCRIPT = """
import sys, threading, time
from pathlib import Path
from ml_collections import ConfigDict
from vflax.give_up import run_under_way
from vflax.watchdog import Watchdog
from vflax.workdir import write_status

def the_step_that_hangs():
    threading.Event().wait()

workdir = Path(sys.argv[1])
write_status(workdir, "running", 0)
(workdir / "metrics.jsonl").write_text('{"step": 7}\\n')
options = ConfigDict({"factor": 3.0, "least": 0.5, "longest": 5.0})
with run_under_way(workdir, 0), Watchdog(options) as dog:
    for _ in range(8):
        time.sleep(0.01)
        dog.step_done()
    the_step_that_hangs()
"""


def run_script(workdir: Path):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workdir)],
        env=small.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_step_that_hangs_ends_with_75_the_reason_and_all_stacks(tmp_path: Path):
    result = run_script(tmp_path)
    assert result.returncode == 75, result.stderr
    assert "error: process 0 (host " in result.stderr and "hangs: a step has not come" in result.stderr
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 7) and "hangs: a step" in status["reason"]
    for text in (result.stderr, (tmp_path / "hang-0.txt").read_text()):
        assert "in the_step_that_hangs" in text and text.count("hread 0x") >= 2


class Ended(BaseException):
    pass


def test_only_process_0_writes_the_status_and_every_one_its_own_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(give_up.os, "_exit", end)
    monkeypatch.setattr(give_up, "_end_soon", lambda: None)  # it would outlive the test
    monkeypatch.setattr(give_up, "_ONCE", threading.Lock())
    monkeypatch.setattr(give_up, "_RUNS", [])
    with pytest.raises(Ended, match="75"), give_up.run_under_way(tmp_path, 1):
        give_up.give_up("process 1 hangs", hang=True)
    assert [p.name for p in tmp_path.iterdir()] == ["hang-1.txt"]


def test_a_factor_of_0_is_no_watchdog():
    options = {"factor": 0.0, "least": 300.0, "longest": 7200.0}
    for factor, expected in ((0.0, False), (20.0, True)):
        with Watchdog(ConfigDict(options | {"factor": factor})):
            assert any(t.name == "watchdog" for t in threading.enumerate()) == expected


# The training command itself, whose loader blocks for ever at the third batch of a process that began at step 0.
BLOCKED = """
import sys, threading
from vflax.data.pipeline import Data

make = Data.loader
def loader(self, start):
    rows = make(self, start)
    for step in range(start, self.total_steps):
        if step == 7 and start == 0:
            threading.Event().wait()
        yield next(rows)
Data.loader = loader
from vflax import launch
launch.cli()
"""


@pytest.mark.slow
def test_a_loader_that_blocks_ends_the_run_with_75_and_it_goes_on_from_its_checkpoint(tmp_path: Path):
    workdir = tmp_path / "run"
    flags = (
        "--config.watchdog.least=3", "--config.watchdog.factor=4", "--config.checkpoint.every=3",
        "--config.steps=10", "--config.evaluate.every=5",
    )  # fmt: skip
    command = small.command(tmp_path, workdir, *flags)
    command[1:3] = ["-c", BLOCKED]
    outputs = [
        subprocess.run(command, env=small.environment(), capture_output=True, text=True, timeout=300)
        for _ in range(2)
    ]
    assert [r.returncode for r in outputs] == [75, 0], outputs
    assert "hangs: a step has not come to its end" in outputs[0].stderr
    stacks = (workdir / "hang-0.txt").read_text()
    assert "in loader" in stacks and "train.py" in stacks
    assert "continuing from step 6" in outputs[1].stdout
