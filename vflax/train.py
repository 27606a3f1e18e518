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

from vflax import aot, freeze, memory, saved_program, sharding, summary
from vflax import config as configs
from vflax.checkpoint import Checkpointer
from vflax.data.packing import PLAN_VERSION
from vflax.data.pipeline import Data, build_data
from vflax.errors import UserError
from vflax.evaluate.heldout import Evaluation, Evaluator, check_tasks
from vflax.flops import device_peak, train_step_flops
from vflax.metrics import MetricsWriter, ProgressLine, read_metrics
from vflax.start import Model, cache_root, checkpoint_path, keep, open_model, resolve_path, unmade_start
from vflax.step import TrainProgram, TrainState, build_train_program, init_state
from vflax.stop import Stopped, StopSignals
from vflax.weights.export import Options, check_exportable, export
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.workdir import EXIT_AGAIN, EXIT_DONE, claimed, read_json, write_json, write_status


def run_with_start(config: ConfigDict, workdir: Path) -> int:
    """Run a stage; first the one that makes its starting point, where that is not there and the config names one.

    Returns:
        The exit status: 0 finished, 75 saved and to be run again.
    """
    configs.check_values(config)
    start = unmade_start(config)
    with claimed(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        # A run that has a checkpoint of its own reads nothing but its WORKDIR.
        begun = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
        if start is not None and not begun:
            _say(f"{config.init.checkpoint} is not there yet: making it with {config.init.make} in {start}")
            status = run_with_start(configs.load_config(config.init.make), start)
            if status != EXIT_DONE:
                return status
        return _run_to_status(config, workdir)


def _run_to_status(config: ConfigDict, workdir: Path) -> int:
    """Train one stage from its last checkpoint, where there is one; however it ends, status.json says so."""
    lead = jax.process_index() == 0
    with StopSignals() as signals:
        try:
            options = config.checkpoint
            # Closed on every way out: whatever ends a run, a save that has begun is finished.
            with contextlib.closing(Checkpointer(workdir, options.keep, options.best_metric)) as checkpointer:
                return _run(config, workdir, signals, checkpointer)
        except Stopped:
            if lead:
                write_status(workdir, "preempted", _last_step(workdir), "run again to continue")
            _say("stopped: run the same command again to continue")
            return EXIT_AGAIN
        except BaseException as error:
            # A start that is refused has changed nothing, so what an earlier run has written stays true.
            if lead and _state(workdir) in (None, "running"):
                write_status(workdir, "failed", _last_step(workdir), f"{type(error).__name__}: {error}")
            raise


def _run(config: ConfigDict, workdir: Path, signals: StopSignals, checkpointer: Checkpointer) -> int:
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    lead = jax.process_index() == 0

    # --- Where we are: devices, and whether this is a continued run. Until all checks are passed nothing is changed.
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    check_tasks(config.evaluate.tasks, config.checkpoint.best_metric)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    resumed = checkpointer.latest_step()
    plain = configs.plain(config)
    record: dict[str, Any] = {}
    notes: list[str] = []
    if resumed is not None:
        record = checkpointer.read_record(resumed)
        if "config" not in record:
            raise UserError(
                f"{workdir} holds imported weights, not a run: choose another --workdir and start it from them with "
                f"--config.init.checkpoint={workdir}"
            )
        _check_plan_version(record, workdir)
        notes = configs.check_resume(record["config"], plain)
    _say(_banner(config, workdir, mesh, resumed))
    for note in notes:
        _say(f"changed for the rest of this run: {note}")

    # --- The model, its tokenizer and its weights' source.
    model = open_model(config, workdir, mesh, resumed)
    files = model.files
    _warn_of_unfinished_start(config, model)
    if config.export:
        check_exportable(files)
    _print_freeze_table(model)

    # --- Data: which samples make which step.
    data = build_data(
        config.data,
        resolve_path,
        evaluate_sources=config.evaluate.sources,
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
    _check_evaluation(config, data)
    if resumed is not None:
        _check_record(record, data, model)
    if resumed == data.total_steps and _is_done(config, workdir, resumed):
        if lead:
            write_status(workdir, "done", resumed)
            summary.print_summary(_CONSOLE, workdir, read_json(workdir / "summary.json"))
        return EXIT_DONE
    _check_fits(config, model, data, mesh)
    program = build_train_program(
        config, model.shapes, files.lora, mesh, capacity=data.capacity, total_steps=data.total_steps
    )
    peak, peak_source = device_peak(jax.local_devices()[0])
    _say(f"MFU is the share of {peak / 1e12:.3g} TFLOP/s per device ({peak_source})")

    # --- From here on the run exists.
    if lead:
        write_json(workdir / "config.json", plain)
        write_status(workdir, "running", resumed or 0)
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
        evaluator = Evaluator(config.evaluate, model.graphdef, model.files, data, mesh)
        seconds["start"] = time.perf_counter() - started

        # --- The loop, with its evaluations and checkpoints.
        loop = _Loop(
            config, workdir, mesh, model, data, checkpointer, evaluator, program.schedules, signals, seconds, peak
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
    if config.export:
        began = time.perf_counter()
        exported = workdir / "export"
        if lead:
            export(open_checkpoint(workdir, step=str(step)), exported, Options(replace=True))
        multihost_utils.sync_global_devices("exported")
        seconds["export"] = time.perf_counter() - began
    seconds["total"] = time.perf_counter() - started
    if lead:
        losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
        facts = {
            "stage": config.stage, "variant": config.variant, "steps": step, "samples": data.samples_seen(step),
            "first_loss": losses[0], "last_loss": losses[-1], "evaluation": loop.last_evaluation.facts,
            "checkpoint": str(workdir / "checkpoints" / str(step)), "export": str(exported) if exported else None,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }  # fmt: skip
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
    seconds: dict[str, float]
    peak: float
    last_evaluation: Evaluation | None = None
    metrics: MetricsWriter | None = field(init=False, default=None)
    progress: ProgressLine | None = field(init=False, default=None)

    def train(self, train_step: Any, state: TrainState, frozen: Any, start: int) -> tuple[TrainState, bool]:
        """Run steps start .. total. Returns the last state, saved, and whether a signal asked to stop."""
        config, total = self.config, self.data.total_steps
        began = time.perf_counter()
        placement = sharding.batch_sharding(self.mesh)
        stopped = False
        pending: tuple[int, Any, float] | None = None
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                self.metrics = stack.enter_context(
                    contextlib.closing(MetricsWriter(self.workdir, start, config.logging.tensorboard))
                )
                self.progress = stack.enter_context(contextlib.closing(ProgressLine(_CONSOLE, start, total)))
            loader = stack.enter_context(contextlib.closing(self.data.loader(start)))
            stack.enter_context(self.signals.deferred())
            clock = time.perf_counter()
            for step in range(start, total):
                waiting = time.perf_counter()
                rows = next(loader)
                wait = time.perf_counter() - waiting
                batch = {k: _to_devices(v, placement, config.batch.accumulation) for k, v in rows.items()}
                state, measured = train_step(state, frozen, batch)
                # The previous step is reported while this one runs, so that the devices never wait for the host.
                if pending is not None:
                    clock = self._report(*pending, clock=clock)
                pending = (step + 1, measured, wait)

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
            self.checkpointer.wait()
        self.seconds["train"] = time.perf_counter() - began - self.seconds.get("evaluate", 0.0)
        return state, stopped or self.signals.asked

    def _report(self, step: int, measured: Any, wait: float, clock: float) -> float:
        """Write one step's figures; returns the time at which the step was over."""
        values = {name: float(value) for name, value in measured.items()}
        now = time.perf_counter()
        elapsed = max(now - clock, 1e-9)
        if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
            raise UserError(
                f"the loss is {values['loss']} and the gradient's norm {values['grad_norm']} at step {step}. Start "
                "again with a lower config.optimizer.lr, or set config.optimizer.clip"
            )
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
        if step % self.config.logging.every == 0 or step in (1, self.data.total_steps):
            self.metrics.write(step, record)
        self.progress.update(step, record)
        return now

    def _should_stop(self, step: int) -> bool:
        if jax.process_count() > 1:
            return self.checkpointer.reached_preemption(step)
        return self.signals.asked

    def evaluate_again(self, state: TrainState, frozen: Any) -> Evaluation:
        """The evaluation after the last step, for a run that was stopped between its last save and its summary."""
        evaluation = self.evaluator({**frozen, **state.trainable})
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
        self.checkpointer.save(step, state, record, evaluated or None)

    def _evaluate(self, state: TrainState, frozen: Any) -> dict[str, float]:
        """Evaluate on held-out samples; whatever ends that early, the steps so far are saved first."""
        began = time.perf_counter()
        step = int(state.step)
        if jax.process_index() == 0:
            write_status(self.workdir, "running", step, "evaluating")
        try:
            with self.signals.at_once():
                self.last_evaluation = self.evaluator({**frozen, **state.trainable})
        except BaseException:
            if jax.process_count() == 1:  # several processes can only save together
                self._save(state, {})
                self.checkpointer.wait()
            raise
        found = self.last_evaluation.metrics
        if self.metrics is not None:
            if found:
                self.metrics.write(step, found)
            write_status(self.workdir, "running", step)
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0.0) + time.perf_counter() - began
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
    step, why = saved_program.load(Path(config.compiled).expanduser(), program.step, arguments, mesh)
    _say(f"config.compiled={config.compiled}: " + (f"{why}. Compiling instead" if why else "loaded"))
    return step


# --------------------------------------------------------------------------------------------------------------------
# Checks before anything is allocated


def _warn_of_unfinished_start(config: ConfigDict, model: Model) -> None:
    """A stage may start from any checkpoint of another; from one that is not the last, nobody starts knowingly."""
    start = checkpoint_path(config) if model.source is not None else None
    if start is None or not (start / "status.json").is_file():
        return
    status = read_json(start / "status.json")
    if status["state"] != "done":
        _say(
            f"warning: the run in {start} is {status['state']} at step {status['step']}, not done; starting "
            "from its last checkpoint"
        )


def _check_evaluation(config: ConfigDict, data: Data) -> None:
    if config.evaluate.every and not data.has_questions:
        raise UserError(
            f"config.evaluate.every={config.evaluate.every}, but there is nothing to evaluate: {data.why_no_heldout}, "
            "and config.evaluate.sources gives no question. Name a split that is there, convert one with --split, or "
            "set config.evaluate.every=0"
        )


def _is_done(config: ConfigDict, workdir: Path, step: int) -> bool:
    """Whether a run whose last step is saved has its summary, and its export where one is wanted, too."""
    path = workdir / "summary.json"
    if not path.is_file() or read_json(path)["steps"] != step:
        return False
    return not config.export or (workdir / "export" / "export.json").is_file()


def _check_plan_version(record: dict[str, Any], workdir: Path) -> None:
    """Refuse a run whose samples another vflax put into other steps, before anything is measured for it."""
    planned = record["data"].get("plan_version", 1)  # the first one did not write it down
    if planned != PLAN_VERSION:
        raise UserError(
            f"{workdir} is a run that another version of vflax planned (plan {planned}; this one makes plan "
            f"{PLAN_VERSION}, with other samples in a step). Finish it with the version that it was started with, or "
            "start in another --workdir, from its weights with --config.init.checkpoint"
        )


def _check_record(record: dict[str, Any], data: Data, model: Model) -> None:
    """Refuse to continue on other data, or with other frozen weights, than a checkpoint's."""
    if record["frozen"] != model.files.frozen:
        raise UserError(
            f"model/frozen.json names the frozen weights {model.files.frozen}, the checkpoint those of "
            f"{record['frozen']}. Put WORKDIR/model back as this run wrote it, or start in another --workdir."
        )
    saved, now = record["data"], {"position": record["step"], **data.identity()}
    wrong = [
        f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in now.items() if saved.get(key) != value
    ]
    if wrong:
        raise UserError(
            "the data is not what this run was trained on so far (data fingerprint):\n  " + "\n  ".join(wrong)
            + "\nPut the same data, tokenizer and package versions back, or start in another --workdir."
        )  # fmt: skip


def _check_fits(config: ConfigDict, model: Model, data: Data, mesh: Mesh) -> None:
    sizes = memory.estimate(
        model.files.config,
        model.abstract,
        model.shardings,
        model.verdict,
        rows=data.rows_per_step // config.batch.accumulation // sharding.batch_shards(mesh),
        max_length=config.data.max_length,
        capacity=data.capacity,
        slots=config.data.slots,
        accumulation=config.batch.accumulation,
        dtype=config.dtype,
        moment_dtype=config.optimizer.moment_dtype,
        remat=config.remat,
        scores=jax.default_backend() != "gpu" or config.attention == "reference",
    )
    limit, kind = memory.device_limit()
    shown = f"{limit / memory.GIB:.2f} GiB {kind}" if limit else "of unknown size"
    _say(f"memory: about {sizes['total'] / memory.GIB:.2f} GiB per device, {shown} (an estimate)")
    memory.check_fits(sizes, limit, kind)


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
        f"vflax stage {config.stage} ({config.variant}): {how} in {workdir}\n"
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
