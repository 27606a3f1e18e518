"""The whole road on real input: convert, train at 336 px, kill, resume, export, the same answers in transformers.

    VFLAX_SHARED_DATA=DIR python -m benchmarks.real_data --out=benchmarks/results/real_data.json

DIR holds vision-flan-samples/ (annotation.json and images/) and tokenizer/llama2-tokenizer.model. A small random LLaVA
of the real architecture (tests/real_data_config.py:all) trains on every sample, is killed midway and goes on. Exit
status 1 when in the end the loss over all samples is not below a third of the first step's, a step's loss changed
by the kill, or an answer differs in transformers (but for near ties). Needs the test extra; --work keeps the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from data_pipeline.convert import convert
from tests.parity.greedy_hf import compare_greedy
from vflax.config import load_config
from vflax.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "tests" / "real_data_config.py"
PER_TASK, NEW_TOKENS = 1, 24


def losses(workdir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}


def train(command: list[str], workdir: Path, kill_at: int) -> dict[str, Any]:
    """Run the command, kill it with SIGKILL after step `kill_at`, run it again to its end."""
    began = time.monotonic()
    first = subprocess.Popen(command)
    while first.poll() is None and max(losses(workdir), default=0) < kill_at:
        time.sleep(0.2)
    if first.poll() is not None:
        raise SystemExit(f"the run ended by itself with status {first.returncode}")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = losses(workdir)
    subprocess.run(command, check=True)
    after = losses(workdir)
    again = [step for step in before if step in after]
    return {
        "killed_after_step": max(before),
        "losses_that_changed_by_the_kill": sum(before[step] != after[step] for step in again),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--work", type=Path, help="where the run is kept (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps (default: the config's)")
    args = parser.parse_args()
    shared = Path(os.environ["VFLAX_SHARED_DATA"])
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        samples = shared / "vision-flan-samples"
        report = convert("vision_flan", samples / "annotation.json", samples / "images", work / "data")
        workdir = work / "run"
        flags = [f"--config.steps={args.steps}"] if args.steps else []
        command = [
            sys.executable, "-m", "vflax.launch", f"--config={CONFIG}:all", f"--workdir={workdir}",
            f"--config.data.sources[0].path={work / 'data'}",
            f"--config.tokenizer={shared / 'tokenizer' / 'llama2-tokenizer.model'}", *flags,
        ]  # fmt: skip
        steps = args.steps or load_config(f"{CONFIG}:all").steps
        trained = train(command, workdir, steps // 2)
        facts = json.loads((workdir / "summary.json").read_text())
        prompts, different, near_ties = compare_greedy(workdir, PER_TASK, NEW_TOKENS, split="train")
        result = {
            "command": "python -m benchmarks.real_data",
            **common.made(),
            "converted": {key: report[key] for key in ("read", "written", "quarantined", "reasons")},
            "steps": facts["steps"],
            "samples_seen": facts["samples"],
            "first_loss": facts["first_loss"],
            "last_loss": facts["last_loss"],
            "loss_over_all_samples": facts["evaluation"]["loss"],
            **trained,
            "export_verified": json.loads((workdir / "export" / "export.json").read_text())["verified"],
            "greedy": {"prompts": prompts, "different_in_transformers": different, "near_ties": near_ties},
        }
    common.write(args.out, result)
    if (
        not result["loss_over_all_samples"] < result["first_loss"] / 3
        or result["losses_that_changed_by_the_kill"]
        or different > near_ties
    ):
        sys.exit(1)


if __name__ == "__main__":
    main()
