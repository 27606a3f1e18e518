"""A study that does not fit together is refused by name, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.grids import run, study
from vflax.errors import UserError
from vflax.study.grid import Arm, Cell, Claim, Difference, Metric, Run, Trend, known_studies, load_study
from vflax.study.recipe import config_of, folder_of


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cells": (Cell("other", 1, run()),)}, "a cell of 'other', which is no arm"),
        ({"arms": (Arm("few"), Arm("many"), Arm("none"))}, "arm 'none' has no cell"),
        ({"cells": 2 * (Cell("few", 1, run()), Cell("many", 1, run()))}, r"two cells of \('few', 1\)"),
        ({"metrics": (Metric("accuracy", "", ("a",), paper={"all": 1.0}),)}, "paper's number of 'all'"),
        ({"claims": (Claim("So.", "there"),)}, "neither a test nor a reason"),
        ({"claims": (Claim("So.", "there", Difference("accuracy", "few", "most")),)}, "no arm 'most'"),
        ({"claims": (Claim("So.", "there", Difference("mme", "few", "many")),)}, "no metric 'mme'"),
        (
            {"claims": (Claim("So.", "there", Difference("accuracy", "few", "few", against="blind")),)},
            "no metric 'blind'",
        ),
        ({"claims": (Claim("So.", "there", Trend("accuracy", 1, ("few",))),)}, "a trend needs two arms"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict, said: str):
    with pytest.raises(UserError, match=said):
        study(**changes)


def test_a_run_that_two_cells_share_is_there_once_and_after_its_start():
    start = run(1)
    second = Run("configs/stage2.py:tiny", {}, start)
    found = study(cells=(Cell("few", 1, start), Cell("many", 1, second))).runs()
    assert found == [start, second]


def test_an_unknown_study_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"two_stage_vs_mixed\.py"):
        load_study("two_stages")


def test_a_file_that_is_no_study_is_refused(tmp_path: Path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no get_study"):
        load_study(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nwhile:\n", r"mine\.py, line 2: SyntaxError"),
        ("x = 1\n\nimport no_such_module\n", r"mine\.py, line 3: ModuleNotFoundError: .*no_such_module"),
        ("def get_study(variant):\n    return 1\n", r"mine\.py: TypeError: .*seeds"),
        ("def get_study(variant, seeds=None):\n    return 1 / 0\n", r"mine\.py, line 2: ZeroDivisionError"),
    ],
)
def test_a_file_that_fails_is_told_with_its_line(text: str, said: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said):
        load_study(f"{tmp_path / 'mine.py'}:small", (1,))


def test_photographs_are_a_variant_of_their_own_that_asks_for_its_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VFLAX_PHOTOGRAPHS", raising=False)
    with pytest.raises(UserError, match=r"VFLAX_PHOTOGRAPHS=DIR .*CIFAR-10"):
        load_study("forgetting:tiny-photographs")
    monkeypatch.setenv("VFLAX_PHOTOGRAPHS", "photographs")
    found, without = load_study("forgetting:tiny-photographs"), load_study("forgetting:tiny")
    assert (found.variant, len(found.cells)) == ("tiny-photographs", len(without.cells))
    assert found.prepare and not without.prepare
    shared = {folder_of(run) for run in found.runs()} & {folder_of(run) for run in without.runs()}
    assert shared == set()
    hidden = {config_of(cell.run).data.sources[0].exclude for cell in found.cells if "without" in cell.arm}
    assert hidden == {("HANDWRITING+*",)}


@pytest.mark.parametrize("name", known_studies())
@pytest.mark.parametrize("size", ["13b", "7b", "tiny"])
def test_every_study_has_every_size_and_takes_other_seeds(name: str, size: str):
    found = load_study(f"{name}:{size}", (7, 8))
    assert found.name == name and found.variant == size
    assert found.seeds == [7, 8]
    assert all(claim.source for claim in found.claims)


def test_the_studies_of_the_paper_are_there():
    assert set(known_studies()) >= {
        "tasks_vs_instances", "tasks_scaling", "gpt4_amount", "two_stage_vs_mixed", "tuned_modules", "drop_task_group",
        "forgetting", "novel_tasks",
    }  # fmt: skip
