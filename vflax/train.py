"""The training loop, top to bottom."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from vflax import config as configs
from vflax import conversation, freeze, memory, sharding, summary
from vflax.checkpoint import Checkpointer
from vflax.data.pipeline import Data, build_data, heldout_questions
from vflax.errors import UserError
from vflax.evaluate import heldout
from vflax.flops import device_peak, train_step_flops
from vflax.images import ImageRules
from vflax.metrics import MetricsWriter, ProgressLine, read_metrics
from vflax.models import llava
from vflax.optimizer import make_optimizer
from vflax.start import cache_root, checkpoint_path, open_start, resolve_path
from vflax.step import TrainState, init_state, make_eval_step, make_train_step, state_shardings
from vflax.weights import names
from vflax.weights.export import export
from vflax.weights.frozen import FrozenSource, save_frozen
from vflax.weights.load import check, load_params
from vflax.weights.source import TensorSource, WorkdirSource
from vflax.workdir import EXIT_AGAIN, EXIT_DONE, ModelFiles, read_json, write_json, write_status


def run_with_start(config: ConfigDict, workdir: Path) -> int:
    """Run a stage; first the one that makes its starting point, where that is not there and the config names one.

    Returns:
        The exit status: 0 finished, 75 saved and to be run again.
    """
    start = checkpoint_path(config)
    # A run that has a checkpoint of its own reads nothing but its WORKDIR.
    begun = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
    if start is not None and config.init.make and not begun and not (start / "summary.json").is_file():
        _say(
            f"[bold]{config.init.checkpoint}[/] is not there yet: making it with {config.init.make} in {start}"
        )
        status = run_with_start(configs.load_config(config.init.make), start)
        if status != EXIT_DONE:
            return status
    return run(config, workdir)


def run(config: ConfigDict, workdir: Path) -> int:
    """Train one stage in `workdir`, from its last checkpoint where there is one. Returns the exit status."""
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        return _run(config, workdir)
    except BaseException as error:
        if jax.process_index() == 0:
            write_status(workdir, "failed", _last_step(workdir), f"{type(error).__name__}: {error}")
        raise


def _run(config: ConfigDict, workdir: Path) -> int:
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    # --- Where we are: devices, and whether this is a continued run.
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    heldout.check_tasks(config.evaluate.tasks)
    checkpointer = Checkpointer(workdir, config.checkpoint.keep, config.checkpoint.best_metric)
    resumed = checkpointer.latest_step()
    _check_config(config, workdir, resumed)
    if jax.process_index() == 0:
        write_status(workdir, "running", resumed or 0)
    _say(_banner(config, workdir, mesh, resumed))

    # --- The model, its tokenizer and its weights' source.
    model = _open_model(config, workdir, mesh, resumed)
    files = model.files

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
    if resumed == data.total_steps and _is_done(config, workdir, resumed):
        checkpointer.close()
        if jax.process_index() == 0:
            write_status(workdir, "done", resumed)
            summary.print_summary(_CONSOLE, workdir, read_json(workdir / "summary.json"))
        return EXIT_DONE
    _check_fits(config, model, data)

    peak, peak_source = device_peak(jax.local_devices()[0])
    _say(f"MFU is the share of {peak / 1e12:.3g} TFLOP/s per device ({peak_source})")

    # --- The optimizer, the state, and the jitted step.
    tx, schedules = make_optimizer(config.optimizer, model.trainable_paths, data.total_steps)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(
        lambda p: init_state(tx, p), {p: model.abstract[p] for p in model.trainable_paths}
    )
    shardings = state_shardings(abstract, model.shardings, replicated)
    with jax.set_mesh(mesh):
        frozen = load_params(model.frozen_source, files.config, model.frozen_shardings, model.dtypes)
        if resumed is None:
            trainable = load_params(model.source, files.config, model.trainable_shardings, model.dtypes)
            state = jax.jit(lambda p: init_state(tx, p), out_shardings=shardings, donate_argnums=0)(trainable)
            start = 0
        else:
            record = checkpointer.read_record(resumed)
            _check_record(record, data, config)
            state = checkpointer.restore(
                resumed,
                jax.tree.map(
                    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
                ),
            )
            start = resumed
        train_step = jax.jit(
            make_train_step(model.graphdef, tx, config.loss.reduction, data.capacity),
            donate_argnums=0,
            out_shardings=(shardings, replicated),
        )
        seconds["start"] = time.perf_counter() - started

        # --- The loop.
        run = _Loop(config, workdir, mesh, model, data, checkpointer, schedules, seconds, peak)
        state, stopped = run.train(train_step, state, frozen, start)
        run.save(state, evaluated=None)
        checkpointer.wait()
        if stopped:
            if jax.process_index() == 0:
                write_status(workdir, "preempted", int(state.step), "saved; run again to continue")
            _say(f"saved step {int(state.step)}: run the same command again to continue")
            checkpointer.close()
            return EXIT_AGAIN

        # --- The last evaluation, the export, the summary.
        evaluation, answered = run.final_evaluation(state, frozen)
    checkpointer.close()
    del state, frozen
    step = data.total_steps
    exported = None
    if config.export:
        began = time.perf_counter()
        exported = workdir / "export"
        if jax.process_index() == 0:
            export(WorkdirSource(workdir, step), files, exported, replace=True)
        multihost_utils.sync_global_devices("exported")
        seconds["export"] = time.perf_counter() - began
    seconds["total"] = time.perf_counter() - started
    if jax.process_index() == 0:
        losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
        facts = {
            "stage": config.stage, "variant": config.variant, "steps": step, "samples": data.samples_seen(step),
            "first_loss": losses[0], "last_loss": losses[-1], "evaluation": evaluation,
            "checkpoint": str(workdir / "checkpoints" / str(step)), "export": str(exported) if exported else None,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }  # fmt: skip
        summary.write_summary(workdir, facts, answered)
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
    model: _Model
    data: Data
    checkpointer: Checkpointer
    schedules: dict[str, Any]
    seconds: dict[str, float]
    peak: float
    metrics: MetricsWriter = field(init=False)

    def train(self, train_step: Any, state: TrainState, frozen: Any, start: int) -> tuple[TrainState, bool]:
        """Run steps start .. total. Returns the last state, and whether a signal stopped the run before its end."""
        config, total = self.config, self.data.total_steps
        began = time.perf_counter()
        lead = jax.process_index() == 0
        self.metrics = MetricsWriter(self.workdir, start, config.logging.tensorboard) if lead else None  # type: ignore[assignment]
        progress = ProgressLine(_CONSOLE, start, total) if lead else None
        loader = self.data.loader(start)
        placement = sharding.batch_sharding(self.mesh)
        stopped = False
        pending: tuple[int, Any, float] | None = None
        with _stop_signals() as signalled:
            clock = time.perf_counter()
            for step in range(start, total):
                waiting = time.perf_counter()
                rows = next(loader)
                wait = time.perf_counter() - waiting
                batch = {k: _to_devices(v, placement, config.batch.accumulation) for k, v in rows.items()}
                state, measured = train_step(state, frozen, batch)
                # The previous step is reported while this one runs, so that the devices never wait for the host.
                if pending is not None:
                    clock = self._report(*pending, clock=clock, progress=progress)
                pending = (step + 1, measured, wait)

                done = step + 1
                evaluate = config.evaluate.every and done % config.evaluate.every == 0 and done < total
                save = config.checkpoint.every and done % config.checkpoint.every == 0 and done < total
                stopped = self._should_stop(done, signalled) and done < total
                if evaluate or save or stopped:
                    clock = self._report(*pending, clock=clock, progress=progress)
                    pending = None
                    evaluated = self.evaluate(state, frozen)[0] if evaluate else None
                    if save or stopped:
                        self.save(state, evaluated)
                    clock = time.perf_counter()
                if stopped:
                    break
            if pending is not None:
                self._report(*pending, clock=clock, progress=progress)
        loader.close()
        if progress is not None:
            progress.close()
        self.seconds["train"] = time.perf_counter() - began - self.seconds.get("evaluate", 0.0)
        return state, stopped

    def _report(
        self, step: int, measured: Any, wait: float, clock: float, progress: ProgressLine | None
    ) -> float:
        """Write one step's figures; returns the time at which the step was over."""
        values = {name: float(value) for name, value in measured.items()}
        now = time.perf_counter()
        elapsed = max(now - clock, 1e-9)
        if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
            raise UserError(
                f"the loss is {values['loss']} and the gradient's norm {values['grad_norm']} at step {step}. Start "
                "again with a lower config.optimizer.lr, or set config.optimizer.clip"
            )
        if progress is None:
            return now
        images = values.pop("image_tokens") / self.model.files.config.vision.num_tokens
        flops = train_step_flops(
            self.model.files.config, self.model.abstract, self.model.verdict, values["tokens"], images
        )
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
        if step % self.config.logging.every == 0 or step == self.data.total_steps:
            self.metrics.write(step, record)
        progress.update(step, record)
        return now

    def _should_stop(self, step: int, signalled: dict[str, bool]) -> bool:
        if jax.process_count() > 1:
            return self.checkpointer.reached_preemption(step)
        return signalled["stop"]

    def save(self, state: TrainState, evaluated: dict[str, float] | None) -> None:
        """Start to save the state with its data position."""
        step = int(state.step)
        record = {
            "data": {"position": step, **self.data.identity()},
            "seed": self.config.seed,
            "frozen": self.model.files.frozen,
        }
        self.checkpointer.save(step, state, record, evaluated)

    def evaluate(
        self, state: TrainState, frozen: Any
    ) -> tuple[dict[str, float], Any, list[heldout.Answered]]:
        """Evaluate on held-out samples. Returns (flat metrics, score's dict or None, answers)."""
        began = time.perf_counter()
        if jax.process_index() == 0:
            write_status(self.workdir, "running", int(state.step), "evaluating")
        params = {**frozen, **state.trainable}
        tasks, flat, scored, answered = self.config.evaluate.tasks, {}, None, []
        if "loss" in tasks and self.data.has_heldout:
            step = jax.jit(
                make_eval_step(self.model.graphdef, self.data.heldout_capacity),
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
            placement = NamedSharding(self.mesh, PartitionSpec(sharding.BATCH_AXES))
            batches = ({k: jax.make_array_from_process_local_data(placement, v) for k, v in rows.items()}
                       for rows in self.data.heldout_batches())  # fmt: skip
            flat["eval/loss"] = heldout.heldout_loss(step, params, batches)
        if "accuracy" in tasks and self.data.has_questions:
            answered = self._answer(params)
            scored = heldout.score(answered)
            shown = ("accuracy", "blind", "words_short", "words_long")
            flat |= {f"eval/{name}": scored[name] for name in shown if scored[name] is not None}
        if jax.process_index() == 0:
            if flat:
                self.metrics.write(int(state.step), flat)
            write_status(self.workdir, "running", int(state.step))
        self.seconds["evaluate"] = self.seconds.get("evaluate", 0.0) + time.perf_counter() - began
        return flat, scored, answered

    def _answer(self, params: Any) -> list[heldout.Answered]:
        files, evaluate = self.model.files, self.config.evaluate
        questions = heldout_questions(self.data, evaluate.samples_per_task)
        options = {
            "tokenizer": files.tokenizer, "eos_ids": conversation.stop_ids(files.template, files.tokenizer),
            "max_new_tokens": evaluate.max_new_tokens, "batch_size": 64,
        }  # fmt: skip
        seen = heldout.answer(params, self.model.graphdef, questions, **options)
        blind = heldout.answer(params, self.model.graphdef, heldout.permute_images(questions), **options)
        return [heldout.Answered(q, a, b) for q, a, b in zip(questions, seen, blind, strict=True)]

    def final_evaluation(
        self, state: TrainState, frozen: Any
    ) -> tuple[dict[str, Any] | None, list[heldout.Answered]]:
        """The evaluation after the last step, for the summary."""
        flat, scored, answered = self.evaluate(state, frozen)
        if self.metrics is not None:
            self.metrics.close()
        if not flat:
            return None, []
        loss = {"loss": flat["eval/loss"]} if "eval/loss" in flat else {}
        return {**loss, **(scored or {})}, answered


def _to_devices(rows: np.ndarray, placement: NamedSharding, accumulation: int) -> jax.Array:
    """This host's rows [A * B_local, ...] -> the global batch leaf [A, B, ...]."""
    return jax.make_array_from_process_local_data(placement, rows.reshape(accumulation, -1, *rows.shape[1:]))


@contextmanager
def _stop_signals() -> Iterator[dict[str, bool]]:
    """Turn the first SIGTERM or Ctrl-C into a flag; a second one acts as usual.

    With several hosts the JAX preemption service listens instead, and makes all hosts stop at the same step.
    """
    flag = {"stop": False}
    if jax.process_count() > 1:
        yield flag
        return
    old: dict[int, Any] = {}

    def handler(number: int, _frame: Any) -> None:
        flag["stop"] = True
        signal.signal(number, old[number])
        _say("stopping after this step; once more to stop at once")

    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, handler)
    try:
        yield flag
    finally:
        for listened, previous in old.items():
            signal.signal(listened, previous)


