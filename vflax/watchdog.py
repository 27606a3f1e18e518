"""A hang that no heartbeat sees: every process lives, and no step comes to its end."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vflax.give_up import give_up

# Before so many steps are known, their median says nothing, and the first ones compile.
_KNOWN = 5
_REMEMBERED = 100
# Seconds by which the watching thread may be late.
_PAUSED = 10.0


class Watchdog:
    """Ends the process (give_up: stacks, status.json, status 75) when too much time passes without a step.

    Between two calls of `step_done` there is one turn of the training loop: waiting for data, the step, its report. It
    may take `factor` times the median turn, and at least `least` seconds. What is no step (the first turns, with their
    compile; what is inside `other`) may take `longest` seconds.
    """

    def __init__(self, options: ConfigDict) -> None:
        """
        Args:
            options: config.watchdog.
        """
        self._options = options
        self._lock = threading.Lock()
        self._turns: deque[float] = deque(maxlen=_REMEMBERED)  # seconds each
        self._steps = 0
        self._what = ""  # that is under way where it is no step
        self._since = time.monotonic()  # when the turn began, or that
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        if self._options.factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def step_done(self) -> None:
        """The loop has come round once more."""
        with self._lock:
            now = time.monotonic()
            if self._steps:  # the first turn compiles
                self._turns.append(now - self._since)
            self._steps, self._since = self._steps + 1, now

    @contextlib.contextmanager
    def other(self, what: str) -> Iterator[None]:
        """Inside is no step but `what`, which has its own limit and counts in no median."""
        with self._lock:
            before = self._what, time.monotonic() - self._since
            self._what, self._since = what, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._what, self._since = (
                    before[0],
                    time.monotonic() - before[1],
                )  # the turn goes on where it was

    def overdue(self) -> str | None:
        """What has taken longer than it may, with both times; None: all is well."""
        with self._lock:
            taken, longest = time.monotonic() - self._since, float(self._options.longest)
            if self._what or len(self._turns) < _KNOWN:
                what = self._what or f"step {self._steps + 1} since this start"
                rule, limit = "config.watchdog.longest", longest
            else:
                median = statistics.median(self._turns)
                factor, least = self._options.factor, self._options.least
                what, limit = "a step", max(factor * median, least)
                rule = (
                    f"config.watchdog: {factor:g} times the median, {median:.3g} s, but {least:g} s at least"
                )
        if taken <= limit:
            return None
        return f"{what} has not come to its end for {taken:.0f} s; it may take {limit:.0f} s ({rule})"

    def _watch(self) -> None:
        shortest = min(self._options.longest, self._options.least or self._options.longest)
        before = time.monotonic()
        while not self._stop.wait(min(1.0, max(0.05, shortest / 10))):
            now = time.monotonic()
            paused, before = now - before, now
            if paused > _PAUSED:  # the whole process stood still: a laptop's lid, a debugger, SIGSTOP
                with self._lock:
                    self._since += paused
            reason = self.overdue()
            if reason is not None:
                give_up(
                    f"process {jax.process_index()} (host {socket.gethostname()}) hangs: {reason}", hang=True
                )
