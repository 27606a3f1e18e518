"""A dead or hung process is noticed in under 20 s and named by all others, which end with 75."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import small

# One process of three that sum a number, over and over; process 1 fails when the file FAIL is there.
SCRIPT = """
import os, sys, time
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from configs.common import base
from vflax import cluster
from vflax.errors import UserError

port, process, workdir = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
options = base(1, "tiny").cluster
options.join = int(sys.argv[4])
try:
    with cluster.joined(options, coordinator=f"localhost:{port}", num_processes=3, process_id=process):
        sharding = NamedSharding(jax.make_mesh((3,), ("x",)), PartitionSpec("x"))
        one = jax.make_array_from_process_local_data(sharding, np.ones(1, np.float32))
        total = jax.jit(lambda x: x.sum())
        for step in range(int(sys.argv[5])):
            assert float(total(one)) == 3
            if step == 3:
                (workdir / f"ready-{process}").touch()
            if process == 1 and (workdir / "FAIL").exists():
                raise UserError("no image at all")
            time.sleep(0.005)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
"""


@dataclass
class Three:
    """Three processes and what became of them: {process: (seconds after the event, status)}."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ends: dict[int, tuple[float, int]] = field(default_factory=dict)

    def start(self, count: int = 3, join: int = 300, steps: int = 1_000_000) -> None:
        self.folder.mkdir()
        port = small.free_port()
        for i in range(count):
            with (self.folder / f"out-{i}").open("wb") as out:
                numbers = [str(number) for number in (join, steps)]
                command = [sys.executable, "-c", SCRIPT, str(port), str(i), str(self.folder), *numbers]
                self.processes.append(
                    subprocess.Popen(command, env=small.environment(), stdout=out, stderr=subprocess.STDOUT)
                )

    def wait_until_ready(self) -> None:
        while len(list(self.folder.glob("ready-*"))) < 3:
            assert all(p.poll() is None for p in self.processes), self.said(0)
            time.sleep(0.1)

    def said(self, process: int) -> str:
        return (self.folder / f"out-{process}").read_text(errors="replace")


EVENTS = {
    "killed worker": (1, signal.SIGKILL), "hung worker": (1, signal.SIGSTOP),
    "killed lead": (0, signal.SIGKILL), "hung lead": (0, signal.SIGSTOP),
    "failed worker": (1, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Three]]:
    """All of them at once, for they mostly wait."""
    folder = tmp_path_factory.mktemp("clusters")
    found = {name: Three(folder / name.replace(" ", "-")) for name in EVENTS}
    with contextlib.ExitStack() as stack:
        for three in found.values():
            three.start()
            for process in three.processes:
                stack.callback(process.wait)
                stack.callback(process.kill)
        for three in found.values():
            three.wait_until_ready()
        began = time.monotonic()
        for name, (victim, number) in EVENTS.items():
            if number is None:
                (found[name].folder / "FAIL").touch()
            else:
                found[name].processes[victim].send_signal(number)
        while time.monotonic() < began + 60 and any(len(t.ends) < 3 for t in found.values()):
            for three in found.values():
                for i, process in enumerate(three.processes):
                    if i not in three.ends and process.poll() is not None:
                        three.ends[i] = (time.monotonic() - began, process.returncode)
            if time.monotonic() > began + 25:  # whoever is hung goes on, as a host after a long pause
                for name in ("hung worker", "hung lead"):
                    found[name].processes[EVENTS[name][0]].send_signal(signal.SIGCONT)
            time.sleep(0.05)
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("event", [name for name, (_, number) in EVENTS.items() if number])
def test_who_is_gone_is_named_by_all_others_in_under_20_s(clusters: dict[str, Three], event: str):
    three, victim = clusters[event], EVENTS[event][0]
    for process in {0, 1, 2} - {victim}:
        seconds, status = three.ends[process]
        assert status == 75 and seconds < 20, (seconds, three.said(process))
        assert f"error: process {victim} (host {socket.gethostname()}) " in three.said(process)
        assert "run the same command again" in three.said(process)


@pytest.mark.slow
def test_a_process_that_hung_and_goes_on_ends_too_and_says_that_it_was_itself(clusters: dict[str, Three]):
    for event in ("hung worker", "hung lead"):
        three, victim = clusters[event], EVENTS[event][0]
        assert three.ends[victim][1] == 75, three.said(victim)
        assert f"error: process {victim} (host " in three.said(victim)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_its_reason_and_itself_with_1(clusters: dict[str, Three]):
    three = clusters["failed worker"]
    assert three.ends[1][1] == 1 and "error: no image at all" in three.said(1)
    for process in (0, 2):
        seconds, status = three.ends[process]
        assert status == 75 and seconds < 20, (seconds, three.said(process))
        assert "has ended: UserError: no image at all" in three.said(process)


# In a process of its own: JAX joins nobody once it has computed something.
REFUSED = """
import sys
from configs.common import base
from vflax import cluster
from vflax.errors import UserError

try:
    with cluster.joined(base(1, "tiny").cluster, **eval(sys.argv[1])):
        pass
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"coordinator": "localhost:1"}, "--coordinator needs --num_processes and --process_id"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "cannot be joined"),
        ({"detect": True}, "cannot be joined.*--coordinator=HOST:PORT"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_the_flags_to_give(arguments: dict, words: str):
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, repr(arguments)],
        env=small.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.search(words, done.stdout), (done.stdout, done.stderr)


@pytest.mark.slow
def test_a_process_whose_others_do_not_come_ends_with_75_and_says_where_to_look(tmp_path: Path):
    three = Three(tmp_path / "one")
    three.start(count=1, join=3)
    assert three.processes[0].wait(timeout=120) == 75, three.said(0)
    assert "have not come together" in three.said(0) and "config.cluster.join" in three.said(0)


@pytest.mark.slow
def test_all_leave_together_with_0_when_all_are_done(tmp_path: Path):
    three = Three(tmp_path / "all")
    three.start(steps=100)
    assert [p.wait(timeout=120) for p in three.processes] == [0, 0, 0], three.said(0)
