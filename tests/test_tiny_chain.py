"""The tiny chain 0 -> 1 -> 2 learns for real on a CPU, its export says what the run said, and so do the pages on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests import pages
from tests.parity.greedy_hf import compare_greedy
from vflax.metrics import read_metrics

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Chain:
    """What the three stages left.

    stage1, stage2: their WORKDIRs; printed: what stage 1's command printed; minutes: all three stages together.
    """

    stage1: Path
    stage2: Path
    printed: str
    minutes: float

    def facts(self, stage: int) -> dict[str, Any]:
        return json.loads(((self.stage1, self.stage2)[stage - 1] / "summary.json").read_text())


def _launch(config: str, workdir: Path, cache: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "vflax.launch", f"--config={config}", f"--workdir={workdir}", *flags]
    result = subprocess.run(
        command, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "VFLAX_CACHE": str(cache)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    stage1, stage2, cache = folder / "stage1", folder / "stage2", folder / "cache"
    started = time.monotonic()
    printed = _launch("configs/stage1.py:tiny", stage1, cache)
    _launch("configs/stage2.py:tiny", stage2, cache, f"--config.init.checkpoint={stage1}")
    chain = Chain(stage1, stage2, printed, (time.monotonic() - started) / 60)
    for stage in (1, 2):
        facts = chain.facts(stage)["evaluation"]
        print(
            f"stage {stage}:", {k: v for k, v in facts.items() if k != "tasks"}, chain.facts(stage)["goodput"]
        )
    print(f"all stages: {chain.minutes:.1f} minutes")
    return chain


def test_stage_1_answers_what_it_sees(chain: Chain) -> None:
    found = chain.facts(1)["evaluation"]
    assert found["accuracy"] >= 0.85
    assert found["blind"] <= 0.35
    assert found["above_blind"] >= 0.75 * found["short_tasks"] and found["short_tasks"] >= 16


def test_the_tasks_are_printed_with_accuracy_majority_and_blind(chain: Chain) -> None:
    for name in ("accuracy", "majority", "blind", *chain.facts(1)["evaluation"]["tasks"]):
        assert name in chain.printed


def test_stage_2_answers_at_length_where_that_is_asked_and_forgets_little(chain: Chain) -> None:
    found = chain.facts(2)["evaluation"]
    assert found["words_long"] >= 30
    assert found["words_short"] <= 3
    assert found["accuracy"] > chain.facts(1)["evaluation"]["accuracy"] - 0.05


def test_every_stage_lowers_its_loss(chain: Chain) -> None:
    for workdir in (chain.stage1, chain.stage2):
        losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
        assert losses[-1] < losses[0] / 2


def test_the_tower_comes_through_stages_1_and_2_byte_for_byte(chain: Chain) -> None:
    first, second = (load_file(w / "export" / "model.safetensors") for w in (chain.stage1, chain.stage2))
    tower = [name for name in first if name.startswith("vision_tower.")]
    assert len(tower) > 40
    for name in tower:
        assert first[name].tobytes() == second[name].tobytes(), name
    moved = "language_model.model.layers.0.mlp.up_proj.weight"
    assert first[moved].tobytes() != second[moved].tobytes()


def test_the_exports_answer_in_transformers_as_the_runs_do(chain: Chain) -> None:
    for workdir, tokens in ((chain.stage1, 12), (chain.stage2, 40)):
        assert json.loads((workdir / "export" / "export.json").read_text())["verified"] is True
        prompts, different, near_ties = compare_greedy(workdir, per_task=2, max_new_tokens=tokens)
        assert prompts >= 6 and different == 0, (workdir.name, different, near_ties)


@pytest.fixture(scope="session")
def reader(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who reads the pages, and has trained runs/tiny."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(chain.stage1, folder / "runs" / "tiny")
    return folder


def _readers_environment(chain: Chain) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "VFLAX_CACHE": str(chain.stage1.parent / "cache")}


@pytest.mark.parametrize("page", pages.FOLLOWED)
def test_what_a_page_says_can_be_done(page: str, chain: Chain, reader: Path) -> None:
    pages.follow(pages.followed(page), reader, _readers_environment(chain))
    if page == "docs/quickstart.md":
        printed = (reader / "log.txt").read_text()
        assert "\nred\n" in printed and '"content":"red"' in printed  # the answer that stands on the page


def test_the_way_of_one_sample_is_what_its_page_shows(chain: Chain, reader: Path) -> None:
    page = pages.ROOT / "docs" / "concepts.md"
    shown = subprocess.run(
        [sys.executable, "-m", "tests.pages", page, reader], cwd=pages.ROOT, capture_output=True, text=True,
        env=_readers_environment(chain),
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr[-3000:]
    entry = "PAIRS+color_of_shape_00332.png"
    (picture,) = (chain.stage1.parent / "cache").glob(f"mini-*/release/stage1/images/{entry}")
    assert picture.read_bytes() == (pages.ROOT / "docs" / "images" / "sample.png").read_bytes()
