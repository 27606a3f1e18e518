"""Rows made one after another, each begun with the longest sample left and brought to its end by an exact fit.

A row aims at so many samples. After its first one it takes, each time, the longest sample that is no longer than an
equal share of the room left: the longest samples so meet the shortest ones, and what is left keeps its mean. The last
place goes to the longest sample that fits, which among thousands is mostly an exact fit:

    T = 20, aim = 3, samples 9 8 8 7 6 6 6 5 5

    row 0   9 9 9 9 9 9 9 9 9 5 5 5 5 5 6 6 6 6 6 6        room 11 for two: 5 or less; then room 6: a 6
    row 1   8 8 8 8 8 8 8 8 6 6 6 6 6 6 6 6 6 6 6 6        room 12 for two: 6 or less; then room 6: a 6
    row 2   8 8 8 8 8 8 8 8 5 5 5 5 5 7 7 7 7 7 7 7        room 12 for two: 6 or less; then room 7: a 7

Best fit in decreasing order puts 9 8, 8 7 5, 6 6 6 and 5 into four rows: it spends the long samples on one another and
ends with short ones that cannot fill a row together. With an aim of 1 the rows are those of first fit in decreasing
order, at most 11/9 of the fewest possible, plus 6/9 (Dosa, 2007).
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

# So many samples at most are looked at for one that supervises few enough tokens; then the row is closed.
_LOOK = 64


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a row holds at most: T tokens, S images, C supervised tokens."""

    tokens: int
    images: int
    supervised: int


def fill_rows(
    tokens: np.ndarray, images: np.ndarray, supervised: np.ndarray, capacity: Capacity, aim: int
) -> list[list[int]]:
    """Put n samples into rows; each fits into a row of its own.

    Args:
        tokens, images, supervised: int [n]; at least one token each.
        capacity: of a row.
        aim: samples per row, at least 1; a row may end with more or fewer.

    Returns:
        Rows of numbers from range(n), each number once, the longest sample of a row first.
    """
    n = len(tokens)
    keys = np.asarray(tokens, np.int64) * n + np.arange(n)  # sorted by length, equal ones in the order given
    # (images, ascending keys of the samples with so many): the longest that fits is found by bisection.
    queues = [(count, np.sort(keys[images == count]).tolist()) for count in np.unique(images).tolist()]
    learned = np.asarray(supervised).tolist()
    rows: list[list[int]] = []
    placed = 0
    while placed < n:
        row: list[int] = []
        room, free, left = capacity.tokens, capacity.images, capacity.supervised
        while fitting := [(c, q) for c, q in queues if c <= free and q and q[0] < (room + 1) * n]:
            share = 1
            if row and aim > len(row) + 1:
                shortest = min(queue[0] for _, queue in fitting) // n
                share = max(1, min(aim - len(row), room // shortest))
            found = _longest(fitting, (room // share + 1) * n, n, learned, left)
            if found is None and share > 1:
                found = _longest(fitting, (room + 1) * n, n, learned, left)
            if found is None:
                break
            count, queue, at = found
            length, sample = divmod(queue.pop(at), n)
            row.append(sample)
            room, free, left = room - length, free - count, left - learned[sample]
        if not row:
            raise ValueError("a sample does not fit into a row of its own")
        rows.append(row)
        placed += len(row)
    return rows


def _longest(
    fitting: list[tuple[int, list[int]]], below: int, n: int, learned: list[int], left: int
) -> tuple[int, list[int], int] | None:
    """(images, queue, place in it) of the longest sample whose key is under `below` and that supervises <= `left`."""
    best: tuple[int, list[int], int] | None = None
    for count, queue in fitting:
        at = bisect.bisect_left(queue, below) - 1
        last = max(at - _LOOK, -1)
        while at > last and learned[queue[at] % n] > left:
            at -= 1
        if at > last and (best is None or queue[at] > best[1][best[2]]):
            best = count, queue, at
    return best
