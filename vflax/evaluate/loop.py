"""Evaluation in the loop: what config.evaluate.tasks names, every so many steps and after the last one."""

from __future__ import annotations

import difflib
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vflax import conversation
from vflax.data.pipeline import Data
from vflax.errors import UserError
from vflax.evaluate import score as scoring
from vflax.evaluate.answering import prompt_of
from vflax.evaluate.heldout import Answered, answer, heldout_loss, permute_images, records, score
from vflax.evaluate.infer import Ask
from vflax.evaluate.jobs import STYLES, asks, lacking_pictures
from vflax.evaluate.question import limited
from vflax.evaluate.result import Score
from vflax.evaluate.tasks import COUNTED, JUDGED, TASKS, WITHOUT_JUDGE, Task
from vflax.generate.processor import Processor
from vflax.sharding import BATCH_AXES, platform
from vflax.step import make_eval_step
from vflax.whole_file import replace
from vflax.workdir import ModelFiles
from vflax.xla_options import compiler_options

# What config.evaluate.tasks may name beside benchmarks, and the metrics that each gives.
HELD_OUT = {
    "loss": ("eval/loss",),
    "accuracy": ("eval/accuracy", "eval/blind", "eval/words_short", "eval/words_long"),
}
# Questions answered at a time, and questions of a benchmark whose pictures are held at a time.
_BATCH = 64
_BLOCK = 8 * _BATCH


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    metrics: {"eval/loss": ...}, flat numbers; empty where there was nothing to evaluate. What is no number, as the loss
        of a run that has diverged, is left out.
    facts: the same and more for summary.json (see `heldout.score`), None for what is no number; None where there was
        nothing.
    answered: every held-out question with its answers.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    answered: list[Answered] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the loop.

    asked: its questions, as the loop asks them.
    """

    task: Task
    data: Path
    mode: str
    custom: bool
    limit: int | None
    asked: list[Ask]

    def score(self, predictions: Path) -> Score:
        """As `vflax.evaluate.score` does it."""
        return scoring.score(
            self.task.NAME, predictions, data=self.data, mode=self.mode, custom=self.custom, limit=self.limit
        )

    def metrics(self, found: Score) -> dict[str, float]:
        """The number that it is quoted by as eval/NAME, all of the whole benchmark as eval/NAME/METRIC."""
        flat = {
            f"eval/{found.task}/{name}": value for name, value in found.metrics.items() if "/" not in name
        }
        return {f"eval/{found.task}": found.score, **flat}


def open_benchmarks(options: Any, data: Path) -> list[Benchmark]:
    """Those that config.evaluate.tasks names.

    Args:
        options: config.evaluate.
        data: the folder that has one for each of them.

    Raises:
        UserError: a benchmark or its pictures are not there or not whole.
    """
    found = []
    for name in options.tasks:
        if name in HELD_OUT:
            continue
        task = TASKS[name]
        if not (data / name).is_dir():
            raise UserError(
                f"config.evaluate.data={str(options.data)!r}: {name} of config.evaluate.tasks is expected in "
                f"{data / name}"
            )
        limit = options.limit or None
        mode = WITHOUT_JUDGE[name][0] if name in WITHOUT_JUDGE else next(iter(task.MODES))
        counted = COUNTED.get(name, lambda question, mode: True)
        loaded = [q for q in task.load(data / name, custom=options.custom) if counted(q, mode)]
        questions = limited(loaded, limit)
        if words := lacking_pictures(task, data / name, questions):
            raise UserError(words)
        asked = asks(task, questions, options.style, min(task.MAX_TOKENS, options.max_new_tokens))
        found.append(Benchmark(task, data / name, mode, options.custom, limit, asked))
    return found


class Evaluator:
    """Evaluates parameters as config.evaluate says: on held-out samples of a run's data, and on benchmarks."""

    def __init__(
        self,
        options: Any,
        graphdef: Any,
        files: ModelFiles,
        data: Data,
        mesh: Mesh,
        benchmarks: Sequence[Benchmark],
        folder: Path,
    ) -> None:
        """
        Args:
            options: config.evaluate.
            graphdef: the model without its parameters.
            files: tokenizer and template.
            data: whose held-out samples are taken.
            mesh: where the parameters lie.
            benchmarks: of `open_benchmarks`.
            folder: gets STEP/NAME/predictions.jsonl, score.json and verdicts.jsonl of each, and of held-out questions
                STEP/heldout/answers.jsonl.
        """
        self._options, self._graphdef, self._files, self._data = options, graphdef, files, data
        self._benchmarks, self._folder = benchmarks, folder
        self._placement = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        if data.has_heldout:
            # Replicated, so that every process of a pod can add up the losses.
            self._step = jax.jit(
                make_eval_step(graphdef, data.heldout_capacity),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
                compiler_options=compiler_options(platform(mesh)),
            )

    def __call__(self, params: Any, step: int) -> Evaluation:
        """Evaluate {path: array} after so many steps; every process of a run calls it."""
        metrics: dict[str, float] = {}
        facts: dict[str, Any] = {}
        answered: list[Answered] = []
        seconds: dict[str, float] = {}
        if "loss" in self._options.tasks and self._data.has_heldout:
            with _timed(seconds, "loss"):
                loss, losses = heldout_loss(self._step, params, self._heldout_batches())
            facts |= {"loss": _number(loss), "losses": {task: _number(own) for task, own in losses.items()}}
            metrics["eval/loss"] = loss
            metrics |= {f"eval/loss/{task}": value for task, value in losses.items()}
        if "accuracy" in self._options.tasks and self._data.has_questions:
            with _timed(seconds, "accuracy"):
                answered = self._answer(params)
            scored = score(answered)
            facts |= scored
            if jax.process_index() == 0:
                kept = self._folder / str(step) / "heldout" / "answers.jsonl"
                replace(kept, _lines(records(answered)))
            shown = [(name, scored[name.removeprefix("eval/")]) for name in HELD_OUT["accuracy"]]
            metrics |= {name: value for name, value in shown if value is not None}
        for benchmark in self._benchmarks:
            name = benchmark.task.NAME
            with _timed(seconds, name):
                found = self._benchmark(params, benchmark, step)
            metrics |= benchmark.metrics(found)
            facts.setdefault("benchmarks", {})[name] = _number(found.score)
            if found.missing:
                facts.setdefault("missing", {})[name] = found.missing
        if facts:
            facts["seconds"] = seconds
            metrics |= {f"eval/seconds/{name}": value for name, value in seconds.items()}
        return Evaluation(
            {name: own for name, own in metrics.items() if math.isfinite(own)}, facts or None, answered
        )

    def _heldout_batches(self) -> Iterator[tuple[dict[str, jax.Array], list[list[str]]]]:
        for number, rows in enumerate(self._data.heldout_batches()):
            batch = {k: jax.make_array_from_process_local_data(self._placement, v) for k, v in rows.items()}
            yield batch, self._data.heldout_batch_tasks(number)

    def _answer(self, params: Any) -> list[Answered]:
        questions = self._data.heldout_questions(self._options.samples_per_task)
        seen, blind = (
            self._answers(params, [(q.ids, q.images) for q in asked], self._options.max_new_tokens)
            for asked in (questions, permute_images(questions))
        )
        return [Answered(q, a, b) for q, a, b in zip(questions, seen, blind, strict=True)]

    def _answers(self, params: Any, prompts: Sequence[tuple[np.ndarray, np.ndarray]], most: int) -> list[str]:
        files = self._files
        return answer(
            params, self._graphdef, prompts, tokenizer=files.tokenizer,
            eos_ids=conversation.stop_ids(files.template, files.tokenizer), max_new_tokens=most, batch_size=_BATCH,
        )  # fmt: skip

    def _benchmark(self, params: Any, benchmark: Benchmark, step: int) -> Score:
        """Ask, write predictions.jsonl, score. The first process keeps the files; the others need the numbers."""
        predictions = self._predictions(params, benchmark.task.NAME, benchmark.asked)
        with tempfile.TemporaryDirectory() as other:
            folder = Path(other)
            if jax.process_index() == 0:
                folder = self._folder / str(step) / benchmark.task.NAME
                folder.mkdir(parents=True, exist_ok=True)
            write_predictions(folder / "predictions.jsonl", predictions)
            found = benchmark.score(folder / "predictions.jsonl")
            scoring.write(found, folder / "score.json", folder / "verdicts.jsonl")
        return found

    def _predictions(self, params: Any, name: str, asked: Sequence[Ask]) -> dict[str, str | None]:
        """{key: greedy answer}; None where a question and its answer are longer than what the decoder knows."""
        files = self._files
        processor = Processor(
            "",
            files.tokenizer,
            files.template,
            files.position,
            files.rules,
            (),
            files.config.vision.num_tokens,
        )
        nothing = np.zeros((0, files.rules.size, files.rules.size, 3), np.uint8)
        found: dict[str, str | None] = {ask.key: None for ask in asked}
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(asked), _BLOCK):
                block = asked[start : start + _BLOCK]
                prompts = pool.map(partial(prompt_of, processor=processor), block)
                fitting = [
                    (ask.key, (prompt.ids, np.stack(prompt.images) if prompt.images else nothing))
                    for ask, prompt in zip(block, prompts, strict=True)
                    if len(prompt.ids) + ask.max_tokens <= files.config.decoder.max_positions
                ]
                answers = self._answers(params, [prompt for _, prompt in fitting], block[0].max_tokens)
                found |= {key: text for (key, _), text in zip(fitting, answers, strict=True)}
        if not any(text is not None for text in found.values()):
            raise UserError(
                f"config.evaluate.tasks: every question of {name} and the {asked[0].max_tokens} tokens of its answer "
                f"are longer than the {files.config.decoder.max_positions} positions of the decoder; leave it out"
            )
        return found


