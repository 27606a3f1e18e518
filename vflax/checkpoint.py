"""Checkpoints: Orbax, asynchronous, the last N and the best one kept.

A checkpoint holds the trainable leaves, the optimizer state, and a JSON record: step, data position, seed and the
fingerprint that the data must match. Frozen leaves are in WORKDIR/frozen/HASH, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from vflax.errors import UserError
from vflax.step import TrainState

# A metric of which less is better; of all others more is.
_LOWER_IS_BETTER = ("loss",)


def to_stored(flat: dict[str, Any]) -> dict[str, Any]:
    """Parameter paths as they are written: "/" would become a folder in the store."""
    return {path.replace("/", "."): leaf for path, leaf in flat.items()}


def from_stored(stored: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_stored`."""
    return {name.replace(".", "/"): leaf for name, leaf in stored.items()}


class Checkpointer:
    """Saves and restores training states under WORKDIR/checkpoints."""

    def __init__(self, workdir: Path, keep: int, best_metric: str):
        """
        Args:
            workdir: the run's folder.
            keep: how many of the latest checkpoints stay.
            best_metric: name of the evaluation metric by which one more, the best, stays; "" for none.
        """
        if keep < 1:
            raise UserError(f"config.checkpoint.keep={keep}: at least one checkpoint must stay")
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best_metric:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    reverse=best_metric.rsplit("/")[-1] in _LOWER_IS_BETTER,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best_metric = best_metric
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                # A kill in the middle of a save leaves a temporary folder; it is never read and goes at the next start.
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Start to write a checkpoint; returns when the arrays are off the devices. A step that is there is left."""
        if step in self._manager.all_steps():
            return
        if metrics is not None and self._best_metric not in metrics:
            metrics = None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(to_stored(state.trainable)),
                opt_state=ocp.args.StandardSave(_stored_opt(state)),
                record=ocp.args.JsonSave({**record, "step": step}),
            ),
            metrics=metrics,
            force=True,
        )

    def read_record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint."""
        return dict(self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"])

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Read a state back, each leaf into the sharding and dtype that `abstract` gives it.

        Args:
            step: which checkpoint.
            abstract: a TrainState of jax.ShapeDtypeStruct with shardings.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(to_stored(abstract.trainable)),
                opt_state=ocp.args.StandardRestore(_stored_opt(abstract)),
            ),
        )
        leaves = jax.tree.leaves(restored["opt_state"])
        opt_state = jax.tree.unflatten(jax.tree.structure((abstract.step, abstract.opt_state)), leaves)
        return TrainState(opt_state[0], from_stored(restored["params"]), opt_state[1])

    def reached_preemption(self, step: int) -> bool:
        """Whether every process has agreed to stop at this step (several hosts only)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Return when all started saves are committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish all saves and free the manager's threads."""
        self._manager.close()


def _stored_opt(state: TrainState) -> dict[str, Any]:
    """Step and optimizer state as a flat dict with short, stable names: Optax nests tuples and "/" in keys."""
    leaves, _ = jax.tree.flatten((state.step, state.opt_state))
    return {f"{i:06d}": leaf for i, leaf in enumerate(leaves)}


def find_step(workdir: Path, which: str) -> int:
    """Resolve "latest", "best" or a number to the step of a complete checkpoint under WORKDIR.

    Raises:
        UserError: no checkpoints, no such step, or "best" in a run that tracked no metric.
    """
    folder = workdir / "checkpoints"
    manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(read_only=True, create=False)) \
        if folder.is_dir() else None
    steps = sorted(manager.all_steps()) if manager else []
    if not steps:
        raise UserError(f"{folder}: no complete checkpoint. Train first: python -m vflax.launch --workdir={workdir}")
    if which == "latest":
        return steps[-1]
    if which == "best":
        best_file = workdir / "best.json"
        if not best_file.is_file():
            raise UserError(f"{best_file}: not there; the run tracked no best step (config.checkpoint.best_metric)")
        import json

        which = str(json.loads(best_file.read_text())["step"])
    if not which.isdigit() or int(which) not in steps:
        raise UserError(f"--step={which}: {folder} holds the steps {', '.join(map(str, steps))}; also: latest, best")
    return int(which)
