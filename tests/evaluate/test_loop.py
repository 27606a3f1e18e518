"""Evaluation in the loop: held-out loss of each task, benchmarks, the best checkpoint by any of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline import mini_benchmarks
from tests import small
from vflax import train
from vflax.checkpoint import find_step
from vflax.errors import UserError
from vflax.evaluate import loop
from vflax.evaluate import score as scoring
from vflax.evaluate.__main__ import main
from vflax.metrics import read_metrics

TASKS = ("loss", "pope", "mme", "cf")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "data"
    mini_benchmarks.write(folder)
    return folder


def config(benchmarks: Path, **changes: Any) -> Any:
    found = small.config(
        evaluate__every=2, evaluate__data=str(benchmarks), evaluate__limit=2, evaluate__custom=True, steps=4, **changes
    )  # fmt: skip
    found.evaluate.tasks = TASKS
    return found


@pytest.fixture(scope="module")
def run(benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    assert (
        train.run_with_start(config(benchmarks, checkpoint__best_metric="eval/pope/yes_ratio"), workdir) == 0
    )
    return workdir


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(workdir / "metrics.jsonl") if "eval/loss" in record]


def test_every_so_many_steps_the_loss_of_each_held_out_task_is_measured(run: Path):
    found = evaluations(run)
    assert [record["step"] for record in found] == [2, 4]
    for record in found:
        tasks = [value for name, value in record.items() if name.startswith("eval/loss/")]
        assert len(tasks) >= 16
        assert min(tasks) < record["eval/loss"] < max(tasks)


def test_benchmarks_are_scored_as_vflax_evaluate_score_does_it(run: Path, benchmarks: Path):
    for record in evaluations(run):
        folder = run / "eval" / str(record["step"])
        for name in ("pope", "mme", "cf"):
            kept = json.loads((folder / name / "score.json").read_text())
            mode = "strict" if name == "cf" else "official"
            found = scoring.score(
                name,
                folder / name / "predictions.jsonl",
                data=benchmarks / name,
                mode=mode,
                custom=True,
                limit=2,
            )
            assert record[f"eval/{name}"] == kept["score"] == found.score
            assert kept["n"] == found.n > 0
            assert (folder / name / "verdicts.jsonl").exists()


def test_the_loop_says_what_vflax_evaluate_says_of_the_same_weights(
    run: Path, benchmarks: Path, tmp_path: Path
):
    flags = (
        f"--model={run}", "--tasks=pope", f"--data={benchmarks}", f"--out={tmp_path}", "--custom", "--limit=2",
        "--steps=infer", "--max-tokens=2", "--cache-tokens=4096", "--pictures=8",
    )  # fmt: skip
    assert main(flags) == 0
    there, here = (
        {row["key"]: row["prediction"] for row in map(json.loads, path.read_text().splitlines())}
        for path in (
            tmp_path / "pope" / "predictions.jsonl",
            run / "eval" / "4" / "pope" / "predictions.jsonl",
        )
    )
    assert here == there


def test_what_an_evaluation_costs_is_told_for_each_task(run: Path):
    facts = json.loads((run / "summary.json").read_text())["evaluation"]
    assert facts["seconds"].keys() == set(TASKS)
    for record in evaluations(run):
        assert all(record[f"eval/seconds/{name}"] > 0 for name in TASKS)
    assert facts["losses"].keys() == {
        name.removeprefix("eval/loss/") for name in evaluations(run)[-1] if name.startswith("eval/loss/")
    }


def test_the_best_checkpoint_may_be_that_of_a_benchmark_s_metric(run: Path):
    found = {record["step"]: record["eval/pope/yes_ratio"] for record in evaluations(run)}
    assert find_step(run, "best") == max(found, key=lambda step: found[step])


@pytest.mark.slow
def test_the_best_checkpoint_may_be_that_of_one_task_s_loss_of_those_that_are_included(
    run: Path, benchmarks: Path, tmp_path: Path
):
    one = next(iter(json.loads((run / "summary.json").read_text())["evaluation"]["losses"]))
    changed = config(benchmarks, checkpoint__best_metric=f"eval/loss/{one}")
    changed.evaluate.tasks, changed.evaluate.include = ("loss",), (one,)
    assert train.run_with_start(changed, tmp_path) == 0
    found = evaluations(tmp_path)
    assert all(record[f"eval/loss/{one}"] == pytest.approx(record["eval/loss"]) for record in found)
    by_step = {record["step"]: record["eval/loss"] for record in found}
    assert find_step(tmp_path, "best") == min(by_step, key=lambda step: by_step[step])


def options(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"tasks": ("loss",), "data": "", "limit": 0, "custom": True, "max_new_tokens": 2} | changes
    )


def test_an_unknown_task_is_named():
    with pytest.raises(
        UserError, match=r"config\.evaluate\.tasks: bleu unknown; there are: loss, accuracy, mme"
    ):
        loop.check_tasks(options(tasks=("loss", "bleu")))


def test_a_benchmark_that_needs_a_judge_is_refused():
    with pytest.raises(UserError, match="mmvet is graded by a judge, which the loop does not have"):
        loop.check_tasks(options(tasks=("mmvet", "cf"), data="somewhere"))


def test_benchmarks_without_a_folder_are_refused():
    with pytest.raises(UserError, match=r"pope is asked for; .*config\.evaluate\.data"):
        loop.check_tasks(options(tasks=("pope",)))


def test_a_benchmark_that_is_not_there_stops_the_run_before_it_begins(tmp_path: Path):
    with pytest.raises(UserError, match=r"pope of config\.evaluate\.tasks is expected in .*/nowhere/pope"):
        train.run_with_start(config(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_best_metric_that_nothing_measures_is_refused_with_those_that_are(benchmarks: Path):
    data: Any = SimpleNamespace(heldout_tasks=["colour", "digit"])
    asked = options(tasks=("loss", "pope"), data=str(benchmarks), limit=2)
    opened = loop.open_benchmarks(asked, benchmarks)
    for metric in ("", "eval/loss", "eval/loss/colour", "eval/pope", "eval/pope/f1"):
        loop.check_best_metric(asked, metric, data, opened)
    for metric, offered in (
        ("eval/accuracy", "eval/loss, eval/pope"),
        ("eval/loss/color", "eval/loss/colour"),
        ("eval/pope/f2", "eval/pope/f1"),
    ):
        with pytest.raises(UserError, match=rf"best_metric='{metric}' is not measured.*{offered}"):
            loop.check_best_metric(asked, metric, data, opened)