def write_predictions(path: Path, predictions: Mapping[str, str | None]) -> None:
    """A file as vflax.evaluate writes it."""
    replace(path, _lines({"key": key, "prediction": text} for key, text in predictions.items()))


def _number(value: float) -> float | None:
    """For JSON, which has no number that is none."""
    return value if math.isfinite(value) else None


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_tasks(options: Any) -> None:
    """Refuse a name in config.evaluate.tasks or .style that is none, and a benchmark that the loop cannot score.

    Args:
        options: config.evaluate.
    """
    known = (*HELD_OUT, *TASKS)
    if unknown := sorted(set(options.tasks) - set(known)):
        raise UserError(f"config.evaluate.tasks: {', '.join(unknown)} unknown; there are: {', '.join(known)}")
    if options.style not in STYLES:
        raise UserError(f"config.evaluate.style={options.style!r}: expected one of {', '.join(STYLES)}")
    benchmarks = [name for name in options.tasks if name in TASKS]
    if judged := [name for name in benchmarks if name in JUDGED and name not in WITHOUT_JUDGE]:
        raise UserError(
            f"config.evaluate.tasks: {', '.join(judged)} is graded by a judge, which the loop does not have; evaluate "
            "the finished model with python -m vflax.evaluate"
        )
    if benchmarks and not options.data:
        raise UserError(
            f"config.evaluate.tasks: {', '.join(benchmarks)} is asked for; name the folder of the benchmarks with "
            "config.evaluate.data"
        )


