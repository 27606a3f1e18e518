"""Run a study, a grid of ordinary launches, and report what it shows.

    python -m vflax.study --study=two_stage_vs_mixed:tiny --workdir=runs/studies
    python -m vflax.study --study=all:tiny --workdir=runs/studies --dry-run
    python -m vflax.study --study=tasks_vs_instances:7b --workdir=studies --runs=gs://my-bucket/studies \\
        --topology=v5e-16 --price=1.20 --slices=a,b \\
        --on="launch/tpu.sh train {slice} --accelerator=v5e-16 --spot --bucket=gs://my-bucket -- {arguments}"

WORKDIR/STUDY/ gets result.json, report.md, report.html and a plot of each metric; WORKDIR/runs/ (--runs) a WORKDIR for
each launch, which all studies share. Killed at any instant, the same command goes on: what is done is not run again.
docs/studies.md is the page on it. Exit status: 0 all cells are there; 75 stopped, to be run again; 1 a launch failed,
or an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from etils import epath
from filelock import FileLock, Timeout
from rich.console import Console

from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.errors import UserError
from vflax.goodput import duration
from vflax.study import cost, measures, report
from vflax.study.execute import Executor, Job, Slots, check_slots
from vflax.study.grid import Cell, Run, Study, known_studies, load_study
from vflax.study.recipe import config_of, differences, flags_of, folder_of
from vflax.study.result import build


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.study", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--study",
        required=True,
        metavar="NAME[:VARIANT],..",
        help="studies, or files of one's own; all: every one",
    )
    add("--workdir", required=True, type=Path, metavar="DIR", help="results and reports")
    add("--runs", metavar="DIR", help="the launches' WORKDIRs, a folder or gs://; default: WORKDIR/runs")
    add("--seeds", default="", metavar="N,..", help="in place of the study's own")
    add("--parallel", type=int, default=1, metavar="N", help="launches at a time on this machine")
    add("--slices", default="", metavar="NAME,..", help="one launch at a time on each of these, with --on")
    add(
        "--on",
        metavar="COMMAND",
        help="runs a launch on a slice: {slice}, {index}, {module} and the word {arguments}",
    )
    add(
        "--evaluate",
        default="",
        metavar="ARGUMENTS",
        help="python -m vflax.evaluate on each cell too, with these",
    )
    add("--evaluate-on", metavar="COMMAND", help="as --on, for that")
    add(
        "--topology", default="cpu", metavar="SLICE", help="what the cost is estimated for; none: no estimate"
    )
    add("--price", type=float, metavar="USD", help="of a chip for an hour")
    add("--dry-run", action="store_true", help="the grid and what it costs; runs nothing")
    add("--report-only", action="store_true", help="of what is there; runs nothing")
    options = parser.parse_args(argv)
    try:
        return _study(options, Console(highlight=False, soft_wrap=True, markup=False, emoji=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR


@dataclass(frozen=True)
class _Place:
    """Where things are: the folder of the studies, and the launches' folder."""

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
        return self.workdir(run) / f"evaluate-{digest}"

    def evaluated(self, run: Run) -> bool:
        folder = self.evaluation(run)
        return folder is None or (folder / "report.json").exists()


def _study(options: argparse.Namespace, console: Console) -> int:
    environment = dict(os.environ)
    seeds = _numbers(options.seeds)
    studies = [load_study(name, seeds) for name in _names(options.study)]
    place = _Place(
        options.workdir.absolute(), epath.Path(options.runs or options.workdir.absolute() / "runs"),
        tuple(shlex.split(options.evaluate)),
    )  # fmt: skip
    slots = _slots(options, environment)
    for study in studies:
        _check_variant(study, place.work / study.name)
    if not options.report_only:
        _show_cost(studies, place, options, console)
    if options.dry_run:
        return EXIT_DONE
    place.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.work / ".lock")
    try:
        with lock.acquire(timeout=0):
            executor = Executor(
                [] if options.report_only else _jobs(studies, place), slots, _printer(console)
            )
            executor.run()
            for study in studies:
                found = _measures(study, place)
                folder = place.work / study.name
                if options.report_only:
                    _check_finished(len(found), folder)
                report.write(build(study, found), folder)
                missing = len(study.cells) - len(found)
                console.print(
                    f"{study.name}: {len(found)} of {len(study.cells)} cells; {folder / 'report.html'}"
                )
                if missing and not options.report_only and not executor.stopped:
                    console.print(f"{study.name}: {missing} cells came to nothing, see above")
            report.write_index(place.work)
    except Timeout:
        raise UserError(f"{place.work}: another study runs in it; wait for its end or stop it") from None
    for key, problem in executor.failed.items():
        console.print(f"failed: {key}: {problem}")
    if executor.stopped:
        return EXIT_AGAIN
    return EXIT_ERROR if executor.failed else EXIT_DONE


