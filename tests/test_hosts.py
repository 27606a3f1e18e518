"""Several processes train what one process trains, killed and started again in other numbers, too."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import mini_benchmarks
from tests import small
from vflax.metrics import read_metrics

FLAGS = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.checkpoint.every=0", "--config.steps=40")


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


# vflax.launch, which writes down each batch that it is given, as {step, process, rows: [[digest, ids of its samples],
# ...]}, in the folder that its first argument names.
RECORDING = """
import hashlib, json, os, sys
import jax
from vflax import launch
from vflax.data.loader import Loader
from vflax.data.pipeline import Data

file = open(f"{sys.argv.pop(1)}/{os.getpid()}", "w", buffering=1)

class Recorded:
    def __init__(self, data, loader):
        self.data, self.loader, self.close = data, loader, loader.close

    def __next__(self):
        step, batch = self.loader.step, next(self.loader)
        rows = [
            [hashlib.sha256(b"".join(batch[name][r].tobytes() for name in sorted(batch))).hexdigest(), ids]
            for r, ids in enumerate(self.data.sample_ids(step))
        ]
        assert len(rows) == len(batch["ids"])
        print(json.dumps({"step": step, "process": jax.process_index(), "rows": rows}), file=file)
        return batch

loader = Data.loader
Data.loader = lambda data, start=0: Recorded(data, loader(data, start))
launch.cli()
"""


def fed(folder: Path, count: int) -> dict[int, list]:
    """{step: rows} that `count` processes were given together, for the steps of which each of them was given its part.
    Left out are the rows without a sample that fill up a step for its devices."""
    parts: dict[int, dict[int, list]] = {}
    for file in folder.iterdir():
        # A process that is killed may leave half a line.
        for line in (line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")):
            found = json.loads(line)
            parts.setdefault(found["step"], {})[found["process"]] = found["rows"]
    return {
        step: [row for process in range(count) for row in part[process] if row[1]]
        for step, part in parts.items()
        if len(part) == count
    }


def start(
    folder: Path, workdir: Path, count: int, *flags: str, devices: int = 2, before: tuple[str, ...] = (),
    record: Path | None = None,
) -> list[subprocess.Popen[str]]:  # fmt: skip
    """`count` processes of one run, each with so many devices; `before` stands before the command, and what each is
    given is kept in the folder `record`, see RECORDING."""
    places = [f"--coordinator=localhost:{small.free_port()}", f"--num_processes={count}"] if count > 1 else []
    command = small.command(folder, workdir, *FLAGS, *flags)
    if record:
        record.mkdir()
        command = [sys.executable, "-c", RECORDING, str(record), *command[3:]]
    return [
        subprocess.Popen(
            [*before, *command, *places, *([f"--process_id={i}"] if places else [])],
            env=small.environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def start_pair(folder: Path, workdir: Path, *flags: str) -> list[subprocess.Popen[str]]:
    return start(folder, workdir, 2, *flags)


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
    mini_benchmarks.write(tmp_path / "benchmarks")
    flags = (
        "--config.steps=4", "--config.evaluate.every=2", "--config.evaluate.tasks=('loss','accuracy','pope')",
        f"--config.evaluate.data={tmp_path / 'benchmarks'}", "--config.evaluate.limit=1",
        "--config.evaluate.custom=True",
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
    one, two = ([r for r in read_metrics(w / "metrics.jsonl") if "eval/loss" in r]
                for w in (tmp_path / "alone", workdir))  # fmt: skip
    assert [r["step"] for r in one] == [2, 4]
    for a, b in zip(one, two, strict=True):
        names = [name for name in a if name.startswith("eval/loss")]
        assert len(names) > 16 and "eval/pope" in a and a.keys() == b.keys()
        np.testing.assert_allclose([b[name] for name in names], [a[name] for name in names], rtol=1e-5)
    scores = [json.loads((w / "eval/4/pope/score.json").read_text()) for w in (tmp_path / "alone", workdir)]
    assert scores[0]["n"] == scores[1]["n"] == 18


CHAIN = ("--config.mesh.data=-1", "--config.mesh.fsdp=1", "--config.steps=9", "--config.checkpoint.every=2")


def checkpoint(workdir: Path) -> int:
    return max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def kill_after_a_checkpoint(processes: list[subprocess.Popen[str]], workdir: Path) -> None:
    """kill -9 for all of them, as soon as they have saved a step of their own."""
    begun = checkpoint(workdir)
    while checkpoint(workdir) == begun and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    for process in processes:
        process.kill()
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [-signal.SIGKILL] * len(processes), outputs


@pytest.mark.slow
def test_a_chain_of_4_2_and_1_processes_killed_in_between_trains_what_one_process_trains(tmp_path: Path):
    workdir, alone = tmp_path / "chain", tmp_path / "alone"

    def begin(workdir: Path, name: str, count: int) -> list[subprocess.Popen[str]]:
        return start(tmp_path, workdir, count, *CHAIN, devices=1, record=tmp_path / name)

    [process] = begin(alone, "fed-alone", 1)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    kill_after_a_checkpoint(begin(workdir, "fed-4", 4), workdir)
    first = checkpoint(workdir)
    kill_after_a_checkpoint(begin(workdir, "fed-2", 2), workdir)
    second = checkpoint(workdir)
    assert 0 < first < second < 9
    [process] = begin(workdir, "fed-1", 1)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert f"continuing from step {second}" in said

    expected = fed(tmp_path / "fed-alone", 1)
    assert sorted(expected) == list(range(9))
    for count, begun, saved in ((4, 0, first), (2, first, second), (1, second, 9)):
        found = fed(tmp_path / f"fed-{count}", count)
        assert set(range(begun, saved)) <= set(found)
        assert found == {step: expected[step] for step in found}, f"the same samples, in {count} processes"
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_under_supervisors_a_killed_host_is_named_and_the_run_ends_as_if_nothing_had_happened(tmp_path: Path):
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    outputs = [p.communicate(timeout=600)[0] for p in start(tmp_path, whole, 2, *CHAIN, devices=1)]
    assert len(losses(whole)) == 9, outputs

    before = (sys.executable, "-m", "vflax.supervise", "--backoff=5", "--")
    pair = start(tmp_path, workdir, 2, *CHAIN, devices=1, before=before)
    said: list[list[tuple[float, str]]] = [[], []]

    def read(i: int) -> None:
        for line in pair[i].stdout or ():
            said[i].append((time.monotonic(), line))

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    while checkpoint(workdir) < 2 and all(p.poll() is None for p in pair):
        time.sleep(0.05)
    [pid] = [int(line.split("started as ")[1].split(":")[0]) for _, line in said[1] if "started as" in line]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    for process, reader in zip(pair, readers, strict=True):
        process.wait(timeout=600)
        reader.join()
    text = ["".join(line for _, line in lines) for lines in said]
    assert [p.returncode for p in pair] == [0, 0], text
    noticed = [t - killed for t, line in said[0] if "error: process 1 (host " in line]
    assert noticed and 0 < noticed[0] < 20, text[0]
    assert "status 75" in text[0] and "status 137" in text[1]
    assert losses(workdir) == losses(whole), "bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_in_a_run_is_named_by_the_other_which_ends_in_under_20_s(
    tmp_path: Path, victim: int
):
    workdir = tmp_path / "run"
    pair = start_pair(tmp_path, workdir, "--config.steps=4000")
    try:
        while all(p.poll() is None for p in pair) and len(losses(workdir)) < 3:
            time.sleep(0.05)
        pair[victim].send_signal(signal.SIGSTOP)
        hung = time.monotonic()
        said = pair[1 - victim].communicate(timeout=60)[0]
        seconds = time.monotonic() - hung
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert pair[1 - victim].returncode == 75 and seconds < 20, (seconds, said)
    assert f"error: process {victim} (host {socket.gethostname()}) " in said