def check_best_metric(options: Any, best_metric: str, data: Data, benchmarks: Sequence[Benchmark]) -> None:
    """Refuse a config.checkpoint.best_metric that no evaluation of this run gives.

    Args:
        options: config.evaluate.
        best_metric: "" for none.
        data, benchmarks: of the run.
    """
    if not best_metric:
        return
    given = [metric for task in options.tasks for metric in HELD_OUT.get(task, ())]
    given += [f"eval/{benchmark.task.NAME}" for benchmark in benchmarks]
    more = []
    if "loss" in options.tasks:
        more += [f"eval/loss/{task}" for task in data.heldout_tasks]
    for benchmark in benchmarks:
        if best_metric.startswith(f"eval/{benchmark.task.NAME}/"):
            more += benchmark.metrics(_of_empty_answers(benchmark))
    if best_metric not in (*given, *more):
        near = difflib.get_close_matches(best_metric, more, n=5)
        raise UserError(
            f"config.checkpoint.best_metric={best_metric!r} is not measured: "
            f"config.evaluate.tasks={tuple(options.tasks)} gives {', '.join((*given, *near)) or 'nothing'}. Choose one "
            "of these, or '' to keep no best checkpoint"
        )


def _of_empty_answers(benchmark: Benchmark) -> Score:
    """For the names of the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        write_predictions(path, {ask.key: "" for ask in benchmark.asked})
        return benchmark.score(path)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
