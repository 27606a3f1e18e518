"""The end of a process whose main thread cannot end it: a host is gone, or a step never comes to its end.

The main thread then waits inside a collective that nobody will answer, so another thread says why, to a person and in
WORKDIR, and ends the process with status 75: run the same command again and it goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vflax.constants import EXIT_AGAIN
from vflax.metrics import read_metrics
from vflax.workdir import write_status


@dataclass(frozen=True)
class _Run:
    workdir: Path
    process: int


# The run under way; the stage that makes another's starting point runs inside that other one.
_RUNS: list[_Run] = []
# What else is to be done with (reason, hang) before the process ends: telling the other processes.
_TELL: list[Callable[[str, bool], None]] = []
_ONCE = threading.Lock()
# Seconds after which the process ends even where a file system or JAX's client holds up what is said here.
_AT_MOST = 10.0


@contextlib.contextmanager
def run_under_way(workdir: Path, process: int) -> Iterator[None]:
    """While inside, a process that gives up writes into this WORKDIR (status.json: process 0 alone)."""
    _RUNS.append(_Run(workdir, process))
    yield
    _RUNS.pop()  # not where it is left by an error: that of a lost connection comes before its cause is known


def tell_too(listener: Callable[[str, bool], None]) -> None:
    """Have `listener(reason, hang)` called, too, before a process that gives up ends."""
    _TELL.append(listener)


def giving_up() -> bool:
    """Whether some thread is ending this process already."""
    return _ONCE.locked()


def give_up(reason: str, hang: bool = False) -> NoReturn:
    """End this process with status 75, from any thread, and say why on stderr and in status.json.

    Args:
        reason: what happened, naming the process or host, without "error:".
        hang: somebody stands still and does not know why: the Python stacks of all threads go to stderr and to
            WORKDIR/hang-PROCESS.txt.
    """
    if not _ONCE.acquire(blocking=False):
        threading.Event().wait()  # another thread is ending the process
    threading.Thread(target=_end_soon, name="giving up", daemon=True).start()
    try:
        _say(f"error: {reason}; run the same command again to go on")
        run = _RUNS[-1] if _RUNS else None
        if hang:
            _dump_stacks(run, reason)
        if run is not None and run.process == 0:
            write_status(run.workdir, "preempted", _last_step(run.workdir), reason)
        for listener in _TELL:
            listener(reason, hang)
    except Exception as error:  # a full disk must not keep the process alive
        _say(f"error: {type(error).__name__}: {error}")
    finally:
        os._exit(EXIT_AGAIN)


def _end_soon() -> None:
    time.sleep(_AT_MOST)
    os._exit(EXIT_AGAIN)


def _say(text: str) -> None:
    # Not print: the main thread may hold the lock of sys.stderr's buffer for ever.
    os.write(2, f"{text}\n".encode(errors="replace"))


def _dump_stacks(run: _Run | None, reason: str) -> None:
    faulthandler.dump_traceback(2, all_threads=True)
    if run is not None:
        with (run.workdir / f"hang-{run.process}.txt").open("w") as f:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} pid {os.getpid()} {sys.argv[0]}: {reason}\n\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)


def _last_step(workdir: Path) -> int:
    try:
        records = read_metrics(workdir / "metrics.jsonl")
    except Exception:  # the main thread may be in the middle of a line
        records = []
    return records[-1]["step"] if records else 0
