"""Jobs that wait for one another, on one or several slots at a time; what is done already is not run again."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vflax.constants import EXIT_AGAIN, EXIT_DONE
from vflax.errors import UserError
from vflax.goodput import duration

# Seconds between two looks at whether a process of an earlier study still works in a WORKDIR.
_LOOK = 2.0
# How often a job that ends with 75, saved and to be run again, is run again.
_AGAIN = 5


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        key: unique.
        title: for a person.
        module, arguments: python -m MODULE ARGUMENTS.
        needs: keys of jobs that must be done before.
        done: whether there is nothing left to do.
        log: gets what it prints.
        busy: whether another process works on it already.
    """

    key: str
    title: str
    module: str
    arguments: Sequence[str]
    needs: Sequence[str]
    done: Callable[[], bool]
    log: Path
    busy: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Slots:
    """Where jobs run.

    Attributes:
        names: one job at a time on each; slices, or lanes of this machine, each with its share of the cores.
        on: {module: command line} that runs a job there, with {slice} for its name, {index} for its number, {module},
            and a word {arguments} for its arguments; modules that are not in it run on this machine.
        environment: of the commands.
    """

    names: Sequence[str]
    on: Mapping[str, str]
    environment: Mapping[str, str]

    def command(self, job: Job, index: int) -> list[str]:
        """What is executed."""
        pattern = self.on.get(job.module)
        if pattern is None:
            return [*self._pinned(index), sys.executable, "-m", job.module, *job.arguments]
        words: list[str] = []
        for word in shlex.split(pattern):
            if word == "{arguments}":
                words += job.arguments
            else:
                words.append(
                    word.format(slice=self.names[index], index=index, module=job.module, arguments="")
                )
        return words

    def _pinned(self, index: int) -> list[str]:
        """Of several lanes each gets cores of its own: two launches that share all of them are slower than in turn."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        lanes = len(self.names)
        if self.on or lanes == 1 or lanes > len(cores) or not shutil.which("taskset"):
            return []
        return ["taskset", "--cpu-list", ",".join(map(str, cores[index::lanes]))]


def check_slots(slots: Slots) -> None:
    """Refuse a command line that does not say what is to be run.

    Raises:
        UserError: {arguments} is not a word of it, or it has an unknown placeholder.
    """
    for pattern in slots.on.values():
        if "{arguments}" not in shlex.split(pattern):
            raise UserError(
                f"{pattern!r}: {{arguments}} must be a word of it: there the flags of the launch go"
            )
        try:
            pattern.format(slice="", index=0, module="", arguments="")
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{pattern!r}: unknown placeholder {error}; use {{slice}}, {{index}}, {{module}}"
            ) from None


class Executor:
    """Runs jobs; `failed` and `skipped` say afterwards what came to nothing."""

    def __init__(self, jobs: Sequence[Job], slots: Slots, say: Callable[[str], None]) -> None:
        self._waiting = list(jobs)
        self._titles = {job.key: job.title for job in jobs}
        self._slots, self._say = slots, say
        self._changed = threading.Condition()
        self._done: set[str] = set()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._total, self._count = len(self._waiting), 0
        self._seconds: list[float] = []
        self.stopped = False
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []

    def run(self) -> None:
        """Until every job is done, failed or skipped, or a signal has come."""
        with self._signals():
            threads = [
                threading.Thread(target=self._work, args=(index,), daemon=True)
                for index in range(min(len(self._slots.names), max(1, len(self._waiting))))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # with a time-out, so that signals are handled
                    thread.join(0.5)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old: dict[int, Any] = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        """Launches save and end; started again, the study goes on."""
        self.stopped = True
        for process in list(self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def _work(self, index: int) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            problem = self._one(job, index)
            with self._changed:
                if problem is None:
                    self._done.add(job.key)
                    self._seconds.append(time.monotonic() - began)
                elif not self.stopped:
                    self.failed[job.key] = problem
                self._count += 1
                self._tell(job, problem, time.monotonic() - began)
                self._changed.notify_all()

    def _next(self) -> Job | None:
        """A job whose needs are met; waits for one; None when there will be none."""
        with self._changed:
            while True:
                if self.stopped:
                    return None
                self._drop_hopeless()
                for job in self._waiting:
                    if set(job.needs) <= self._done:
                        self._waiting.remove(job)
                        return job
                if not self._waiting:
                    return None
                self._changed.wait(1.0)

    def _drop_hopeless(self) -> None:
        lost = {*self.failed, *self.skipped}
        for job in list(self._waiting):
            if lost & set(job.needs):
                self._waiting.remove(job)
                self.skipped.append(job.key)
                lost.add(job.key)
                self._count += 1

    def _one(self, job: Job, index: int) -> str | None:
        """Run a job to its end; None, or what went wrong."""
        waited = False
        while job.busy() and not self.stopped:
            if not waited:
                self._say(f"{job.title}: a process of an earlier start still works on it; waiting for it")
            waited = True
            time.sleep(_LOOK)
        if job.done():  # by that process, between two looks, too
            return None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        command = self._slots.command(job, index)
        where = "" if len(self._slots.names) == 1 else f" on {self._slots.names[index]}"
        self._say(f"{job.title}: starts{where}")
        for _ in range(1 + _AGAIN):
            if self.stopped:
                return "stopped"
            status = self._execute(command, job.log)
            if status != EXIT_AGAIN or self.stopped:
                break
        if self.stopped and status != EXIT_DONE:
            return "stopped"
        if status != EXIT_DONE:
            return f"ended with status {status}: {_last_line(job.log)} (all of it: {job.log})"
        return None if job.done() else f"ended with status 0 and is not done, see {job.log}"

    def _execute(self, command: Sequence[str], log: Path) -> int:
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            try:
                # A session of its own: Ctrl-C comes to the study alone, which then stops them in order.
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                    env=dict(self._slots.environment),
                )  # fmt: skip
            except OSError as error:
                file.write(f"error: {error}\n".encode())
                return 127
            self._processes.add(process)
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    def _tell(self, job: Job, problem: str | None, seconds: float) -> None:
        left = self._total - self._count
        line = f"[{self._count}/{self._total}] {job.title}: {problem or f'done in {seconds:.0f} s'}"
        if self._seconds and left and not self.stopped:
            mean = sum(self._seconds) / len(self._seconds)
            line += f"; about {duration(left * mean / len(self._slots.names))} left"
        self._say(line)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["nothing was printed"])[-1]
