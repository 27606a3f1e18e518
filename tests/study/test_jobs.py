"""What is left of studies as jobs, and what is told of it before it is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from tests import small
from tests.study.grids import run, study
from vflax.study.__main__ import main
from vflax.study.grid import Arm, Cell
from vflax.study.jobs import Place, jobs_of, unmade_starts

ONE_SEED = """
from vflax.study.grid import Arm, Cell, Run, Study

def get_study(variant="x", seeds=None):
    return Study("one", variant, "one", "One?", "", (Arm("a"),), (Cell("a", 1, Run({config!r})),), (), ())
"""


@pytest.fixture
def no_start_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_start_is_made")
def test_a_start_that_a_config_makes_is_a_job_of_its_own_before_all_that_wait_for_it(tmp_path: Path):
    place = Place(tmp_path, epath.Path(tmp_path / "runs"), ())
    first, *others = jobs_of([study()], place)
    assert first.title == "cache:stage0-tiny (configs/stage0.py:tiny)"
    assert len(others) == 4 and all(one.needs == [first.key] for one in others)
    assert unmade_starts([run(1), run(2)]) == [first.title]


def test_an_evaluation_is_written_into_a_folder_wherever_the_launches_are(tmp_path: Path):
    near, far = (
        Place(tmp_path, epath.Path(runs), ("--tasks=pope",))
        for runs in (tmp_path / "runs", "gs://bucket/studies")
    )
    assert near.evaluation(run(1)).parent == near.workdir(run(1))
    assert Path(far.evaluation(run(1))).parent == tmp_path / "evaluations"
    assert far.evaluation(run(1)) != far.evaluation(run(2))


@pytest.mark.usefixtures("no_start_is_made")
def test_an_evaluation_is_a_job_until_its_report_is_there(tmp_path: Path):
    grid = study(arms=(Arm("few", 8),), cells=(Cell("few", 1, run(1)),), claims=())
    place = Place(tmp_path, epath.Path(tmp_path / "runs"), ("--tasks=pope",))
    job = jobs_of([grid], place)[-1]
    assert job.module == "vflax.evaluate"
    flags = dict(argument.partition("=")[::2] for argument in job.arguments)
    assert flags["--model"] == str(place.workdir(run(1)))
    out = Path(flags["--out"])
    assert out.is_relative_to(tmp_path) and not job.done()
    out.mkdir(parents=True)
    (out / "report.json").write_text("{}")
    assert job.done()


def test_what_evaluates_elsewhere_must_write_where_this_machine_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = ["--evaluate=--tasks=pope", "--evaluate-on=ssh {slice} {arguments}", "--runs=gs://bucket/x"]
    flags += ["--slices=a", "--on=ssh {slice} {arguments}"]
    assert main(["--study=tasks_scaling:tiny", f"--workdir={tmp_path / 'w'}", *flags]) == 1
    assert "--evaluate-on with --runs=gs://bucket/x" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_study_of_one_seed_says_that_it_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "small_config.py").write_text(small.FILE)
    file = tmp_path / "one.py"
    file.write_text(ONE_SEED.format(config=str(tmp_path / "small_config.py")))
    flags = [f"--workdir={tmp_path / 'w'}", "--dry-run", "--topology=none"]
    assert main([f"--study={file}", *flags]) == 0
    assert "every claim will end as 'cannot'" in capsys.readouterr().out
    assert main(["--study=tasks_scaling:tiny", *flags]) == 0
    assert "cannot" not in capsys.readouterr().out
