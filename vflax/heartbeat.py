"""Every process of a run says every second that it lives; who is silent too long is named, and all others end.

JAX has a heartbeat of its own, but what it does with it is to abort, with a C++ stack and without a host's name. Here
the lines go through the same service (the key-value store of JAX's coordinator, which lives in process 0):

    vflax/worker/I     process I writes, process 0 reads          vflax/lead/beat      process 0 writes, all read
                                                                  vflax/lead/verdict   why all must end

so that a second costs each process two small calls, however many there are.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vflax.give_up import give_up, tell_too

# Beats in the time after which a process counts as gone, and the most seconds between two.
_BEATS, _INTERVAL = 10, 1.0
# Seconds that process 0 stays when all must end: the store that tells the others why dies with it.
GRACE = 3.0
# Seconds between two looks at the store while a process waits to hear of the others for the first time.
_MOMENT = 0.05


class Store(Protocol):
    """The part of JAX's distributed client that is used here; a call may block or raise where process 0 is gone."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Write one value."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All (key, value) under a prefix."""


@dataclass
class _Peer:
    """What is known of another process: its last line, and when that changed (time.monotonic)."""

    process: int
    heard: float
    beat: int = -1
    host: str = ""
    left: str | None = None  # why it ended; "" in good order, None: it runs

    @property
    def name(self) -> str:
        return f"process {self.process} (host {self.host or 'unknown: it never spoke'})"


class Heartbeat:
    """Two threads: one speaks and listens and may block in a call, one judges by the clock.

    Attributes:
        verdict: why everybody must end, as soon as that is known.
    """

    def __init__(self, store: Store, process: int, num_processes: int, timeout: float) -> None:
        """
        Args:
            store: JAX's distributed client.
            process: which one this is; process 0 is the lead.
            num_processes: how many there are.
            timeout: seconds of silence after which a process counts as gone.
        """
        self.verdict: str | None = None
        self._store, self._process, self._timeout = store, process, timeout
        self._lead = process == 0
        self._interval = min(_INTERVAL, timeout / _BEATS)
        now = time.monotonic()
        listened_to = range(1, num_processes) if self._lead else (0,)
        self._peers = {i: _Peer(i, now) for i in listened_to}
        self._hang = False
        self._judged = now  # when the judge last looked
        self._beat = 0
        self._left: str | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Learn the others' names, start both threads, and tell the others when this process gives up by itself."""
        tell_too(self._tell)
        self._greet()
        for name, work in (("heartbeat", self._speak), ("heartbeat judge", self._judge)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def leave(self, reason: str = "") -> None:
        """Say goodbye, so that the silence that follows means nothing; with a reason the others end, too."""
        self._stop.set()
        self._left = reason
        _within(GRACE, self._write)

    def explain(self, lead_answers: bool) -> str | None:
        """Why JAX ends this process, as far as is known here; None: not because of another process.

        Args:
            lead_answers: somebody listens where process 0 does.
        """
        now = time.monotonic()
        if self.verdict is not None:
            return self.verdict
        if standstill := self._standstill(now):
            return standstill
        for peer in self._peers.values():
            if peer.left:
                return self._end(peer)
        if not self._lead and not lead_answers:
            return f"{self._peers[0].name} is gone: nobody listens there any more"
        if self._stop.is_set():
            return None  # it has left, and listens to nobody
        # JAX waits longer than the judge: it comes first only where Python stood still, or where a process that is gone
        # is back, as another one, before anybody missed it.
        silent = [p for p in self._peers.values() if p.left is None and now - p.heard > 3 * self._interval]
        return ", ".join(self._silence(p, now) for p in silent) or None

    def _greet(self) -> None:
        """Wait until all have spoken once, but not for ever: who is gone a moment later has a name then."""
        end = time.monotonic() + GRACE

        def greet() -> None:
            self._exchange()
            while time.monotonic() < end and any(peer.beat < 0 for peer in self._peers.values()):
                time.sleep(_MOMENT)
                self._exchange()

        _within(GRACE, greet)

    # --- The thread that speaks

    def _speak(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._beat += 1
            self._exchange()
            self._stop.wait(max(0.0, self._interval - (time.monotonic() - began)))

    def _exchange(self) -> None:
        try:
            self._write()
            self._listen()
        except Exception:  # process 0 is gone, or the network for a moment: the judge's business
            pass

    def _write(self) -> None:
        key = "vflax/lead/beat" if self._lead else f"vflax/worker/{self._process}"
        line = {"host": socket.gethostname(), "beat": self._beat, "left": self._left}
        self._store.key_value_set(key, json.dumps(line), allow_overwrite=True)

    def _listen(self) -> None:
        folder = "vflax/worker/" if self._lead else "vflax/lead/"
        for key, value in self._store.key_value_dir_get(folder):
            name, line = key.rsplit("/", 1)[-1], json.loads(value)
            if name == "verdict":
                self._hang, self.verdict = line["hang"], line["reason"]
            else:
                self._hear(self._peers[0 if name == "beat" else int(name)], line)

    def _hear(self, peer: _Peer, line: dict[str, Any]) -> None:
        if line["beat"] != peer.beat or line["left"] != peer.left:
            peer.host, peer.beat, peer.heard = line["host"], line["beat"], time.monotonic()
            if line["left"] is not None:  # a beat on its way may arrive after the goodbye
                peer.left = line["left"]

    # --- The thread that judges

    def _judge(self) -> None:
        self._judged = time.monotonic()
        while not self._stop.wait(self._interval / 2):
            now = time.monotonic()
            paused, standstill = now - self._judged - self._interval / 2, self._standstill(now)
            self._judged = now
            if standstill is not None:
                self.verdict = standstill
                give_up(standstill)
            if paused > self._interval:  # a shorter one says nothing about the others
                for peer in self._peers.values():
                    peer.heard += paused
            reason = self.verdict or self._find(now)
            if reason is not None:
                self.verdict = reason
                give_up(reason, self._hang)

    def _standstill(self, now: float) -> str | None:
        """A sentence where this process itself was away for so long that the others have given it up."""
        paused = now - self._judged
        if paused <= self._timeout or self._stop.is_set():
            return None
        here = f"process {self._process} (host {socket.gethostname()}), this one,"
        return f"{here} stood still for {paused:.0f} s, and the others have given it up"

    def _find(self, now: float) -> str | None:
        silent = [p for p in self._peers.values() if p.left is None and now - p.heard > self._timeout]
        if silent:
            return ", ".join(self._silence(p, now) for p in silent)
        for peer in self._peers.values():
            # This process most likely ends for the same reason, and by itself.
            if peer.left and now - peer.heard > GRACE:
                return self._end(peer)
        return None

    def _end(self, peer: _Peer) -> str:
        return f"{peer.name} has ended: {peer.left}"

    def _silence(self, peer: _Peer, now: float) -> str:
        return f"{peer.name} has not been heard of for {now - peer.heard:.0f} s"

    def _tell(self, reason: str, hang: bool) -> None:
        """Before this process gives up: the reason, for the others."""
        if not self._lead:
            if self.verdict is None:
                self.leave(reason)
            return
        line = json.dumps({"reason": reason, "hang": hang})
        _within(GRACE, lambda: self._store.key_value_set("vflax/lead/verdict", line, allow_overwrite=True))
        time.sleep(GRACE)


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Do it, and wait no longer: where process 0 hangs, or JAX is ending this process, a call does not come back."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