# --------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class _Model:
    """The model without its numbers, and where these are.

    abstract: {path: ShapeDtypeStruct}, trainable leaves in float32, frozen ones in the compute dtype.
    """

    files: ModelFiles
    graphdef: Any
    abstract: dict[str, jax.ShapeDtypeStruct]
    verdict: dict[str, str]
    shardings: dict[str, NamedSharding]
    source: TensorSource
    frozen_source: TensorSource

    @property
    def trainable_paths(self) -> list[str]:
        return [path for path, verdict in self.verdict.items() if verdict == freeze.TRAINABLE]

    @property
    def trainable_shardings(self) -> dict[str, NamedSharding]:
        return freeze.split(self.shardings, self.verdict)[0]

    @property
    def frozen_shardings(self) -> dict[str, NamedSharding]:
        return freeze.split(self.shardings, self.verdict)[1]

    @property
    def dtypes(self) -> dict[str, Any]:
        return {path: leaf.dtype for path, leaf in self.abstract.items()}


def _open_model(config: ConfigDict, workdir: Path, mesh: Mesh, resumed: int | None) -> _Model:
    """Open the model of a fresh run (from config.init) or of a continued one (from WORKDIR alone)."""
    if resumed is not None:
        files = ModelFiles.load(workdir)
        llava_config, source = files.config, None
    else:
        start = open_start(config)
        llava_config, source = start.config, start.source
    graphdef, shapes = llava.abstract(
        llava_config,
        dtype=config.dtype,
        param_dtype="float32",
        remat=config.remat,
        attention=config.attention,
    )
    verdict = freeze.verdicts(shapes, config.freeze)
    compute = jnp.dtype(config.dtype)
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if verdict[path] == freeze.TRAINABLE else compute)
        for path, leaf in shapes.items()
    }
    shardings = sharding.param_shardings(abstract, mesh)
    if source is not None:
        check(source, llava_config)
        vision = llava_config.vision
        frozen_paths = [path for path, v in verdict.items() if v == freeze.FROZEN]
        if jax.process_index() == 0:
            ModelFiles(
                config=llava_config,
                tokenizer=start.tokenizer,
                template=config.template,
                position=config.image.position,
                rules=ImageRules(config.image.mode, vision.image_size, vision.image_mean, vision.image_std),
                source_dtypes={name: source.source_dtype(name).name for name in names.expected(llava_config)},
                frozen=save_frozen(source, llava_config, frozen_paths, workdir),
            ).save(workdir)
        multihost_utils.sync_global_devices("model files")
        files = ModelFiles.load(workdir)
    frozen_source = FrozenSource(workdir / "frozen" / files.frozen)
    _print_freeze_table(abstract, verdict)
    return _Model(files, graphdef, abstract, verdict, shardings, source or frozen_source, frozen_source)


