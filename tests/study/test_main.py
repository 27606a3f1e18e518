"""A study through its command line, on runs of seconds: it goes on after a kill, and runs only what is missing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from data_pipeline import built_in
from tests import pages, small
from vflax.study.__main__ import main
from vflax.study.grid import known_studies

STUDY = """
from vflax.study.grid import Arm, Cell, Claim, Metric, Preparation, Run, Study, Trend

def get_study(variant="x", seeds=None):
    arms = (Arm("one stage", {steps}), Arm("two stages", {steps} + 2))
    def first(seed):
        return Run({first!r}, {{"seed": seed, "steps": {steps}}})
    def second(seed):
        return Run({second!r}, {{"seed": seed, "steps": 2}}, first(seed))
    made = {{"one stage": first, "two stages": second}}
    claims = (Claim("It falls.", "here", Trend("loss", -1)),)
    if variant == "one":
        arms, claims = arms[:1], ()
    cells = tuple(Cell(arm.name, seed, made[arm.name](seed)) for seed in seeds or (1, 2) for arm in arms)
    return Study("small", variant, "one stage or two", "One stage or two?", "steps", arms, cells,
                 (Metric("loss", "held-out loss, nats", ("loss",), better="lower"),
                  Metric("pope", "POPE format, accuracy in %", ("pope/accuracy",))),
                 claims, prepare=(Preparation("{{work}}/prepared", "tests.study.touch", ("{{work}}/prepared",)),))
"""
# The small config for a run that starts from another one: the model comes with the weights.
SECOND = """
from ml_collections import ConfigDict

from vflax.config import load_config

def get_config():
    config = load_config({first!r})
    config.model.vision, config.model.decoder, config.tokenizer = ConfigDict(), ConfigDict(), ""
    return config
