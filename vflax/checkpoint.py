"""Checkpoints: Orbax, asynchronous, the last N and the best one kept.

A checkpoint holds the trainable leaves, the optimizer state, and a JSON record: step, config, data position, the
fingerprints that the data must match, and which frozen leaves belong to it. These are in WORKDIR/frozen/HASH, once.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from vflax.bucket import COMMITTED, is_url, reaching
from vflax.errors import UserError
from vflax.mirror import remote
from vflax.step import TrainState
from vflax.workdir import read_json

_RECORD = "record"
# A leaf up to so many bytes is stored, and read, as one. A reader keeps all of these that a stack of layers has,
# adapters too (see weights/workdir_source.py).
_LARGE_LEAF = 2**23
# At most so many bytes are in a chunk of a larger one.
_CHUNK_BYTES = 2**24
# Orbax warns of every checkpoint that falls on no evaluation. That is what `metrics=None` says.
logging.getLogger("absl").addFilter(lambda record: "`tracked_metric`" not in record.getMessage())


def to_stored(flat: dict[str, Any]) -> dict[str, Any]:
    """Parameter paths as they are written: "/" would become a folder in the store."""
    return {path.replace("/", "."): leaf for path, leaf in flat.items()}


def from_stored(stored: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_stored`."""
    return {name.replace(".", "/"): leaf for name, leaf in stored.items()}