# --------------------------------------------------------------------------------------------------------------------
# Checks before anything is allocated


def _check_config(config: ConfigDict, workdir: Path, resumed: int | None) -> None:
    """Write WORKDIR/config.json, or hold the config against the one that a continued run was started with."""
    path, new = workdir / "config.json", configs.plain(config)
    if resumed is not None:
        for note in configs.check_resume(read_json(path), json.loads(json.dumps(new))):
            _say(f"changed for the rest of this run: {note}")
    if jax.process_index() == 0:
        write_json(path, new)


def _is_done(config: ConfigDict, workdir: Path, step: int) -> bool:
    """Whether a run whose last step is saved has its summary, and its export where one is wanted, too."""
    path = workdir / "summary.json"
    if not path.is_file() or read_json(path)["steps"] != step:
        return False
    return not config.export or (workdir / "export" / "export.json").is_file()


def _check_record(record: dict[str, Any], data: Data, config: ConfigDict) -> None:
    """Refuse to continue on other data than a checkpoint's."""
    saved, now = record["data"], {"position": record["step"], **data.identity()}
    wrong = [
        f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in now.items() if saved.get(key) != value
    ]
    if wrong:
        raise UserError(
            "the data is not what this run was trained on so far (data fingerprint):\n  " + "\n  ".join(wrong)
            + "\nPut the same data, tokenizer and package versions back, or start in another --workdir."
        )  # fmt: skip


