"""Which samples an epoch is made of: sources with weights or counts, task filters, caps and a budget.

The steps, in this order:

    include, exclude    task globs; a task stays if it matches an include (or there is none) and no exclude
    tasks               so many of the tasks that are left, drawn by seed: the tasks of 10 are among those of 20
    cap                 at most so many samples of each task of a source, drawn by seed, the same in every epoch
    weight              w gives floor(w) copies of everything and a share w - floor(w) drawn anew each epoch
    count               or: so many samples of a source, drawn by seed, the same in every epoch; whole copies of
                        everything first where it has fewer
    budget              so many samples over all sources, drawn by seed, the same in every epoch: each sample as
                        likely as the next (spread="samples"), or as evenly over the tasks as their sizes
                        allow (spread="tasks"; Vision-Flan's Table 3, 10 tasks x 10,000 against 187 x 500)
    order               "mixed": the sources are one; "sequence": one source after the other

Everything is a pure function of (seed, epoch). Order and rows are the business of vflax.data.packing.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Sequence
from itertools import compress

import numpy as np

from vflax.data.draw import Draw, permutation
from vflax.errors import UserError

ORDERS = ("mixed", "sequence")
SPREADS = ("samples", "tasks")


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One entry of data.sources.

    Attributes:
        path: a directory that data_pipeline.convert wrote.
        split: its split.
        weight: how often an epoch holds each sample; 1.5 is once, and half of the samples twice.
        count: so many samples in place of a weight; None for what the weight gives.
        cap: at most so many samples of each task; None for all.
        include: task names or globs; empty for every task.
        exclude: task names or globs.
        strict: refuse an include or exclude that matches no task.
    """

    path: str
    split: str = "train"
    weight: float = 1.0
    cap: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    count: int | None = None
    strict: bool = True


@dataclasses.dataclass(frozen=True)
class MixtureRules:
    """What holds for all sources together.

    Attributes:
        tasks: so many tasks; None for all.
        budget: samples per epoch; None for what the sources give.
        spread: "samples" or "tasks", how a budget is spread.
        order: "mixed" or "sequence".
    """

    tasks: int | None = None
    budget: int | None = None
    spread: str = "samples"
    order: str = "mixed"

    def __post_init__(self) -> None:
        if self.spread not in SPREADS:
            raise UserError(f"data.spread={self.spread!r}: expected one of {', '.join(SPREADS)}")
        if self.order not in ORDERS:
            raise UserError(f"data.order={self.order!r}: expected one of {', '.join(ORDERS)}")
        if self.spread == "tasks" and self.budget is None:
            raise UserError('data.spread="tasks" spreads a budget: give data.budget too')


@dataclasses.dataclass(frozen=True)
class TaskCount:
    """One task of one source.

    Attributes:
        source: index into data.sources.
        task: its name.
        available: samples in the source.
        usable: of them those that the preflight keeps.
        asked: samples per epoch by the config. With a budget that is its share of the budget: with spread="samples" by
            what it has of all that can be used, with spread="tasks" as much as each other task's; without one, what cap
            and weight or count would give had the task enough.
        samples: samples in epoch 0, repeats counted.
        short: whether these are fewer than asked for because the task's usable samples run out, and not by chance of a
            draw.
    """

    source: int
    task: str
    available: int
    usable: int
    asked: float
    samples: int
    short: bool


