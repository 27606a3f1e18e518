"""The tiny chain 0 -> 1 -> 2 learns for real: what the README's first command promises, and stage 2 behind it.

It takes most of CI's time, so it runs once: everything that needs a trained tiny model reuses its WORKDIR through the
fixture `chain` below.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import small
from vflax import config as configs
from vflax.start import checkpoint_path

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Chain:
    """WORKDIRs of the three stages and their summaries."""

    workdirs: list[Path]
    facts: list[dict[str, Any]]


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    environment = small.environment()
    environment.pop("XLA_FLAGS")
    for stage, start in ((1, None), (2, root / "stage1")):
        command = [
            sys.executable, "-m", "vflax.launch", f"--config=configs/stage{stage}.py:tiny",
            f"--workdir={root / f'stage{stage}'}",
        ]  # fmt: skip
        if start is not None:
            command.append(f"--config.init.checkpoint={start}")
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
        print(result.stdout[-6000:])
        assert result.returncode == 0, result.stderr[-3000:]
    stage0 = checkpoint_path(configs.load_config("configs/stage1.py:tiny"))
    assert stage0 is not None
    workdirs = [stage0, root / "stage1", root / "stage2"]
    return Chain(workdirs, [json.loads((w / "summary.json").read_text()) for w in workdirs])


def test_stage_1_answers_held_out_questions(chain: Chain):
    evaluation = chain.facts[1]["evaluation"]
    assert evaluation["short_tasks"] >= 16
    assert evaluation["accuracy"] >= 0.85


def test_stage_1_looks_at_the_images(chain: Chain):
    evaluation = chain.facts[1]["evaluation"]
    assert evaluation["blind"] <= 0.35
    assert evaluation["above_blind"] >= 12 / 16 * evaluation["short_tasks"]


def test_stage_2_answers_at_length_where_it_is_asked_to(chain: Chain):
    evaluation = chain.facts[2]["evaluation"]
    assert evaluation["words_long"] >= 30
    assert evaluation["words_short"] <= 3


def test_stage_2_forgets_little_of_stage_1(chain: Chain):
    before, after = (chain.facts[i]["evaluation"]["accuracy"] for i in (1, 2))
    assert before - after < 0.05


def test_every_stage_leaves_a_verified_export(chain: Chain):
    for workdir in chain.workdirs:
        assert json.loads((workdir / "export" / "export.json").read_text())["verified"] is True


def test_stage_1_leaves_the_tower_as_stage_0_left_it(chain: Chain):
    from safetensors.numpy import load_file

    before, after = (load_file(w / "export" / "model.safetensors") for w in chain.workdirs[:2])
    for name, tensor in before.items():
        if name.startswith("vision_tower."):
            assert after[name].tobytes() == tensor.tobytes(), name


def test_greedy_answers_equal_those_of_transformers(chain: Chain):
    from tests.parity.greedy_hf import compare_greedy

    count, different, near_ties = compare_greedy(chain.workdirs[1], per_task=4, max_new_tokens=12)
    print(
        f"{count} prompts, {different} answers differ, {near_ties} of them where the top two logits are within 1e-4"
    )
    assert count >= 64 and different == 0
