"""Traces on demand: of the steps that config.profile names, or of the next ones after SIGUSR2.

A trace is WORKDIR/profile/STEP, STEP being the first step in it, in the form that jax.profiler writes: TensorBoard with
tensorboard-plugin-profile (or xprof) opens the folder, and https://ui.perfetto.dev the .trace.json.gz in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax


class Profiler:
    """Traces whole steps. As a context manager it listens to SIGUSR2, and finishes a trace that is going on in the end.

    Each process listens for itself: of several hosts the one that gets the signal is traced. The steps that the config
    names are traced on the first one.

    Attributes:
        tracing: whether a trace is going on.
    """

    def __init__(self, folder: Path, start: int, steps: int, say: Callable[[str], None]) -> None:
        """
        Args:
            folder: WORKDIR/profile.
            start: the first step to be traced, as it is numbered in metrics.jsonl; 0: none.
            steps: how many, from there or from the signal on.
            say: where to say what is traced and where it lies.
        """
        self._folder, self._start, self._steps, self._say = folder, start, steps, say
        self._asked = False
        self._end = 0
        self._out: Path | None = None
        self._old: Any = None
        self._listens = (
            threading.current_thread() is threading.main_thread()
        )  # Python allows handlers there only

    @property
    def tracing(self) -> bool:
        return self._out is not None

    def __enter__(self) -> Profiler:
        if self._listens:
            self._old = signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.tracing:
            self.stop(None)
        if self._listens:
            signal.signal(signal.SIGUSR2, self._old)

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """To be entered around step `number`, the one after the checkpoint being one more than its; begins a trace
        where one is due."""
        due = self._asked or (number == self._start and jax.process_index() == 0)
        if due and not self.tracing:
            self._asked = False
            self._end = number + self._steps - 1
            self._out = self._folder / str(number)
            self._say(f"tracing the steps {number} to {self._end}")
            with self._harmless():
                self._out.mkdir(parents=True, exist_ok=True)  # told now where it cannot be written
                jax.profiler.start_trace(self._out)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def is_last(self, number: int) -> bool:
        """Whether the trace that is going on ends with step `number`."""
        return self.tracing and number >= self._end

    def stop(self, results: Any) -> None:
        """Wait for the last step's results, and write the trace."""
        jax.block_until_ready(results)
        out = self._out
        with self._harmless():
            jax.profiler.stop_trace()
            assert out is not None
            newest = max(out.glob("plugins/profile/*/*.trace.json.gz"), key=os.path.getmtime)
            self._say(
                f"trace written: tensorboard --logdir={out}, or open {newest} in https://ui.perfetto.dev"
            )
        self._out = None

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """A full disk, or another trace that somebody began, costs the trace and not the run."""
        try:
            yield
        except Exception as error:
            self._say(f"no trace in {self._out}: {error}")
            self._out = None

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
