"""Runs the jobs of a conversion in as many processes as asked for, and shows how far they are."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data_pipeline import shard
from data_pipeline.image_store import ImageReader
from data_pipeline.shard import Result
from data_pipeline.spool import Job


def run(
    jobs: Iterator[Job], workers: int, reader: ImageReader, source: str, show_progress: bool
) -> list[Result]:
    """Make all shards, in the order of the jobs; a shard that an earlier run finished is taken as it is.

    Reading the release and checking images go on side by side; when the release is read, how much there is in all is
    known, and the time left is told.

    Raises:
        UserError: a worker was killed.
    """
    results: dict[str, Result] = {}
    names: list[str] = []
    with Bar(show_progress) as bar:

        def to_do() -> Iterator[Job]:
            for job in jobs:
                names.append(job.base.name)
                done = shard.finished(job)
                bar.read(job, done is not None)
                if done is None:
                    yield job
                else:
                    job.samples_path.unlink()
                    results[job.base.name] = done
            bar.all_read()

        waiting = to_do()
        first = list(islice(waiting, 2))
        if workers == 1 or len(first) < 2:
            for job in [*first, *waiting]:  # a list: the release is read to its end before, for the time left
                results[job.base.name] = shard.make(job, reader, source, bar.tick)
        else:
            for result in _in_processes(_chain(first, waiting), workers, reader, source, bar):
                results[result.base.name] = result
    return [results[name] for name in names]


def _chain(first: list[Job], others: Iterator[Job]) -> Iterator[Job]:
    yield from first
    yield from others


def _in_processes(
    jobs: Iterator[Job], workers: int, reader: ImageReader, source: str, bar: Bar
) -> Iterator[Result]:
    # spawn: the parent may hold threads (JAX's, a test runner's), which a fork would copy in mid-flight.
    context = multiprocessing.get_context("spawn")
    counters = (context.Value("q", 0), context.Value("q", 0))
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(counters, reader, source)
    )
    waiting: list[Job] = []
    running: set[Future[Result]] = set()

    def submit() -> None:
        while waiting and len(running) < 2 * workers:
            running.add(pool.submit(_run_in_worker, waiting.pop(0)))

    try:
        with bar.following(counters):
            for job in jobs:
                waiting.append(job)  # small: its samples are in a file
                ready = {future for future in running if future.done()}
                running -= ready
                submit()
                yield from (future.result() for future in ready)
            while running or waiting:
                submit()
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
    except BrokenProcessPool:
        raise WorkerKilled(
            "a worker process was killed: most likely memory ran out (try fewer --workers), or convert() was called by "
            'a script that does not guard it by `if __name__ == "__main__":` (its workers import the script)'
        ) from None
    except BaseException:  # Ctrl-C too: shards that are not finished do not count, so nobody waits for them
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class WorkerKilled(OSError):
    """From outside: what is finished stays, and the same command goes on with it."""


# ---------------------------------------------------------------------------------------------------------
# In a worker

_counters: Any = None
_reader: Any = None
_source = ""


def _start_worker(counters: Any, reader: ImageReader, source: str) -> None:
    global _counters, _reader, _source
    _counters, _reader, _source = counters, reader, source
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends Ctrl-C to all; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not write on: the next conversion may have begun."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _tick(images: int) -> None:
    for counter, count in zip(_counters, (1, images), strict=True):
        with counter.get_lock():
            counter.value += count


def _run_in_worker(job: Job) -> Result:
    return shard.make(job, _reader, _source, _tick)


# ---------------------------------------------------------------------------------------------------------
# Progress


class Bar:
    """Samples done of those read so far, images per second, and the time left once the release is read to its end.

    Samples of shards that an earlier run finished count neither as done nor as to do: they take no time.
    """

    def __init__(self, show: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._progress = Progress(
            *columns, console=Console(stderr=True), disable=not show, speed_estimate_period=120
        )
        self._task: TaskID | None = None
        self._rows = self._kept = self._done = self._images = 0
        self._began = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        self._task = self._progress.add_task("reading and converting", total=None, rate="")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def read(self, job: Job, finished: bool) -> None:
        """A job was read from the release; an earlier run has finished it, or it is to be done."""
        if finished:
            self._kept += job.rows
        else:
            self._rows += job.rows
        self._show(description=f"reading ({self._rows + self._kept:,} samples), converting")

    def all_read(self) -> None:
        kept = f" ({self._kept:,} samples were finished before)" if self._kept else ""
        self._show(description=f"converting{kept}", total=self._rows)

    def tick(self, images: int) -> None:
        """One sample is done."""
        self._done += 1
        self._images += images
        self._show()

    @contextlib.contextmanager
    def following(self, counters: tuple[Any, Any]) -> Iterator[None]:
        """Show what the workers count."""
        finished = threading.Event()

        def follow() -> None:
            while not finished.wait(0.5):
                self._done, self._images = (counter.value for counter in counters)
                self._show()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            finished.set()
            follower.join()
            self._done, self._images = (counter.value for counter in counters)
            self._show()

    def _show(self, **changes: Any) -> None:
        if self._task is not None:
            rate = self._images / max(time.monotonic() - self._began, 1e-9)
            self._progress.update(self._task, completed=self._done, rate=f"{rate:,.0f} images/s", **changes)
