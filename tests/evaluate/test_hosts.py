"""Real processes that answer together: the files are those of one process, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import pytest

from data_pipeline import mini_benchmarks
from tests import small
from tests.serve.process import write_model

# What is compiled is kept for all tests.
CACHE = Path(tempfile.gettempdir()) / f"vflax-test-servers-{os.getuid()}-{jax.__version__}"
TASKS = ("mme", "pope", "cf")
FILES = ("predictions.jsonl", "score.json", "verdicts.jsonl", "run.json")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and data/."""
    folder = tmp_path_factory.mktemp("inputs")
    mini_benchmarks.write(folder / "data")
    (folder / "model").mkdir()
    write_model(folder / "model")
    return folder


def start(inputs: Path, out: Path, count: int, devices: int = 1) -> list[subprocess.Popen[str]]:
    """`count` processes of one run, each with so many devices."""
    command = [
        sys.executable, "-m", "vflax.evaluate", f"--model={inputs / 'model'}", f"--tasks={','.join(TASKS)}",
        f"--data={inputs / 'data'}", f"--out={out}", "--custom", "--max-tokens=6", "--template=vicuna_v1",
        "--mode=cf=strict", "--cache-tokens=4096",
    ]  # fmt: skip
    if count > 1:
        command += [f"--coordinator=127.0.0.1:{small.free_port()}", f"--num-processes={count}"]
    environment = small.environment(devices) | {"VFLAX_CACHE": str(CACHE)}
    return [
        subprocess.Popen(
            [*command, *([f"--process-id={process}"] if count > 1 else [])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and what was said."""
    try:
        said = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def files(out: Path) -> dict[str, bytes]:
    return {f"{task}/{name}": (out / task / name).read_bytes() for task in TASKS for name in FILES}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process with one device writes."""
    out = tmp_path_factory.mktemp("whole")
    [(status, said)] = ended(start(inputs, out, 1))
    assert status == 0, said
    return files(out)


@pytest.mark.slow
def test_two_processes_of_two_devices_write_what_one_writes(
    inputs: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (lead, said), (other, told) = ended(start(inputs, tmp_path, 2, devices=2))
    assert (lead, other) == (0, 0), said + told
    assert files(tmp_path) == whole
    assert json.loads((tmp_path / "mme" / "infer.json").read_text())["hosts"] == 2
    assert "report.html" in said and "report.html" not in told


@pytest.mark.slow
def test_eight_devices_write_what_one_writes(inputs: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    [(status, said)] = ended(start(inputs, tmp_path, 1, devices=8))
    assert status == 0, said
    assert files(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_of_a_killed_process_the_other_ends_and_both_go_on(
    victim: int, inputs: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    pair = start(inputs, tmp_path, 2)
    parts = tmp_path / "mme" / "parts"
    while all(process.poll() is None for process in pair) and not any(
        path.stat().st_size for path in parts.glob(f"{victim:05d}-*.jsonl")
    ):
        time.sleep(0.002)
    pair[victim].kill()
    killed = time.monotonic()
    (left, said), (gone, _) = ended([pair[1 - victim], pair[victim]])
    assert (left, gone) == (75, -signal.SIGKILL), said
    assert time.monotonic() - killed < 40
    assert f"error: process {victim} (host {socket.gethostname()}) " in said
    assert not (tmp_path / "cf" / "score.json").exists()
    again = ended(start(inputs, tmp_path, 2))
    assert [status for status, _ in again] == [0, 0], again
    assert files(tmp_path) == whole


@pytest.mark.slow
def test_a_broken_picture_ends_all_of_them(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path / "inputs")
    sorted((tmp_path / "inputs" / "data" / "mme" / "color").glob("*.png"))[7].write_bytes(b"no picture")
    found = ended(start(tmp_path / "inputs", tmp_path / "out", 2))
    assert {status for status, _ in found} <= {1, 75} and 1 in {status for status, _ in found}, found
    assert any("error: color" in said and "fetch it again" in said for _, said in found), found