def _check_fits(config: ConfigDict, model: _Model, data: Data) -> None:
    mesh_shards = next(iter(model.shardings.values())).mesh
    rows = data.rows_per_step // config.batch.accumulation // sharding.batch_shards(mesh_shards)
    sizes = memory.estimate(
        model.files.config,
        model.abstract,
        model.shardings,
        model.verdict,
        rows=rows,
        max_length=config.data.max_length,
        slots=config.data.slots,
        dtype=config.dtype,
        moment_dtype=config.optimizer.moment_dtype,
        remat=config.remat,
    )
    limit = memory.device_limit()
    shown = f"{limit / memory.GIB:.2f} GiB free" if limit else "of unknown size"
    _say(f"memory: about {sizes['total'] / memory.GIB:.2f} GiB per device, {shown} (an estimate)")
    memory.check_fits(sizes, limit)


# --------------------------------------------------------------------------------------------------------------------
# What a person sees

_CONSOLE = Console()


def _say(text: str) -> None:
    if jax.process_index() == 0:
        _CONSOLE.print(text, highlight=False)


def _banner(config: ConfigDict, workdir: Path, mesh: Mesh, resumed: int | None) -> str:
    devices = jax.devices()
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    how = "starting" if resumed is None else f"continuing from step {resumed}"
    return (
        f"[bold]vflax stage {config.stage} ({config.variant})[/]: {how} in {workdir}\n"
        f"devices: {len(devices)} x {devices[0].device_kind} on {jax.process_count()} host(s); mesh: {axes}"
    )


def _print_freeze_table(abstract: dict[str, Any], verdict: dict[str, str]) -> None:
    if jax.process_index() != 0:
        return
    table = Table(title="what learns", title_justify="left")
    for name in ("part", "verdict", "leaves", "parameters", "bytes"):
        table.add_column(name, justify="left" if name in ("part", "verdict") else "right")
    for group in freeze.summary(abstract, verdict):
        table.add_row(
            group["part"], group["verdict"], *(f"{group[k]:,}" for k in ("leaves", "parameters", "bytes"))
        )
    _CONSOLE.print(table)


def _last_step(workdir: Path) -> int:
    records = read_metrics(workdir / "metrics.jsonl")
    return records[-1]["step"] if records else 0
