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
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from etils import epath
from filelock import FileLock, Timeout
from rich.console import Console

from vflax.bucket import is_url
from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.errors import UserError
from vflax.goodput import duration
from vflax.study import cost, report
from vflax.study.execute import Executor, Slots, check_slots
from vflax.study.grid import Study, known_studies, load_study
from vflax.study.jobs import Place, all_runs, jobs_of, measures_of, unmade_starts
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


def _study(options: argparse.Namespace, console: Console) -> int:
    environment = dict(os.environ)
    seeds = _numbers(options.seeds)
    studies = [load_study(name, seeds) for name in _names(options.study)]
    place = Place(
        options.workdir.absolute(), epath.Path(options.runs or options.workdir.absolute() / "runs"),
        tuple(shlex.split(options.evaluate)),
    )  # fmt: skip
    if options.evaluate_on and is_url(place.runs):
        raise UserError(
            f"--evaluate-on with --runs={options.runs}: what evaluates elsewhere must write where this machine reads, "
            "and it writes into folders; give a --runs that both see as a folder, or leave --evaluate-on out: then it "
            "runs here"
        )
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
        # Pages may be made while another process runs the study: every file is written whole.
        with contextlib.nullcontext() if options.report_only else lock.acquire(timeout=0):
            executor = Executor(
                [] if options.report_only else jobs_of(studies, place), slots, _printer(console)
            )
            executor.run()
            for study in studies:
                found = measures_of(study, place)
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


def _show_cost(studies: Sequence[Study], place: Place, options: argparse.Namespace, console: Console) -> None:
    """The grid, and what is left of it; then what that will cost."""
    for study in studies:
        there = sum(place.finished(cell.run) for cell in study.cells)
        console.print(
            f"{study.name}:{study.variant}: {study.title}\n  {len(study.arms)} arms x {len(study.seeds)} seeds = "
            f"{len(study.cells)} cells of {len(study.runs())} launches, {there} cells are there"
        )
        if len(study.seeds) == 1:
            console.print(
                "  one seed says nothing of chance, every claim will end as 'cannot': --seeds=42,43,44 decides them"
            )
    left = [run for run in all_runs(studies) if not place.finished(run)]
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
    if starts := unmade_starts(left):
        console.print(f"  made before, and not counted: {', '.join(starts)}")
    for line in found.said:
        console.print(f"  {line}")


def _printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text)


if __name__ == "__main__":
    sys.exit(main())
