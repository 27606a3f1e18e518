"""The tiny chain 0 -> 1 -> 2 learns for real on a CPU, its export says what the run said, and so do the pages on it.

What the pages say of one's own task and of ScienceQA, and a study, start from its stage 0, with few steps.
"""

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

from data_pipeline.author.task import load_task_file
from tests import pages
from tests.data_pipeline.author_files import write_review
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


def _environment(cache: Path) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "VFLAX_CACHE": str(cache)}


def _launch(config: str, workdir: Path, cache: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "vflax.launch", f"--config={config}", f"--workdir={workdir}", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=_environment(cache))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first launch that needs them puts the built-in data and the tiny stage 0."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def chain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    stage1, stage2 = folder / "stage1", folder / "stage2"
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


@pytest.mark.parametrize("page", pages.FOLLOWED)
def test_what_a_page_says_can_be_done(page: str, cache: Path, reader: Path) -> None:
    pages.follow(pages.followed(page), reader, _environment(cache))
    if page == "docs/quickstart.md":
        printed = (reader / "log.txt").read_text()
        assert "\nred\n" in printed and '"content":"red"' in printed  # the answer that stands on the page


def test_the_way_of_one_sample_is_what_its_page_shows(cache: Path, reader: Path) -> None:
    page = pages.ROOT / "docs" / "concepts.md"
    shown = subprocess.run(
        [sys.executable, "-m", "tests.pages", page, reader], cwd=pages.ROOT, capture_output=True, text=True,
        env=_environment(cache),
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr[-3000:]
    entry = "PAIRS+color_of_shape_00332.png"
    (picture,) = cache.glob(f"mini-*/release/stage1/images/{entry}")
    assert picture.read_bytes() == (pages.ROOT / "docs" / "images" / "sample.png").read_bytes()


def test_a_task_of_ones_own_is_trained_on_and_stands_in_the_report(cache: Path, tmp_path: Path) -> None:
    """The way of docs/author.md, from the task file to the pages, with the two reviewers' part in between."""
    asked = pages.followed("docs/author.md")
    (at,) = (at for at, command in enumerate(asked) if " accept " in command.text)
    environment = _environment(cache)
    pages.follow(asked[:at], tmp_path, environment)
    file = tmp_path / "charts.py"
    names = [task.name for task in load_task_file(file).tasks]
    assert sorted(sheet.stem for sheet in (tmp_path / "reviews").glob("*.html")) == sorted(names)
    for number, name in enumerate(names):
        for person in ("Ann Other", "Bo Third"):
            export = tmp_path / f"{name}.{person.lower().replace(' ', '-')}.json"
            write_review(export, file, None, person, task_at=number)
    pages.follow(asked[at:], tmp_path, environment, {"vflax.launch": "--config.steps=20"})

    facts = json.loads((tmp_path / "runs" / "charts" / "summary.json").read_text())
    assert facts["steps"] == 20
    found = facts["evaluation"]["tasks"]
    assert found.keys() == {"BARS+tallest", "BARS+count"} == set(names)
    report = (tmp_path / "runs" / "charts" / "summary.html").read_text()
    for name in names:
        assert found[name]["short"] and found[name]["n"] == 25, found[name]
        assert 0 < found[name]["majority"] < 1 and 0 <= found[name]["accuracy"] <= 1
        assert name in report
    metadata = json.loads((tmp_path / "release" / "metadata.json").read_text())
    assert "Ann Other" in json.dumps(metadata) and (tmp_path / "pages" / "charts" / "index.html").is_file()


def test_the_tiny_chain_of_scienceqa_goes_as_its_page_says(cache: Path, tmp_path: Path) -> None:
    short = {
        "vflax.launch": "--config.steps=20",
        "vflax.evaluate": "--limit=2",
        "vflax.evaluate.scienceqa_gpt4": "--limit=2",
    }
    pages.follow(pages.followed("docs/scienceqa.md"), tmp_path, _environment(cache), short)
    runs = tmp_path / "runs"
    losses = [r["loss"] for r in read_metrics(runs / "scienceqa-tiny" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 20 and losses[-1] < losses[0]
    for name in ("scienceqa-eval", "scienceqa-gpt4"):
        score = json.loads((runs / name / "scienceqa" / "score.json").read_text())
        # So many of each of the three subjects, and every one has an answer, whatever it says.
        assert score["n"] == 6 and score["missing"] == 0
    assert {"ours", "gpt4", "complement", "upper_bound"} <= score["metrics"].keys()


# An installed study as it stands, but for how long it trains and how much it asks.
_SHORT_STUDY = """
import dataclasses

from configs.studies import two_stage_vs_mixed

SHORT = {
    "steps": 2,
    "evaluate.tasks": ("accuracy", "pope"),
    "evaluate.samples_per_task": 1,
    "evaluate.limit": 4,
    "evaluate.max_new_tokens": 4,
}


def short(run):
    start = run.start and short(run.start)
    return dataclasses.replace(run, changes={**run.changes, **SHORT}, start=start)


def get_study(variant="tiny", seeds=(42,)):
    study = two_stage_vs_mixed.get_study(variant, seeds)
    cells = tuple(dataclasses.replace(cell, run=short(cell.run)) for cell in study.cells)
    return dataclasses.replace(study, cells=cells)
"""


def test_an_installed_study_runs_its_grid_and_reports(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(_SHORT_STUDY)
    ran = subprocess.run(
        [sys.executable, "-m", "vflax.study", f"--study={tmp_path / 'short.py'}", f"--workdir={tmp_path / 'w'}",
         "--topology=none"],
        cwd=pages.ROOT, capture_output=True, text=True, env=_environment(cache),
    )  # fmt: skip
    logs = "".join(path.read_text()[-2000:] for path in (tmp_path / "w" / "logs").glob("*.log"))
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs
    folder = tmp_path / "w" / "two_stage_vs_mixed"
    result = json.loads((folder / "result.json").read_text())
    assert result["cells"] == {"wanted": 3, "finished": 3}
    assert {claim["verdict"] for claim in result["claims"]} == {"cannot"}
    assert any(claim["why"].startswith("one seed says nothing") for claim in result["claims"])
    for metric in ("accuracy", "pope", "words"):
        (plot,) = folder.glob(f"*{metric}*.png")
        assert plot.read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert all(arm in report for arm in ("stage 1", "two stages", "mixed"))
    # Stage 2 started from the cell that is stage 1, which was run once.
    runs = list((tmp_path / "w" / "runs").iterdir())
    assert len(runs) == 3
    starts = {json.loads((run / "config.json").read_text())["init"]["checkpoint"] for run in runs}
    assert starts == {"cache:stage0-tiny", *(str(run) for run in runs if run.name.startswith("stage1-"))}
