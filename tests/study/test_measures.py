"""What a finished run tells, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from vflax.errors import UserError
from vflax.study.grid import Metric
from vflax.study.measures import read, value_of

TASK = {"n": 4, "majority": 0.25, "words": 1.0, "short": True}
SUMMARY = {
    "steps": 7,
    "samples": 100,
    "goodput": {"wall_seconds": 12.5},
    "evaluation": {
        "loss": 1.5,
        "losses": {"A+x": 2.0},
        "accuracy": 0.5,
        "blind": None,
        "words_short": 1.0,
        "words_long": 20.0,
        "tasks": {
            "A+x": TASK | {"accuracy": 0.25, "blind": 0.0},
            "A+y": TASK | {"accuracy": 0.75, "blind": 0.5},
            "B+long": TASK | {"accuracy": 0.0, "blind": 0.0, "words": 30.0, "short": False},
        },
    },
}


def run(folder: Path) -> epath.Path:
    """A WORKDIR that is done, with a benchmark of the loop, also one of an earlier step."""
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    for step, score in (("5", 1.0), ("7", 70.0)):
        own = folder / "eval" / step / "pope"
        own.mkdir(parents=True)
        metrics = {"yes_ratio": 40.0, "f1/random": None}
        told = {"task": "pope", "score": score, "metrics": metrics, "n": 40, "unparsed": 10}
        (own / "score.json").write_text(json.dumps(told))
    return epath.Path(folder)


def test_a_run_tells_its_accuracies_in_percent_and_the_benchmarks_of_its_last_step(tmp_path: Path):
    assert read(run(tmp_path)) == {
        "samples": 100.0, "seconds": 12.5, "loss": 1.5, "loss/A+x": 2.0, "accuracy": 50.0, "words_short": 1.0,
        "words_long": 20.0, "words/A+x": 1.0, "words/A+y": 1.0, "words/B+long": 30.0, "accuracy/A+x": 25.0,
        "accuracy/A+y": 75.0, "blind/A+x": 0.0, "blind/A+y": 50.0, "pope": 70.0, "pope/yes_ratio": 40.0,
        "pope/unparsed": 25.0,
    }  # fmt: skip


def test_mentions_of_what_is_not_there_are_counted_in_long_answers_only(tmp_path: Path):
    workdir = run(tmp_path)
    rows = [
        {"task": "B+long", "question": "Describe it.", "reference": "A red heart on navy.",
         "answer": "A red heart and a blue heart."},
        {"task": "A+x", "question": "What is it?", "reference": "star", "answer": "moon"},
    ]  # fmt: skip
    folder = tmp_path / "eval" / "7" / "heldout"
    folder.mkdir()
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"evaluate": {"sources": [{"path": "mini:stage1"}]}}))
    assert read(workdir)["hallucinated"] == 25.0  # blue, of red, heart, blue, heart


def test_what_the_evaluation_command_wrote_comes_on_top(tmp_path: Path):
    workdir = run(tmp_path)
    own = tmp_path / "evaluate" / "llava_bench"
    own.mkdir(parents=True)
    told = {"task": "llava_bench", "score": 60.0, "metrics": {}, "n": 0, "unparsed": 0}
    (own / "score.json").write_text(json.dumps(told))
    assert read(workdir, epath.Path(tmp_path / "evaluate"))["llava_bench"] == 60.0


def test_a_metric_is_the_mean_of_what_its_patterns_match():
    measures = {"accuracy/A+x": 20.0, "accuracy/A+y": 40.0, "accuracy/B+z": 90.0, "accuracy": 50.0}
    assert value_of(Metric("a", "", ("accuracy/A+*",)), measures) == 30.0
    assert value_of(Metric("a", "", ("accuracy/*",), without=("accuracy/A+*",)), measures) == 90.0
    assert value_of(Metric("a", "", ("mme",)), measures) is None


def test_a_run_without_its_summary_is_named_with_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"summary\.json: not there; delete its folder"):
        read(epath.Path(tmp_path))
