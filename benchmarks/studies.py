"""All studies of the paper's claims in small, and how their results get into docs/studies.md.

    python -m benchmarks.studies --workdir=runs/studies --publish
    python -m benchmarks.studies --workdir=runs/studies --publish --photographs=DIR
    python -m benchmarks.studies --workdir=runs/studies --publish --report-only     what is there; runs nothing

runs python -m vflax.study, with --photographs forgetting:tiny-photographs in place of forgetting:tiny; what stands
after "--" is passed on to it (-- --parallel=2). With --publish each WORKDIR/STUDY/result.json becomes
benchmarks/results/studies/STUDY.json, and of all of these the plots in docs/images/studies and the last part of
docs/studies.md are made; the same results make the same bytes. Exit status: that of the study, which is published only
if it is 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from vflax.errors import UserError
from vflax.study import markdown, plots, report, shown
from vflax.study.grid import known_studies
from vflax.whole_file import replace

BEGIN = "<!-- From here on written by python -m benchmarks.studies --publish -->"
END = "<!-- To here -->"
NOTHING = "No results are published yet."
# Plots of at most 1,100 x 410 pixels and some 15 KB.
_DPI = 120


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--workdir",
        type=Path,
        default=Path("runs/studies"),
        metavar="DIR",
        help="of the studies (runs/studies)",
    )
    add("--study", metavar="NAME[:VARIANT],..", help="which are run (all:tiny)")
    add(
        "--photographs",
        metavar="DIR",
        help="CIFAR-10 and MNIST, see python -m data_pipeline.photographs --help",
    )
    add("--publish", action="store_true", help="the results in --workdir, those of other studies too")
    add("--report-only", action="store_true", help="run nothing")
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="of python -m vflax.study")
    options = parser.parse_args(argv)
    if options.report_only and (options.arguments or not options.publish):
        parser.error(
            "--report-only runs nothing: it goes with --publish, and without arguments for vflax.study"
        )
    if not options.report_only:
        command = [
            sys.executable,
            "-m",
            "vflax.study",
            f"--study={options.study or ','.join(_all_tiny(bool(options.photographs)))}",
            f"--workdir={options.workdir}",
        ]
        own = {"VFLAX_PHOTOGRAPHS": options.photographs} if options.photographs else {}
        status = subprocess.run([*command, *options.arguments], env=os.environ | own).returncode
        if status:
            return status
    if options.publish:
        try:
            publish(options.workdir, ROOT)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _all_tiny(photographs: bool) -> list[str]:
    pictured = "forgetting" if photographs else ""
    return [f"{name}:tiny{'-photographs' if name == pictured else ''}" for name in known_studies()]


def publish(work: Path, root: Path) -> None:
    """Take the results into the project.

    Args:
        work: WORKDIR of the studies.
        root: of the project.

    Raises:
        UserError: there is no result, one is broken, or docs/studies.md has no place for them.
    """
    found = {path.parent.name: path for path in sorted(work.glob("*/result.json"))}
    if not found:
        raise UserError(f"{work}: no STUDY/result.json in it; run the studies first, or name their --workdir")
    for name, path in found.items():
        cells = report.read(path)["cells"]
        if cells["finished"] < cells["wanted"]:
            print(f"{name}: only {cells['finished']} of {cells['wanted']} cells are finished")
    results = root / "benchmarks" / "results" / "studies"
    results.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        replace(results / f"{name}.json", path.read_bytes())
    write_docs(root)
    print(f"published: {', '.join(found)}")


def write_docs(root: Path) -> None:
    """Make plots and page of all that is published.

    Raises:
        UserError: a result is broken, or the page lacks one of its two marks.
    """
    page = root / "docs" / "studies.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"{page}: the lines {BEGIN} and {END} must stand in it; what is published goes between them"
        )
    paths = sorted((root / "benchmarks" / "results" / "studies").glob("*.json"))
    results = {path.stem: report.read(path) for path in paths}
    views = [shown.study(result) | {"name": name} for name, result in results.items()]
    _draw(root / "docs" / "images" / "studies", results)
    lines = markdown.overview(views) if views else [NOTHING]
    for view in views:
        lines += ["", *markdown.study(view, f"images/studies/{view['name']}-", 3)]
    replace(page, before + "\n".join([BEGIN, "", *lines, "", END]) + after)


def _draw(folder: Path, results: dict[str, dict]) -> None:
    """The folder holds these plots, and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set()
    for name, result in results.items():
        for plot in shown.study(result)["plots"]:
            drawn.add(folder / f"{name}-{plot['file']}")
            replace(folder / f"{name}-{plot['file']}", plots.png(result, plot["metric"], _DPI))
    for path in set(folder.glob("*.png")) - drawn:
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
