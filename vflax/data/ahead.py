"""Work given to a pool a little ahead of where its results are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    pool: Executor, work: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[tuple[_Item, _Result]]:
    """(item, its result), in the order of the items, of which at most `ahead` are taken before they are asked for.

    Executor.map takes all of them at once: a future for each sample of a large dataset is gigabytes.
    """
    pending: deque[tuple[_Item, Future[_Result]]] = deque()
    for item in items:
        pending.append((item, pool.submit(work, item)))
        if len(pending) >= ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()
