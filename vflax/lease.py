"""Who may write a WORKDIR on a bucket: one run, for as long as it says so again and again.

The object WORKDIR/.lock names its holder, who writes it anew every RENEW seconds. Each write, and taking over what a
killed run has left, holds only if nobody else has written since (the generation of the object), so of two that try at
once one gets it. An object that was not renewed for LEASE seconds by the bucket's own clock belongs to nobody; that of
a process of this machine that is gone, at once.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from vflax import bucket
from vflax.errors import UserError
from vflax.folders import is_running

# Six renewals may fail in a row before another run may take over.
LEASE, RENEW = 120.0, 20.0


class Lease:
    """A claim on a folder of a bucket."""

    def __init__(self, folder: str) -> None:
        """
        Args:
            folder: gs://BUCKET/FOLDER.
        """
        self._folder, self._url = folder, f"{folder}/.lock"
        self._me = {"host": platform.node(), "boot": _boot(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._generation = ""
        self._lost = False

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take it, where need be after the time in which its last holder, if alive, would have renewed it.

        Raises:
            UserError: another run holds it; there is no such bucket, or no access to it.
        """
        found = bucket.read_version(self._url)
        seen = found.generation if found else ""
        while True:
            if found is not None and found.generation != seen:
                raise self._refused(found)
            if found is None or self._abandoned(found):
                try:
                    self._write(found.generation if found else "0")
                    return
                except FileExistsError:
                    found = bucket.read_version(self._url)
                    if found is not None and self._is_mine(found):
                        # Written, but the answer was lost on the way.
                        self._generation = found.generation
                        return
                    seen = seen or (found.generation if found else "")
                    continue
            if self._lives_here(found):
                raise self._refused(found)
            left = LEASE - found.age
            say(
                f"{self._folder}: {_holder(found)} has it and may be gone; waiting {left:.0f} s for a sign of life"
            )
            until = time.monotonic() + left
            while found is not None and found.generation == seen and time.monotonic() < until:
                time.sleep(min(1.0, max(0.1, until - time.monotonic())))
                found = bucket.read_version(self._url)

    def renew(self) -> None:
        """Say again that this run is alive. A bucket that does not answer raises; one that was taken over is noted."""
        try:
            self._write(self._generation)
        except FileExistsError:
            found = bucket.read_version(self._url)
            if found is not None and self._is_mine(found):
                self._generation = found.generation
            else:
                self._lost = True

    def check(self) -> None:
        """
        Raises:
            UserError: another run has taken over.
        """
        if self._lost:
            raise UserError(
                f"{self._folder}: another run has taken it over, because this one did not reach the bucket for "
                f"{LEASE:.0f} s; stop one of them"
            )

    def release(self) -> None:
        """Give it back."""
        if self._generation and not self._lost:
            bucket.remove_version(self._url, self._generation)
        self._generation = ""

    def _write(self, generation: str) -> None:
        self._generation = bucket.write_version(self._url, json.dumps(self._me).encode(), generation)

    def _is_mine(self, found: bucket.Version) -> bool:
        return _read(found).get("token") == self._me["token"]

    def _abandoned(self, found: bucket.Version) -> bool:
        return found.age >= LEASE or self._lives_here(found) is False

    def _lives_here(self, found: bucket.Version) -> bool | None:
        """Whether its process runs; None: on another machine, so who knows."""
        holder = _read(found)
        pid = holder.get("pid")
        if not isinstance(pid, int) or any(holder.get(key) != self._me[key] for key in ("host", "boot")):
            return None
        return is_running(pid)

    def _refused(self, found: bucket.Version) -> UserError:
        return UserError(
            f"{self._folder}: another process trains in it ({_holder(found)}); wait for its end or stop it"
        )


def _read(found: bucket.Version) -> dict[str, object]:
    try:
        value = json.loads(found.content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _holder(found: bucket.Version) -> str:
    holder = _read(found)
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _boot() -> str:
    """What tells one start of this machine from another, and from other machines of its name."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""
