"""Killed at any moment and started again, a run has the losses of one that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import small
from vflax.metrics import read_metrics

STEPS = 40
FLAGS = (f"--config.steps={STEPS}", "--config.checkpoint.every=3", "--config.evaluate.every=5")


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


@dataclass(frozen=True)
class Begun:
    """WORKDIR as a process found it, to tell its own doings from what an earlier, killed one left.

    step: where it continues; metrics: inode of metrics.jsonl, which a run replaces when it begins; saves: inodes of
    half-written checkpoints.
    """

    step: int
    metrics: int
    saves: frozenset[int]

    @classmethod
    def at(cls, workdir: Path) -> Begun:
        saved = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
        return cls(max(saved, default=0), inode(workdir / "metrics.jsonl"), saves(workdir))


def inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def saves(workdir: Path) -> frozenset[int]:
    return frozenset(inode(p) for p in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")) - {0}


def steps_done(workdir: Path) -> int:
    done = losses(workdir)
    return done[-1][0] if done else 0


def in_a_save(workdir: Path, begun: Begun) -> bool:
    return bool(saves(workdir) - begun.saves)


def in_an_evaluation(workdir: Path, _begun: Begun) -> bool:
    try:
        return json.loads((workdir / "status.json").read_text())["reason"] == "evaluating"
    except (OSError, ValueError):
        return False


def before_the_first_checkpoint(workdir: Path, _begun: Begun) -> bool:
    return steps_done(workdir) >= 1


def after_some_steps(count: int) -> Callable[[Path, Begun], bool]:
    def moment(workdir: Path, begun: Begun) -> bool:
        return steps_done(workdir) >= begun.step + count

    moment.__name__ = f"{count} steps on"
    return moment


def run_and_kill(folder: Path, workdir: Path, moment: Callable[[Path, Begun], bool]) -> str:
    """Start the run, kill it with SIGKILL when `moment` holds; returns "killed" or "finished"."""
    begun = Begun.at(workdir)
    process = subprocess.Popen(
        small.command(folder, workdir, *FLAGS),
        env=small.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while process.poll() is None:
        # Nothing counts before this process has begun its loop.
        if inode(workdir / "metrics.jsonl") not in (0, begun.metrics) and moment(workdir, begun):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "killed"
        time.sleep(0.001)
    assert process.returncode == 0, process.stderr.read().decode()[-3000:] if process.stderr else ""
    return "finished"


@pytest.mark.slow
def test_ten_kills_change_no_bit_of_the_losses(tmp_path: Path):
    whole = tmp_path / "whole"
    result = small.launch(tmp_path, whole, *FLAGS)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = losses(whole)
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))

    workdir = tmp_path / "killed"
    seed = int(os.environ.get("VFLAX_KILL_SEED", time.time_ns()))
    print(f"VFLAX_KILL_SEED={seed}")  # shown when it fails, and it can then be repeated
    rng = random.Random(seed)
    moments = [before_the_first_checkpoint, in_a_save, in_a_save, in_an_evaluation, in_a_save]
    moments += [after_some_steps(rng.randint(1, 3)) for _ in range(5)]
    outcomes = []
    for moment in moments:
        outcome = run_and_kill(tmp_path, workdir, moment)
        outcomes.append((getattr(moment, "__name__", "?"), outcome, steps_done(workdir)))
        if moment is before_the_first_checkpoint:
            assert not [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    print(outcomes)
    assert [outcome for _, outcome, _ in outcomes] == ["killed"] * 10, outcomes
    result = small.launch(tmp_path, workdir, *FLAGS)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(workdir) == expected
