"""Rows dealt to steps, so that every step and every device's part of it has as much to do as the next.

The rows of a window are dealt one by one, those that hold most first, equal ones in random order, each to the step with
which it has the least in common: the step in which images, samples and supervised tokens, each over its mean, are
scarcest where the row has many of them. Inside a step the rows with the most images then lie far apart
(`spread`), so that the halves, quarters, ... that go to the devices hold about as many images each.
"""

from __future__ import annotations

import array
import dataclasses

import numpy as np

from vflax.data.draw import Draw, permutation


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of sample numbers, and what is in each.

    Attributes:
        samples: of each row.
        loads: int64 [rows, 5]: (images, samples, supervised tokens, tokens, samples that were left by an earlier
            window).
    """

    samples: list[list[int]]
    loads: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.samples + other.samples, np.concatenate([self.loads, other.loads]))

    def take(self, places: np.ndarray) -> Rows:
        """The rows with these numbers, in that order."""
        return Rows([self.samples[i] for i in places.tolist()], self.loads[places])

    def split(self, count: int) -> tuple[Rows, Rows]:
        """(`count` of the rows, evenly from first to last; the others)."""
        chosen = np.zeros(len(self), bool)
        chosen[np.arange(count) * len(self) // max(count, 1)] = True
        return self.take(np.flatnonzero(chosen)), self.take(np.flatnonzero(~chosen))

    @property
    def dealt(self) -> np.ndarray:
        """int64 [rows, 3]: of the loads those by which rows are dealt, (images, samples, supervised tokens)."""
        return self.loads[:, :3]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return int(self.loads[:, 1].sum())


def no_rows(count: int = 0) -> Rows:
    """Empty rows."""
    return Rows([[] for _ in range(count)], np.zeros((count, 5), np.int64))


class Steps:
    """The steps of an epoch, built window by window.

    Args:
        rows: R, of a step.
        key: of the random order in which rows are dealt, non-negative whole numbers.

    Attributes:
        waiting: rows of a step that is not full yet.
    """

    def __init__(self, rows: int, *key: int) -> None:
        self.waiting = no_rows()
        self._rows, self._key, self._windows = rows, key, 0
        self._places = spread(rows)
        # Of every row so far, and the samples row after row: arrays, for there may be millions.
        self._lengths, self._samples = array.array("i"), array.array("i")

    def add(self, rows: Rows) -> None:
        """Deal the rows of a window; what makes no whole step waits for the next window."""
        order = permutation(len(rows), Draw.ROWS, *self._key, self._windows)
        sizes = _shares(rows.dealt).sum(axis=1)[order]
        rows = rows.take(order[np.argsort(-sizes, kind="stable")])
        self._windows += 1
        if len(self.waiting):
            first, rows = rows.split(min(self._rows - len(self.waiting), len(rows)))
            self.waiting += first
            if len(self.waiting) == self._rows:
                self.flush()
        rest, rows = rows.split(len(rows) % self._rows)
        whole = len(rows) // self._rows
        for part in deal(rows.dealt, whole)[
            permutation(whole, Draw.STEPS_OF_ROWS, *self._key, self._windows)
        ]:
            self._append(rows.take(part))
        self.waiting += rest

    def flush(self) -> None:
        """End the step whose rows are waiting: it is full, or the last one, or holds all the samples it may."""
        if len(self.waiting):
            self._append(self.waiting + no_rows(self._rows - len(self.waiting)))
            self.waiting = no_rows()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples int32 [n], row after row; lengths of the rows, int64 [steps * R])."""
        self.flush()
        return np.array(self._samples, np.int32), np.array(self._lengths, np.int64)

    def _append(self, step: Rows) -> None:
        """Lay out the rows of one step."""
        images, _, supervised = step.dealt.T
        layout = np.empty(self._rows, np.int64)
        layout[self._places] = np.lexsort((-supervised, -images))
        for place in layout.tolist():
            self._lengths.append(len(step.samples[place]))
            self._samples.extend(step.samples[place])


def deal(loads: np.ndarray, steps: int) -> np.ndarray:
    """Deal rows, in their order, to so many steps, which get equally many.

    Args:
        loads: int64 [steps * R, 3], what is in each row.
        steps: how many; 0 for no rows.

    Returns:
        int64 [steps, R], numbers of rows.
    """
    rows = len(loads) // max(steps, 1)
    if steps <= 1 or rows == 1:
        return np.arange(len(loads)).reshape(steps, rows)
    shares = _shares(loads)
    totals = np.zeros((steps, loads.shape[1]), np.int64)
    full = np.zeros(steps, np.int64)  # huge where a step has all its rows
    counts = [0] * steps
    dealt = np.empty((steps, rows), np.int64)
    for row, share in enumerate(shares):
        # The sum of the squared totals grows least where this is smallest.
        step = int(np.argmin(totals @ share + full))
        totals[step] += share
        dealt[step, counts[step]] = row
        counts[step] += 1
        if counts[step] == rows:
            full[step] = 1 << 62
    return dealt


def _shares(loads: np.ndarray) -> np.ndarray:
    """int64 [rows, 3]: what is in each row over its mean, in 256ths.

    Whole numbers: sums of floats differ in their last bits from processor to processor, and every host, and every
    machine on which a run goes on, must deal the same.
    """
    return loads * (256 * len(loads)) // np.maximum(loads.sum(axis=0), 1)


def spread(n: int) -> np.ndarray:
    """Places in which neighbours of a sorted list lie far apart: the bits of a Gray code, mirrored.

    Row k of the list goes to place spread(n)[k]. Of n = 8 the places are 0 4 6 2 3 7 5 1: the halves get rows 0 3 4 7
    and 1 2 5 6, as when two captains choose their teams, and the quarters in each half likewise. (Plain numbers
    mirrored are van der Corput's sequence, by which the first of two parts always has the larger of two rows.)

    Returns:
        int64 [n], a permutation.
    """
    numbers = np.arange(n)
    code = numbers ^ (numbers >> 1)
    bits = max(1, (n - 1).bit_length())
    mirrored = sum(((code >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return np.argsort(np.argsort(mirrored, kind="stable"), kind="stable")
