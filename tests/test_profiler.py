"""Traces on demand: which steps are in them, and that tools can open them."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import jax
import pytest

from tests import small
from vflax.metrics import read_metrics
from vflax.profiler import Profiler
from vflax.stop import StopSignals


def traced(folder: Path) -> list[int]:
    """Numbers of the steps that the trace in `folder` holds, read as Perfetto reads it."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(
        int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e["args"]
    )


def run(profiler: Profiler, first: int, last: int, at: int = 0) -> None:
    """Steps first .. last as the loop makes them; SIGUSR2 comes during step `at`."""
    double = jax.jit(lambda x: 2 * x)
    for number in range(first, last + 1):
        with profiler.step(number):
            value = double(number)
            if number == at:
                signal.raise_signal(signal.SIGUSR2)
        if profiler.is_last(number):
            profiler.stop(value)


def test_the_steps_that_the_config_names_are_traced_and_no_other(tmp_path: Path):
    said: list[str] = []
    with Profiler(tmp_path / "profile", 3, 2, said.append) as profiler:
        run(profiler, 1, 6)
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["3"]
    assert traced(tmp_path / "profile" / "3") == [3, 4]
    # TensorBoard's profile plugin reads this one.
    assert list((tmp_path / "profile" / "3").glob("plugins/profile/*/*.xplane.pb"))
    assert said[0] == "tracing the steps 3 to 4" and f"--logdir={tmp_path}/profile/3" in said[1]
    assert ".trace.json.gz in https://ui.perfetto.dev" in said[1]


def test_a_signal_traces_the_next_steps_as_often_as_it_comes(tmp_path: Path):
    with Profiler(tmp_path, 0, 2, lambda text: None) as profiler:
        run(profiler, 1, 6, at=2)
        run(profiler, 7, 12, at=9)
    assert {p.name: traced(p) for p in tmp_path.iterdir()} == {"3": [3, 4], "10": [10, 11]}


def test_a_trace_that_the_end_of_a_run_cuts_short_is_written(tmp_path: Path):
    with Profiler(tmp_path, 5, 100, lambda text: None) as profiler:
        run(profiler, 4, 7)
        assert profiler.tracing
    assert traced(tmp_path / "5") == [5, 6, 7]


def test_a_run_that_continues_after_the_step_traces_nothing(tmp_path: Path):
    with Profiler(tmp_path / "profile", 3, 2, lambda text: None) as profiler:
        run(profiler, 4, 6)
    assert not (tmp_path / "profile").exists()


def test_of_several_processes_only_the_first_traces_what_the_config_names_but_any_its_own_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Profiler(tmp_path, 1, 1, lambda text: None) as profiler:
        run(profiler, 1, 4, at=2)
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_the_signals_that_stop_a_run_still_do_and_afterwards_each_signal_has_its_old_handler(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)]
    with (
        StopSignals() as signals,
        Profiler(tmp_path, 0, 1, lambda text: None) as profiler,
        signals.deferred(),
    ):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not signals.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked
        run(profiler, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)] == before


def test_a_trace_that_cannot_be_begun_or_written_costs_no_step(tmp_path: Path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with Profiler(tmp_path / "file", 2, 2, said.append) as profiler:
        run(profiler, 1, 5)
    with Profiler(tmp_path, 2, 2, said.append) as profiler, jax.profiler.trace(tmp_path / "other"):
        run(profiler, 1, 5)
    assert [text.split(": ")[0] for text in said if not text.startswith("tracing")] == [
        f"no trace in {tmp_path}/file/2", f"no trace in {tmp_path}/2",
    ]  # fmt: skip


@pytest.mark.slow
def test_sigusr2_to_a_running_launch_leaves_a_trace_and_changes_no_loss(tmp_path: Path):
    workdir = tmp_path / "run"
    flags = ("--config.steps=300", "--config.checkpoint.every=0", "--config.profile.steps=3")
    process = small.launch_until_it_steps(tmp_path, workdir, *flags)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    (folder,) = (workdir / "profile").iterdir()
    first = int(folder.name)
    assert traced(folder) == [first, first + 1, first + 2]
    assert f"--logdir={folder}" in out
    assert len([r for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]) == 300
    alone = small.launch(tmp_path, tmp_path / "alone", *flags)
    assert alone.returncode == 0, alone.stderr[-2000:]
    losses = [
        [r["loss"] for r in read_metrics(w / "metrics.jsonl") if "loss" in r]
        for w in (workdir, tmp_path / "alone")
    ]
    assert losses[0] == losses[1]
