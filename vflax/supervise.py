"""Run a command again until it is done:  python -m vflax.supervise [--max_restarts=N --backoff=S] -- COMMAND ...

COMMAND is a training command, `python -m vflax.launch --config=... --workdir=DIR`; on several hosts each has its own
supervisor. What its end means:

    0           done; so is the supervisor
    75          stopped and saved, or another host is gone: it is started again
    1           an error. Where it comes before anything has begun (DIR/status.json is as it was), and nothing has begun
                under this supervisor before, the command itself is wrong: it is not started again. Else it is
    2, 126, 127 a command line that is wrong, or no such program: not started again
    a signal    killed, out of memory, crashed: it is started again

Progress is a larger step in DIR (status.json, checkpoints). A 75 after progress starts again at once. Every other end
waits first, for about S seconds, doubled with each failure in a row up to ten minutes; a random part of it is left out,
so that many hosts do not start in step. After N such ends without progress in between the supervisor gives up, with the
last one's status (128 + the number of a signal). SIGTERM and SIGINT go to COMMAND, and nothing is started after them.

Outside of Kubernetes, variables that tell a process its place among TPU hosts are taken out of COMMAND's environment:
an earlier job or launcher left them there, they name hosts that a preemption has replaced, and JAX would wait for these
for ever. Without them it asks the VM's metadata. --keep_variables leaves them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from etils import epath

from vflax import bucket
from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.errors import UserError

# A command line that argparse or a shell refuses, a file that is no program, no such program.
_NO_COMMAND = (2, 126, 127)
_LONGEST = 600.0
# Where a process stands among the slices, hosts and processes of its job. Not: what a user sets to divide the chips of
# one host (TPU_VISIBLE_CHIPS, TPU_PROCESS_BOUNDS, ...).
PLACE_VARIABLES = (
    "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_PORT", "MEGASCALE_SLICE_ID",
    "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID",
)  # fmt: skip


def main() -> None:
    """Entry point."""
    summary, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m vflax.supervise", usage=summary.partition(":  ")[2], description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--max_restarts", type=_at_least(int, 0), default=5, metavar="N",
                        help="ends without progress, in a row, after which it starts again (default: 5)")  # fmt: skip
    parser.add_argument("--backoff", type=_at_least(float, 0), default=10.0, metavar="S",
                        help="seconds before the second start after a failure (default: 10)")  # fmt: skip
    parser.add_argument("--keep_variables", action="store_true",
                        help="leave MEGASCALE_* and TPU_* in the environment as they are")  # fmt: skip
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    environment = dict(os.environ)
    if not options.keep_variables:
        environment = cleaned(environment)
    sys.exit(Supervisor(options.command, environment, options.max_restarts, options.backoff).run())


def _at_least(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
    def number(text: str) -> float:
        if (value := kind(text)) < least:
            raise argparse.ArgumentTypeError(f"{text}: at least {least}")
        return value

    number.__name__ = kind.__name__  # argparse names it in its message
    return number


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without PLACE_VARIABLES, which are told on stderr; in Kubernetes, which sets them, as it is."""
    stale = [name for name in PLACE_VARIABLES if name in environment]
    if not stale or "KUBERNETES_SERVICE_HOST" in environment:
        return dict(environment)
    _log(
        f"left out of the environment: {', '.join(f'{n}={environment[n]}' for n in stale)} (--keep_variables)"
    )
    return {name: value for name, value in environment.items() if name not in stale}


