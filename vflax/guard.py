"""What follows a step whose loss or gradient is no number: stop with all that is known of it, or go on without it.

The step itself (vflax/step.py) leaves parameters and moments as they were and says so in its metrics; here the host,
which hears of it one step later, decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vflax.errors import UserError
from vflax.mirror import remote

ACTIONS = ("stop", "skip")
# So many sample ids stand in a message; the files have all.
_SHOWN = 8
# So many batches of skipped steps are kept, the oldest: a batch has a hundred megabytes of images, and what began it is
# in the first ones. The ids of every step are kept, too.
_KEPT = 4


class Samples(Protocol):
    """What the guard asks of a run's data (vflax.data.pipeline.Data)."""

    def sample_ids(self, step: int) -> list[list[str]]:
        """Ids of the samples of each row that this host has in the step after `step` others, in the batch's order."""
        ...


class Guard:
    """Judges each step's figures as they come in."""

    def __init__(
        self, action: str, max_skips: int, workdir: Path, samples: Samples, say: Callable[[str], None],
        process_index: int = 0, process_count: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            action: "stop" or "skip" (config.guard.action).
            max_skips: so many steps in a row may be skipped; one more stops the run. The count begins anew with a
                restart.
            workdir: where the batch of a bad step is written, and the ids of its samples.
            samples: who knows which samples made it.
            say: where to say that a step was skipped.
        """
        self._action, self._max_skips, self._workdir, self._samples = action, max_skips, workdir, samples
        self._say, self._process = say, (process_index, process_count)
        self._skips = 0

    def check(self, step: int, values: Mapping[str, float], rows: Mapping[str, np.ndarray]) -> None:
        """Judge step `step` (1, 2, ...).

        Args:
            values: its figures: loss, skipped, grad_norm and grad_norm/PART.
            rows: this host's batch, {name: [rows, ...]}.

        Raises:
            UserError: the step is bad, and the action is "stop" or too many in a row were; the batch lies in WORKDIR.
                A step that is skipped has its samples' ids there, too, and its batch if it is one of the first.
        """
        if not values["skipped"]:
            self._skips = 0
            return
        self._skips += 1
        norms = {name: value for name, value in values.items() if name.startswith("grad_norm/")}
        found = (
            f"the loss is {values['loss']} and the gradient's norm {values['grad_norm']} at step {step} ("
            + (
                ", ".join(f"{name.removeprefix('grad_norm/')} {value:.4g}" for name, value in norms.items())
                + ")"
            )
        )
        ids = self._samples.sample_ids(step - 1)
        names = [name for row in ids for name in row]
        shown = ", ".join(names[:_SHOWN]) + (
            f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        )
        if self._action == "skip" and self._skips <= self._max_skips:
            kept = self._file(step) if self._has_room(step) else None
            if kept is not None:
                self._write(kept, values, rows, ids)
            listed = self._list(step, names, kept)
            self._say(
                f"skipped: {found}; parameters and moments are as before "
                f"({self._skips} in a row, at most {self._max_skips}). Samples: {shown}; all of them stand in "
                f"{remote(listed)}, the batch "
                + (f"in {remote(kept)}" if kept is not None else f"is not kept, as {_KEPT} others are")
            )
            return
        path = self._file(step)
        self._write(path, values, rows, ids)
        if self._action == "skip":
            found = f"{self._skips} steps in a row were skipped, and config.guard.max_skips={self._max_skips}: {found}"
        raise UserError(
            f"{found}. Nothing of it is in a checkpoint. The batch and its sample ids lie in {remote(path)}; "
            f"samples: {shown}. {self._remedy(step, norms)}"
        )

    def _remedy(self, step: int, norms: Mapping[str, float]) -> str:
        bad = [name.removeprefix("grad_norm/") for name, value in norms.items() if not math.isfinite(value)]
        where = "" if not bad or len(bad) == len(norms) else f"Only {', '.join(bad)} has no finite gradient. "
        again = (
            "The same command goes on from the last checkpoint and meets the same batch"
            + (": with --config.guard.action=skip it goes on without it. " if self._action == "stop" else ". ")
        )  # fmt: skip
        return (
            f"{where}{again}Does it diverge (the loss rose before step {step}, see metrics.jsonl), start again with a "
            "lower config.optimizer.lr or a longer config.optimizer.warmup, or set config.optimizer.clip"
        )

    def _own(self, name: str, ending: str) -> Path:
        """A file in WORKDIR, of several hosts each its own."""
        index, count = self._process
        return self._workdir / f"{name}{f'-host{index}' if count > 1 else ''}{ending}"

    def _file(self, step: int) -> Path:
        return self._own(f"bad-batch-{step}", ".npz")

    def _has_room(self, step: int) -> bool:
        """Whether the batch of a skipped step is kept; one that a restarted run meets again replaces its own file."""
        others = list(self._workdir.glob(self._own("bad-batch-*", ".npz").name))
        return self._file(step) in others or len(others) < _KEPT

    def _list(self, step: int, names: list[str], kept: Path | None) -> Path:
        """Add a line to WORKDIR/bad-batch-samples.jsonl: {"step", "file" (null: not kept), "sample_ids"}. A step that a
        restarted run meets again has two."""
        path = self._own("bad-batch-samples", ".jsonl")
        line = {"step": step, "file": None if kept is None else kept.name, "sample_ids": names}
        with path.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return path

    def _write(
        self, path: Path, values: Mapping[str, float], rows: Mapping[str, np.ndarray], ids: list[list[str]]
    ) -> None:
        """Write the leaves of the batch, [rows, ...]; loss and grad_norm/PART; and of each sample sample_ids,
        sample_rows (row of the file) and sample_segments (1, 2, ...)."""
        places = [(r, s, name) for r, row in enumerate(ids) for s, name in enumerate(row, start=1)]
        temporary = path.with_name(f".{path.name}.part.npz")
        leaves: dict[str, Any] = {
            **rows,
            **{name: np.float32(v) for name, v in values.items() if name == "loss" or "grad_norm" in name},
            "sample_ids": np.asarray([name for *_, name in places], np.str_),
            "sample_rows": np.asarray([r for r, *_ in places], np.int32),
            "sample_segments": np.asarray([s for _, s, _ in places], np.int32),
        }
        np.savez_compressed(temporary, **leaves)  # fmt: skip
        temporary.replace(path)
