"""The tiny stage 1, smaller still: a random model of 60,000 parameters that takes seconds on the built-in data."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vflax.metrics import read_metrics

# What makes configs/stage1.py:tiny small; as flags for a subprocess and for a config in this process.
CHANGES: dict[str, Any] = {
    "optimizer.lr": 1.5e-3,
    "init.checkpoint": "",
    "init.make": "",
    "tokenizer": "mini:tokenizer",
    "steps": 6,
    "batch.samples": 8,
    "data.sources[0].cap": 4,
    "checkpoint.every": 2,
    "evaluate.every": 0,
    "evaluate.samples_per_task": 1,
    "evaluate.max_new_tokens": 2,
    "evaluate.tasks": ("loss",),
    "logging.tensorboard": False,
    "export": False,
}
MODEL = {
    "vision": {
        "image_size": 64, "patch_size": 16, "width": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 2,
        "hidden_act": "quick_gelu", "norm_eps": 1e-5,
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "decoder": {
        "width": 32, "mlp_dim": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "norm_eps": 1e-5, "rope_theta": 10000.0, "max_positions": 1024, "tie_word_embeddings": False,
    },
}  # fmt: skip

# The same as a config file, so that a subprocess can take it with --config and change it with flags.
FILE = f"""
from ml_collections import ConfigDict

from vflax.config import load_config

def get_config():
    config = load_config("configs/stage1.py:tiny")
    config.model.update(ConfigDict({MODEL!r}))
    config.data.sources[0].cap = 4
    for key, value in { ({k: v for k, v in CHANGES.items() if "[" not in k})!r}.items():
        config.update_from_flattened_dict({{key: value}})
    return config
"""


def config(**changes: Any) -> ConfigDict:
    """The small config; keys of `changes` have "__" for "."."""
    namespace: dict[str, Any] = {}
    exec(FILE, namespace)
    result = namespace["get_config"]()
    for key, value in changes.items():
        result.update_from_flattened_dict({key.replace("__", "."): value})
    return result


def environment(devices: int = 1) -> dict[str, str]:
    """Of a subprocess on simulated CPU devices."""
    root = str(Path(__file__).parent.parent)
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
    }


def free_port() -> int:
    """A port of localhost that nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def command(folder: Path, workdir: Path, *flags: str) -> list[str]:
    """The command line of a small run; its config file is written into `folder`."""
    file = folder / "small_config.py"
    file.write_text(FILE)
    return [sys.executable, "-m", "vflax.launch", f"--config={file}", f"--workdir={workdir}", *flags]


def launch(folder: Path, workdir: Path, *flags: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(folder, workdir, *flags),
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=900,
    )


def launch_until_it_steps(folder: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    """Start it, and come back when it has reported a step; its output is to be had by `communicate`."""
    process = subprocess.Popen(
        command(folder, workdir, *flags), env=environment(), stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not read_metrics(workdir / "metrics.jsonl"):
        time.sleep(0.02)
    return process
