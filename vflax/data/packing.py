"""Which samples share a row, and which rows make a step.

A step takes the next `samples` samples of the epoch's order, longest first, each into the first of R rows
that has room for its tokens and its images; what finds no room goes to the front of the next step. R is fixed
for the run: the smallest number of rows that keeps up with `samples` per step. So a step means what the
papers mean by a batch, and the plan knows nothing of devices, hosts or threads:

    order of epoch e    |  s7  s2  s9  s4  s1  s8 ...                      samples = 6, slots = 2
    step 0, row 0       |  s9 s9 s9 s9 s9 s4 s4 s4 .
            row 1       |  s7 s7 s7 s7 s2 s2 s2 . .
            row 2       |  s1 s1 s1 s1 s8 s8 . . .
    step 1, row 0       |  ...

First fit in decreasing order uses at most 11/9 of the optimal number of rows, plus 6/9 (Dosa, 2007).
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from vflax.errors import UserError

# Part of the data fingerprint: raise it whenever the same lengths and seed would give other rows.
PLAN_VERSION = 1
# By this share an epoch may have more than ceil(n / samples) steps, and a step on average fewer samples.
TOLERANCE = 0.02
# The search for R looks at this many steps of a long epoch, then checks the result on all of it.
_TRIAL_STEPS = 64
_TRIAL_EPOCHS = 4
_CACHED_EPOCHS = 3
_ORDER = 1  # the first word of the key of a permutation; vflax.data.mixture has others


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) drawn from `key`, non-negative whole numbers.

    From the raw 64-bit stream of PCG64: that one is fixed by definition, whereas NumPy reserves the right to
    change Generator.permutation from version to version, which would break resuming.

    Returns:
        int64 [n].
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")


@dataclasses.dataclass(frozen=True)
class PlanStats:
    """What epoch 0 looks like."""

    samples: int  # in the epoch, repeats counted
    steps: int
    samples_per_step: float  # mean over the steps before the last one, which takes what is left
    images_per_step: float  # mean over all steps
    tokens_per_step: float  # mean over all steps, padding not counted
    fill: float  # used tokens over row capacity, all steps
    slot_fill: float  # used image slots over all


@dataclasses.dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # int32 [samples], row after row
    starts: np.ndarray  # int64 [steps * rows + 1], where each row begins in `order`
    steps: int


class PackPlan:
    """The rows of every step: a pure function of (lengths, seed, step).

    Args:
        tokens: int [n], tokens of each sample, its image tokens included.
        images: int [n], images of each sample.
        samples: samples per step, what the papers call the batch size.
        max_length: tokens per row.
        slots: images per row.
        packing: False gives each sample a row of its own, as LLaVA does.
        seed: of the permutations.
        order: "shuffle" or "sequential".
        epoch_samples: epoch -> int [m], the samples of that epoch before shuffling, repeats allowed
            (vflax.data.mixture); by default each of the n samples once.
        pool: int [m], every sample that some epoch may hold; by default those of epoch 0.

    Raises:
        UserError: a sample has more images than a row has slots, or samples < 1.
        ValueError: a sample is longer than a row (lengths.measure drops or truncates those).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        images: np.ndarray,
        *,
        samples: int,
        max_length: int,
        slots: int,
        packing: bool,
        seed: int,
        order: str = "shuffle",
        epoch_samples: Callable[[int], np.ndarray] | None = None,
        pool: np.ndarray | None = None,
    ) -> None:
        if samples < 1:
            raise UserError(f"batch.samples={samples}: expected at least 1 sample per step")
        if order not in ("shuffle", "sequential"):
            raise UserError(f"data.order={order!r}: expected 'shuffle' or 'sequential'")
        self.samples, self.max_length, self.slots, self.packing = samples, max_length, slots, packing
        self.seed, self.order = seed, order
        self._tokens = np.asarray(tokens, np.int32)
        self._images = np.asarray(images, np.int32)
        self._epoch_samples = epoch_samples
        self._lock = threading.RLock()
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._first_steps = [0]  # [e]: the global step at which epoch e begins
        if len(self._chosen(0)) == 0:
            raise UserError("data.sources: not one sample is left to train on")
        self._check(self._chosen(0) if pool is None else pool)
        # Plain lists: the packing loop reads single elements, which NumPy does slowly.
        self._token_list: list[int] = self._tokens.tolist()
        self._image_list: list[int] = self._images.tolist()
        self.rows_per_step = self._find_rows() if packing else samples

    def _check(self, used: np.ndarray) -> None:
        long = used[self._tokens[used] > self.max_length]
        if len(long):
            raise ValueError(
                f"sample number {long[0]} has {self._tokens[long[0]]} tokens, a row has {self.max_length}: "
                "lengths.measure truncates or drops such samples before a plan is made"
            )
        crowded = np.unique(used[self._images[used] > self.slots])
        if len(crowded):
            most = int(self._images[crowded].max())
            raise UserError(
                f"data.slots={self.slots}, but {len(crowded)} samples have more images than that, "
                f"up to {most}. Set data.slots={most}, or leave those samples out."
            )

    def __getstate__(self) -> dict[str, object]:
        """For pickling: the plans of epochs are made again, a lock cannot travel."""
        return {**self.__dict__, "_epochs": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    # -- what the loader asks ---------------------------------------------------------------------------

    def length(self, sample: int) -> tuple[int, int]:
        """(tokens, images) of a sample as planned."""
        return self._token_list[sample], self._image_list[sample]

    def steps_per_epoch(self, epoch: int) -> int:
        """Steps of this epoch; the last one is partial."""
        return self._epoch(epoch).steps

    def total_steps(self, *, epochs: int | None = None, steps: int | None = None) -> int:
        """Steps of a run of so many epochs, or simply `steps`; one of the two is given."""
        if (epochs is None) == (steps is None):
            raise UserError("train for config.epochs or for config.steps: exactly one of them is set")
        if steps is not None:
            return steps
        assert epochs is not None
        return sum(self.steps_per_epoch(epoch) for epoch in range(epochs))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within that epoch) of a global step."""
        if step < 0:
            raise IndexError(f"step {step}")
        with self._lock:
            while self._first_steps[-1] <= step:
                epoch = len(self._first_steps) - 1
                self._first_steps.append(self._first_steps[-1] + self._epoch(epoch).steps)
            epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            return epoch, step - self._first_steps[epoch]

    def samples_before(self, step: int) -> int:
        """How many samples the steps before this one took, repeats counted."""
        epoch, local = self.locate(step)
        earlier = epoch * len(self._chosen(0))  # every epoch is equally long
        return earlier + int(self._epoch(epoch).starts[local * self.rows_per_step])

    def max_per_row(self, values: np.ndarray, total_steps: int) -> int:
        """The largest sum over the samples of one row, of values int [n], in the first `total_steps` steps."""
        last_epoch, _ = self.locate(total_steps - 1)
        largest = 0
        for epoch in range(last_epoch + 1):
            plan = self._epoch(epoch)
            sums = np.concatenate([[0], np.cumsum(values[plan.order], dtype=np.int64)])[plan.starts]
            largest = max(largest, int(np.diff(sums).max()))
        return largest

    def row(self, step: int, row: int) -> list[int]:
        """The samples of one row of a step, in their order; empty where the step needs fewer rows."""
        if not 0 <= row < self.rows_per_step:
            raise IndexError(f"row {row} of {self.rows_per_step}")
        epoch, local = self.locate(step)
        plan = self._epoch(epoch)
        start, end = plan.starts[local * self.rows_per_step + row :][:2]
        return plan.order[start:end].tolist()

    def step(self, step: int) -> list[list[int]]:
        """The rows of a global step: rows_per_step lists of sample numbers, some may be empty."""
        return [self.row(step, row) for row in range(self.rows_per_step)]

    def stats(self) -> PlanStats:
        """Fill and means of epoch 0."""
        plan = self._epoch(0)
        used_tokens = int(self._tokens[plan.order].sum())
        used_images = int(self._images[plan.order].sum())
        rows = plan.steps * self.rows_per_step
        last = len(plan.order) - int(plan.starts[(plan.steps - 1) * self.rows_per_step])
        whole_steps = plan.steps - 1
        return PlanStats(
            samples=len(plan.order),
            steps=plan.steps,
            samples_per_step=(len(plan.order) - last) / whole_steps if whole_steps else float(last),
            images_per_step=used_images / plan.steps,
            tokens_per_step=used_tokens / plan.steps,
            fill=used_tokens / (rows * self.max_length),
            slot_fill=used_images / (rows * self.slots) if self.slots else 0.0,
        )

    # -- packing ----------------------------------------------------------------------------------------

    def _chosen(self, epoch: int) -> np.ndarray:
        if self._epoch_samples is None:
            return np.arange(len(self._tokens), dtype=np.int32)
        return self._epoch_samples(epoch)

    def _order(self, epoch: int) -> np.ndarray:
        """int [m]: the samples of an epoch in the order in which the steps take them."""
        chosen = self._chosen(epoch)
        if self.order == "sequential":
            return chosen
        return chosen[permutation(len(chosen), _ORDER, self.seed, epoch)]

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch in self._epochs:
                self._epochs.move_to_end(epoch)
                return self._epochs[epoch]
            packed = self._pack(self._order(epoch).tolist(), self.rows_per_step)
            self._epochs[epoch] = _flatten(packed, self.rows_per_step)
            while len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _pack(self, order: Sequence[int], rows: int, max_steps: int | None = None) -> list[list[list[int]]]:
        """Steps of rows of samples; at most `max_steps` steps when that is given."""
        steps: list[list[list[int]]] = []
        carried: list[int] = []
        taken = 0
        while (carried or taken < len(order)) and len(steps) != max_steps:
            count = self.samples - len(carried)
            window = carried + list(order[taken : taken + count])
            taken += count
            if self.packing:
                contents, carried = self._first_fit(window, rows)
            else:
                contents = [[sample] for sample in window] + [[] for _ in range(rows - len(window))]
            steps.append(contents)
        return steps

    def _first_fit(self, window: list[int], rows: int) -> tuple[list[list[int]], list[int]]:
        """First fit in decreasing order; (rows of samples, samples that found no room)."""
        tokens, images = self._token_list, self._image_list
        window = sorted(window, key=tokens.__getitem__, reverse=True)
        shortest = tokens[window[-1]]
        fewest = min(images[sample] for sample in window)
        room, free = [self.max_length] * rows, [self.slots] * rows
        contents: list[list[int]] = [[] for _ in range(rows)]
        rest: list[int] = []
        first = 0  # no sample of this window fits into a row before this one
        for sample in window:
            need, count = tokens[sample], images[sample]
            for row in range(first, rows):
                if room[row] >= need and free[row] >= count:
                    room[row] -= need
                    free[row] -= count
                    contents[row].append(sample)
                    break
            else:
                rest.append(sample)
            while first < rows and (room[first] < shortest or free[first] < fewest):
                first += 1
        return contents, rest

    def _find_rows(self) -> int:
        """The smallest R that keeps up with `samples` per step, judged by packing."""
        orders = [self._order(0).tolist()]
        trial = orders[0][: _TRIAL_STEPS * self.samples]
        if len(trial) == len(orders[0]):  # short epochs are cheap: look at several, they differ more
            orders = [self._order(epoch).tolist() for epoch in range(_TRIAL_EPOCHS)]
            trials = orders
        else:
            trials = [trial]
        low, high = 1, self.samples  # with a row for each sample everything fits
        while low < high:
            middle = (low + high) // 2
            if all(self._keeps_up(order, middle) for order in trials):
                high = middle
            else:
                low = middle + 1
        while not all(self._keeps_up(order, low) for order in orders):
            low += 1
        return low

    def _keeps_up(self, order: Sequence[int], rows: int) -> bool:
        ideal = math.ceil(len(order) / self.samples)
        allowed = math.floor(ideal * (1 + TOLERANCE))
        capacity = allowed * rows
        if sum(map(self._token_list.__getitem__, order)) > capacity * self.max_length:
            return False
        steps = self._pack(order, rows, max_steps=allowed)
        counts = [sum(map(len, step)) for step in steps]
        if sum(counts) < len(order):
            return False
        whole = counts[:-1]
        return not whole or sum(whole) >= (1 - TOLERANCE) * self.samples * len(whole)


def _flatten(steps: list[list[list[int]]], rows: int) -> _Epoch:
    lengths = np.fromiter((len(row) for step in steps for row in step), np.int64, len(steps) * rows)
    order = np.fromiter((s for step in steps for row in step for s in row), np.int32, int(lengths.sum()))
    return _Epoch(order, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), len(steps))
