"""The training loop, top to bottom."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from vflax import aot, checks, freeze, goodput, mirror, saved_program, sharding, summary
from vflax import config as configs
from vflax.checkpoint import Checkpointer, saved_steps
from vflax.constants import EXIT_AGAIN, EXIT_DONE
from vflax.data.packing import PLAN_VERSION
from vflax.data.pipeline import Data, build_data
from vflax.data.preflight import check_sources
from vflax.errors import UserError
from vflax.evaluate.loop import Evaluation, Evaluator, check_best_metric, check_tasks, open_benchmarks
from vflax.flops import device_peak, train_step_flops
from vflax.give_up import run_under_way
from vflax.guard import Guard
from vflax.metrics import MetricsWriter, ProgressLine, read_metrics
from vflax.profiler import Profiler
from vflax.start import Model, cache_root, keep, open_model, resolve_path, unmade_start
from vflax.step import TrainProgram, TrainState, build_train_program, init_state
from vflax.stop import Stopped, StopSignals
from vflax.watchdog import Watchdog
from vflax.weights.export import RECORD, Options, check_exportable, export
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.workdir import claimed, read_json, write_json, write_status


def run_with_start(config: ConfigDict, workdir: Path) -> int:
    """Run a stage; first the one that makes its starting point, where that is not there and the config names one.

    Returns:
        The exit status: 0 finished, 75 saved and to be run again.
    """
    configs.check_values(config)
    check_tasks(config.evaluate)
    start = unmade_start(config)
    with claimed(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        # A run that has a checkpoint of its own reads nothing but its WORKDIR.
        begun = bool(saved_steps(workdir))
        if start is not None and not begun:
            check_sources(config.data, resolve_path)
            _say(f"{config.init.checkpoint} is not there yet: making it with {config.init.make} in {start}")
            status = run_with_start(configs.load_config(config.init.make), start)
            if status != EXIT_DONE:
                return status
        return _run_to_status(config, workdir)


def _run_to_status(config: ConfigDict, workdir: Path) -> int:
    """Train one stage from its last checkpoint, where there is one; however it ends, status.json says so."""
    lead = jax.process_index() == 0
    recorder = goodput.Recorder(workdir / goodput.FILE if lead else None)
    profiler = Profiler(workdir / "profile", config.profile.start, config.profile.steps, _say)
    ended = "failed"
    with (
        StopSignals() as signals,
        run_under_way(workdir, jax.process_index()),
        profiler,
        goodput.counting_compiles(recorder),
    ):
        try:
            options = config.checkpoint
            # Closed on every way out: whatever ends a run, a save that has begun is finished.
            with contextlib.closing(Checkpointer(workdir, options.keep, options.best_metric)) as checkpointer:
                status = _run(config, workdir, signals, checkpointer, recorder, profiler)
            ended = "done" if status == EXIT_DONE else "preempted"
            return status
        except Stopped:
            ended = "preempted"
            if lead:
                write_status(workdir, "preempted", _last_step(workdir), "run again to continue")
            _say("stopped: run the same command again to continue")
            return EXIT_AGAIN
        except BaseException as error:
            # A start that is refused has changed nothing, so what an earlier run has written stays true.
            if lead and _state(workdir) in (None, "running"):
                write_status(workdir, "failed", _last_step(workdir), f"{type(error).__name__}: {error}")
            raise
        finally:
            recorder.close(ended)


def _run(
    config: ConfigDict,
    workdir: Path,
    signals: StopSignals,
    checkpointer: Checkpointer,
    recorder: goodput.Recorder,
    profiler: Profiler,
) -> int:
    lead = jax.process_index() == 0

    # --- Where we are: devices, and whether this is a continued run. Until all checks are passed nothing is changed.
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    resumed = checkpointer.latest_step()
    plain = configs.plain(config)
    record: dict[str, Any] = {}
    notes: list[str] = []
    if resumed is not None:
        record = checkpointer.read_record(resumed)
        place = mirror.remote(workdir)
        if "config" not in record:
            raise UserError(
                f"{place} holds imported weights, not a run: choose another --workdir and start it from them with "
                f"--config.init.checkpoint={place}"
            )
        checks.check_plan_version(record, place)
        notes = configs.check_resume(record["config"], plain)
    _say(_banner(config, workdir, mesh, resumed))
    for note in notes:
        _say(f"changed for the rest of this run: {note}")

    # --- The model, its tokenizer and its weights' source.
    model = open_model(config, workdir, mesh, resumed)
    files = model.files
    if warning := checks.unfinished_start(config, model):
        _say(warning)
    if config.export:
        check_exportable(files)
    _print_freeze_table(model)

    # --- Data: which samples make which step.
    data = build_data(
        config.data,
        resolve_path,
        evaluate_sources=config.evaluate.sources,
        evaluate_tasks=(config.evaluate.include, config.evaluate.exclude),
        tokenizer=files.tokenizer,
        template=files.template,
        position=files.position,
        rules=files.rules,
        num_image_tokens=files.config.vision.num_tokens,
        samples=config.batch.samples,
        rows_multiple=sharding.batch_shards(mesh) * config.batch.accumulation,
        seed=config.seed,
        epochs=config.epochs,
        steps=config.steps,
        cache=workdir / "preflight",
        accumulation=config.batch.accumulation,
    )
    _say(data.describe())
    benchmarks = open_benchmarks(config.evaluate, resolve_path(config.evaluate.data))
    checks.check_evaluation(config, data)
    check_best_metric(config.evaluate, config.checkpoint.best_metric, data, benchmarks)
    if resumed is not None:
        checks.check_record(record, data, model)
    if resumed == data.total_steps and checks.is_done(config, workdir, resumed):
        if lead:
            write_status(workdir, "done", resumed)
            summary.print_summary(_CONSOLE, workdir, read_json(workdir / "summary.json"))
        return EXIT_DONE
    _say(checks.check_fits(config, model, data, mesh))
    program = build_train_program(
        config, model.shapes, files.lora, mesh, capacity=data.capacity, total_steps=data.total_steps
    )
    peak, peak_source = device_peak(jax.local_devices()[0])
    _say(f"MFU is the share of {peak / 1e12:.3g} TFLOP/s per device ({peak_source})")

    # --- From here on the run exists.
    if lead:
        write_json(workdir / "config.json", plain)
        write_status(workdir, "running", resumed or 0)
        recorder.begin(resumed or 0)
    if model.source is not None:
        model = keep(model, workdir)

    # --- The state and the jitted step.
    with jax.set_mesh(mesh):
        frozen = load_params(
            model.frozen_source(workdir), files.config, model.frozen_shardings, model.dtypes, files.lora
        )
        if model.source is not None:
            trainable = load_params(
                model.source, files.config, model.trainable_shardings, model.dtypes, files.lora
            )
            start = jax.jit(
                lambda p: init_state(program.tx, p), out_shardings=program.shardings, donate_argnums=0
            )
            state = start(trainable)
        else:
            assert resumed is not None
            state = checkpointer.restore(resumed, program.state)
        train_step = _saved_step(config, model, data, program, mesh) or program.step
        evaluator = Evaluator(
            config.evaluate, model.graphdef, model.files, data, mesh, benchmarks, workdir / "eval"
        )
        guard = Guard(
            config.guard.action, config.guard.max_skips, workdir, data, _say, jax.process_index(), jax.process_count()
        )  # fmt: skip

        # --- The loop, with its evaluations and checkpoints.
        loop = _Loop(
            config, workdir, mesh, model, data, checkpointer, evaluator, program.schedules, signals, recorder, profiler,
            guard, peak,
        )  # fmt: skip
        state, stopped = loop.train(train_step, state, frozen, resumed or 0)
        if stopped:
            if lead:
                write_status(workdir, "preempted", int(state.step), "saved; run again to continue")
            _say(f"saved step {int(state.step)}: run the same command again to continue")
            return EXIT_AGAIN
        if loop.last_evaluation is None:  # continued after its last step
            loop.last_evaluation = loop.evaluate_again(state, frozen)
    del state, frozen

    # --- The export and the summary.
    step = data.total_steps
    exported = None
    with recorder.within("export"):
        if config.export:
            exported = workdir / "export"
            if lead:
                export(open_checkpoint(workdir, step=str(step)), exported, Options(replace=True))
                mirror.push_folder(workdir, "export", RECORD)
            multihost_utils.sync_global_devices("exported")
    if lead:
        losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
        facts = {
            "stage": config.stage, "variant": config.variant, "steps": step, "samples": data.samples_seen(step),
            "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
            "evaluation": loop.last_evaluation.facts,
            "checkpoint": str(mirror.remote(workdir / "checkpoints" / str(step))),
            "export": str(mirror.remote(exported)) if exported else None,
            "goodput": goodput.of_run(workdir).to_dict(),
        }  # fmt: skip
        with recorder.within("export"):
            summary.write_summary(workdir, facts, loop.last_evaluation.answered)
        write_status(workdir, "done", step)
        summary.print_summary(_CONSOLE, workdir, facts)
    return EXIT_DONE


# --------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class _Loop:
    """What the loop needs beside the state that it carries."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    model: Model
    data: Data
    checkpointer: Checkpointer
    evaluator: Evaluator
    schedules: dict[str, Any]
    signals: StopSignals
    recorder: goodput.Recorder
    profiler: Profiler
    guard: Guard
    peak: float
    last_evaluation: Evaluation | None = None
    metrics: MetricsWriter | None = field(init=False, default=None)
    progress: ProgressLine | None = field(init=False, default=None)
    watchdog: Watchdog = field(init=False)

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.config.watchdog)

    def train(self, train_step: Any, state: TrainState, frozen: Any, start: int) -> tuple[TrainState, bool]:
        """Run steps start .. total. Returns the last state, saved, and whether a signal asked to stop."""
        config, total = self.config, self.data.total_steps
        placement = sharding.batch_sharding(self.mesh)
        stopped = False
        pending: tuple[int, Any, Any, float] | None = None
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                self.metrics = stack.enter_context(
                    contextlib.closing(MetricsWriter(self.workdir, start, config.logging.tensorboard))
                )
                self.progress = stack.enter_context(contextlib.closing(ProgressLine(_CONSOLE, start, total)))
            loader = stack.enter_context(contextlib.closing(self.data.loader(start)))
            stack.enter_context(self.signals.deferred())
            stack.enter_context(self.watchdog)
            stack.enter_context(self.recorder.within("step"))
            clock = time.perf_counter()
            for step in range(start, total):
                with self.profiler.step(step + 1):
                    rows, wait = self._next(loader, pending[1] if pending else None)
                    batch = {k: _to_devices(v, placement, config.batch.accumulation) for k, v in rows.items()}
                    if step == start and isinstance(train_step, jax.stages.Wrapped):
                        with self.recorder.within("compile"):
                            train_step = train_step.lower(state, frozen, batch).compile()
                        clock = time.perf_counter()
                    state, measured = train_step(state, frozen, batch)
                if self.profiler.is_last(step + 1):
                    with self.recorder.within("profile"):
                        self.profiler.stop(measured)
                # The previous step is reported while this one runs, so that the devices never wait for the host.
                if pending is not None:
                    clock = self._report(*pending, clock=clock)
                pending = (step + 1, measured, rows, wait)

                done, last = step + 1, step + 1 == total
                evaluate = last or (config.evaluate.every and done % config.evaluate.every == 0)
                save = last or (config.checkpoint.every and done % config.checkpoint.every == 0)
                evaluated: dict[str, float] = {}
                if evaluate or save:
                    self._report(*pending, clock=clock)
                    pending = None
                if evaluate:
                    evaluated = self._evaluate(state, frozen)
                stopped = self._should_stop(done)
                if stopped and pending is not None:
                    self._report(*pending, clock=clock)
                    pending = None
                if save or stopped:
                    self._save(state, evaluated)
                if stopped:
                    break
                if evaluate or save:
                    clock = time.perf_counter()
                self.watchdog.step_done()
            with self.watchdog.other("the last save"), self.recorder.within("checkpoint"):
                self.checkpointer.wait()
        return state, stopped or self.signals.asked

    def _next(self, loader: Any, running: Any) -> tuple[dict[str, np.ndarray], float]:
        """This host's next rows, and for how many seconds the devices had nothing to do meanwhile, at most; `running`
        are the results of the step that was started last, None where it is over."""
        began = time.perf_counter()
        with self.recorder.within("data_wait") as span:
            rows = next(loader)
            if running is not None and not running["loss"].is_ready():
                span.kind = "step"
                return rows, 0.0
        return rows, time.perf_counter() - began

    def _report(self, step: int, measured: Any, rows: Any, wait: float, clock: float) -> float:
        """Write one step's figures; returns the time at which the step was over."""
        values = {name: float(value) for name, value in jax.device_get(measured).items()}
        now = time.perf_counter()
        elapsed = max(now - clock, 1e-9)
        self.guard.check(step, values, rows)
        self.recorder.done(step)
        if self.metrics is None or self.progress is None:
            return now
        images = values.pop("image_tokens") / self.model.files.config.vision.num_tokens
        flops = train_step_flops(
            self.model.files.config, self.model.abstract, self.model.verdict, tokens=values["tokens"],
            supervised=values["supervised_tokens"], context=values.pop("context"), images=images,
        )  # fmt: skip
        record = {
            **values,
            "images": images,
            **{f"lr/{group}": float(schedule(step - 1)) for group, schedule in self.schedules.items()},
            "epoch": self.data.epoch_at(step),
            "seconds": elapsed,
            "tokens_per_s": values["tokens"] / elapsed,
            "images_per_s": images / elapsed,
            "mfu": flops / elapsed / (self.peak * jax.device_count()),
            "data_wait": min(1.0, wait / elapsed),
        }
        if step % self.config.logging.every == 0 or step in (1, self.data.total_steps) or values["skipped"]:
            # JSON has no number for a loss that is none: a skipped step has no loss.
            self.metrics.write(step, {name: value for name, value in record.items() if np.isfinite(value)})
        self.progress.update(step, record)
        return now

    def _should_stop(self, step: int) -> bool:
        if jax.process_count() > 1:
            return self.checkpointer.reached_preemption(step)
        return self.signals.asked

    def evaluate_again(self, state: TrainState, frozen: Any) -> Evaluation:
        """The evaluation after the last step, for a run that was stopped between its last save and its summary."""
        with self.recorder.within("evaluation"):
            evaluation = self.evaluator({**frozen, **state.trainable}, int(state.step))
        step, found = int(state.step), evaluation.metrics
        records = read_metrics(self.workdir / "metrics.jsonl")
        known = any(r["step"] == step and name in r for r in records for name in found)
        if jax.process_index() == 0 and found and not known:
            with contextlib.closing(
                MetricsWriter(self.workdir, step, self.config.logging.tensorboard)
            ) as metrics:
                metrics.write(step, found)
        return evaluation

    def _save(self, state: TrainState, evaluated: dict[str, float]) -> None:
        """Start to save the state with all that a continued run is held against."""
        step = int(state.step)
        record = {
            "config": configs.plain(self.config),
            "data": {"position": step, "plan_version": PLAN_VERSION, **self.data.identity()},
            "frozen": self.model.files.frozen,
        }
        with self.watchdog.other("a save"), self.recorder.within("checkpoint"):
            mirror.push(self.workdir)  # the metrics up to here, which the checkpoint promises
            self.checkpointer.save(step, state, record, evaluated or None)

    def _evaluate(self, state: TrainState, frozen: Any) -> dict[str, float]:
        """Evaluate on held-out samples; whatever ends that early, the steps so far are saved first."""
        step = int(state.step)
        if jax.process_index() == 0:
            write_status(self.workdir, "running", step, "evaluating")
        try:
            with (
                self.recorder.within("evaluation"),
                self.signals.at_once(),
                self.watchdog.other("an evaluation"),
            ):
                self.last_evaluation = self.evaluator({**frozen, **state.trainable}, step)
        except BaseException:
            if jax.process_count() == 1:  # several processes can only save together
                self._save(state, {})
                self.checkpointer.wait()
            raise
        found = self.last_evaluation.metrics
        if self.last_evaluation.facts is not None:
            _say(f"step {step:,}: {summary.evaluation_line(self.last_evaluation.facts)}")
        if self.metrics is not None:
            if found:
                self.metrics.write(step, found)
            write_status(self.workdir, "running", step)
        return found


