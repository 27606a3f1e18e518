"""The comparison on a GPU, as far as it can be tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common, gpu

ROOT = Path(__file__).parents[2]
# What an accelerator image has not, and what the data side of vflax needs.
ABSENT = (
    "grain", "tensorflow_datasets", "array_record", "ml_collections", "sentencepiece", "imagehash", "openai",
    "tensorboardX", "matplotlib", "tests",
)  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_it_needs_no_library_of_the_data_side() -> None:
    code = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
from benchmarks import common, gpu
task = gpu.Task("parity", "vflax", "tiny", "cpu", "float32", "float32", 2, 4, 2)
first = gpu.do(task)
second = gpu.do(gpu.dataclasses.replace(task, side="eager"))
print(common.largest_difference({{"vflax": first["losses"], "eager": second["losses"]}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) <= gpu.TOLERANCE["float32"]


@pytest.mark.slow
def test_it_runs_whole_on_a_cpu_and_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--size=tiny", "--compute=float32",
        "--sides=vflax,eager", "--rounds=1", "--steps=2", f"--out={out}", f"--work={tmp_path}",
    ]  # fmt: skip
    first = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    result = json.loads(out.read_text())
    assert first.returncode == (0 if all(mark["met"] for mark in result["marks"]) else 1), first.stderr[
        -2000:
    ]
    assert result["parity"]["largest_relative_difference"] <= gpu.TOLERANCE["float32"]
    assert len(result["parity"]["losses"]["eager"]) == gpu.PARITY
    for what in ("rows", "samples"):
        for line in result["figures"][what].values():
            assert line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1
    again = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == first.returncode
    assert json.loads(out.read_text())["time"] == result["time"]


def test_the_most_layers_are_those_that_every_side_holds() -> None:
    def run(name: str, side: str, layers: int, samples: int, steps: int) -> dict[str, bool]:
        room = {"vflax": 100, "eager": 64}[side]
        return {"fits": layers * samples <= room}

    found = gpu.fit(run, ("vflax", "eager"), gpu.SIZES["7b"], 2)
    assert (found["layers"], found["samples"]) == (16, 4)


def test_memory_that_is_too_small_is_told_from_other_errors() -> None:
    assert gpu.is_memory("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert gpu.is_memory("jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    assert not gpu.is_memory("ValueError: shapes do not match")


def test_losses_that_are_no_numbers_are_different() -> None:
    assert (
        not common.largest_difference({"vflax": [1.0], "eager": [float("nan")]}) <= gpu.TOLERANCE["bfloat16"]
    )


def test_options_of_another_run_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"given": {"size": "7b"}}))
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--size=tiny", f"--out={out}"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "other options" in done.stderr


def test_the_tokens_of_both_sides_are_those_of_samples() -> None:
    task = gpu.Task("time", "vflax", "tiny", "cpu", "float32", "float32", 2, 4, 2)
    ours = gpu.count(gpu.own(task, 1))
    assert ours["image_tokens"] % task.model.vision.num_tokens == 0
    assert ours["tokens"] < sum(rows["ids"].size for rows in gpu.own(task, 1))
    theirs = gpu.own(gpu.dataclasses.replace(task, side="eager"), 2)
    assert all(len(rows["ids"]) == task.samples for rows in theirs)
