"""Several processes train what one process trains."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests import small
from vflax.metrics import read_metrics

FLAGS = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.checkpoint.every=0", "--config.steps=40")


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


def start_pair(folder: Path, workdir: Path, *flags: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *small.command(folder, workdir, *FLAGS, *flags), f"--coordinator=localhost:{port}", "--num_processes=2",
                f"--process_id={i}",
            ],
            env=small.environment(devices=2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_and_save_and_one_resumes_and_exports(tmp_path: Path):
    workdir = tmp_path / "run"
    pair = start_pair(tmp_path, workdir)
    while all(p.poll() is None for p in pair) and len(losses(workdir)) < 3:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)  # a preemption notice reaches one host only
    outputs = [p.communicate(timeout=300)[0] for p in pair]
    assert [p.returncode for p in pair] == [75, 75], outputs
    saved = json.loads((workdir / "status.json").read_text())["step"]
    assert 3 <= saved < 40

    one = small.launch(tmp_path, workdir, *FLAGS, "--config.export=True")
    assert one.returncode == 0, one.stderr[-3000:]
    assert json.loads((workdir / "export" / "export.json").read_text())["verified"]

    alone = small.launch(tmp_path, tmp_path / "alone", *FLAGS)
    assert alone.returncode == 0, alone.stderr[-3000:]
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.slow
def test_ctrl_c_at_one_process_saves_and_ends_both_with_75(tmp_path: Path):
    workdir = tmp_path / "run"
    pair = start_pair(tmp_path, workdir, "--config.steps=400")
    while all(p.poll() is None for p in pair) and len(losses(workdir)) < 3:
        time.sleep(0.05)
    pair[0].send_signal(signal.SIGINT)
    outputs = [p.communicate(timeout=300)[0] for p in pair]
    assert [p.returncode for p in pair] == [75, 75], outputs
    status = json.loads((workdir / "status.json").read_text())
    assert status["state"] == "preempted" and 3 <= status["step"] < 400
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(status["step"])]


@pytest.mark.slow
def test_two_processes_evaluate_answer_and_export_together(tmp_path: Path):
    workdir = tmp_path / "run"
    flags = (
        "--config.steps=4", "--config.evaluate.every=2", "--config.evaluate.tasks=('loss','accuracy')",
        "--config.export=True",
    )  # fmt: skip
    pair = start_pair(tmp_path, workdir, *flags)
    outputs = [p.communicate(timeout=300)[0] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outputs
    facts = json.loads((workdir / "summary.json").read_text())
    assert facts["evaluation"]["loss"] > 0 and len(facts["evaluation"]["tasks"]) >= 16
    assert json.loads((workdir / "export" / "export.json").read_text())["verified"]
    assert "what learns" in outputs[0] and "what learns" not in outputs[1], "one of them speaks"
    alone = small.launch(tmp_path, tmp_path / "alone", *FLAGS, *flags)
    assert alone.returncode == 0, alone.stderr[-3000:]
    one, two = ([r["eval/loss"] for r in read_metrics(w / "metrics.jsonl") if "eval/loss" in r]
                for w in (tmp_path / "alone", workdir))  # fmt: skip
    assert len(one) == 2
    np.testing.assert_allclose(two, one, rtol=1e-5)
