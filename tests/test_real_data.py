"""Stage 1 on real Vision-Flan samples: convert, train, kill, resume, export, the same answers in transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipeline.convert import convert
from tests import small
from vflax.metrics import read_metrics

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

SAMPLES = 12
LONGEST_ANSWER = 40  # characters: short enough that a test can memorise and decode it


@dataclass(frozen=True)
class Run:
    workdir: Path
    killed_at: int


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train on a fixed subset, killed once midway."""
    root = tmp_path_factory.mktemp("real")
    samples = json.loads((shared_data / "vision-flan-samples" / "annotation.json").read_text())
    short = [s for s in samples if len(s["conversations"][1]["value"]) <= LONGEST_ANSWER
             and len(s["conversations"][0]["value"]) <= 300]  # fmt: skip
    (root / "annotation.json").write_text(json.dumps(short[:SAMPLES]))
    convert(
        "vision_flan", root / "annotation.json", shared_data / "vision-flan-samples" / "images", root / "data"
    )
    command = [
        sys.executable, "-m", "vflax.launch", f"--config={Path(__file__).parent / 'real_data_config.py'}:subset",
        f"--workdir={root / 'run'}", f"--config.data.sources[0].path={root / 'data'}",
        f"--config.tokenizer={shared_data / 'tokenizer' / 'llama2-tokenizer.model'}",
    ]  # fmt: skip
    environment = small.environment()
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while first.poll() is None and len(read_metrics(root / "run" / "metrics.jsonl")) < 25:
        time.sleep(0.2)
    assert first.poll() is None, first.communicate()[0][-3000:]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    killed_at = read_metrics(root / "run" / "metrics.jsonl")[-1]["step"]
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "continuing from step" in second.stdout
    return Run(root / "run", killed_at)


def test_a_killed_run_goes_on_and_learns_real_samples(run: Run):
    losses = {r["step"]: r["loss"] for r in read_metrics(run.workdir / "metrics.jsonl") if "loss" in r}
    assert 25 <= run.killed_at < max(losses)
    assert list(losses) == list(range(1, max(losses) + 1))
    assert losses[1] > 8
    assert losses[max(losses)] < 0.3


def test_greedy_answers_equal_the_targets(run: Run):
    facts = json.loads((run.workdir / "summary.json").read_text())
    tasks = facts["evaluation"]["tasks"].values()
    assert sum(t["accuracy"] * t["n"] for t in tasks) / sum(t["n"] for t in tasks) >= 0.9


def test_permuting_the_images_raises_the_loss(run: Run):
    seen, permuted = losses_with_and_without_their_images(run.workdir)
    print(f"loss {seen:.4f}, with permuted images {permuted:.4f}")
    assert permuted > seen + 0.01


def test_transformers_gives_the_same_greedy_answers(run: Run):
    pytest.importorskip("torch")
    from tests.parity.greedy_hf import compare_greedy

    count, different, near_ties = compare_greedy(run.workdir, per_task=1, max_new_tokens=24, split="train")
    print(
        f"{count} prompts, {different} answers differ, {near_ties} where the top two logits are within 1e-4"
    )
    assert (count, different) == (SAMPLES, 0)


def losses_with_and_without_their_images(workdir: Path) -> tuple[float, float]:
    from jax.sharding import SingleDeviceSharding
    from ml_collections import ConfigDict

    from vflax.checkpoint import find_step
    from vflax.data.rows import RowFormat, join, prepare
    from vflax.data.source import open_source
    from vflax.models import llava
    from vflax.step import loss_sum
    from vflax.weights.load import load_params
    from vflax.weights.source import WorkdirSource
    from vflax.workdir import ModelFiles

    files = ModelFiles.load(workdir)
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    source = open_source(config.data.sources[0]["path"], "train")
    row_format = RowFormat(
        files.tokenizer, files.template, files.position, files.rules, files.config.vision.num_tokens,
        config.data.max_length, config.data.slots,
    )  # fmt: skip
    samples = [prepare(source[i], row_format) for i in range(len(source))]
    others = [
        dataclasses.replace(s, images=o.images)
        for s, o in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    kw = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "auto"}
    graphdef, shapes = llava.abstract(files.config, **kw)
    where = {path: SingleDeviceSharding(jax.devices()[0]) for path in shapes}
    weights = WorkdirSource(workdir, find_step(workdir, "latest"))
    params = load_params(weights, files.config, where, {path: np.float32 for path in shapes})
    loss = jax.jit(lambda params, batch: loss_sum(graphdef, params, batch, config.data.max_length))

    def mean(prepared: list) -> float:
        rows = [join([sample], row_format) for sample in prepared]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return float(loss(params, batch)) / sum(int((s.labels != -100).sum()) for s in prepared)

    return mean(samples), mean(others)
