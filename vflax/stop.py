"""Being told to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import jax


class Stopped(BaseException):
    """The run was told to stop at a moment that needs no tidying up. No Exception: nothing on the way may catch it."""


class StopSignals:
    """Turns the first SIGTERM or Ctrl-C into an orderly end; a second one acts as usual.

    As a rule `Stopped` is raised where the run stands. Inside `deferred` only `asked` is set, and the run comes to
    a good end by itself: a training step is short, and a state that is half replaced cannot be saved.

    With several processes the JAX preemption service listens to SIGTERM and makes all of them stop at the same step
    (Checkpointer.reached_preemption); Ctrl-C is handed on to it.

    Attributes:
        asked: a signal came inside `deferred`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            if jax.process_count() > 1:
                self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._hand_on)
            else:
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._old[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    def deferred(self) -> AbstractContextManager[None]:
        """Do not raise inside this block; look at `asked` instead."""
        return self._deferring(True)

    def at_once(self) -> AbstractContextManager[None]:
        """Inside `deferred`: a part that may take long and that `Stopped` may end."""
        return self._deferring(False)

    @contextmanager
    def _deferring(self, value: bool) -> Iterator[None]:
        before, self._deferred = self._deferred, value
        try:
            yield
        finally:
            self._deferred = before

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, self._old[number])
        if not self._deferred:
            raise Stopped
        self.asked = True

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, self._old[number])
        os.kill(os.getpid(), signal.SIGTERM)