class Supervisor:
    """Starts a command, again and again, by the rules of this file's head."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], max_restarts: int, backoff: float
    ) -> None:
        """
        Args:
            command: program and arguments.
            environment: its variables.
            max_restarts: ends without progress, in a row, after which it is still started again.
            backoff: seconds to wait after the first of them.
        """
        self._command, self._environment = list(command), dict(environment)
        self._max_restarts, self._backoff = max_restarts, backoff
        self._workdir = find_workdir(command)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = threading.Event()  # to stop

    def run(self) -> int:
        """Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        if self._workdir is None:
            _log(
                "the command has no --workdir=DIR: progress cannot be seen, so every end but 0 counts as a failure"
            )
        failures, begun = 0, False
        while True:
            step, status_file = saved_step(self._workdir), _identity(self._workdir)
            status = self._start_once()
            if status == EXIT_DONE or self._asked.is_set():
                _log(
                    "done" if status == EXIT_DONE else f"told to stop; the command ended with status {status}"
                )
                return status
            progress = saved_step(self._workdir) > step
            begun = begun or progress or _identity(self._workdir) != status_file
            if status in _NO_COMMAND or (status == EXIT_ERROR and self._workdir is not None and not begun):
                _log(
                    f"status {status} before anything has begun: the command is wrong, see its message; not again"
                )
                return status
            failures = 0 if progress else failures + 1
            if failures > self._max_restarts:
                _log(f"status {status}; {failures} ends in a row without progress: given up (--max_restarts)")
                return status
            wait = 0.0 if progress and status == EXIT_AGAIN else self._wait(failures)
            saved = f"step {saved_step(self._workdir)} is saved" if self._workdir else "progress unknown"
            _log(f"status {status}; {saved}; failures in a row: {failures}; again in {wait:.1f} s")
            if self._asked.wait(wait):
                _log("told to stop while waiting")
                return status

    def _start_once(self) -> int:
        """Run the command to its end; its status, 128 + the number of a signal that ended it."""
        try:
            # A group of its own: Ctrl-C in a terminal then reaches it once, from here, and not twice.
            self._child = subprocess.Popen(self._command, env=self._environment, process_group=0)
        except OSError as error:
            _log(f"{self._command[0]}: {error.strerror}")
            return 126 if isinstance(error, PermissionError) else 127
        _log(f"started as {self._child.pid}: {' '.join(self._command)}")
        if self._asked.is_set():  # the signal came while there was no child to pass it on to
            self._child.terminate()
        status = self._child.wait()
        return status if status >= 0 else 128 - status

    def _wait(self, failures: int) -> float:
        longest = min(_LONGEST, self._backoff * 2.0 ** max(0, failures - 1))
        return random.uniform(longest / 2, longest)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._asked.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def find_workdir(command: Sequence[str]) -> epath.Path | None:
    """DIR of --workdir=DIR, --workdir DIR or either with one dash; None: there is none."""
    for i, word in enumerate(command):
        flag, equals, value = word.partition("=")
        if flag in ("--workdir", "-workdir"):
            value = value if equals else "".join(command[i + 1 : i + 2])
            if bucket.is_url(value):
                with contextlib.suppress(UserError):  # no gcsfs: the command itself says so
                    return bucket.path(value)
                return None
            return epath.Path(value).expanduser() if value else None
    return None


def saved_step(workdir: epath.Path | None) -> int:
    """The largest step that WORKDIR tells of: its newest checkpoint, or status.json; -1 where it tells none."""
    if workdir is None:
        return -1
    steps = [-1]
    # What is not there, not whole or not reachable for the moment is no progress.
    with contextlib.suppress(Exception):
        steps.append(int(json.loads((workdir / "status.json").read_text())["step"]))
    with contextlib.suppress(Exception):
        found = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
        # One that a kill has cut short has its name already, on a bucket.
        steps += [int(p.name) for p in found if not bucket.is_url(p) or (p / bucket.COMMITTED).exists()]
    return max(steps)


def _identity(workdir: epath.Path | None) -> tuple[float, str] | None:
    """Of status.json, which is replaced whenever it is written; None where it is not there."""
    if workdir is None:
        return None
    with contextlib.suppress(Exception):
        path = workdir / "status.json"
        return float(path.stat().mtime), path.read_text()
    return None


def _log(text: str) -> None:
    print(f"supervise {time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
