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
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.endpoint.session import Endpoint, add_flags, of_flags
from vflax.errors import UserError
from vflax.evaluate import judge as judging
from vflax.evaluate import report
from vflax.evaluate import score as scoring
from vflax.evaluate.files import json_lines, json_object
from vflax.evaluate.hosts import Hosts, joined
from vflax.evaluate.infer import Model, infer
from vflax.evaluate.jobs import STYLES, Job, asks, check_pictures, open_jobs, some
from vflax.evaluate.question import digest
from vflax.evaluate.tasks import JUDGED, TASKS
from vflax.small_files import parse_object
from vflax.whole_file import writing

STEPS = ("infer", "judge", "score")


def _parser() -> argparse.ArgumentParser:
    from vflax.generate.open import add_engine_flags, count

    parser = argparse.ArgumentParser(
        prog="python -m vflax.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--tasks", required=True, help=f"some of, with commas: {','.join(TASKS)}")
    add("--data", required=True, action="append", metavar="DIR|TASK=DIR", help="the benchmarks as released")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--steps", default=",".join(STEPS), help="some of, with commas: %(default)s (the default)")
    add(
        "--limit", type=count, metavar="N", help="of each subtask, split or subject only the first N pictures"
    )
    add("--style", choices=STYLES, default="llava",
        help="whose wording of prompts, where a task has it; else LLaVA's (default: %(default)s)")  # fmt: skip
    add("--max-tokens", type=count, metavar="N",
        help="of a prediction, at most (default: LLaVA's number for the task)")  # fmt: skip
    add(
        "--mode",
        action="append",
        default=[],
        metavar="TASK=MODE",
        help="whose rule scores (default: the authors')",
    )
    add("--custom", action="store_true", help="the data are sets of your own in the benchmarks' formats")
    add_engine_flags(parser)
    served = parser.add_argument_group("model at a URL").add_argument
    served("--served-as", metavar="NAME", help="its name there (default: the only one there is)")
    served("--parameters", default="{}", metavar="JSON",
           help="further parameters of its requests, or others; null leaves one out")  # fmt: skip
    judge = parser.add_argument_group("judge, of tasks that are graded by one").add_argument
    judge("--judge-model", metavar="NAME", help="as its endpoint calls it")
    judge("--judge", metavar="URL", help="its endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
    judge(
        "--judge-runs",
        type=count,
        metavar="N",
        help="grades of an answer (default: as published numbers were made)",
    )
    judge("--judge-parameters", default="{}", metavar="JSON", help="as --parameters, of its requests")
    judge("--judge-cache", type=Path, metavar="FILE", help="its replies (default: OUT/judge.sqlite)")
    add_flags(parser)
    several = parser.add_argument_group("several hosts, which share --out").add_argument
    several("--distributed", action="store_true", help="join the others as JAX finds them by itself")
    several("--coordinator", metavar="HOST:PORT", help="of process 0, where it finds none")
    several("--num_processes", "--num-processes", type=int, help="how many there are, with --coordinator")
    several("--process_id", "--process-id", type=int, help="which one this is, with --coordinator")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args = _parser().parse_args(argv)
    try:
        with _sigterm_as_ctrl_c():
            return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_AGAIN


def _run(args: argparse.Namespace) -> int:
    steps = some(args.steps, STEPS, "--steps")
    _check_flags(args, steps)
    with joined(
        detect=args.distributed, coordinator=args.coordinator, num_processes=args.num_processes,
        process_id=args.process_id,
    ) as hosts:  # fmt: skip
        jobs = open_jobs(args)
        _check(args, steps, jobs)
        with _claimed(args.out) if hosts.process == 0 else contextlib.nullcontext():
            reason = _infer(args, jobs, hosts) if "infer" in steps else ""
    if hosts.process:
        return EXIT_DONE
    with _claimed(args.out):
        if "judge" in steps and not reason:
            reason = _judge(args, [job for job in jobs if job.needs_judge])
        if reason:
            print(f"stopped: {reason}. Run the same command again to go on", file=sys.stderr)
            return EXIT_AGAIN
        if "score" in steps:
            for job in jobs:
                _score(args, job)
            questions = {job.task.NAME: job.questions for job in jobs}
            prompts = {job.task.NAME: _prompts(job) for job in jobs}
            report.write(args.out, questions, prompts)
            print(f"{args.out / 'report.html'}: all of it on a page")
    return EXIT_DONE


# --- what is wrong, before anything is computed -----------------------------------------------------------------------


def _is_url(args: argparse.Namespace) -> bool:
    return (args.model or "").startswith(("http://", "https://"))


def _check_flags(args: argparse.Namespace, steps: Sequence[str]) -> None:
    if "infer" in steps and not args.model:
        raise UserError("--model: missing; name a model, an address, or leave infer out of --steps")
    if "infer" in steps and _is_url(args) and (args.distributed or args.coordinator):
        raise UserError("--model=URL: one host asks for all; --concurrency says how much at a time")
    for name in ("parameters", "judge_parameters"):
        setattr(args, name, parse_object(getattr(args, name), f"--{name.replace('_', '-')}"))


def _check(args: argparse.Namespace, steps: Sequence[str], jobs: Sequence[Job]) -> None:
    """Pictures and a judge are there before hours of inference."""
    judged = [job for job in jobs if job.needs_judge]
    names = ", ".join(job.task.NAME for job in judged)
    ungraded = [job.task.NAME for job in judged if not (job.folder / judging.GRADED).exists()]
    if judged and "judge" in steps and not args.judge_model:
        raise UserError(
            f"{names}: graded by a judge, and there is none. Name one with --judge-model (and --judge=URL), or leave "
            "judge and score out of --steps"
        )
    if ungraded and "score" in steps and "judge" not in steps:
        raise UserError(
            f"{', '.join(ungraded)}: scored from the grades of a judge, and not graded yet; have judge in --steps, too"
        )
    if "infer" in steps:
        check_pictures(jobs)
    if judged and "judge" in steps:
        endpoint = _judge_of(args)
        if "infer" in steps and _is_url(args) and args.price_in is not None:
            raise UserError(
                "--price_in, --price_out, --budget: of the model or of the judge? Run --steps=infer first, then the "
                "others"
            )
        if "infer" in steps and not all((job.folder / "predictions.jsonl").exists() for job in judged):
            try:
                endpoint.check()
            except UserError as error:
                raise UserError(f"the judge of {names}: {error}") from None


# --- the steps --------------------------------------------------------------------------------------------------------


def _infer(args: argparse.Namespace, jobs: Sequence[Job], hosts: Hosts) -> str:
    with _model(args) as model:
        for job in jobs:
            most = args.max_tokens or job.task.MAX_TOKENS
            identity = {"style": job.style, "max_tokens": most, "decoding": "greedy"}
            if reason := infer(model, job.folder, job.asked, identity, hosts):
                return f"{job.task.NAME}: {reason}"
            if hosts.process == 0:
                _tell_too_long(job)
    return ""


def _tell_too_long(job: Job) -> None:
    rows = json_lines(job.folder / "predictions.jsonl")
    if count := sum(row["prediction"] is None for row in rows):
        print(
            f"warning: {job.task.NAME}: {count:,} of {len(rows):,} questions and the {job.asked[0].max_tokens:,} tokens"
            " of an answer are longer than the model's limit: they count as missing. --max-tokens asks for shorter"
            " answers",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _model(args: argparse.Namespace) -> Iterator[Model]:
    from vflax.evaluate.answering import Local, Remote

    if _is_url(args):
        endpoint = _right(of_flags(args, args.served_as or "any", args.model))
        if not args.served_as:
            names = endpoint.models() or []
            if len(names) != 1:
                raise UserError(
                    f"--model={args.model}: has {', '.join(names) or 'no list of models'}; say --served-as=NAME"
                )
            endpoint = dataclasses.replace(endpoint, model=names[0])
        yield Remote(endpoint, args.out / "replies.sqlite", args.parameters)
        return
    import jax

    from vflax.generate.open import open_engine
    from vflax.weights.export import open_from_flags
    from vflax.weights.frozen import content_hash

    opened = open_from_flags(args)
    # The engine's own choice, made here to be kept: a run must not go on with another one elsewhere.
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    engine, processor = open_engine(args)
    decided: dict[str, Any] = {"weights_sha256": content_hash(opened.source), "template": processor.template}
    decided |= {name: getattr(args, name) for name in ("dtype", "weights", "cache", "row_sizes")}
    decided["max_length"] = engine.max_length  # what is longer has no prediction
    try:
        yield Local(engine, processor, decided)
    finally:
        engine.close()


def _judge(args: argparse.Namespace, jobs: Sequence[Job]) -> str:
    cache = args.judge_cache or args.out / "judge.sqlite"
    for job in jobs:
        task = JUDGED[job.task.NAME]
        reason = judging.judge(
            task, job.questions, job.folder, _judge_of(args), cache, runs=args.judge_runs,
            parameters=args.judge_parameters,
        )  # fmt: skip
        if reason:
            return f"{task.NAME}: {reason}"
    return ""


def _judge_of(args: argparse.Namespace) -> Endpoint:
    return _right(of_flags(args, args.judge_model, args.judge))


def _right(endpoint: Endpoint) -> Endpoint:
    if wrong := endpoint.wrong():
        raise UserError("; ".join(wrong))
    return endpoint


def _prompts(job: Job) -> dict[str, str]:
    """{key: what the model was asked}: in the style of its predictions, whatever the command line says now."""
    path = job.folder / "run.json"
    style = json_object(path)["style"] if path.exists() else job.style
    return {ask.key: ask.text for ask in asks(job.task, job.questions, style, 1)}


def _score(args: argparse.Namespace, job: Job) -> None:
    """In the manifest stand what made the predictions and who judged; files of OUT by their names alone, so that the
    same predictions give the same bytes wherever they lie."""
    name = judging.GRADED if job.needs_judge else "predictions.jsonl"
    found = scoring.score(
        job.task.NAME, job.folder / name, data=job.data, mode=job.mode, custom=args.custom, limit=args.limit
    )
    manifest = {**found.manifest, "predictions": name, "data_sha256": digest(job.questions)}
    if (job.folder / "run.json").exists():  # not of predictions that come from elsewhere
        manifest["run"] = json_object(job.folder / "run.json")
    if job.needs_judge:
        manifest["judge"] = judging.facts(job.folder)
    found = dataclasses.replace(found, manifest=manifest)
    scoring.write(found, job.folder / "score.json", job.folder / "verdicts.jsonl")
    scoring.show(found, Console())


# --- this process -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Keep a second run out of --out."""
    lock = FileLock(out / ".lock")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{out}: another run writes into it; wait for its end, or choose another --out"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A machine that is taken away says so by SIGTERM."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
