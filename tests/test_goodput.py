"""Goodput: every second of a run's wall time has one kind, over all restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import pytest

from tests import small
from tests.test_kill import FLAGS, after_some_steps, run_and_kill
from vflax import goodput
from vflax.errors import UserError
from vflax.goodput import KINDS, Recorder, add_up, read


class Clock:
    """Seconds since 1970 that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now

    def recorder(self, workdir: Path) -> Recorder:
        """Of a process that starts now; its monotonic clock counts from elsewhere."""
        began = self.now
        return Recorder(workdir / goodput.FILE, clock=lambda: self.now - began + 17.0, wall=self)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(recorder: Recorder, clock: Clock, start: int, end: int) -> None:
    """Each step waits a quarter of a second for its batch and takes another second."""
    with recorder.within("step"):
        for step in range(start, end):
            with recorder.within("data_wait"):
                clock.now += 0.25
            clock.now += 1.0
            recorder.done(step + 1)


def begun(workdir: Path, clock: Clock, step: int) -> Recorder:
    """A process that needs 10 seconds to start and 20 to compile."""
    recorder = clock.recorder(workdir)
    clock.now += 10.0
    recorder.begin(step)
    with recorder.within("compile"):
        clock.now += 20.0
    return recorder


def took(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(KINDS, 0.0) | seconds


def found(workdir: Path) -> goodput.Goodput:
    return add_up(read(workdir / goodput.FILE))


def test_every_moment_is_of_the_innermost_kind(tmp_path: Path, clock: Clock):
    recorder = begun(tmp_path, clock, 0)
    steps(recorder, clock, 0, 4)
    with recorder.within("evaluation"):
        clock.now += 3.0
        with recorder.within("checkpoint"):
            clock.now += 2.0
        clock.now += 1.0
    clock.now += 0.5
    recorder.close("done")
    expected = took(start=10.5, compile=20, data_wait=1, step=4, evaluation=4, checkpoint=2)
    assert found(tmp_path).seconds == pytest.approx(expected, abs=1e-3)


def test_a_kind_that_is_none_is_refused(tmp_path: Path, clock: Clock):
    with (
        pytest.raises(ValueError, match="'lunch' is not one of start, compile"),
        clock.recorder(tmp_path).within("lunch"),
    ):
        pass


def test_a_kind_may_be_corrected_until_its_end(tmp_path: Path, clock: Clock):
    recorder = begun(tmp_path, clock, 0)
    with recorder.within("data_wait") as span:
        clock.now += 5.0
        span.kind = "step"
    recorder.close("done")
    assert found(tmp_path).seconds == pytest.approx(took(start=10, compile=20, step=5), abs=1e-3)


def test_a_run_that_is_refused_at_its_start_leaves_nothing(tmp_path: Path, clock: Clock):
    recorder = clock.recorder(tmp_path)
    with recorder.within("evaluation"):
        clock.now += 1.0
    recorder.close("failed")
    assert list(tmp_path.iterdir()) == []


def test_a_chain_with_a_kill_adds_up_to_its_wall_time_and_names_what_the_kill_cost(
    tmp_path: Path, clock: Clock
):
    first = clock.now
    recorder = begun(tmp_path, clock, 0)
    steps(recorder, clock, 0, 100)
    with recorder.within("checkpoint"):
        clock.now += 4.0
    steps(recorder, clock, 100, 107)
    clock.now += 0.9  # in the middle of step 108: killed
    clock.now += 600.0
    recorder = begun(tmp_path, clock, 100)
    steps(recorder, clock, 100, 110)
    recorder.close("preempted")
    clock.now += 60.0
    recorder = begun(tmp_path, clock, 110)
    steps(recorder, clock, 110, 120)
    recorder.close("done")
    result = found(tmp_path)
    assert result.wall == pytest.approx(clock.now - first, abs=1e-3)
    assert sum(result.to_dict()["shares"].values()) == pytest.approx(1, abs=1e-12)
    restart = 7 * 1.25 + 0.9 + 600 + 60
    expected = took(start=30, compile=60, step=120, data_wait=30, checkpoint=4, restart=restart)
    assert result.seconds == pytest.approx(expected, abs=1e-3)
    assert (result.starts, result.kills, result.repeated_steps) == (3, 1, 7)


def test_steps_that_are_lost_twice_count_as_often(tmp_path: Path, clock: Clock):
    first = clock.now
    for _ in range(2):
        steps(begun(tmp_path, clock, 0), clock, 0, 50)
    recorder = begun(tmp_path, clock, 20)
    steps(recorder, clock, 20, 60)
    recorder.close("done")
    result = found(tmp_path)
    # The second start lost 50 steps, the third 30 of the second's.
    assert result.repeated_steps == 80
    assert result.seconds == pytest.approx(
        took(start=30, compile=60, step=60, data_wait=15, restart=80 * 1.25), abs=1e-3
    )
    assert result.wall == pytest.approx(clock.now - first, abs=1e-3)


def test_a_file_that_is_cut_anywhere_by_a_kill_still_adds_up_after_the_next_start(
    tmp_path: Path, clock: Clock
):
    first = clock.now
    steps(begun(tmp_path, clock, 0), clock, 0, 5)
    path = tmp_path / goodput.FILE
    whole, killed = path.read_bytes(), clock.now
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        clock.now = killed + 100.0
        recorder = begun(tmp_path, clock, 0)
        steps(recorder, clock, 0, 5)
        recorder.close("done")
        assert all(json.loads(line) for line in path.read_text().splitlines()), "no line is two"
        result = found(tmp_path)
        began = first if b"\n" in whole[:size] else killed + 100.0
        assert result.wall == pytest.approx(clock.now - began, abs=1e-3)
        assert result.seconds["step"] == pytest.approx(5.0, abs=1e-3)


def test_a_run_that_is_made_longer_another_day_has_not_waited_for_that_day(tmp_path: Path, clock: Clock):
    for start in (0, 10):
        recorder = begun(tmp_path, clock, start)
        steps(recorder, clock, start, start + 10)
        recorder.close("done")
        clock.now += 86400.0
    expected = took(start=20, compile=40, step=20, data_wait=5)
    assert found(tmp_path).seconds == pytest.approx(expected, abs=1e-3)


def test_a_host_whose_clock_is_behind_makes_no_second_negative(tmp_path: Path, clock: Clock):
    steps(begun(tmp_path, clock, 0), clock, 0, 5)
    clock.now -= 300.0
    recorder = begun(tmp_path, clock, 5)
    recorder.close("done")
    result = found(tmp_path)
    assert min(result.seconds.values()) == 0.0 and result.seconds["restart"] == 0.0


def test_what_jax_compiles_inside_a_kind_is_compiling(tmp_path: Path):
    recorder = Recorder(tmp_path / goodput.FILE)
    recorder.begin(0)
    value = jax.numpy.arange(7.0)
    with goodput.counting_compiles(recorder), recorder.within("evaluation"):
        jax.jit(lambda x: jax.numpy.sort(jax.numpy.sin(x) @ jax.numpy.ones((7, 7))))(
            value
        ).block_until_ready()
    with recorder.within("evaluation"):  # nobody listens any more
        jax.jit(lambda x: jax.numpy.sort(jax.numpy.cos(x) @ jax.numpy.ones((7, 7))))(
            value
        ).block_until_ready()
    recorder.close("done")
    lines = [
        line["seconds"] for line in read(tmp_path / goodput.FILE) if "evaluation" in line.get("seconds", {})
    ]
    assert lines[0]["compile"] > 0.005 and "compile" not in lines[1]
    assert lines[0]["evaluation"] >= 0


def test_lines_that_say_nothing_are_passed_over(tmp_path: Path):
    path = tmp_path / goodput.FILE
    path.write_bytes(
        b'{"event": "start", "time": 5.0, "step": 0}\n[1]\n\x00\x00\n{"time": 6.0, "step": 0}\n'
        b'{"event": "work", "time": "x", "step": 0}\n{"event": "work", "time": 7.0, "step": 0, "seconds": 3}\n{"event"'
    )
    assert [line["time"] for line in read(path)] == [5.0]


def test_the_command_prints_a_table_and_json(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    steps(begun(tmp_path, clock, 0), clock, 0, 40)
    steps(begun(tmp_path, clock, 20), clock, 20, 50)
    assert goodput.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "goodput 33.9% of 2 min 28 s, 2 starts (1 after a kill), 20 steps done again" in shown
    assert "compile" in shown and "evaluation" not in shown, "kinds that took no time are left out"
    assert goodput.main([str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["starts"] == 2 and facts["shares"].keys() == facts["seconds"].keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("text", "words"), [(None, "not there"), ("", "no whole line"), ('{"event"', "no whole line")]
)
def test_a_folder_without_lines_is_an_error_that_names_the_file(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
):
    if text is not None:
        (tmp_path / goodput.FILE).write_text(text)
    assert goodput.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path / goodput.FILE) in error and words in error
    with pytest.raises(UserError):
        goodput.of_run(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (302.4, "5 min 02 s"), (11222.0, "3 h 07 min")]
)
def test_a_duration_is_read_at_a_glance(seconds: float, text: str):
    assert goodput.duration(seconds) == text


@pytest.mark.slow
def test_the_shares_of_a_run_that_was_killed_add_up_to_the_time_that_went_by(tmp_path: Path):
    workdir = tmp_path / "run"
    began = time.time()
    assert run_and_kill(tmp_path, workdir, after_some_steps(5)) == "killed"
    killed = time.time()
    time.sleep(2)
    assert run_and_kill(tmp_path, workdir, after_some_steps(4)) == "killed"
    result = small.launch(tmp_path, workdir, *FLAGS)
    ended = time.time()
    assert result.returncode == 0, result.stderr[-3000:]
    lines = read(workdir / goodput.FILE)
    found = add_up(lines)
    assert (found.starts, found.kills) == (3, 2)
    assert found.wall == pytest.approx(lines[-1]["time"] - lines[0]["time"], abs=1e-3)
    # All but the interpreter's own start and end, which no line can hold.
    assert ended - began - 25 < found.wall < ended - began
    starts = [line["time"] for line in lines if line["event"] == "start"]
    assert found.seconds["restart"] >= starts[1] - killed >= 2
    facts = json.loads((workdir / "summary.json").read_text())["goodput"]
    assert sum(facts["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert facts["kills"] == 2 and f"{facts['shares']['step']:.1%} of" in result.stdout