def _to_devices(rows: np.ndarray, placement: NamedSharding, accumulation: int) -> jax.Array:
    """This host's rows [A * B_local, ...] -> the global batch leaf [A, B, ...]."""
    return jax.make_array_from_process_local_data(placement, rows.reshape(accumulation, -1, *rows.shape[1:]))


def _saved_step(
    config: ConfigDict, model: Model, data: Data, program: TrainProgram, mesh: Mesh
) -> Any | None:
    """The step that config.compiled holds, where it is this run's; else None, and a word about why."""
    if not config.compiled:
        return None
    rows = data.rows_per_step // config.batch.accumulation
    arguments = aot.step_arguments(config, model.files.config, model.shapes, program, mesh, rows)
    try:
        file = resolve_path(config.compiled)
    except UserError as error:  # as with a file that is not on the disk, the step can be compiled
        step, why = None, str(error)
    else:
        step, why = saved_program.load(file, program.step, arguments, mesh)
    _say(f"config.compiled={config.compiled}: " + (f"{why}. Compiling instead" if why else "loaded"))
    return step


# --------------------------------------------------------------------------------------------------------------------
# What a person sees

_CONSOLE = Console()


def _say(text: str) -> None:
    if jax.process_index() == 0:
        # Brackets as they are, for what is said holds paths; and whole lines in a log, which is not 80 columns wide.
        _CONSOLE.print(text, highlight=False, markup=False, soft_wrap=not _CONSOLE.is_terminal)


def _banner(config: ConfigDict, workdir: Path, mesh: Mesh, resumed: int | None) -> str:
    devices = jax.devices()
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    how = "starting" if resumed is None else f"continuing from step {resumed}"
    return (
        f"vflax stage {config.stage} ({config.variant}): {how} in {mirror.remote(workdir)}\n"
        f"devices: {len(devices)} x {devices[0].device_kind} on {jax.process_count()} host(s); mesh: {axes}"
    )


def _print_freeze_table(model: Model) -> None:
    if jax.process_index() != 0:
        return
    table = Table(title="what learns", title_justify="left")
    for name in ("part", "verdict", "leaves", "parameters", "bytes"):
        table.add_column(name, justify="left" if name in ("part", "verdict") else "right")
    for group in freeze.summary(model.abstract, model.verdict):
        table.add_row(
            group["part"], group["verdict"], *(f"{group[k]:,}" for k in ("leaves", "parameters", "bytes"))
        )
    _CONSOLE.print(table)


def _last_step(workdir: Path) -> int:
    records = read_metrics(workdir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def _state(workdir: Path) -> str | None:
    """What status.json says, or None."""
    path = workdir / "status.json"
    return read_json(path)["state"] if path.is_file() else None
