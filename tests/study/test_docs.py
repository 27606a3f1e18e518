"""docs/studies.md is true: its studies, its own study, what is published in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import studies as published
from vflax.study import plots
from vflax.study.grid import known_studies, load_study
from vflax.study.recipe import config_of, folder_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "studies.md"


def test_the_page_lists_the_studies_that_there_are():
    table = PAGE.read_text().split("| study |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == known_studies()


def test_what_is_published_is_what_its_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "png", lambda *_: b"")  # as drawn on another machine they may have other bytes
    results = ROOT / "benchmarks" / "results" / "studies"
    if results.is_dir():
        shutil.copytree(results, tmp_path / "benchmarks" / "results" / "studies")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "studies.md").write_text(PAGE.read_text())
    published.write_docs(tmp_path)
    assert (tmp_path / "docs" / "studies.md").read_text() == PAGE.read_text()
    drawn, kept = (sorted((root / "docs" / "images" / "studies").glob("*.png")) for root in (tmp_path, ROOT))
    assert [path.name for path in drawn] == [path.name for path in kept]


def test_what_is_published_measures_all_but_what_a_judge_would():
    """A metric that reads a measure by a wrong name has no values, and its plot would be missing without a word."""
    for path in (ROOT / "benchmarks" / "results" / "studies").glob("*.json"):
        result = json.loads(path.read_text())
        unread = {
            metric["name"]
            for metric in result["metrics"]
            if not all(len(arm["values"]) == len(result["seeds"]) for arm in metric["arms"].values())
        }
        assert unread <= {"llava_bench"}, path.name
        assert result["cells"]["finished"] == result["cells"]["wanted"], path.name


def test_its_study_is_one(tmp_path: Path):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "rates.py").write_text(code)
    study = load_study(str(tmp_path / "rates.py"), (5,))
    assert [(cell.arm, cell.seed) for cell in study.cells] == [("0.00035", 5), ("0.0007", 5), ("0.0014", 5)]
    configs = [config_of(run) for run in study.runs()]
    assert [config.optimizer.lr for config in configs] == [3.5e-4, 7e-4, 1.4e-3]
    assert {config.seed for config in configs} == {5}
    assert len({folder_of(run) for run in study.runs()}) == 3
    assert len(load_study(str(tmp_path / "rates.py")).cells) == 9
