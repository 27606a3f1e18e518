"""What a run is held against before anything is allocated or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vflax import memory, sharding
from vflax.constants import GIB
from vflax.data.packing import PLAN_VERSION
from vflax.data.pipeline import Data
from vflax.errors import UserError
from vflax.evaluate.loop import HELD_OUT
from vflax.mirror import remote
from vflax.models.attention import writes_scores
from vflax.start import Model, checkpoint_path
from vflax.workdir import read_json


def unfinished_start(config: ConfigDict, model: Model) -> str:
    """A warning, or "". A stage may start from any checkpoint of another; from one that is not the last, nobody starts
    knowingly."""
    start = checkpoint_path(config) if model.source is not None else None
    if start is None or not (start / "status.json").is_file():
        return ""
    status = read_json(start / "status.json")
    if status["state"] == "done":
        return ""
    return (
        f"warning: the run in {remote(start)} is {status['state']} at step {status['step']}, not done; starting from "
        "its last checkpoint"
    )


def check_evaluation(config: ConfigDict, data: Data) -> None:
    """Refuse to evaluate in the loop where there is nothing to evaluate."""
    on_data = any(task in HELD_OUT for task in config.evaluate.tasks)
    if config.evaluate.every and on_data and not data.has_questions:
        raise UserError(
            f"config.evaluate.every={config.evaluate.every}, but there is nothing to evaluate: {data.why_no_heldout}, "
            "and config.evaluate.sources gives no question. Name a split that is there, convert one with --split, or "
            "set config.evaluate.every=0"
        )


def is_done(config: ConfigDict, workdir: Path, step: int) -> bool:
    """Whether a run whose last step is saved has its summary, and its export where one is wanted, too."""
    path = workdir / "summary.json"
    if not path.is_file() or read_json(path)["steps"] != step:
        return False
    return not config.export or (workdir / "export" / "export.json").is_file()


def check_plan_version(record: dict[str, Any], workdir: Path) -> None:
    """Refuse a run whose samples another vflax put into other steps, before anything is measured for it."""
    planned = record["data"].get("plan_version", 1)  # the first one did not write it down
    if planned != PLAN_VERSION:
        raise UserError(
            f"{workdir} is a run that another version of vflax planned (plan {planned}; this one makes plan "
            f"{PLAN_VERSION}, with other samples in a step). Finish it with the version that it was started with, or "
            "start in another --workdir, from its weights with --config.init.checkpoint"
        )


def check_record(record: dict[str, Any], data: Data, model: Model) -> None:
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


def check_fits(config: ConfigDict, model: Model, data: Data, mesh: Mesh) -> str:
    """Refuse what cannot fit on the devices; returns the estimate in a line."""
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
        scores=writes_scores(config.attention, config.data.max_length),
    )
    limit, kind = memory.device_limit()
    shown = f"{limit / GIB:.2f} GiB {kind}" if limit else "of unknown size"
    memory.check_fits(sizes, limit, kind)
    return f"memory: about {sizes['total'] / GIB:.2f} GiB per device, {shown} (an estimate)"
