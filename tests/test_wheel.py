"""The wheel and what pip installs with it, and nothing beside them, are all that a run needs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import small
from vflax.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a fresh environment with the wheel and its base dependencies: no extra, no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", f"--outdir={folder / 'dist'}", str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (folder / "dist").glob("vflax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=300)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True, timeout=900)
    yield python
    shutil.rmtree(folder)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside the checkout, the checkout on no path."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_tiny_job_starts_from_the_wheel_outside_the_checkout(python: Path, elsewhere: Path):
    where = [
        str(python),
        "-c",
        "import configs, data_pipeline, vflax; print(configs.__file__, vflax.__file__)",
    ]
    found = subprocess.run(where, capture_output=True, text=True, check=True)
    assert found.stdout.count(str(python.parent.parent)) == 2

    command = [str(python), "-m", "vflax.launch", "--config=configs/stage1.py:tiny", "--workdir=run"]
    cache = elsewhere / "cache"
    process = subprocess.Popen(
        command, env=os.environ | {"VFLAX_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 400
    steps: list[dict] = []
    while process.poll() is None and len(steps) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
        steps = [r for path in cache.glob("stage0-tiny-*/metrics.jsonl") for r in read_metrics(path)]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert len(steps) >= 3
    (status,) = cache.glob("stage0-tiny-*/status.json")
    assert json.loads(status.read_text())["state"] == "preempted"


def test_the_base_dependencies_carry_a_run_to_its_export_and_summary(python: Path, elsewhere: Path):
    flags = (
        "--config.export=True",
        "--config.evaluate.tasks=('loss','accuracy')",
        "--config.logging.tensorboard=True",
    )
    workdir = elsewhere / "run"
    command = [str(python), *small.command(elsewhere, workdir, *flags)[1:]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((workdir / "export" / "export.json").read_text())["verified"] is True
    assert json.loads((workdir / "status.json").read_text())["state"] == "done"
    for name in ("summary.html", "loss.png", "samples.png", "tensorboard"):
        assert (workdir / name).exists(), name

    again = [str(python), "-m", "vflax.weights.export", f"--model={workdir / 'export'}", "--out=again"]
    result = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (f / "model.safetensors" for f in (workdir / "export", elsewhere / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_report_of_the_preflight_is_made_from_the_wheel(python: Path, elsewhere: Path):
    config = [flag for flag in small.command(elsewhere, elsewhere / "run") if flag.startswith("--config")]
    command = [str(python), "-m", "data_pipeline.preflight", *config, "--out=report"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "A launch would take this data" in (elsewhere / "report" / "preflight.html").read_text()


def test_the_page_of_the_browser_is_in_the_wheel(python: Path, elsewhere: Path):
    command = (
        "from importlib import resources; "
        "print(*sorted(f.name for f in (resources.files('data_pipeline.browse') / 'page').iterdir()))"
    )
    found = subprocess.run([str(python), "-c", command], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["app.js", "index.html", "style.css"]
