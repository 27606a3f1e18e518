"""Which samples an epoch is made of: sources with weights, caps per task, task filters and a budget.

The steps, in this order:

    include, exclude    task globs; a task stays if it matches an include (or there is none) and no exclude
    cap                 at most so many samples of each task, drawn by seed, the same in every epoch
    weight              w gives floor(w) copies of everything and a share w - floor(w) drawn anew each epoch
    budget              so many samples over all sources, drawn by seed, the same in every epoch

Everything is a pure function of (seed, epoch). Order and rows are the business of vflax.data.packing.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence

import numpy as np

from vflax.data.packing import permutation
from vflax.errors import UserError

# The first word of each key: draws of different kinds must not be correlated (vflax.data.packing has 1).
_CAP, _WEIGHT, _BUDGET = 2, 3, 4


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One entry of data.sources.

    Attributes:
        path: a directory that data_pipeline.convert wrote.
        split: its split.
        weight: how often an epoch holds each sample; 1.5 is once, and half of the samples twice.
        cap: at most so many samples of each task; None for all.
        include: task names or globs; empty for every task.
        exclude: task names or globs.
    """

    path: str
    split: str = "train"
    weight: float = 1.0
    cap: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class Mixture:
    """The samples of each epoch, as numbers: sample i of source k has the number offsets[k] + i.

    Args:
        specs: data.sources.
        tasks: for each source the task of each of its samples.
        kept: for each source bool [n], False for samples that must not be trained on (lengths.measure).
        budget: samples per epoch over all sources; None for all.
        seed: of every draw.

    Raises:
        UserError: a glob that matches no task, a weight or cap that is not positive, a budget that is larger
            than what there is, or a source of which nothing is left.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        tasks: Sequence[Sequence[str]],
        kept: Sequence[np.ndarray],
        *,
        budget: int | None,
        seed: int,
    ) -> None:
        self._specs, self._seed = list(specs), seed
        self.offsets = np.concatenate([[0], np.cumsum([len(names) for names in tasks])]).astype(np.int64)
        self._pools = [
            self._pool(k, spec, np.asarray(names, dtype=object), mask)
            for k, (spec, names, mask) in enumerate(zip(specs, tasks, kept, strict=True))
        ]
        self._fixed: np.ndarray | None = None
        if budget is not None:
            self._fixed = self._thin(self._weighted(0), budget)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def epoch(self, epoch: int) -> np.ndarray:
        """int32 [m]: the samples of an epoch, source after source; m is the same for every epoch."""
        return self._fixed if self._fixed is not None else self._weighted(epoch)

    @property
    def pool(self) -> np.ndarray:
        """int32 [m]: every sample that some epoch may hold."""
        return self._fixed if self._fixed is not None else np.concatenate(self._pools)

    def locate(self, number: int) -> tuple[int, int]:
        """(source, index within that source) of a sample number."""
        source = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return source, number - int(self.offsets[source])

    def _pool(self, k: int, spec: SourceSpec, tasks: np.ndarray, kept: np.ndarray) -> np.ndarray:
        _check_numbers(spec)
        chosen = kept & select(spec, tasks)
        if spec.cap is not None:
            draw = permutation(len(tasks), _CAP, self._seed, k)
            chosen = first_per_task(tasks, chosen, draw, spec.cap)
        indices = np.flatnonzero(chosen)
        if not len(indices):
            raise UserError(
                f"data.sources: of the {len(tasks)} samples of {spec.path} (split {spec.split}) none is left "
                f"after include={list(spec.include)}, exclude={list(spec.exclude)} and the preflight"
            )
        return (indices + self.offsets[k]).astype(np.int32)

    def _weighted(self, epoch: int) -> np.ndarray:
        parts = []
        for k, (spec, pool) in enumerate(zip(self._specs, self._pools, strict=True)):
            whole = int(spec.weight)
            extra = round((spec.weight - whole) * len(pool))
            drawn = permutation(len(pool), _WEIGHT, self._seed, k, epoch)[:extra]
            parts += [pool] * whole + [pool[np.sort(drawn)]]
        return np.concatenate(parts)

    def _thin(self, samples: np.ndarray, budget: int) -> np.ndarray:
        if not 1 <= budget <= len(samples):
            raise UserError(
                f"data.budget={budget}: the sources give {len(samples)} samples per epoch; "
                "expected a number from 1 to that, or 0 for all"
            )
        return samples[np.sort(permutation(len(samples), _BUDGET, self._seed)[:budget])]


def _check_numbers(spec: SourceSpec) -> None:
    if not spec.weight > 0:
        raise UserError(f"data.sources: weight={spec.weight} of {spec.path}: expected a number above 0")
    if spec.cap is not None and spec.cap < 1:
        raise UserError(f"data.sources: cap={spec.cap} of {spec.path}: expected at least 1, or 0 for no cap")


def select(spec: SourceSpec, tasks: np.ndarray, *, strict: bool = True) -> np.ndarray:
    """bool [n]: which samples the task filters let through.

    Args:
        spec: has the filters.
        tasks: the task of each sample, [n].
        strict: refuse a filter that matches no task; a held-out split need not hold every task.

    Raises:
        UserError: see strict; the message gives the nearest names.
    """
    names, inverse = np.unique(tasks.astype(str), return_inverse=True)
    known = [str(name) for name in names]
    problems: list[str] = []

    def of(patterns: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            # A name is taken literally first: task names may hold brackets, which mean something in a glob.
            hits = [pattern] if pattern in known else [n for n in known if fnmatch.fnmatchcase(n, pattern)]
            if not hits:
                near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
                problems.append(f"{pattern!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
            found.update(hits)
        return found

    included = of(spec.include) if spec.include else set(known)
    excluded = of(spec.exclude)
    if problems and strict:
        raise UserError(
            f"data.sources: include and exclude name tasks that {spec.path} (split {spec.split}) "
            f"does not hold: {'; '.join(problems)}"
        )
    keep = np.array([name in included and name not in excluded for name in known])
    return keep[inverse]


def first_per_task(tasks: np.ndarray, chosen: np.ndarray, draw: np.ndarray, cap: int) -> np.ndarray:
    """bool [n]: of the chosen samples of each task the first `cap` in the order `draw`."""
    result = np.zeros(len(tasks), bool)
    counts: dict[str, int] = {}
    for i in draw.tolist():
        if chosen[i] and counts.get(tasks[i], 0) < cap:
            counts[tasks[i]] = counts.get(tasks[i], 0) + 1
            result[i] = True
    return result
