"""How results of studies get into the repository."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import studies as published
from tests.study.results import files, made
from vflax.errors import UserError
from vflax.study import plots

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the page as it stands, without what is published in it."""
    root = tmp_path / "project"
    (root / "docs").mkdir(parents=True)
    before, _, rest = PAGE.read_text().partition(published.BEGIN)
    after = rest.partition(published.END)[2]
    text = f"{before}{published.BEGIN}\nold\n{published.END}{after}and what follows\n"
    (root / "docs" / "studies.md").write_text(text)
    return root


def write(work: Path, name: str, **changes: Any) -> None:
    (work / name).mkdir(parents=True)
    (work / name / "result.json").write_text(json.dumps(made(name, **changes)))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A WORKDIR with two results."""
    for name in ("one", "two"):
        write(tmp_path / "work", name)
    return tmp_path / "work"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are files of nothing, at once."""
    monkeypatch.setattr(plots, "png", lambda *_: b"")


def test_publishing_writes_results_plots_and_the_page_between_its_marks(project: Path, work: Path):
    page = project / "docs" / "studies.md"
    before = page.read_text()
    published.publish(work, project)
    after = page.read_text()
    assert after.split(published.BEGIN)[0] == before.split(published.BEGIN)[0]
    assert after.split(published.END)[1] == before.split(published.END)[1] == "\nand what follows\n"
    assert "\nold\n" not in after
    assert "### two" in after
    assert "| [one](#one) | Many tasks beat few. |" in after
    pictures = re.findall(r"!\[.*\]\((.*)\)", after.split(published.BEGIN)[1])
    assert len(pictures) == 6
    assert {f"images/studies/{path.name}" for path in (page.parent / "images" / "studies").iterdir()} == set(
        pictures
    )
    for picture in pictures:
        assert (page.parent / picture).stat().st_size < 60_000
    results = project / "benchmarks" / "results" / "studies"
    assert (results / "two.json").read_bytes() == (work / "two" / "result.json").read_bytes()


def test_publishing_twice_changes_nothing(project: Path, work: Path):
    published.publish(work, project)
    first = files(project)
    published.publish(work, project)
    assert files(project) == first


@pytest.mark.usefixtures("undrawn")
def test_what_was_published_of_other_studies_stays_and_plots_of_none_go(
    project: Path, work: Path, tmp_path: Path
):
    published.publish(work, project)
    drawn = project / "docs" / "images" / "studies"
    (drawn / "two-gone.png").write_bytes(b"")
    write(tmp_path / "more", "three", lost=9)
    published.publish(tmp_path / "more", project)
    text = (project / "docs" / "studies.md").read_text()
    assert re.findall(r"^### (\w+)", text.split(published.BEGIN)[1], re.M) == ["one", "three", "two"]
    assert not (drawn / "two-gone.png").exists()
    assert len(list(drawn.iterdir())) == 6


def test_a_page_without_marks_and_a_folder_without_results_are_named(
    project: Path, work: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=r"nowhere: no STUDY/result\.json in it"):
        published.publish(tmp_path / "nowhere", project)
    (project / "docs" / "studies.md").write_text("# Studies\n")
    with pytest.raises(UserError, match=r"studies\.md: the lines .* must stand in it"):
        published.publish(work, project)


@pytest.mark.usefixtures("undrawn")
def test_the_command_runs_the_studies_and_publishes_what_went_well(
    project: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    ran: list[list[str]] = []
    pictures: list[str] = []
    status = 75

    def instead(command: list[str], env: Mapping[str, str]) -> SimpleNamespace:
        ran.append(command[1:])
        pictures.append(env.get("VFLAX_PHOTOGRAPHS", ""))
        return SimpleNamespace(returncode=status)

    monkeypatch.delenv("VFLAX_PHOTOGRAPHS", raising=False)
    monkeypatch.setattr(subprocess, "run", instead)
    monkeypatch.setattr(published, "ROOT", project)
    given = [f"--workdir={work}", "--publish", "--study=one:tiny", "--", "--parallel=2"]
    assert published.main(given) == 75
    assert not (project / "benchmarks").exists()
    status = 0
    assert published.main(given) == 0
    assert ran == [["-m", "vflax.study", "--study=one:tiny", f"--workdir={work}", "--parallel=2"]] * 2
    assert (project / "benchmarks" / "results" / "studies" / "one.json").exists()

    assert published.main([f"--workdir={work}", "--publish", "--report-only"]) == 0
    assert len(ran) == 2
    assert published.main([f"--workdir={work}", "--photographs=DIR"]) == 0
    assert "forgetting:tiny-photographs,gpt4_amount:tiny," in ran[2][2] and pictures[1:] == ["", "DIR"]
    assert published.main([f"--workdir={work / 'none'}", "--publish", "--report-only"]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        published.main([f"--workdir={work}", "--report-only"])