class Checkpointer:
    """Saves and restores training states under WORKDIR/checkpoints, on its bucket where WORKDIR is one's mirror."""

    def __init__(self, workdir: Path, keep: int, best_metric: str):
        """
        Args:
            workdir: the run's folder.
            keep: how many of the latest checkpoints stay.
            best_metric: name of the evaluation metric by which one more, the best, stays; "" for none.
        """
        if keep < 1:
            raise UserError(f"config.checkpoint.keep={keep}: at least one checkpoint must stay")
        worst = math.inf if best_metric and _lower_is_better(best_metric) else -math.inf

        def measured(metrics: dict[str, float]) -> float:
            # A checkpoint from before the metric was chosen, or measured, has others.
            return metrics.get(best_metric, worst)

        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best_metric:
            kept.append(
                policies.BestN(
                    get_metric_fn=measured,
                    reverse=_lower_is_better(best_metric),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best_metric = best_metric
        self._folder = remote((workdir / "checkpoints").absolute())
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                # Only with a best_fn does the manager write metrics down, and a continued run needs them.
                best_fn=measured if best_metric else None,
                # A kill in the middle of a save leaves a temporary folder; it is never read and goes at the next start.
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        with reaching(self._folder):
            return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, record: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        """Start to write a checkpoint; returns when the arrays are off the devices. A step that is there is left."""
        if step in self._manager.all_steps():
            return
        if metrics is not None and self._best_metric not in metrics:
            metrics = None
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(to_stored(state.trainable), save_args=_in_parts(state.trainable)),
            opt_state=ocp.args.StandardSave(_stored_opt(state)),
            record=ocp.args.JsonSave({**record, "step": step}),
        )
        with reaching(self._folder):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def read_record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        with reaching(self._folder):
            return dict(self._manager.restore(step, args=args)["record"])

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Read a state back, each leaf into the sharding and dtype that `abstract` gives it.

        Args:
            step: which checkpoint.
            abstract: a TrainState of jax.ShapeDtypeStruct with shardings.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(to_stored(abstract.trainable)),
            opt_state=ocp.args.StandardRestore(_stored_opt(abstract)),
        )
        with reaching(self._folder):
            restored = self._manager.restore(step, args=args)
        leaves = jax.tree.leaves(restored["opt_state"])
        opt_state = jax.tree.unflatten(jax.tree.structure((abstract.step, abstract.opt_state)), leaves)
        return TrainState(opt_state[0], from_stored(restored["params"]), opt_state[1])

    def reached_preemption(self, step: int) -> bool:
        """Whether every process has agreed to stop at this step (several hosts only)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Return when all started saves are committed."""
        with reaching(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish all saves, and the removal of those that were cut off, and free the manager's threads."""
        with reaching(self._folder):
            self._manager.close()
            # Orbax does not wait for it, and a process that ends meanwhile prints the traceback of its thread.
            removal = getattr(self._manager, "_cleanup_tmp_directory_future", None)
            if removal is not None:
                removal.result()


def _stored_opt(state: TrainState) -> dict[str, Any]:
    """Step and optimizer state as a flat dict with short, stable names: Optax nests tuples and "/" in keys."""
    leaves, _ = jax.tree.flatten((state.step, state.opt_state))
    return {f"{i:06d}": leaf for i, leaf in enumerate(leaves)}


def _in_parts(params: dict[str, jax.Array]) -> dict[str, ocp.SaveArgs]:
    """Store large leaves in chunks that an export reads a few at a time: parts of a layer, or of the vocabulary."""
    return to_stored({path: _chunks(path, leaf) for path, leaf in params.items()})


def _chunks(path: str, leaf: jax.Array) -> ocp.SaveArgs:
    if leaf.nbytes <= _LARGE_LEAF:
        return ocp.SaveArgs()
    if "/layers/" in path:
        # Orbax cuts an axis that is named here into single steps: layers. Then it cuts what is still too large.
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,))
    # No axis is named: single rows of a vocabulary take several times as long to write. They are an embedding's [V, D]
    # rows, an output kernel's [D, V] columns. V may be a prime number, too, and Orbax cuts evenly: into single rows, or
    # not at all.
    part = leaf.sharding.shard_shape(leaf.shape)
    rows = part[0 if path.endswith("/embedding") else -1]
    row_bytes = math.prod(part) // rows * leaf.dtype.itemsize
    even = (n * row_bytes for n in range(1, rows) if rows % n == 0)
    least = next((size for size in even if size >= _CHUNK_BYTES // 16), rows * row_bytes)
    return ocp.SaveArgs(chunk_byte_size=max(_CHUNK_BYTES, least))


def save_record(workdir: Path, step: int, record: dict[str, Any]) -> None:
    """Write a checkpoint that holds nothing but its record, for weights that all lie in the frozen store."""
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        manager.save(step, args=ocp.args.Composite(record=ocp.args.JsonSave({**record, "step": step})))
        manager.wait_until_finished()


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints under WORKDIR, in order."""
    folder = remote(workdir / "checkpoints")
    with reaching(folder):
        found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        mark = COMMITTED if is_url(folder) else _RECORD
        return sorted(int(p.name) for p in found if (p / mark).exists())


def find_step(workdir: Path, which: str) -> int:
    """Resolve "latest", "best" or a number to the step of a complete checkpoint under WORKDIR.

    Raises:
        UserError: no checkpoints, no such step, or "best" in a run that measured nothing at its checkpoints.
    """
    folder = remote(workdir / "checkpoints")
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"{folder}: no complete checkpoint. Train first: python -m vflax.launch --workdir={folder.parent}"
        )
    if which == "latest":
        return steps[-1]
    if which == "best":
        return _best_step(workdir, steps)
    if not which.isdigit() or int(which) not in steps:
        raise UserError(
            f"--step={which}: {folder} holds the steps {', '.join(map(str, steps))}; also: latest, best"
        )
    return int(which)


def _best_step(workdir: Path, steps: list[int]) -> int:
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"--step=best: {workdir} holds imported weights, of which nothing was measured; leave --step away"
        )
    config = read_json(workdir / "config.json")
    try:
        metric = str(config["checkpoint"]["best_metric"])
    except (TypeError, KeyError):
        raise UserError(
            f"{workdir / 'config.json'}: checkpoint.best_metric is missing, and --step=best goes by it; give a number"
        ) from None
    values = {}
    for step in steps:
        file = remote(workdir / "checkpoints" / str(step) / "metrics" / "metrics")
        with reaching(file):
            found = json.loads(file.read_text()) if file.is_file() else {}
        if metric in found:
            values[step] = found[metric]
    if not values:
        raise UserError(
            f"--step=best: no checkpoint under {remote(workdir / 'checkpoints')} has the metric {metric!r}; "
            "config.evaluate.every and config.checkpoint.every decide where both fall on one step"
        )
    choose = min if _lower_is_better(metric) else max
    return choose(values, key=lambda step: values[step])


def _lower_is_better(metric: str) -> bool:
    # eval/loss, and eval/loss/TASK
    return metric.split("/")[1:2] == ["loss"]
