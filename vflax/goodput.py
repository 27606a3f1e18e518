"""Goodput: what the wall time of a run goes into, kept over all its restarts.

    python -m vflax.goodput WORKDIR [--json]

WORKDIR/goodput.jsonl has a line when a process starts, one about every second of its work, and one when it ends:

    {"event": "start", "time": ..., "step": ...}    time: seconds since 1970; step: of the checkpoint it continues from
    {"event": "work", "time": ..., "step": ..., "seconds": {kind: ...}}      since the line before; step: steps done
    {"event": "end", ..., "state": "done"}          as "work"; state as in status.json

A process is always in exactly one kind of work, so the kinds add up to its time. What no line accounts for between a
start and the next one, because the process was killed, is restart; so is the work on steps that a later start, from an
older checkpoint, does again. A pause after "done" (a run that is made longer another day) is left out.

Google's ml-goodput-measurement reckons with similar kinds. It keeps its records in Google Cloud Logging, so it needs a
project there and the network, and does nothing on a laptop, a GPU machine or in Colab; a file in WORKDIR is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vflax import bucket, mirror
from vflax.errors import UserError
from vflax.values import NUMBER, OBJECT, TEXT, WHOLE, wrong

KINDS = {
    "start": "checks, reading data and weights, restoring a checkpoint",
    "compile": "tracing, lowering and compiling, whatever it is for (without an earlier compilation's cache)",
    "data_wait": "the next batch was not there and the devices had nothing to do",
    "step": "training steps",
    "checkpoint": "the loop waited for a save",
    "evaluation": "held-out loss, answers and benchmarks",
    "export": "export and summary",
    "profile": "writing a trace down",
    "restart": "between a process's last sign of life and the next start, and steps done again",
}
FILE = "goodput.jsonl"
# The kinds that change with every step: lines about them are written by the clock.
_FREQUENT = ("step", "data_wait")
_LINE_SECONDS = 1.0
# A smaller share is not shown.
LEAST_SHOWN = 0.0005
# What a whole line holds; an old reader passes over lines of a newer writer that do not.
_NEEDED = {"event", "time", "step"}
_LINE = {"event": TEXT, "time": NUMBER, "step": WHOLE, "seconds": OBJECT}
# Work that is lost with the steps that it was done for.
_REPEATED = ("step", "data_wait", "checkpoint", "evaluation", "profile")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Span:
    """A stretch of work; its kind may be corrected until it ends."""

    kind: str


class Recorder:
    """Charges every moment of a process to the innermost `within`; outside of any, that is "start".

    Nothing is written before `begin`. Of several processes one keeps the file; the others have none and only count.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            path: WORKDIR/goodput.jsonl, or None.
            clock: seconds that never go back; wall: seconds since 1970, asked once.
        """
        self._path, self._clock = path, clock
        self._mark = self._last_line = clock()
        self._offset = wall() - self._mark
        self._spans = [Span("start")]
        self._seconds: dict[str, float] = {}
        self._step = 0
        self._file: Any = None
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def within(self, kind: str) -> Iterator[Span]:
        """Charge this block to `kind`, one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
        self._charge()
        if kind not in _FREQUENT:
            self._write("work")
        span = Span(kind)
        self._spans.append(span)
        try:
            yield span
        finally:
            self._charge()
            del self._spans[self._spans.index(span) :]
            if kind not in _FREQUENT:
                self._write("work")

    def begin(self, step: int) -> None:
        """The run exists: append the start, at the time at which this recorder was made. `step`: where it continues."""
        self._step = step
        if self._path is not None:
            self._file = _open_whole(self._path)
            start = {"event": "start", "time": self._offset + self._last_line, "step": step}
            self._file.write(json.dumps(start).encode() + b"\n")
        self._charge()
        self._write("work")

    def done(self, step: int) -> None:
        """So many steps are done."""
        self._step = step
        self._charge()
        if self._mark - self._last_line >= _LINE_SECONDS:
            self._write("work")

    def compiled(self, seconds: float) -> None:
        """So much of what the current block took so far was compiling; not for the thread of another."""
        if threading.get_ident() != self._thread or self._spans[-1].kind == "compile":
            return
        self._charge()
        kind = self._spans[-1].kind
        moved = min(seconds, self._seconds.get(kind, 0.0))
        self._seconds[kind] = self._seconds.get(kind, 0.0) - moved
        self._seconds["compile"] = self._seconds.get("compile", 0.0) + moved

    def close(self, state: str) -> None:
        """Write the last line; `state` is that of status.json. A run that never began leaves none."""
        self._charge()
        self._write("end", state=state)
        if self._file is not None:
            self._file.close()
        self._file = None

    def _charge(self) -> None:
        now = self._clock()
        kind = self._spans[-1].kind
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._mark
        self._mark = now

    def _write(self, event: str, **more: str) -> None:
        """One line in one write, so that a kill leaves it whole or cuts it, but never mixes two."""
        if self._file is None:
            return
        line = {
            "event": event,
            "time": self._offset + self._mark,
            "step": self._step,
            "seconds": {kind: seconds for kind, seconds in self._seconds.items() if seconds},
            **more,
        }
        self._file.write(json.dumps(line).encode() + b"\n")
        self._last_line, self._seconds = self._mark, {}


