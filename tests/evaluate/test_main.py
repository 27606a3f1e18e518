"""python -m vflax.evaluate: from a model and benchmarks on disk to scores and a page."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import mini_benchmarks
from tests.data_pipeline.openai_server import completion, serving
from tests.generate.small_engine import compiled_once
from tests.serve.process import ServerProcess, write_model
from vflax.evaluate.__main__ import main

TASKS = ("mme", "pope", "mmbench", "cf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "data"
    mini_benchmarks.write(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    folder.mkdir()
    write_model(folder)
    return folder


def options(model: Path | str, data: Path, out: Path, *more: str, tasks: str = ",".join(TASKS)) -> list[str]:
    return [
        f"--model={model}", f"--tasks={tasks}", f"--data={data}", f"--out={out}", "--custom", "--limit=2",
        "--max-tokens=4", "--template=vicuna_v1", "--mode=cf=strict", "--cache-tokens=4096", "--pictures=8", *more,
    ]  # fmt: skip


def run(*args: Any, **options_: Any) -> int:
    with compiled_once():
        return main(options(*args, **options_))


def files(out: Path) -> dict[str, bytes]:
    return {task: (out / task / "predictions.jsonl").read_bytes() for task in TASKS}


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes that nothing disturbs."""
    out = tmp_path_factory.mktemp("out") / "whole"
    assert run(model, data, out) == 0
    return out


def test_every_task_has_predictions_scores_and_a_page(whole: Path) -> None:
    numbers = {}
    for task in TASKS:
        score = json.loads((whole / task / "score.json").read_text())
        lines = (whole / task / "predictions.jsonl").read_text().splitlines()
        verdicts = (whole / task / "verdicts.jsonl").read_text().splitlines()
        assert len(lines) == len(verdicts) == score["n"]
        numbers[task] = score["n"], score["missing"]
    # Two pictures of each of four subtasks, of three splits, of one split in four turns, of ten digits.
    assert numbers == {"mme": (16, 0), "pope": (36, 0), "mmbench": (8, 0), "cf": (20, 0)}
    page = (whole / "report.html").read_text()
    assert all(f'<section id="{task}">' in page for task in TASKS)
    assert set(json.loads((whole / "report.json").read_text())["scores"]) == set(TASKS)
    assert (whole / "report.md").read_text().startswith("| model | mme | pope | mmbench | cf |")


def test_scoring_again_needs_no_model(whole: Path, data: Path) -> None:
    before = (whole / "pope" / "score.json").read_bytes()
    arguments = [one for one in options("x", data, whole, "--steps=score") if not one.startswith("--model")]
    assert main(arguments) == 0
    assert (whole / "pope" / "score.json").read_bytes() == before


def test_an_address_gives_the_same_files(model: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    with ServerProcess(model, tmp_path / "log") as server:
        assert main(options(f"{server.url}/v1", data, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.slow
def test_a_kill_costs_nothing_but_time(model: Path, data: Path, tmp_path: Path) -> None:
    """Killed when the first predictions of a task are on the disk, then of the next one."""
    arguments = [one for one in options(model, data, tmp_path / "killed") if not one.startswith("--limit")]
    command = [sys.executable, "-m", "vflax.evaluate", *arguments]
    for task in TASKS[:3]:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            parts = tmp_path / "killed" / task / "parts"
            while process.poll() is None and not any(path.stat().st_size for path in parts.glob("*.jsonl")):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert main(command[3:]) == 0
    assert main([*command[3:], f"--out={tmp_path / 'whole'}"]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_another_model_in_the_same_folder_is_refused(
    model: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, data, whole, "--weights=int8") == 1
    assert "holds predictions of another run (model was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tasks=mme,vqa"], "--tasks=vqa: expected some of"),
        (["--steps=guess"], "--steps=guess: expected some of infer, judge, score"),
        (["--data=pope=nowhere"], "nowhere: not there"),
        (["--mode=mmvet=official"], "--mode=mmvet=...: is not one of --tasks"),
        (["--mode=cf=official"], "cf: graded by a judge, and there is none"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_computed(
    change: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options("nowhere", data, tmp_path / "out", *change)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_grades_what_the_model_said(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving(lambda seen, before: completion("Yes.")) as server:
        assert run(
            model, data, tmp_path, "--mode=cf=official", f"--judge={server.url}", "--judge-model=judge", tasks="cf"
        ) == 0  # fmt: skip
    score = json.loads((tmp_path / "cf" / "score.json").read_text())
    assert score["score"] == 100
    assert json.loads((tmp_path / "cf" / "judge.json").read_text())["versions"] == {"test-model": 20}