class Mixture:
    """The samples of each epoch, as numbers: sample i of source k has the number offsets[k] + i.

    Args:
        specs: data.sources.
        tasks: for each source the task of each of its samples.
        kept: for each source bool [n], False for samples that must not be trained on (lengths.measure).
        rules: what holds for all sources together.
        seed: of every draw.

    Raises:
        UserError: a glob that matches no task, a number that makes no sense, more tasks or a larger budget than
            there are, or a source of which nothing is left.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        tasks: Sequence[Sequence[str]],
        kept: Sequence[np.ndarray],
        *,
        rules: MixtureRules | None = None,
        seed: int,
    ) -> None:
        self._specs, self._seed, self._rules = list(specs), seed, rules or MixtureRules()
        self.offsets = np.concatenate([[0], np.cumsum([len(names) for names in tasks])]).astype(np.int64)
        self._names, self._codes = task_codes(tasks)
        self._kept = [np.asarray(mask, bool) for mask in kept]
        for spec in specs:
            check_numbers(spec)
        selected = [
            _matching(spec, self._names, np.unique(codes), strict=spec.strict)[codes]
            for spec, codes in zip(specs, self._codes, strict=True)
        ]
        self._chosen_tasks, self._asked_tasks = self._draw_tasks(selected)
        self._pools = [self._pool(k, mask) for k, mask in enumerate(selected)]
        budget = self._rules.budget
        self._fixed = None if budget is None else self._thin(self._weighted(0), budget)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The samples of an epoch, int32 [m] in groups to be taken one after another: one group, or one for each source
        where order is "sequence". How many groups there are and how large each is, is the same for every epoch."""
        samples = self._fixed if self._fixed is not None else self._weighted(epoch)
        if self._rules.order == "mixed":
            return [samples]
        borders = np.searchsorted(samples, self.offsets[1:-1])  # ascending from source to source
        return [group for group in np.split(samples, borders) if len(group)]

    @property
    def pool(self) -> np.ndarray:
        """int32 [m]: every sample that some epoch may hold."""
        return self._fixed if self._fixed is not None else np.concatenate(self._pools)

    @property
    def drawn_tasks(self) -> frozenset[str] | None:
        """The tasks that rules.tasks has drawn; None where it is not set."""
        if self._rules.tasks is None:
            return None
        return frozenset(name for name, chosen in zip(self._names, self._chosen_tasks, strict=True) if chosen)

    def locate(self, number: int) -> tuple[int, int]:
        """(source, index within that source) of a sample number."""
        source = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return source, number - int(self.offsets[source])

    def counts(self) -> list[TaskCount]:
        """What was asked for and what an epoch holds, for each task that is not filtered out."""
        given = self._by_task(self._weighted(0))
        asked, scarce = self._asked(given)
        samples = self._by_task(np.concatenate(self.epoch(0)))
        rows = []
        for k, codes in enumerate(self._codes):
            available = np.bincount(codes, minlength=len(self._names))
            usable = np.bincount(codes[self._kept[k]], minlength=len(self._names))
            shown = np.flatnonzero((available > 0) & self._asked_tasks[k])
            rows += [
                TaskCount(
                    k,
                    self._names[t],
                    int(available[t]),
                    int(usable[t]),
                    float(asked[k, t]),
                    int(samples[k, t]),
                    bool(scarce[k, t] and samples[k, t] < math.floor(asked[k, t])),
                )
                for t in sorted(shown.tolist(), key=self._names.__getitem__)
            ]
        return rows

    # -- the steps, in their order ----------------------------------------------------------------------

    def _draw_tasks(self, selected: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """bool [tasks]: those that stay; and for each source which of them it was asked for."""
        count = len(self._names)
        there = [
            np.bincount(codes[mask], minlength=count) > 0
            for codes, mask in zip(self._codes, selected, strict=True)
        ]
        chosen, wanted = np.ones(count, bool), self._rules.tasks
        if wanted is not None:
            usable = np.zeros(count, bool)
            for codes, mask, kept in zip(self._codes, selected, self._kept, strict=True):
                usable |= np.bincount(codes[mask & kept], minlength=count) > 0
            _check_tasks(wanted, int(usable.sum()))
            names = sorted(np.flatnonzero(usable).tolist(), key=self._names.__getitem__)
            chosen = np.zeros(count, bool)
            chosen[np.asarray(names)[permutation(len(names), Draw.TASKS, self._seed)[:wanted]]] = True
        return chosen, [mask & chosen for mask in there]

    def _pool(self, k: int, selected: np.ndarray) -> np.ndarray:
        spec, codes = self._specs[k], self._codes[k]
        chosen = self._kept[k] & selected & self._chosen_tasks[codes]
        if spec.cap is not None:
            chosen = _first_of_each(
                codes,
                chosen,
                permutation(len(codes), Draw.CAP, self._seed, k),
                np.full(len(self._names), spec.cap),
            )
        indices = np.flatnonzero(chosen)
        if not len(indices):
            drawn = "" if self._rules.tasks is None else f", data.tasks={self._rules.tasks}"
            raise UserError(
                f"data.sources: of the {len(codes)} samples of {spec.path} (split {spec.split}) none is left "
                f"after include={list(spec.include)}, exclude={list(spec.exclude)}{drawn} and the preflight"
            )
        return (indices + self.offsets[k]).astype(np.int32)

    def _weighted(self, epoch: int) -> np.ndarray:
        """The samples that weights and counts give, ascending within a copy and from source to source."""
        parts = []
        key: tuple[int, ...]
        for k, (spec, pool) in enumerate(zip(self._specs, self._pools, strict=True)):
            if spec.count is None:
                whole = int(spec.weight)
                extra, key = round((spec.weight - whole) * len(pool)), (Draw.WEIGHT, self._seed, k, epoch)
            else:
                whole, extra = divmod(spec.count, len(pool))
                key = (Draw.COUNT, self._seed, k)
            drawn = permutation(len(pool), *key)[:extra] if extra else np.zeros(0, int)
            parts.append(np.sort(np.concatenate([*[pool] * whole, pool[drawn]])))
        return np.concatenate(parts)

    def _thin(self, samples: np.ndarray, budget: int) -> np.ndarray:
        if not 1 <= budget <= len(samples):
            raise UserError(
                f"data.budget={budget}: the sources give {len(samples)} samples per epoch; "
                "expected a number from 1 to that, or 0 for all"
            )
        draw = permutation(len(samples), Draw.BUDGET, self._seed)
        if self._rules.spread == "samples":
            return samples[np.sort(draw[:budget])]
        codes = np.concatenate(self._codes)[samples]
        quotas = _even_quotas(np.bincount(codes, minlength=len(self._names)), budget)
        return samples[_first_of_each(codes, np.ones(len(samples), bool), draw, quotas)]

    # -- counting ---------------------------------------------------------------------------------------

    def _by_task(self, samples: np.ndarray) -> np.ndarray:
        """int [sources, tasks]: how many of the samples are of each."""
        sources = np.searchsorted(self.offsets, samples, side="right") - 1
        codes = np.concatenate(self._codes)[samples]
        shape = (len(self._specs), len(self._names))
        return np.bincount(sources * shape[1] + codes, minlength=shape[0] * shape[1]).reshape(shape)

    def _asked(self, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the config asks for, see TaskCount, and which tasks cannot give it.

        Args:
            given: int [sources, tasks], what weights and counts give, before a budget.

        Returns:
            float [sources, tasks] and bool [sources, tasks].
        """
        budget, tasks = self._rules.budget, len(self._names)
        if budget is not None and self._rules.spread == "samples":
            return budget * given / given.sum(), np.zeros(given.shape, bool)
        if budget is not None:
            each = given.sum(axis=0)
            quota = budget / np.count_nonzero(each)
            return quota * given / np.maximum(each, 1), np.broadcast_to(each < quota, given.shape)
        asked, scarce = np.zeros(given.shape), np.zeros(given.shape, bool)
        for k, (spec, codes) in enumerate(zip(self._specs, self._codes, strict=True)):
            wanted = np.bincount(codes, minlength=tasks) * self._asked_tasks[k]
            if spec.cap is not None:
                wanted = np.where(wanted > 0, spec.cap, 0)
            scale = spec.weight if spec.count is None else spec.count / wanted.sum()
            asked[k] = scale * wanted
            scarce[k] = np.bincount(codes[self._pools[k] - self.offsets[k]], minlength=tasks) < wanted
        return asked, scarce


def check_mixture(specs: Sequence[SourceSpec], tasks: Sequence[Sequence[str]], rules: MixtureRules) -> None:
    """Refuse, before anything is measured, what no seed and no number of usable samples would make good.

    Args:
        specs, tasks, rules: see Mixture.

    Raises:
        UserError: as Mixture does; one that passes may still be refused when samples turn out to be unusable.
    """
    everything = [np.ones(len(names), bool) for names in tasks]
    if rules.tasks is not None:
        chosen = zip(specs, tasks, strict=True)
        left = {name for spec, names in chosen for name in compress(names, select(spec, names))}
        _check_tasks(rules.tasks, len(left))
    # Whether a draw of tasks leaves something of each source depends on the seed.
    Mixture(specs, tasks, everything, rules=dataclasses.replace(rules, tasks=None), seed=0)


def _check_tasks(wanted: int, there: int) -> None:
    if not 1 <= wanted <= there:
        raise UserError(
            f"data.tasks={wanted}: the sources hold {there} tasks after include and exclude; expected a number from 1 "
            "to that, or 0 for all"
        )


def check_numbers(spec: SourceSpec) -> None:
    """Refuse a weight, cap or count that makes no sense.

    Raises:
        UserError: naming it.
    """
    if not spec.weight > 0:
        raise UserError(f"data.sources: weight={spec.weight} of {spec.path}: expected a number above 0")
    for key, value in (("cap", spec.cap), ("count", spec.count)):
        if value is not None and value < 1:
            raise UserError(
                f"data.sources: {key}={value} of {spec.path}: expected at least 1, or 0 for no {key}"
            )
    if spec.count is not None and spec.weight != 1.0:
        raise UserError(
            f"data.sources: weight={spec.weight} and count={spec.count} of {spec.path}: give one of the two, a "
            "number of samples or how often each comes"
        )


def task_codes(tasks: Sequence[Sequence[str]]) -> tuple[list[str], list[np.ndarray]]:
    """The names of all tasks, and for each source int32 [n], which of them its samples have."""
    numbers: dict[str, int] = {}
    codes = [
        np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int32, len(names))
        for names in tasks
    ]
    return list(numbers), codes


def select(
    spec: SourceSpec, tasks: Sequence[str], *, strict: bool = True, key: str = "data.sources"
) -> np.ndarray:
    """bool [n]: which samples the task filters let through.

    Args:
        spec: has the filters.
        tasks: the task of each of n samples.
        strict: refuse a filter that matches no task, if the source is strict; a held-out split need not hold every one.
        key: that of the config which holds the filters, for messages.

    Raises:
        UserError: see strict; the message gives the nearest names.
    """
    names, [codes] = task_codes([tasks])
    return _matching(spec, names, np.arange(len(names)), strict=strict and spec.strict, key=key)[codes]


def _matching(
    spec: SourceSpec, names: Sequence[str], held: np.ndarray, *, strict: bool, key: str = "data.sources"
) -> np.ndarray:
    """bool [names]: those that the filters let through, of the ones that the source holds."""
    known = sorted(names[code] for code in held)
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
            f"{key}: include and exclude name tasks that {spec.path} (split {spec.split}) "
            f"does not hold: {'; '.join(problems)}. Correct them, or let them pass with its strict=False"
        )
    return np.array([name in included and name not in excluded for name in names], bool)


def first_per_task(tasks: Sequence[str], chosen: np.ndarray, draw: np.ndarray, cap: int) -> np.ndarray:
    """bool [n]: of the chosen samples of each task the first `cap` in the order `draw`."""
    names, [codes] = task_codes([tasks])
    return _first_of_each(codes, chosen, draw, np.full(len(names), cap))


def _first_of_each(codes: np.ndarray, chosen: np.ndarray, draw: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """bool [n]: of the chosen samples with code c the first caps[c] in the order `draw`."""
    drawn = draw[chosen[draw]]
    grouped = drawn[np.argsort(codes[drawn], kind="stable")]  # code after code, each in the order of the draw
    sizes = np.bincount(codes[grouped], minlength=len(caps))
    rank = np.arange(len(grouped)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    result = np.zeros(len(codes), bool)
    result[grouped[rank < caps[codes[grouped]]]] = True
    return result


def _even_quotas(sizes: np.ndarray, budget: int) -> np.ndarray:
    """int [tasks]: how much of a budget each task gets: all alike, but what a small task lacks goes to the others."""
    quotas = np.zeros(len(sizes), np.int64)
    order = np.argsort(sizes, kind="stable")
    order = order[sizes[order] > 0]
    left = budget
    for i, task in enumerate(order):
        quotas[task] = min(int(sizes[task]), left // (len(order) - i))
        left -= quotas[task]
    return quotas
