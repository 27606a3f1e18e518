"""Which samples share a row, and which rows make a step.

The order of an epoch is taken in windows of K steps. A window takes new samples until K * R rows could hold no more,
fills rows with them (vflax.data.fill), keeps the fullest K * R and leaves the samples of the others to the next
window. The rows are dealt to the steps so that each has as many samples, images and supervised tokens as the next
(vflax.data.deal). R is fixed for the run: the smallest number of rows that keeps up with `samples` per step. So a step
means what the papers mean by a batch, and the plan knows nothing of devices, hosts or threads:

    order of epoch e    s7 s2 s9 s4 s1 s8 s3 s6 s5 ...                       samples = 4, R = 2, K = 2
                        '------ window 0 -------'

    rows of window 0    s9 s9 s9 s9 s4 s4    step 0    (a row holds T tokens, S images, C supervised tokens)
                        s7 s7 s7 s2 s2 s2    step 1
                        s8 s8 s8 s1 s1 s1    step 1
                        s3 s3 s3 s6 s6 .     step 0
                        s5 s5 . . . .        to window 1, where its row is kept however empty it is

Where no R brings full rows near to `samples` (8 samples of which 2.9 fill a row), samples are dealt to the steps of a
window instead, `samples` to each, long and short ones evenly, and then the R rows of each step are filled.

At the end of an epoch every row is kept; its last step is partial. An epoch may consist of groups, one after the
other: no row holds samples of two groups, and the last rows of one share a step with the first of the next.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from vflax.data.deal import Rows, Steps, deal, no_rows
from vflax.data.draw import Draw, permutation
from vflax.data.fill import Capacity, fill_rows
from vflax.errors import UserError

# Part of the data fingerprint: raise it whenever the same lengths and seed would give other rows.
PLAN_VERSION = 2
# By this share an epoch may have more than ceil(n / samples) steps, and a step on average fewer or more samples.
TOLERANCE = 0.02
# A limit on supervised tokens may cost this share more rows.
SUPERVISED_COST = 0.005
# The loss gathers supervised positions into an array of static size; small changes shall not recompile it.
SUPERVISED_UNIT = 32
# T is advised in steps of so many tokens.
_LENGTH_UNIT = 32
# Samples of a window. A quarter of the epoch at most, so that samples meet others in each epoch.
_WINDOW = 8192
# Plans of epochs are kept up to so many samples in all, about 100 MB: those of all epochs of most runs.
_KEPT_SAMPLES = 1 << 24
# Short epochs are cheap to pack and differ more: R is judged by several.
_TRIAL_EPOCHS = 4


@dataclasses.dataclass(frozen=True)
class PlanStats:
    """What epoch 0 looks like."""

    samples: int  # in the epoch, repeats counted
    steps: int
    samples_per_step: float  # mean over the steps before the last one, which takes what is left
    images_per_step: float  # mean over all steps
    images_spread: float  # standard deviation over the steps before the last one
    tokens_per_step: float  # mean over all steps, padding not counted
    fill: float  # used tokens over row capacity, all steps
    slot_fill: float  # used image slots over all
    supervised_fill: float  # supervised tokens over their capacity


@dataclasses.dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # int32 [samples], row after row
    starts: np.ndarray  # int64 [steps * rows + 1], where each row begins in `order`
    steps: int


@dataclasses.dataclass(frozen=True)
class _Pace:
    """How a group is taken."""

    steps: int  # of a window
    most: float  # samples that a step may have
    aim: int  # samples of a row
    exact: bool  # whether samples, not rows, are dealt to the steps


class _Queue:
    """The samples of a group, some of which come back."""

    def __init__(self, order: np.ndarray) -> None:
        self._order, self._taken, self._back = order, 0, order[:0]

    def __len__(self) -> int:
        return len(self._back) + len(self._order) - self._taken

    def next(self, count: int) -> np.ndarray:
        """The next samples, at most `count`, those that came back before the others."""
        new = max(0, count - len(self._back))
        return np.concatenate([self._back[:count], self._order[self._taken : self._taken + new]])

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(the next samples, bool: which of them came back); they leave the queue."""
        samples = self.next(count)
        waited = np.arange(len(samples)) < len(self._back)
        self._taken += len(samples) - int(waited.sum())
        self._back = self._back[count:]
        return samples, waited

    def put_back(self, samples: np.ndarray) -> None:
        """Before all others."""
        self._back = np.concatenate([samples, self._back])