"""


def write_study(folder: Path, steps: int = 3) -> Path:
    """A study file of four runs of the small config, of which two start from the other two."""
    first, second = folder / "small_config.py", folder / "second_config.py"
    first.write_text(small.FILE)
    second.write_text(SECOND.format(first=str(first)))
    file = folder / "small_study.py"
    file.write_text(STUDY.format(first=str(first), second=str(second), steps=steps))
    return file


def command(file: Path, workdir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "vflax.study", f"--study={file}", f"--workdir={workdir}", *flags]


def study(file: Path, workdir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(file, workdir, *flags), env=small.environment(), capture_output=True, text=True, timeout=600
    )


def executed(work: Path) -> dict[str, int]:
    """{log: how often its command was run}."""
    return {path.name: len(re.findall("^[$] ", path.read_text(), re.M)) for path in (work / "logs").iterdir()}


def starts(run: Path) -> int:
    """How often a launch has begun to work in a WORKDIR; one that finds all done does not."""
    lines = [json.loads(line) for line in (run / "goodput.jsonl").read_text().splitlines()]
    return sum(line["event"] == "start" for line in lines)


@pytest.mark.slow
def test_a_study_goes_on_after_kill_9_and_runs_only_what_is_missing(tmp_path: Path):
    file, work = write_study(tmp_path), tmp_path / "w"
    dry = study(file, work, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "2 arms x 2 seeds = 4 cells of 4 launches, 0 cells are there" in dry.stdout
    assert "to be run: 4 launches (10 steps" in dry.stdout
    assert not work.exists()

    # Killed in the first launch: that one goes on alone, and is waited for.
    process = subprocess.Popen(
        command(file, work, "--topology=none"), env=small.environment(), stdout=subprocess.DEVNULL
    )
    try:
        while not list((work / "runs").glob("*/config.json")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    again = study(file, work, "--topology=none", "--parallel=2")
    assert again.returncode == 0, again.stdout + again.stderr
    result = json.loads((work / "small" / "result.json").read_text())
    assert result["cells"] == {"wanted": 4, "finished": 4}
    [claim] = result["claims"]
    assert claim["n"] == 2 and claim["verdict"] in ("shows it", "does not show it", "shows the opposite")
    # Every run was begun once, and so was what is prepared.
    assert [starts(run) for run in (work / "runs").iterdir()] == [1, 1, 1, 1]
    jobs = {f"{run.name}.log": 1 for run in (work / "runs").iterdir()} | {"prepared.log": 1}
    assert executed(work) == jobs
    assert (work / "prepared").read_text() == "begun\ndone\n"
    runs = {run.name.partition("-")[0]: run for run in (work / "runs").iterdir()}
    origin = json.loads((runs["second_config"] / "config.json").read_text())["init"]["checkpoint"]
    assert Path(origin).parent == work / "runs" and Path(origin).name.startswith("small_config-")

    # All there: nothing is run. One is lost: that one is.
    logs = {path: path.stat().st_size for path in (work / "logs").iterdir()}
    assert study(file, work).returncode == 0
    assert {path: path.stat().st_size for path in (work / "logs").iterdir()} == logs
    lost = sorted((work / "runs").iterdir())[0]
    shutil.rmtree(lost)
    part = study(file, work, "--report-only")
    assert part.returncode == 1 and "is of 4 cells, and 3 are found now" in part.stderr
    (work / "small" / "result.json").unlink()
    part = study(file, work, "--report-only")
    assert part.returncode == 0, part.stderr
    assert json.loads((work / "small" / "result.json").read_text())["claims"][0]["verdict"] == "unfinished"
    before = executed(work)
    done = study(file, work, "--topology=none")
    assert executed(work) == before | {f"{lost.name}.log": before[f"{lost.name}.log"] + 1}
    assert "[1/1]" in done.stdout and "[2/" not in done.stdout
    assert json.loads((work / "small" / "result.json").read_text()) == result | {
        "seconds": pytest.approx(result["seconds"], rel=10)
    }


@pytest.mark.slow
def test_a_cell_is_evaluated_once_and_its_score_is_found(tmp_path: Path):
    file, work = Path(f"{write_study(tmp_path)}:one"), tmp_path / "w"
    asked = f"--tasks=pope --data={built_in.path('benchmarks')} --custom --limit=4 --max-tokens=2"
    flags = ("--seeds=1", "--topology=none", "--evaluate", asked)
    ran = study(file, work, *flags)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [run] = (work / "runs").iterdir()
    jobs = {"prepared.log": 1, f"{run.name}.log": 1, f"{run.name}-evaluate.log": 1}
    assert executed(work) == jobs
    result = json.loads((work / "small" / "result.json").read_text())
    assert result["cells"] == {"wanted": 1, "finished": 1}
    [score] = run.glob("evaluate-*/pope/score.json")
    [pope] = [metric for metric in result["metrics"] if metric["name"] == "pope"]
    assert pope["arms"]["one stage"]["mean"] == json.loads(score.read_text())["metrics"]["accuracy"]

    # All there: nothing is run again. Asked otherwise the cell has no score yet.
    assert study(file, work, *flags).returncode == 0 and executed(work) == jobs
    other = study(file, work, *flags[:-1], asked.replace("=4", "=2"), "--report-only")
    assert other.returncode == 1 and "is of 1 cells, and 0 are found now" in other.stderr


@pytest.mark.slow
def test_a_study_told_to_stop_saves_its_launches_and_says_so(tmp_path: Path):
    file, work = write_study(tmp_path, steps=400), tmp_path / "w"
    process = subprocess.Popen(
        command(file, work, "--topology=none"), env=small.environment(), stdout=subprocess.PIPE, text=True
    )
    while not list((work / "runs").glob("*/checkpoints/*/_CHECKPOINT_METADATA")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    [run] = (work / "runs").iterdir()
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"


@pytest.mark.slow
def test_the_dry_runs_of_the_pages_count_cells_launches_and_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = [
        command.text
        for page in ("README.md", "docs/studies.md")
        for command in pages.commands(pages.ROOT / page)
        if re.match(r"\S*python -m vflax.study --study=\w+:tiny .*--dry-run$", command.text)
    ]
    assert len(asked) == 2
    monkeypatch.chdir(tmp_path)
    for text in asked:
        assert main(shlex.split(text)[3:]) == 0
        told = capsys.readouterr().out
        for name in known_studies() if "--study=all:" in text else ["two_stage_vs_mixed"]:
            assert re.search(
                rf"^{name}:tiny: .*\n  \d+ arms x 3 seeds = \d+ cells of \d+ launches, 0 cells", told, re.M
            )
        assert re.search(r"^to be run: \d+ launches .* of training, one after the other$", told, re.M)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--study=nothing"], "there is no file configs/studies/nothing.py"),
        (["--study=tasks_scaling:small"], "the study has no variant 'small'"),
        (["--study="], "--study: name one of"),
        (["--study=tasks_scaling:tiny", "--seeds=a"], "--seeds=a: whole numbers"),
        (["--study=tasks_scaling:tiny", "--slices=a,b"], "--slices and --on go together"),
        (["--study=tasks_scaling:tiny", "--slices=a", "--on=x"], "must be a word"),
        (["--study=tasks_scaling:tiny", "--parallel=0"], "--parallel=0: at least 1"),
    ],
)
def test_a_wrong_command_line_is_told_and_nothing_is_written(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*flags, f"--workdir={tmp_path / 'w'}"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_the_result_of_another_variant_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = write_study(tmp_path)
    assert main([f"--study={file}:a", f"--workdir={tmp_path / 'w'}", "--report-only"]) == 0
    before = (tmp_path / "w" / "small" / "result.json").read_bytes()
    assert main([f"--study={file}:b", f"--workdir={tmp_path / 'w'}", "--report-only"]) == 1
    assert "is of small:a, not of :b" in capsys.readouterr().err
    assert (tmp_path / "w" / "small" / "result.json").read_bytes() == before


def test_one_study_at_a_time_runs_in_a_folder_and_pages_can_be_made_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    work = tmp_path / "w"
    work.mkdir()
    flags = [f"--study={write_study(tmp_path)}", f"--workdir={work}", "--topology=none"]
    with FileLock(work / ".lock"):
        assert main(flags) == 1
        assert "another study runs in it" in capsys.readouterr().err and not (work / "runs").exists()
        assert main([*flags, "--report-only"]) == 0
    assert (work / "small" / "report.html").exists()


def test_a_folder_of_another_run_is_never_taken_for_the_studys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from vflax.study.grid import load_study
    from vflax.study.recipe import folder_of

    file = write_study(tmp_path)
    run = load_study(str(file)).cells[0].run
    folder = tmp_path / "w" / "runs" / folder_of(run)
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "done"}')
    (folder / "summary.json").write_text("{}")
    (folder / "config.json").write_text('{"seed": 9}')
    assert main([f"--study={file}", f"--workdir={tmp_path / 'w'}", "--topology=none"]) == 1
    assert "not the run that the study means: " in (error := capsys.readouterr().err)
    assert "seed: 1 wanted, 9 run" in error
