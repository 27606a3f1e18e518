"""The wheel holds all that a run needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vflax.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_tiny_job_starts_from_the_wheel_outside_the_checkout(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", f"--outdir={tmp_path / 'dist'}", str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("vflax-*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={site}", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(site), "VFLAX_CACHE": str(tmp_path / "cache")}
    where = [
        sys.executable,
        "-c",
        "import vflax, configs, data_pipeline; print(vflax.__file__, configs.__file__)",
    ]
    found = subprocess.run(where, env=environment, cwd=elsewhere, capture_output=True, text=True, check=True)
    assert found.stdout.count(str(site)) == 2

    command = [sys.executable, "-m", "vflax.launch", "--config=configs/stage1.py:tiny", "--workdir=run"]
    process = subprocess.Popen(command, env=environment, cwd=elsewhere, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    steps: list[dict] = []
    while process.poll() is None and len(steps) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
        steps = [
            r for path in (tmp_path / "cache").glob("stage0-tiny-*/metrics.jsonl") for r in read_metrics(path)
        ]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert len(steps) >= 3
    (status,) = (tmp_path / "cache").glob("stage0-tiny-*/status.json")
    assert json.loads(status.read_text())["state"] == "preempted"
