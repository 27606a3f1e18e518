"""What is left of some studies as jobs: where each launch lies, whether it is done, what it waits for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from etils import epath
from filelock import FileLock, Timeout

from vflax.bucket import is_url
from vflax.errors import UserError
from vflax.study import measures
from vflax.study.execute import Job
from vflax.study.grid import Cell, Run, Study
from vflax.study.recipe import config_of, differences, flags_of, folder_of


@dataclass(frozen=True)
class Place:
    """Where things are.

    work: the folder of the studies; runs: the launches' WORKDIRs; evaluate: arguments of vflax.evaluate on each cell.
    """

    work: Path
    runs: epath.Path
    evaluate: tuple[str, ...]

    def workdir(self, run: Run) -> epath.Path:
        return self.runs / folder_of(run)

    def finished(self, run: Run) -> bool:
        """Whether the launch is done.

        Raises:
            UserError: there is another run under its name.
        """
        folder = self.workdir(run)
        try:
            status = json.loads((folder / "status.json").read_text())
            if status["state"] != "done" or not (folder / "summary.json").exists():
                return False
            saved = json.loads((folder / "config.json").read_text())
        except (FileNotFoundError, ValueError, KeyError):
            return False
        if wrong := differences(run, saved, str(self.work)):
            raise UserError(
                f"{folder}: not the run that the study means: {'; '.join(wrong)}; delete that folder"
            )
        return True

    def evaluation(self, run: Run) -> epath.Path | None:
        """What vflax.evaluate writes with these arguments; None: nothing is asked for."""
        if not self.evaluate:
            return None
        digest = hashlib.sha256(json.dumps(self.evaluate).encode()).hexdigest()[:8]
        if is_url(self.runs):  # vflax.evaluate writes into folders, not into buckets
            return epath.Path(self.work) / "evaluations" / f"{folder_of(run)}-{digest}"
        return self.workdir(run) / f"evaluate-{digest}"

    def evaluated(self, run: Run) -> bool:
        folder = self.evaluation(run)
        return folder is None or (folder / "report.json").exists()


def all_runs(studies: Sequence[Study]) -> list[Run]:
    """Every launch of all of them once, in an order in which each comes after what it starts from."""
    found: dict[str, Run] = {}
    for study in studies:
        for run in study.runs():
            found.setdefault(folder_of(run), run)
    return list(found.values())


def jobs_of(studies: Sequence[Study], place: Place) -> list[Job]:
    """What is not done yet: preparations, starts that a config makes, launches, evaluations.

    Raises:
        UserError: a run's folder holds another run.
    """
    logs = place.work / "logs"
    titles = {folder_of(cell.run): _title(study, cell) for study in studies for cell in study.cells}
    jobs: dict[str, Job] = {}
    before: list[str] = []
    for study in studies:
        for one in study.prepare:
            makes = Path(one.makes.replace("{work}", str(place.work)))
            key = f"prepare {makes.name}"
            if not makes.exists() and key not in jobs:
                arguments = [word.replace("{work}", str(place.work)) for word in one.arguments]
                jobs[key] = Job(key, key, one.module, arguments, (), makes.exists, logs / f"{makes.name}.log")
                before.append(key)
    runs = [run for run in all_runs(studies) if not place.finished(run)]
    made = _starts(runs, logs)
    waiting = set()
    for run in runs:
        name = folder_of(run)
        needs = [*before, *made[1].get(name, ())]
        start = ""
        if run.start is not None:
            start = str(place.workdir(run.start))
            needs += [folder_of(run.start)] if folder_of(run.start) in waiting else []
        waiting.add(name)
        folder = place.workdir(run)
        jobs[name] = Job(
            name, titles.get(name, name), "vflax.launch", flags_of(run, str(folder), str(place.work), start), needs,
            partial(place.finished, run), logs / f"{name}.log", partial(_busy, folder),
        )  # fmt: skip
    for cell in [cell for study in studies for cell in study.cells if not place.evaluated(cell.run)]:
        name, out = folder_of(cell.run), place.evaluation(cell.run)
        key = f"{name} evaluated"
        arguments = [f"--model={place.workdir(cell.run)}", f"--out={out}", *place.evaluate]
        needs = [name] if name in waiting else []
        jobs[key] = Job(
            key, f"{titles[name]}, evaluation", "vflax.evaluate", arguments, needs,
            partial(place.evaluated, cell.run), logs / f"{name}-evaluate.log",
        )  # fmt: skip
    return [*made[0], *jobs.values()]


def _title(study: Study, cell: Cell) -> str:
    return f"{study.name}, {cell.arm}, seed {cell.seed}"


def _starts(runs: Sequence[Run], logs: Path) -> tuple[list[Job], dict[str, list[str]]]:
    """Models that configs start from and that are not made yet: jobs, and which run waits for which. Left to the
    launches, two of them at a time would want to make the same one."""
    from vflax.start import unmade_start  # JAX, only after the command line is known to be right

    jobs: dict[str, Job] = {}
    waits: dict[str, list[str]] = {}
    for run in runs:
        config = config_of(run)
        start = None if run.start is not None else unmade_start(config)
        if start is None:
            continue
        key = start.name
        waits[folder_of(run)] = [key]
        jobs[key] = Job(
            key, f"{config.init.checkpoint} ({config.init.make})", "vflax.launch",
            [f"--config={config.init.make}", f"--workdir={start}"], (), (start / "summary.json").is_file,
            logs / f"{key}.log", partial(_busy, epath.Path(start)),
        )  # fmt: skip
    return list(jobs.values()), waits


def unmade_starts(runs: Sequence[Run]) -> list[str]:
    """What is made before the first of these launches, "NAME (the config that makes it)" each."""
    return [job.title for job in _starts(runs, Path())[0]]


def _busy(folder: epath.Path) -> bool:
    """Whether a launch works in a local WORKDIR: one that a killed study has left behind goes on."""
    path = Path(os.fspath(folder)) / ".lock"
    if is_url(folder) or not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def measures_of(study: Study, place: Place) -> dict[tuple[str, int], dict[str, float]]:
    """Of the cells that are finished."""
    return {
        (cell.arm, cell.seed): measures.read(place.workdir(cell.run), place.evaluation(cell.run))
        for cell in study.cells
        if place.finished(cell.run) and place.evaluated(cell.run)
    }