@contextlib.contextmanager
def counting_compiles(recorder: Recorder) -> Iterator[None]:
    """Have JAX tell the recorder of all that it traces, lowers and compiles (or finds in its cache) in this block."""
    import jax  # only here: the table is printed without it

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            recorder.compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def _open_whole(path: Path) -> Any:
    """Open for appending without a buffer, after a last line that a kill has cut is cut off."""
    if path.is_file():
        with path.open("rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
    return path.open("ab", buffering=0)


# --- adding up --------------------------------------------------------------------------------------------------------


@dataclass
class Goodput:
    """Seconds by kind, all of KINDS; how many processes there were; how many of them ended without a last line; and
    how many steps were done again."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    starts: int = 0
    kills: int = 0
    repeated_steps: int = 0

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last line, pauses after "done" left out."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, as it stands in summary.json: shares add up to 1."""
        wall = self.wall
        return {
            "wall_seconds": wall,
            "shares": {kind: seconds / wall if wall else 0.0 for kind, seconds in self.seconds.items()},
            "seconds": dict(self.seconds),
            "starts": self.starts,
            "kills": self.kills,
            "repeated_steps": self.repeated_steps,
        }


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a goodput.jsonl that are whole; what a cut one stood for is then found as a gap."""
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if OBJECT.holds(line) and line.keys() >= _NEEDED and not wrong(line, _LINE):
            lines.append(line)
    return lines


@dataclass
class _Work:
    """Seconds by kind that led from step `first` to step `last`."""

    first: int
    last: int
    seconds: dict[str, float]


def add_up(lines: Sequence[Mapping[str, Any]]) -> Goodput:
    """What the lines of a run's goodput.jsonl come to.

    The seconds of all kinds add up to the time from the first line to the last one, pauses after "done" left out.
    """
    result = Goodput()
    total = result.seconds
    kept: list[_Work] = []  # what no later start has done again so far
    before: Mapping[str, Any] | None = None
    for line in lines:
        spent = {k: s for k, s in line.get("seconds", {}).items() if k in KINDS and NUMBER.holds(s)}
        start = line["event"] == "start"
        if before is not None and not (start and before.get("state") == "done"):
            total["restart"] += max(0.0, line["time"] - before["time"] - sum(spent.values()))
        if start:
            result.starts += 1
            result.kills += before is not None and before["event"] != "end"
            result.repeated_steps += max(0, *(work.last - line["step"] for work in kept), 0)
            for work in kept:
                _repeat(work, line["step"], total)
            kept = [work for work in kept if work.last <= line["step"]]
        for kind, seconds in spent.items():
            total[kind] += seconds
        first = line["step"] if start or before is None else before["step"]
        kept.append(_Work(first, line["step"], spent))
        before = line
    return result


def _repeat(work: _Work, step: int, total: dict[str, float]) -> None:
    """A process starts again from `step`: charge what was done beyond it to restart."""
    if work.last <= step:
        return
    lost = (work.last - max(work.first, step)) / (work.last - work.first) if work.last > work.first else 1.0
    for kind in _REPEATED:
        seconds = work.seconds.get(kind, 0.0) * lost
        total[kind] -= seconds
        total["restart"] += seconds
        if kind in work.seconds:
            work.seconds[kind] -= seconds
    work.last = max(work.first, step)


# --- what a person sees -----------------------------------------------------------------------------------------------


def table(facts: Mapping[str, Any]) -> Table:
    """The kinds that took time, from Goodput.to_dict."""
    starts, kills, again = (facts[key] for key in ("starts", "kills", "repeated_steps"))
    title = f"goodput {facts['shares']['step']:.1%} of {duration(facts['wall_seconds'])}"
    if starts > 1:
        title += f", {starts} starts ({kills} after a kill), {again} steps done again"
    result = Table(title=title, title_justify="left")
    for name in ("kind", "share", "time", "what it is"):
        result.add_column(name, justify="right" if name in ("share", "time") else "left")
    for kind, seconds in facts["seconds"].items():
        if facts["shares"][kind] >= LEAST_SHOWN:
            result.add_row(kind, f"{facts['shares'][kind]:.1%}", duration(seconds), KINDS[kind])
    return result


def duration(seconds: float) -> str:
    """For example 12.3 s, 5 min 02 s, 3 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.goodput", description="Say what the wall time of a run goes into."
    )
    parser.add_argument("workdir", help="the run's folder, or gs://BUCKET/FOLDER; the run may be going on")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        remote = bucket.is_url(args.workdir)
        workdir = mirror.fetch(args.workdir, only=(FILE,)) if remote else Path(args.workdir)
        facts = of_run(workdir).to_dict()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        Console(highlight=False).print(table(facts))
    return 0


def of_run(workdir: Path) -> Goodput:
    """Of a WORKDIR.

    Raises:
        UserError: it has no goodput.jsonl, or nothing in it can be read.
    """
    path = workdir / FILE
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: not there. Is {workdir} the --workdir of a run? Those of before there was this file have none"
        )
    lines = read(path)
    if not lines:
        raise UserError(f"{path}: no whole line in it; a run that goes on in {workdir} writes new ones")
    return add_up(lines)


if __name__ == "__main__":
    sys.exit(main())