def _check_variant(study: Study, folder: Path) -> None:
    """Refuse to write over the result of another variant.

    Raises:
        UserError: naming it.
    """
    path = folder / "result.json"
    if path.exists() and (there := report.read(path)["variant"]) != study.variant:
        raise UserError(
            f"{path} is of {study.name}:{there}, not of :{study.variant}; choose another --workdir"
        )


def _check_finished(finished: int, folder: Path) -> None:
    """Refuse to write over the result of more cells, where nothing was run that could have lost one.

    Raises:
        UserError: naming both numbers.
    """
    path = folder / "result.json"
    if path.exists() and (there := report.read(path)["cells"]["finished"]) > finished:
        raise UserError(
            f"{path} is of {there} cells, and {finished} are found now; give --runs, --seeds and --evaluate as they "
            "were when it was run, or delete it"
        )


def _names(given: str) -> list[str]:
    """Of --study; all:VARIANT is each that is installed."""
    found: list[str] = []
    for name in filter(None, given.split(",")):
        path, colon, variant = name.partition(":")
        found += [f"{one}{colon}{variant}" for one in known_studies()] if path == "all" else [name]
    if not found:
        raise UserError(f"--study: name one of {', '.join(known_studies())}, or a file")
    return found


def _numbers(given: str) -> list[int]:
    try:
        return [int(number) for number in filter(None, given.split(","))]
    except ValueError:
        raise UserError(f"--seeds={given}: whole numbers with commas, such as 1,2,3") from None


def _slots(options: argparse.Namespace, environment: dict[str, str]) -> Slots:
    names = [name for name in options.slices.split(",") if name]
    if bool(names) != bool(options.on):
        raise UserError(
            "--slices and --on go together: which slices there are, and how a launch gets onto one"
        )
    if names and options.parallel != 1:
        raise UserError("--parallel is for this machine; with --slices there is one launch at a time on each")
    if options.parallel < 1:
        raise UserError(f"--parallel={options.parallel}: at least 1")
    on = {"vflax.launch": options.on, "vflax.evaluate": options.evaluate_on}
    slots = Slots(
        names or [f"lane {i}" for i in range(options.parallel)],
        {m: c for m, c in on.items() if c},
        environment,
    )
    check_slots(slots)
    return slots


def _show_cost(
    studies: Sequence[Study], place: _Place, options: argparse.Namespace, console: Console
) -> None:
    """The grid, and what is left of it; then what that will cost."""
    for study in studies:
        there = sum(place.finished(cell.run) for cell in study.cells)
        console.print(
            f"{study.name}:{study.variant}: {study.title}\n  {len(study.arms)} arms x {len(study.seeds)} seeds = "
            f"{len(study.cells)} cells of {len(study.runs())} launches, {there} cells are there"
        )
    left = [run for run in _runs(studies) if not place.finished(run)]
    if not left or options.topology == "none":
        return
    found = cost.estimate(left, options.topology, options.price, _printer(console), str(place.work))
    hours = "an unknown time"
    if found.hours is not None:
        hours = f"{duration(3600 * found.hours)} of training, one after the other"
    chips = (
        ""
        if options.topology == "cpu" or found.chip_hours is None
        else f", {found.chip_hours:,.0f} chip hours"
    )
    price = "" if found.price is None else f", ${found.price:,.0f}"
    steps = "" if found.steps is None else f" ({found.steps:,} steps, {found.samples:,.0f} samples)"
    console.print(f"to be run: {found.launches} launches{steps}: {hours}{chips}{price}")
    for line in found.said:
        console.print(f"  {line}")


def _runs(studies: Sequence[Study]) -> list[Run]:
    """Every launch of all of them once, in an order in which each comes after what it starts from."""
    found: dict[str, Run] = {}
    for study in studies:
        for run in study.runs():
            found.setdefault(folder_of(run), run)
    return list(found.values())


def _jobs(studies: Sequence[Study], place: _Place) -> list[Job]:
    """What is not done yet: preparations, starts that a config makes, launches, evaluations."""
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
    runs = [run for run in _runs(studies) if not place.finished(run)]
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


def _busy(folder: epath.Path) -> bool:
    """Whether a launch works in a local WORKDIR: one that a killed study has left behind goes on."""
    path = Path(os.fspath(folder)) / ".lock"
    if "://" in os.fspath(folder) or not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _measures(study: Study, place: _Place) -> dict[tuple[str, int], dict[str, float]]:
    """Of the cells that are finished."""
    return {
        (cell.arm, cell.seed): measures.read(place.workdir(cell.run), place.evaluation(cell.run))
        for cell in study.cells
        if place.finished(cell.run) and place.evaluated(cell.run)
    }


def _printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text)


if __name__ == "__main__":
    sys.exit(main())
