"""Joining the other processes of a run, one per host, and leaving them.

JAX ends a process that loses the others with SIGABRT, from C++ and without a host's name; so a handler of that signal
says what the heartbeat knows, and turns it into status 75. (The callback that jaxlib takes for this cannot be a Python
function: it is given an absl::Status, which has no Python type.)
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the client is nowhere else to be had
from ml_collections import ConfigDict

from vflax.constants import EXIT_AGAIN, EXIT_ERROR
from vflax.errors import UserError
from vflax.give_up import give_up, giving_up
from vflax.heartbeat import GRACE, Heartbeat

# JAX's own heartbeat is only the net below ours, for a process whose Python stands still. It beats twice in the time
# that it is given and may so be early by half of it.
_NET = 3
# Seconds of JAX's own heartbeat where there is none of ours: its default.
_JAX_HEARTBEAT = 100
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def joined(
    options: ConfigDict,
    *,
    detect: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Be one of the processes of a run inside, where the arguments ask for it; else do nothing.

    Args:
        options: config.cluster.
        detect: take all from what JAX finds by itself: a TPU pod, Slurm, ...
        coordinator: host:port of process 0, else.
        num_processes: how many there are, with `coordinator`.
        process_id: which one this is, with `coordinator`.

    Raises:
        UserError: arguments that do not go together, or no cluster to be found.
    """
    if coordinator and (num_processes is None or process_id is None):
        raise UserError("--coordinator needs --num_processes and --process_id")
    if not coordinator and not detect:
        yield
        return
    place = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    end = _AbortHandler(options.join)
    try:
        _initialize(options, place if coordinator else {})
    except BaseException:
        end.remove()
        raise
    end.joined = True
    state = distributed.global_state
    if state.client is None or state.num_processes == 1 or not options.heartbeat:
        yield
        return
    heartbeat = Heartbeat(state.client, state.process_id, state.num_processes, options.heartbeat)
    end.heartbeat = heartbeat
    heartbeat.start()
    try:
        yield
    except BaseException as error:
        _leave_alone(heartbeat, error, options.heartbeat, lead=state.process_id == 0)
        raise
    heartbeat.leave()


def _initialize(options: ConfigDict, place: dict[str, Any]) -> None:
    net = math.ceil(_NET * options.heartbeat) or _JAX_HEARTBEAT
    try:
        jax.distributed.initialize(
            **place, initialization_timeout=options.join, heartbeat_timeout_seconds=net
        )
    except ValueError as error:
        raise UserError(
            f"the other hosts cannot be joined ({error}): JAX finds no cluster here, or the numbers do not fit; give "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from None


def _leave_alone(heartbeat: Heartbeat, error: BaseException, timeout: float, lead: bool) -> None:
    """Leave while the others go on: they are told, and JAX's wait for all of them at the end is left out."""
    told = isinstance(error, UserError | KeyboardInterrupt | SystemExit)
    if not told:
        # A lost connection shows itself as an error of some collective, before anybody knows who is lost. If it is
        # that, the heartbeat ends this process here.
        wait = timeout + GRACE
        print(
            f"{type(error).__name__} here: waiting {wait:.0f} s whether another process is gone",
            file=sys.stderr,
        )
        time.sleep(wait)
        if heartbeat.verdict is not None:
            threading.Event().wait()  # for the end of this process, which is under way
    heartbeat.leave(f"{type(error).__name__}: {str(error)[:500]}")

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if lead:  # what the others must be told can be read as long as this process is there
            time.sleep(GRACE)
        os._exit(EXIT_AGAIN if isinstance(error, KeyboardInterrupt) else EXIT_ERROR)

    atexit.register(end)  # before JAX's own, which was registered earlier


class _AbortHandler:
    """What happens at SIGABRT; signal.signal would run it in the main thread, which waits in a collective."""

    def __init__(self, wait: int) -> None:
        """
        Args:
            wait: seconds that JAX waits for all processes to come.
        """
        self.joined = False
        self.heartbeat: Heartbeat | None = None
        self._wait = wait
        self._c = ctypes.CDLL(None)
        self._c.signal.restype = ctypes.c_void_p
        self._c.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._kept = _HANDLER(self._handle)  # ctypes keeps no reference to a callback
        self._old = self._c.signal(signal.SIGABRT, ctypes.cast(self._kept, ctypes.c_void_p))

    def remove(self) -> None:
        """Put the handler back that was there before."""
        self._c.signal(signal.SIGABRT, self._old)

    def _handle(self, number: int) -> None:
        if giving_up():
            threading.Event().wait()
        reason = self._reason()
        if reason is not None:
            give_up(reason)
        # Not ours: as if this handler were not there, faulthandler's dump included.
        self.remove()
        getattr(self._c, "raise")(number)

    def _reason(self) -> str | None:
        if threading.current_thread() is threading.main_thread() and self.joined:
            return None  # JAX aborts from a thread of its own
        if not self.joined:
            return (
                f"the processes of this run have not come together (the reason is above; JAX waits {self._wait} s: "
                "config.cluster.join). Is the command running on every host, with the same --coordinator"
            )
        return self.heartbeat.explain(_coordinator_answers()) if self.heartbeat is not None else None


def _coordinator_answers() -> bool:
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except OSError:
        return False