class PackPlan:
    """The rows of every step: a pure function of (lengths, seed, step).

    Args:
        tokens: int [n], tokens of each sample, its image tokens included.
        images: int [n], images of each sample.
        supervised: int [n], supervised tokens of each sample.
        samples: samples per step, what the papers call the batch size.
        max_length: T, tokens per row.
        slots: S, images per row.
        supervised_capacity: C, supervised tokens per row; 0 for the smallest multiple of SUPERVISED_UNIT that costs at
            most SUPERVISED_COST more rows than no limit and holds every sample.
        packing: False gives each sample a row of its own, as LLaVA does.
        seed: of the permutations.
        epoch_samples: epoch -> the groups of that epoch, int [m] each, taken one after another and each shuffled by
            itself, repeats allowed (vflax.data.mixture); by default one group, each of the n samples once.
        pool: int [m], every sample that some epoch may hold; by default those of epoch 0.

    Attributes:
        rows_per_step: R.
        capacity: T, S, C.

    Raises:
        UserError: a sample has more images than a row has slots or more supervised tokens than C, or samples < 1.
        ValueError: a sample is longer than a row (lengths.measure drops or truncates those).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        images: np.ndarray,
        supervised: np.ndarray,
        *,
        samples: int,
        max_length: int,
        slots: int,
        supervised_capacity: int = 0,
        packing: bool,
        seed: int,
        epoch_samples: Callable[[int], Sequence[np.ndarray]] | None = None,
        pool: np.ndarray | None = None,
    ) -> None:
        if samples < 1:
            raise UserError(f"batch.samples={samples}: expected at least 1 sample per step")
        self.samples, self.packing, self.seed = samples, packing, seed
        self._tokens, self._images, self._supervised = (
            np.asarray(values, np.int32) for values in (tokens, images, supervised)
        )
        self._epoch_samples = epoch_samples
        # Held while an epoch is planned, 20 s for 1.66 M samples. What is known is read without it, so that the threads
        # of the loader, and the report of a step, wait only for an epoch that they need.
        self._planning = threading.RLock()
        self._epochs: dict[int, _Epoch] = {}
        self._first_steps = [0]  # [e]: the global step at which epoch e begins; only ever appended to
        self._size = sum(map(len, self._groups(0)))
        if not self._size:
            raise UserError("data.sources: not one sample is left to train on")
        used = np.concatenate(self._groups(0)) if pool is None else pool
        self.capacity = Capacity(max_length, slots, max_length)
        self._check(used, supervised_capacity)
        self.capacity = Capacity(max_length, slots, supervised_capacity or self._enough_supervised(used))
        self._largest = int(self._tokens[used].max()), int(self._images[used].max())
        self.rows_per_step = self._find_rows() if packing else samples

    def _check(self, used: np.ndarray, supervised_capacity: int) -> None:
        long = used[self._tokens[used] > self.capacity.tokens]
        if len(long):
            raise ValueError(
                f"sample number {long[0]} has {self._tokens[long[0]]} tokens, a row has {self.capacity.tokens}: "
                "lengths.measure truncates or drops such samples before a plan is made"
            )
        crowded = np.unique(used[self._images[used] > self.capacity.images])
        if len(crowded):
            most = int(self._images[crowded].max())
            raise UserError(
                f"data.slots={self.capacity.images}, but {len(crowded)} samples have more images than that, "
                f"up to {most}. Set data.slots={most}, or leave those samples out."
            )
        wordy = np.unique(used[self._supervised[used] > supervised_capacity]) if supervised_capacity else ()
        if len(wordy):
            most = int(self._supervised[wordy].max())
            raise UserError(
                f"data.supervised={supervised_capacity}, but {len(wordy)} samples have more supervised tokens than "
                f"that, up to {most}. Set data.supervised={most}, or 0 to have it chosen."
            )

    # -- what the loader asks ---------------------------------------------------------------------------

    def length(self, sample: int) -> tuple[int, int]:
        """(tokens, images) of a sample as planned."""
        return int(self._tokens[sample]), int(self._images[sample])

    def steps_per_epoch(self, epoch: int) -> int:
        """Steps of this epoch; the last one is partial."""
        return self._begin(epoch + 1) - self._begin(epoch)

    def total_steps(self, *, epochs: int | None = None, steps: int | None = None) -> int:
        """Steps of a run of so many epochs, or simply `steps`; one of the two is given."""
        if (epochs is None) == (steps is None):
            raise UserError("train for config.epochs or for config.steps: exactly one of them is set")
        if steps is not None:
            return steps
        assert epochs is not None
        return self._begin(epochs)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within that epoch) of a global step."""
        if step < 0:
            raise IndexError(f"step {step}")
        if self._first_steps[-1] <= step:
            with self._planning:
                while self._first_steps[-1] <= step:
                    self._begin(len(self._first_steps))
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def samples_before(self, step: int) -> int:
        """How many samples the steps before this one took, repeats counted."""
        if step == 0:
            return 0
        # By the step before, so that the end of a run asks for no plan of an epoch that it never enters.
        epoch, local = self.locate(step - 1)
        earlier = epoch * self._size  # every epoch is equally long
        return earlier + int(self._epoch(epoch).starts[(local + 1) * self.rows_per_step])

    def row(self, step: int, row: int) -> list[int]:
        """The samples of one row of a step, in their order; empty where the step needs fewer rows."""
        if not 0 <= row < self.rows_per_step:
            raise IndexError(f"row {row} of {self.rows_per_step}")
        epoch, local = self.locate(step)
        plan = self._epoch(epoch)
        start, end = plan.starts[local * self.rows_per_step + row :][:2]
        return plan.order[start:end].tolist()

    def stats(self) -> PlanStats:
        """Fill and means of epoch 0."""
        plan = self._epoch(0)
        borders = plan.starts[:: self.rows_per_step]  # [steps + 1]
        images = np.diff(np.concatenate([[0], np.cumsum(self._images[plan.order], dtype=np.int64)])[borders])
        whole = slice(None, -1) if plan.steps > 1 else slice(None)
        used_tokens = int(self._tokens[plan.order].sum(dtype=np.int64))
        learned = int(self._supervised[plan.order].sum(dtype=np.int64))
        rows = plan.steps * self.rows_per_step
        return PlanStats(
            samples=len(plan.order),
            steps=plan.steps,
            samples_per_step=float(np.diff(borders)[whole].mean()),
            images_per_step=float(images.mean()),
            images_spread=float(images[whole].std()),
            tokens_per_step=used_tokens / plan.steps,
            fill=used_tokens / (rows * self.capacity.tokens),
            slot_fill=int(images.sum()) / (rows * self.capacity.images) if self.capacity.images else 0.0,
            supervised_fill=learned / (rows * self.capacity.supervised) if learned else 0.0,
        )

    def size_for(self, rows: int) -> tuple[int, int] | None:
        """(T, S) with which a step has so many rows or few less, judged by a trial; the shortest that cut no sample.

        None where there are none: the longest sample makes rows that are too long for so many of them.
        """
        trial = self._trial(self._epoch(0).order)
        tokens, images, supervised = (
            values[trial] for values in (self._tokens, self._images, self._supervised)
        )
        each = self.samples / rows  # samples of a row
        longest, most_images = self._largest
        slots = max(most_images, math.ceil(each * float(images.mean()) - 1e-6))

        def needed(length: int) -> float:
            capacity = Capacity(length, slots, length)
            aims = {max(1, math.floor(each)), math.ceil(each)}
            filled = [len(fill_rows(tokens, images, supervised, capacity, aim)) for aim in aims]
            return min(filled) * self.samples / len(trial)

        def enough(units: int) -> bool:
            length = longest + units * _LENGTH_UNIT
            # Rows of twice the mean length are half empty.
            too_long = length > longest + 2 * each * float(tokens.mean())
            return too_long or needed(length) <= (1 + TOLERANCE / 2) * rows

        length = longest + smallest(0, enough) * _LENGTH_UNIT
        return (length, slots) if 0.9 <= needed(length) / rows <= 1 + TOLERANCE / 2 else None

    # -- the order --------------------------------------------------------------------------------------

    def _groups(self, epoch: int) -> list[np.ndarray]:
        if self._epoch_samples is None:
            return [np.arange(len(self._tokens), dtype=np.int32)]
        return [group for group in self._epoch_samples(epoch) if len(group)]

    def _orders(self, epoch: int) -> list[np.ndarray]:
        """int [m] of each group: its samples in the order in which the windows take them."""
        return [
            group[permutation(len(group), Draw.ORDER, self.seed, epoch, *([k] if k else []))]
            for k, group in enumerate(self._groups(epoch))
        ]

    def _begin(self, epoch: int) -> int:
        """The global step at which an epoch begins; plans the epochs before it, each once."""
        if len(self._first_steps) <= epoch:
            with self._planning:
                while len(self._first_steps) <= epoch:
                    last = len(self._first_steps) - 1
                    self._first_steps.append(self._first_steps[-1] + self._epoch(last).steps)
        return self._first_steps[epoch]

    def _epoch(self, epoch: int) -> _Epoch:
        plan = self._epochs.get(epoch)
        if plan is None:
            with self._planning:
                plan = self._epochs.get(epoch)  # another thread may have planned it meanwhile
                if plan is None:
                    plan = self._pack(epoch, self.rows_per_step)
                    while self._epochs and (len(self._epochs) + 1) * self._size > _KEPT_SAMPLES:
                        del self._epochs[next(iter(self._epochs))]
                    self._epochs[epoch] = plan
        return plan

    # -- windows ----------------------------------------------------------------------------------------

    def _pack(self, epoch: int, rows: int) -> _Epoch:
        """All steps of an epoch, of so many rows each."""
        steps = Steps(rows, self.seed, epoch)
        for order in self._orders(epoch):
            pace = self._pace(order, rows)
            queue = _Queue(order)
            while len(queue):
                if steps.waiting.count >= self.samples:
                    steps.flush()
                if not pace.exact:
                    self._add_window(steps, queue, rows, pace.steps, pace)
                elif len(steps.waiting) or len(queue) < self.samples:
                    self._add_window(steps, queue, rows, 1, pace)
                else:
                    self._add_exact(steps, queue, rows, pace, epoch)
        samples, lengths = steps.finish()
        return _Epoch(samples, np.concatenate([[0], np.cumsum(lengths)]), len(lengths) // rows)

    def _add_window(self, steps: Steps, queue: _Queue, rows: int, count: int, pace: _Pace) -> None:
        """Fill the rows of `count` steps; at the end of the group those of as many as there are."""
        places = count * rows - len(steps.waiting)
        most = int(pace.most * count) - steps.waiting.count
        window, waited = queue.take(self._until_full(queue.next(most), places))
        kept, rest = self._fullest(window, waited, places if len(queue) else None, pace.aim)
        queue.put_back(rest)
        steps.add(kept)

    def _add_exact(self, steps: Steps, queue: _Queue, rows: int, pace: _Pace, epoch: int) -> None:
        """Deal samples to whole steps, the longest first, and fill the rows of each step."""
        count = min(pace.steps, len(queue) // self.samples)
        window, waited = queue.take(count * self.samples)
        longest = np.argsort(-self._tokens[window], kind="stable")
        window, waited = window[longest], waited[longest]
        loads = np.stack([self._tokens[window], self._images[window], self._supervised[window]], axis=1)
        left = []
        # The longest were dealt to the first steps first: in any order but that.
        order = permutation(count, Draw.STEPS_OF_SAMPLES, self.seed, epoch, len(queue))
        for part in deal(loads, count)[order]:
            kept, rest = self._fullest(window[part], waited[part], rows, pace.aim)
            steps.add(kept)
            left.append(rest)
        queue.put_back(np.concatenate(left))

    def _until_full(self, samples: np.ndarray, places: int) -> int:
        """How many of these samples make so many rows full; at least one."""
        full = np.zeros(len(samples), bool)
        for values, size in (
            (self._tokens, self.capacity.tokens),
            (self._images, self.capacity.images),
            (self._supervised, self.capacity.supervised),
        ):
            if size:
                full |= np.cumsum(values[samples], dtype=np.int64) >= places * size
        return int(np.argmax(full)) + 1 if full.any() else len(samples)

    def _fill(self, window: np.ndarray, aim: int, supervised: int = 0) -> list[list[int]]:
        """Rows of numbers from range(len(window)); at another C where one is given."""
        if not self.packing:
            return [[i] for i in range(len(window))]
        capacity = self.capacity
        if supervised:
            capacity = dataclasses.replace(capacity, supervised=supervised)
        return fill_rows(self._tokens[window], self._images[window], self._supervised[window], capacity, aim)

    def _fullest(
        self, window: np.ndarray, waited: np.ndarray, places: int | None, aim: int
    ) -> tuple[Rows, np.ndarray]:
        """(the fullest `places` rows, the samples of the others); None keeps all.

        Rows with a sample that was left before go first: what fits badly is not put off to the end of the epoch.
        """
        found = self._fill(window, aim)
        rows = self._rows(window, waited, found)
        if places is None or len(rows) <= places:
            return rows + no_rows((places or len(rows)) - len(rows)), window[:0]
        size = self.capacity
        images, _, supervised, tokens, late = rows.loads.T
        fullness = np.max(
            [tokens / size.tokens, images / max(size.images, 1), supervised / size.supervised], axis=0
        )
        best = np.lexsort((-fullness, late == 0))
        left = sorted(i for row in best[places:].tolist() for i in found[row])
        return rows.take(np.sort(best[:places])), window[left]

    def _rows(self, window: np.ndarray, waited: np.ndarray, found: list[list[int]]) -> Rows:
        each = np.stack(  # of each sample what Rows.loads has of each row
            [
                self._images[window],
                np.ones(len(window), np.int64),
                self._supervised[window],
                self._tokens[window],
                waited,
            ],
            axis=1,
        )
        lengths = np.array([len(row) for row in found], np.int64)
        loads = np.add.reduceat(each[[i for row in found for i in row]], np.cumsum(lengths) - lengths)
        numbers = window.tolist()
        return Rows([[numbers[i] for i in row] for row in found], loads)

    # -- what is fixed before the first window ----------------------------------------------------------

    def _trial(self, samples: np.ndarray) -> np.ndarray:
        """At most a window of them, evenly from first to last."""
        count = min(len(samples), _WINDOW)
        return samples[np.arange(count) * len(samples) // count]

    def _best_aim(self, trial: np.ndarray) -> tuple[int, int]:
        """(the aim with which a trial fills the fewest rows, how many these are)."""
        size = self.capacity
        means = [float(values[trial].mean()) for values in (self._tokens, self._images, self._supervised)]
        limits = (size.tokens, size.images, size.supervised)
        typical = int(min(limit / mean for limit, mean in zip(limits, means, strict=True) if mean))
        aims = sorted({1, max(1, typical - 1), max(1, typical), typical + 1}, reverse=True)
        rows = [len(self._fill(trial, aim)) for aim in aims]
        return aims[int(np.argmin(rows))], min(rows)

    def _pace(self, order: np.ndarray, rows: int) -> _Pace:
        if not self.packing:
            return _Pace(1, self.samples, 1, False)
        trial = self._trial(order)
        aim, needed = self._best_aim(trial)
        steps = max(1, min(math.ceil(_WINDOW / self.samples), len(order) // (4 * self.samples)))
        most = (1 + TOLERANCE) * self.samples
        if len(trial) / needed * rows > most:
            return _Pace(steps, self.samples, aim, True)
        return _Pace(steps, most, aim, False)

    def _enough_supervised(self, used: np.ndarray) -> int:
        """The smallest C that costs next to nothing."""
        longest = int(self._supervised[used].max())
        low = max(1, -(-longest // SUPERVISED_UNIT))
        high = -(-self.capacity.tokens // SUPERVISED_UNIT)
        if not self.packing:
            return min(self.capacity.tokens, low * SUPERVISED_UNIT)
        trial = self._trial(used)
        aim, rows = self._best_aim(trial)
        while low < high:
            middle = (low + high) // 2
            if len(self._fill(trial, aim, middle * SUPERVISED_UNIT)) <= (1 + SUPERVISED_COST) * rows:
                high = middle
            else:
                low = middle + 1
        return min(self.capacity.tokens, low * SUPERVISED_UNIT)

    def _find_rows(self) -> int:
        """The smallest R that keeps up with `samples` per step, judged by packing."""
        start = 1
        for order in self._orders(0):
            trial = self._trial(order)
            _, needed = self._best_aim(trial)
            # Less than is needed: the last row of the trial may be nearly empty, and a trial errs.
            least = (1 - TOLERANCE - 0.005) * self.samples * (needed - 1) / len(trial)
            start = max(start, math.ceil(least))
        epochs = range(_TRIAL_EPOCHS if self._size <= _WINDOW else 1)

        def enough(rows: int) -> bool:
            plans: dict[int, _Epoch] = {}
            for epoch in epochs:
                plans[epoch] = self._pack(epoch, rows)
                if not self._keeps_up(plans[epoch]):
                    return False
            self._epochs = plans  # needed again: the last that is enough is the one that is found
            return True

        return smallest(start, enough)

    def _keeps_up(self, plan: _Epoch) -> bool:
        if plan.steps > math.ceil(self._size / self.samples) * (1 + TOLERANCE):
            return False
        last = int(plan.starts[(plan.steps - 1) * ((len(plan.starts) - 1) // plan.steps)])
        return last >= (1 - TOLERANCE) * self.samples * (plan.steps - 1)


def smallest(start: int, enough: Callable[[int], bool]) -> int:
    """The smallest number from `start` on that is enough, as all larger ones are.

    Asked are start, start + 1, + 2, + 4, ..., then halves of the last gap: each that is enough is smaller than the one
    before.
    """
    too_few, ahead = start - 1, 0
    while not enough(start + ahead):
        too_few, ahead = start + ahead, max(1, 2 * ahead)
    found = start + ahead
    while found - too_few > 1:
        middle = (too_few + found) // 2
        if enough(middle):
            found = middle
        else:
            too_few = middle
    return found
