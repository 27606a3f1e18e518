"""Evaluation in the loop: held-out loss of each task, benchmarks, the best checkpoint by any of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from data_pipeline import mini_benchmarks
from tests import small
from tests.evaluate.test_scienceqa import write_pictures
from tests.evaluate.test_scienceqa import write_release as write_scienceqa
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


def test_every_held_out_question_is_kept_with_its_answers(benchmarks: Path, tmp_path: Path):
    changed = config(benchmarks)
    changed.evaluate.tasks, changed.evaluate.every, changed.steps = ("loss", "accuracy"), 0, 1
    assert train.run_with_start(changed, tmp_path) == 0
    lines = (tmp_path / "eval" / "1" / "heldout" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    facts = json.loads((tmp_path / "summary.json").read_text())["evaluation"]
    assert {row["task"] for row in rows} == facts["tasks"].keys()
    for task, found in facts["tasks"].items():
        own = [row for row in rows if row["task"] == task]
        assert len(own) == found["n"]
        assert sum(row["right"] for row in own) / len(own) == found["accuracy"]
        assert sum(row["blind_right"] for row in own) / len(own) == found["blind"]
        assert statistics.median(row["words"] for row in own) == found["words"]
        assert {row["short"] for row in own} == {found["short"]}
        for row in own:
            assert row["id"] and row["question"] and row["reference"] and isinstance(row["blind"], str)
            assert (Path(row["source"]) / "dataset_info.json").exists() and row["split"] == "test"
    assert [path.name for path in (tmp_path / "eval" / "1" / "heldout").iterdir()] == ["answers.jsonl"]


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
        **{"tasks": ("loss",), "data": "", "limit": 0, "style": "llava", "custom": True, "max_new_tokens": 2}
        | changes
    )


def test_an_unknown_task_is_named():
    with pytest.raises(
        UserError, match=r"config\.evaluate\.tasks: bleu unknown; there are: loss, accuracy, mme"
    ):
        loop.check_tasks(options(tasks=("loss", "bleu")))


def test_an_unknown_style_is_named():
    with pytest.raises(UserError, match=r"config\.evaluate\.style='qcm': expected one of llava, plain"):
        loop.check_tasks(options(style="qcm"))


def test_a_benchmark_is_asked_in_the_style_that_the_config_names(tmp_path: Path):
    write_scienceqa(tmp_path / "scienceqa")
    write_pictures(tmp_path / "scienceqa")
    task = loop.TASKS["scienceqa"]
    questions = task.load(tmp_path / "scienceqa", custom=True)
    for style in ("llava", "qcm_lea"):
        asked = options(tasks=("scienceqa",), data=str(tmp_path), style=style)
        (found,) = loop.open_benchmarks(asked, tmp_path)
        assert [ask.text for ask in found.asked] == [task.prompt(question, style) for question in questions]


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


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_a_benchmark_without_its_pictures_stops_the_run_before_it_begins(
    name: str, benchmarks: Path, tmp_path: Path
):
    """Its questions would be asked, and answered, without."""
    shutil.copytree(benchmarks / name, tmp_path / name)
    if name == "mme":
        blind(tmp_path / name)
    else:
        shutil.rmtree(tmp_path / name / "images")
    with pytest.raises(UserError, match=f"the questions of {name} are there, their pictures are not"):
        loop.open_benchmarks(options(tasks=(name,), data=str(tmp_path)), tmp_path)


def blind(folder: Path) -> None:
    """MME's folders of pictures -> its tool's template, which has none."""
    for text in loop.TASKS["mme"].load(folder, custom=True):
        subtask, picture = text.unit.split("/")
        with (folder / f"{subtask}.txt").open("a") as file:
            file.write(f"{picture}.png\t{text.text}\t{text.answer}\n")
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)


def test_only_what_the_rule_counts_is_asked(tmp_path: Path):
    """TextOCR's questions are of two kinds, each with a rule of its own."""
    boxes = {
        f"a{n}": {"id": f"a{n}", "image_id": "a", "bbox": [0, 0, 4, 4], "utf8_string": word}
        for n, word in enumerate(("stop", "here"))
    }
    (tmp_path / "textocr" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "textocr" / "images" / "a.jpg")
    whole = {"imgs": {"a": {"id": "a", "width": 8, "height": 8}}, "anns": boxes}
    (tmp_path / "textocr" / "TextOCR_0.1_val.json").write_text(json.dumps(whole))
    (found,) = loop.open_benchmarks(options(tasks=("textocr",), data=str(tmp_path)), tmp_path)
    assert [ask.key for ask in found.asked] == ["words/a"]


def test_what_is_too_long_for_the_model_has_no_prediction(
    benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in vflax.evaluate; POPE's rule would read an empty answer as yes."""
    opened = loop.open_benchmarks

    def with_a_long_one(*args: Any) -> list[loop.Benchmark]:
        (found,) = opened(*args)
        first, *rest = found.asked
        return [dataclasses.replace(found, asked=[dataclasses.replace(first, text="word " * 2000), *rest])]

    monkeypatch.setattr(train, "open_benchmarks", with_a_long_one)
    changed = config(benchmarks)
    changed.evaluate.tasks, changed.steps, changed.evaluate.every = ("pope",), 1, 0
    changed.checkpoint.best_metric = ""
    assert train.run_with_start(changed, tmp_path) == 0
    folder = tmp_path / "eval" / "1" / "pope"
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] is None for row in predictions] == [True] + [False] * (len(predictions) - 1)
    assert json.loads((folder / "score.json").read_text())["missing"] == 1


def test_a_held_out_loss_that_is_no_number_does_not_stop_the_run(
    benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Half of the steps' weights may overflow bfloat16 on one sample."""
    monkeypatch.setattr(loop, "heldout_loss", lambda *_: (float("nan"), {}))
    changed = config(benchmarks, checkpoint__best_metric="eval/loss")
    changed.evaluate.tasks = ("loss",)
    assert train.run_with_start(changed, tmp_path) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["evaluation"]["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "not a number" in (tmp_path / "summary.html").read_text()


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
