"""Evaluate a model on the papers' benchmarks.

    python -m vflax.evaluate --model=WORKDIR|DIR|HUB_ID|URL --tasks=mme,pope --data=DIR --out=DIR

DIR of --data has a folder for each task, by its name; --data=mme=ELSEWHERE names another. URL is an endpoint that
speaks OpenAI's protocol. There are three steps, which --steps can take apart: infer (OUT/TASK/predictions.jsonl), judge
(where a benchmark has one: OUT/TASK/graded.jsonl), score (OUT/TASK/score.json and verdicts.jsonl; no model, no
network). Then OUT/report.html tells all of it. Run again after any stop, the same command goes on where it was.

Exit status: 0 all is there; 75 stopped before that, to be run again; 1 an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.endpoint.session import add_flags, of_flags
from vflax.errors import UserError
from vflax.evaluate import report
from vflax.evaluate import score as scoring
from vflax.evaluate.files import json_lines
from vflax.evaluate.infer import Ask, Model, asks, infer
from vflax.evaluate.question import Question, limited
from vflax.evaluate.tasks import JUDGED, TASKS, WITHOUT_JUDGE, Task

STEPS = ("infer", "judge", "score")
STYLES = ("llava", "plain", "vlmevalkit")


@dataclass(frozen=True)
class Job:
    """One task of a run."""

    task: Task
    data: Path
    folder: Path
    mode: str | None
    questions: list[Question]
    asked: list[Ask]

    @property
    def needs_judge(self) -> bool:
        name = self.task.NAME
        return name in JUDGED and self.mode not in WITHOUT_JUDGE.get(name, ())


def _parser() -> argparse.ArgumentParser:
    from vflax.generate.open import add_engine_flags

    parser = argparse.ArgumentParser(
        prog="python -m vflax.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--tasks", required=True, help=f"some of, with commas: {','.join(TASKS)}")
    add("--data", required=True, action="append", metavar="DIR|TASK=DIR", help="the benchmarks as released")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--steps", default=",".join(STEPS), help="some of, with commas: %(default)s (the default)")
    add("--limit", type=int, metavar="N", help="of each subtask, split or subject only the first N pictures")
    add("--style", choices=STYLES, default="llava", help="of prompts (default: %(default)s)")
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of a prediction, at most (default: LLaVA's number for the task)",
    )
    add(
        "--mode",
        action="append",
        default=[],
        metavar="TASK=MODE",
        help="whose rule scores (default: the authors')",
    )
    add("--custom", action="store_true", help="the data are sets of your own in the benchmarks' formats")
    add("--served-as", metavar="NAME", help="the model's name at --model=URL (default: the only one there)")
    add_engine_flags(parser)
    judge = parser.add_argument_group("judge, of tasks that are graded by one").add_argument
    judge("--judge-model", metavar="NAME", help="as its endpoint calls it")
    judge("--judge", metavar="URL", help="its endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
    judge(
        "--judge-runs",
        type=int,
        metavar="N",
        help="grades of an answer (default: as published numbers were made)",
    )
    judge("--judge-cache", type=Path, metavar="FILE", help="its replies (default: OUT/judge.sqlite)")
    add_flags(parser)
    several = parser.add_argument_group("several hosts, which share --out")
    several.add_argument(
        "--distributed", action="store_true", help="join the others as JAX finds them by itself"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where it finds none")
    several.add_argument("--num_processes", type=int)
    several.add_argument("--process_id", type=int)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_AGAIN


def _run(args: argparse.Namespace) -> int:
    steps = _some(args.steps, STEPS, "--steps")
    jobs = _jobs(args)
    judged = [job for job in jobs if job.needs_judge]
    if judged and "judge" in steps and not args.judge_model:
        raise UserError(
            f"{', '.join(job.task.NAME for job in judged)}: graded by a judge, and there is none. Name one with "
            "--judge-model (and --judge=URL), or leave judge and score out of --steps"
        )
    if "infer" in steps:
        if not args.model:
            raise UserError("--model: missing; name a model, an address, or leave infer out of --steps")
        _check_pictures(jobs)
        if reason := _infer(args, jobs):
            print(f"stopped: {reason}. Run the same command again to go on", file=sys.stderr)
            return EXIT_AGAIN
    if args.process_id not in (None, 0):
        return EXIT_DONE
    if "judge" in steps:
        for job in judged:
            if reason := _judge(args, job):
                print(
                    f"stopped: {job.task.NAME}: {reason}. Run the same command again to go on",
                    file=sys.stderr,
                )
                return EXIT_AGAIN
    if "score" in steps:
        for job in jobs:
            _score(args, job)
        questions = {job.task.NAME: job.questions for job in jobs}
        prompts = {job.task.NAME: {ask.key: ask.text for ask in job.asked} for job in jobs}
        report.write(args.out, questions, prompts)
        print(f"{args.out / 'report.html'}: all of it on a page")
    return EXIT_DONE


def _some(text: str, known: Sequence[str], flag: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag}={','.join(unknown)}: expected some of {', '.join(known)}")
    return [name for name in known if name in names]


def _pairs(values: Sequence[str], flag: str, names: Sequence[str]) -> dict[str, str]:
    """{task: value} of TASK=VALUE."""
    found = dict(value.split("=", 1) for value in values)
    if unknown := [name for name in found if name not in names]:
        raise UserError(f"{flag}={unknown[0]}=...: is not one of --tasks={','.join(names)}")
    return found


def _jobs(args: argparse.Namespace) -> list[Job]:
    """The tasks, with all that is wrong with their data told before anything is computed."""
    names = _some(args.tasks, tuple(TASKS), "--tasks")
    own = [value for value in args.data if value.partition("=")[0] in TASKS]
    roots = [Path(value) for value in args.data if value not in own]
    if len(roots) > 1:
        raise UserError(
            f"--data={roots[0]} and --data={roots[1]}: one folder for all tasks; others as TASK=DIR"
        )
    places = _pairs(own, "--data", names)
    modes = _pairs(args.mode, "--mode", names)
    found = []
    for name in names:
        task = TASKS[name]
        if name not in places and not roots:
            raise UserError(f"--data: names no folder for {name}")
        data = Path(places[name]) if name in places else roots[0] / name
        if not data.exists():
            raise UserError(f"--data: {data}: not there; {name} is expected in it, or say --data={name}=DIR")
        questions = limited(task.load(data, custom=args.custom), args.limit)
        asked = asks(
            questions, task.prompt, args.style, min(args.max_tokens or task.MAX_TOKENS, task.MAX_TOKENS)
        )
        found.append(Job(task, data, args.out / name, modes.get(name), questions, asked))
    return found


def _check_pictures(jobs: Sequence[Job]) -> None:
    lacking = [job for job in jobs if not any(question.pictures for question in job.questions)]
    if lacking:
        raise UserError(
            "; ".join(
                f"{job.data}: the questions of {job.task.NAME} are there, their pictures are not"
                for job in lacking
            )
        )


def _infer(args: argparse.Namespace, jobs: Sequence[Job]) -> str:
    with _hosts(args) as (process, processes, wait), _model(args) as model:
        for job in jobs:
            identity = {"style": args.style, "decoding": "greedy"}
            reason = infer(
                model, job.folder, job.asked, identity, process=process, processes=processes, wait=wait
            )
            if reason:
                return f"{job.task.NAME}: {reason}"
            _tell_too_long(job)
    return ""


def _tell_too_long(job: Job) -> None:
    predictions = job.folder / "predictions.jsonl"
    rows = json_lines(predictions) if predictions.exists() else []
    if count := sum(row["prediction"] is None for row in rows):
        print(
            f"warning: {job.task.NAME}: {count:,} of {len(rows):,} questions and the {job.asked[0].max_tokens:,} tokens"
            " of an answer are longer than the model's limit: they count as missing. --max-tokens asks for shorter"
            " answers",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _model(args: argparse.Namespace) -> Iterator[Model]:
    from vflax.evaluate.answering import Local, Remote, served_name

    if args.model.startswith(("http://", "https://")):
        endpoint = of_flags(args, args.served_as or served_name(args.model), args.model)
        if wrong := endpoint.wrong():
            raise UserError("; ".join(wrong))
        args.out.mkdir(parents=True, exist_ok=True)
        yield Remote(endpoint, args.out / "replies.sqlite")
        return
    from vflax.generate.open import open_engine
    from vflax.weights.export import open_from_flags
    from vflax.weights.frozen import content_hash

    opened = open_from_flags(args)
    engine, processor = open_engine(args)
    decided: dict[str, Any] = {"weights_sha256": content_hash(opened.source), "template": processor.template}
    decided |= {name: getattr(args, name) for name in ("dtype", "weights", "cache")}
    try:
        yield Local(engine, processor, decided)
    finally:
        engine.close()


@contextlib.contextmanager
def _hosts(args: argparse.Namespace) -> Iterator[tuple[int, int, Any]]:
    """This process, their number, and what waits for the others."""
    if not (args.distributed or args.coordinator):
        yield 0, 1, lambda: None
        return
    import jax
    from jax.experimental import multihost_utils
    from ml_collections import ConfigDict

    from vflax import cluster

    options = ConfigDict({"join": 300, "heartbeat": 60})
    with cluster.joined(
        options, detect=args.distributed, coordinator=args.coordinator, num_processes=args.num_processes,
        process_id=args.process_id,
    ):  # fmt: skip
        wait = partial(multihost_utils.sync_global_devices, "vflax.evaluate")
        yield jax.process_index(), jax.process_count(), wait


def _judge(args: argparse.Namespace, job: Job) -> str:
    from vflax.evaluate.judge import judge

    endpoint = of_flags(args, args.judge_model, args.judge)
    if wrong := endpoint.wrong():
        raise UserError("; ".join(wrong))
    cache = args.judge_cache or args.out / "judge.sqlite"
    return judge(JUDGED[job.task.NAME], job.questions, job.folder, endpoint, cache, runs=args.judge_runs)


def _score(args: argparse.Namespace, job: Job) -> None:
    predictions = job.folder / ("graded.jsonl" if job.needs_judge else "predictions.jsonl")
    found = scoring.score(
        job.task.NAME, predictions, data=job.data, mode=job.mode, custom=args.custom, limit=args.limit
    )
    scoring.write(found, job.folder / "score.json", job.folder / "verdicts.jsonl")
    scoring.show(found, Console())


if __name__ == "__main__":
    sys.exit(main())
