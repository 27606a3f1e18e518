"""Make instances of Vision-Flan's form out of an academic dataset: write a task file, check, review, accept, export.

    python -m data_pipeline.author new flowers.py
    python -m data_pipeline.author check flowers.py --data=DIR
    python -m data_pipeline.author review flowers.py --data=DIR --out=reviews
    python -m data_pipeline.author accept flowers.py --review=A.json --review=B.json
    python -m data_pipeline.author export flowers.py --data=DIR --out=release

docs/author.md leads through it. A task file is run: take none from somebody whom you would not take a program from.
Exit status: 0 all is well; 1 an error, or faults, or not accepted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from data_pipeline.author import TOOL, accept
from data_pipeline.author.checks import Checked, check
from data_pipeline.author.export import METADATA, TEST, TRAIN, export
from data_pipeline.author.instances import Loader
from data_pipeline.author.report import as_json, lines_of
from data_pipeline.author.review import write_sheet
from data_pipeline.author.task import TaskFile, load_task_file
from vflax.errors import UserError
from vflax.whole_file import replace

_EXAMPLES = ("charts", "cifar10", "mnist", "omniglot")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {TOOL}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    def data(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--data", metavar="DIR", type=Path, help="the folder that the task file's paths start from"
        )

    new = command("new", "write a task file to begin with")
    new.add_argument("name", metavar="FILE", help="the file to write, flowers.py")
    new.add_argument(
        "--example", choices=_EXAMPLES, help="a copy of one that works, in place of an empty one"
    )

    checking = command("check", "say what is wrong with tasks, and their figures")
    checking.add_argument("file", metavar="TASKFILE", type=Path)
    data(checking)
    checking.add_argument("--report", metavar="FILE", type=Path, help="all of it as JSON, each key named")

    review = command("review", "write the review sheet of each task, a page for the browser")
    review.add_argument("file", metavar="TASKFILE", type=Path)
    data(review)
    review.add_argument("--out", metavar="DIR", type=Path, required=True, help="gets TASK.html")

    accepting = command("accept", "judge reviews, and write TASKFILE.accepted.json beside the task file")
    accepting.add_argument("file", metavar="TASKFILE", type=Path)
    accepting.add_argument(
        "--review", metavar="FILE", type=Path, required=True, action="append", dest="reviews",
        help="as a sheet exported it; two for each task",
    )  # fmt: skip

    exporting = command("export", "write the accepted tasks as a release for data_pipeline.convert")
    exporting.add_argument("files", metavar="TASKFILE", type=Path, nargs="+")
    data(exporting)
    exporting.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder of the release")
    exporting.add_argument(
        "--held-out", metavar="SHARE|N", default="0.05",
        help="of each task this share of the pictures, or so many; 0: none (default: %(default)s)",
    )  # fmt: skip
    exporting.add_argument("--seed", type=int, default=0, help="of what is held out (default: %(default)s)")
    exporting.add_argument(
        "--unreviewed", action="store_true", help="tasks that are not accepted, too; the metadata says so"
    )
    return parser


def _held_out(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 1 or (value >= 1 and value == int(value))):
        raise UserError(f"--held-out={text}: expected a share below 1, or a whole number of pictures")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    args = _parser().parse_args(argv)
    commands = {"new": _new, "check": _check, "review": _review, "accept": _accept, "export": _export}
    try:
        return commands[args.command](args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return 130


def _new(args: argparse.Namespace) -> int:
    path = Path(args.name if args.name.endswith(".py") else f"{args.name}.py")
    if path.exists():
        raise UserError(f"{path}: there is one already; name another file")
    folder = resources.files(TOOL)
    if args.example:
        text = (folder / "examples" / f"{args.example}.py").read_text("utf-8")
    else:
        dataset = (
            "".join(sign if sign.isalnum() and sign.isascii() else "_" for sign in path.stem)
            .strip("_")
            .upper()
        )
        text = (
            (folder / "page" / "new_task.py.txt")
            .read_text("utf-8")
            .replace("@DATASET@", dataset or "DATASET")
        )
    replace(path, text)
    print(f"{path}: edit it, then\n  python -m {TOOL} check {path} --data=DIR")
    return 0


def _check(args: argparse.Namespace) -> int:
    found = _checked(load_task_file(args.file), args.data)
    for one in found:
        print("\n".join(lines_of(one)))
    if args.report is not None:
        replace(args.report, json.dumps([as_json(one) for one in found], indent=1, ensure_ascii=False) + "\n")
    _refuse_faulty(found, "the FAULT lines say why")
    return 0


def _review(args: argparse.Namespace) -> int:
    file = load_task_file(args.file)
    found = _checked(file, args.data)
    _refuse_faulty(found, "no sheet is written; `check` says why")
    for one in found:
        print(f"{write_sheet(one, file.digest, args.out)}: for two reviewers, none of them {one.task.author}")
    return 0


def _accept(args: argparse.Namespace) -> int:
    file = load_task_file(args.file)
    verdicts = accept.judge(file, [accept.read_review(path) for path in args.reviews])
    passed = [verdict for verdict in verdicts if not verdict.problems]
    if passed:
        print(f"{accept.write_record(file, passed)}:")
    for verdict in passed:
        record = verdict.record
        solved = (
            f"{one['name']} solved {one['solved']} of {record['samples']}" for one in record["reviewers"]
        )
        agreed = f"they agree on {record['agreement']['right']:.0%} of the keys"
        print(f"  {verdict.task} is accepted: {', '.join(solved)}; {agreed}")
    refused = [verdict for verdict in verdicts if verdict.problems]
    if refused:
        lines = (f"{verdict.task} is not accepted: {'; '.join(verdict.problems)}" for verdict in refused)
        raise UserError("\n  ".join(lines))
    return 0


def _export(args: argparse.Namespace) -> int:
    metadata = export(
        [load_task_file(path) for path in args.files],
        args.data,
        args.out,
        held_out=_held_out(args.held_out),
        seed=args.seed,
        unreviewed=args.unreviewed,
        show_progress=sys.stderr.isatty(),
    )
    for name, task in metadata["tasks"].items():
        count, mark = task["instances"], "" if task["reviewed"] else "; NOT REVIEWED"
        print(f"{name}: {count['train']:,} to train on, {count['test']:,} held out{mark}")
    print(f"{args.out}/{METADATA} says what they are. Next:")
    convert = f"  python -m data_pipeline.convert --format=vision_flan --images={args.out}/images --out=DATA"
    print(f"{convert} --annotations={args.out}/{TRAIN}")
    if any(task["instances"]["test"] for task in metadata["tasks"].values()):
        print(f"{convert} --annotations={args.out}/{TEST} --split=test")
    return 0


def _refuse_faulty(found: Sequence[Checked], words: str) -> None:
    if faulty := [one.task.name for one in found if not one.is_fit]:
        raise UserError(f"not fit for review: {', '.join(faulty)}; {words}")


def _checked(file: TaskFile, data: Path | None) -> list[Checked]:
    loader = Loader(data)
    return [check(task, loader, sys.stderr.isatty()) for task in file.tasks]


if __name__ == "__main__":
    sys.exit(main())
