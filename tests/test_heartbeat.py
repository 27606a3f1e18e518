"""Who is silent too long is named, and all others end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from vflax import heartbeat
from vflax.heartbeat import Heartbeat

TIMEOUT = 1.0


class Store:
    """JAX's key-value store; `silent` processes reach it no more, `hangs` for ever, or it is `down`."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.hangs = threading.Event()
        self.down = False

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self._reached()
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        self._reached()
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def _reached(self) -> None:
        if self.hangs.is_set():
            threading.Event().wait()
        if self.down:
            raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")


class Ended(BaseException):
    pass


class Cluster:
    """Heartbeats of several processes in one."""

    def __init__(self, count: int) -> None:
        self.store = Store()
        self.ended: dict[int, tuple[str, float]] = {}
        self.beats = [Heartbeat(self.store, i, count, TIMEOUT) for i in range(count)]
        self.began = time.monotonic()

    def give_up(self, reason: str, hang: bool = False) -> None:
        process = int(threading.current_thread().name.rsplit(" ", 1)[-1])
        self.beats[process]._tell(reason, hang)
        self.ended[process] = (reason, time.monotonic() - self.began)
        raise Ended

    def start(self) -> None:
        for i, beat in enumerate(self.beats):
            for work in (beat._speak, beat._judge):
                threading.Thread(target=self._quietly, args=(work,), name=f"beat {i}", daemon=True).start()

    def _quietly(self, work) -> None:
        with contextlib.suppress(Ended):
            work()

    def wait(self, count: int, seconds: float = 6 * TIMEOUT) -> dict[int, str]:
        """The reasons of those that ended: all of `count`, or as many as there are after some seconds."""
        end = time.monotonic() + seconds
        while len(self.ended) < count and time.monotonic() < end:
            time.sleep(0.02)
        return {i: reason for i, (reason, _) in self.ended.items()}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(3)
    monkeypatch.setattr(heartbeat, "give_up", cluster.give_up)
    monkeypatch.setattr(heartbeat, "GRACE", 0.5)
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "node-7")
    yield cluster
    for beat in cluster.beats:
        beat._stop.set()


def silence(cluster: Cluster, process: int) -> None:
    cluster.beats[process]._stop.set()


def test_all_know_each_other_by_name_when_the_first_goes_on(cluster: Cluster):
    known = []

    def come(process: int) -> None:
        time.sleep(0.1 * process)
        cluster.beats[process]._greet()
        known.append({peer.name for peer in cluster.beats[process]._peers.values()})

    threads = [threading.Thread(target=come, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lead = {"process 0 (host node-7)"}
    assert sorted(known, key=len) == [lead, lead, {"process 1 (host node-7)", "process 2 (host node-7)"}]


@pytest.mark.parametrize("hangs", [False, True])
def test_who_does_not_come_or_a_store_that_hangs_is_not_waited_for_longer_than_the_grace(cluster, hangs):
    if hangs:
        cluster.store.hangs.set()
    began = time.monotonic()
    cluster.beats[0]._greet()
    assert 0.5 <= time.monotonic() - began < 2


def test_nobody_ends_while_all_speak(cluster: Cluster):
    cluster.start()
    assert cluster.wait(1, seconds=2 * TIMEOUT) == {}


def test_a_silent_worker_is_named_by_the_lead_and_by_the_other_worker(cluster: Cluster):
    cluster.start()
    cluster.wait(1, seconds=0.5 * TIMEOUT)
    silence(cluster, 1)
    ends = cluster.wait(2)
    assert set(ends) == {0, 2}
    for reason in ends.values():
        assert reason.startswith("process 1 (host node-7) has not been heard of for 1 s")


def test_a_worker_that_never_spoke_is_named_without_a_host(cluster: Cluster):
    silence(cluster, 2)
    cluster.start()
    assert cluster.wait(2)[0].startswith("process 2 (host unknown: it never spoke) has not been heard of")


@pytest.mark.parametrize("how", ["hangs", "down"])
def test_a_lead_whose_store_does_not_answer_is_named_by_all_workers(cluster: Cluster, how: str):
    cluster.start()
    cluster.wait(1, seconds=0.5 * TIMEOUT)
    silence(cluster, 0)
    cluster.store.hangs.set() if how == "hangs" else setattr(cluster.store, "down", True)
    ends = cluster.wait(2)
    assert set(ends) == {1, 2}
    assert all(r.startswith("process 0 (host node-7) has not been heard of") for r in ends.values())


def test_the_lead_stays_until_the_workers_have_read_why(cluster: Cluster):
    cluster.start()
    cluster.wait(1, seconds=0.5 * TIMEOUT)
    silence(cluster, 1)
    cluster.wait(2)
    assert cluster.ended[2][1] < cluster.ended[0][1]


def test_who_has_said_goodbye_is_not_missed(cluster: Cluster):
    cluster.start()
    cluster.wait(1, seconds=0.5 * TIMEOUT)
    cluster.beats[1].leave()
    cluster.beats[0].leave()
    assert cluster.wait(1, seconds=2 * TIMEOUT) == {}


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_of_one_process_ends_the_others_who_name_it_and_the_error(cluster: Cluster, process: int):
    cluster.start()
    cluster.wait(1, seconds=0.5 * TIMEOUT)
    cluster.beats[process].leave("UserError: no such image")
    ends = cluster.wait(2)
    assert set(ends) == {0, 1, 2} - {process}
    expected = f"process {process} (host node-7) has ended: UserError: no such image"
    assert set(ends.values()) == {expected}


def test_a_process_that_stood_still_itself_blames_nobody_else(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    real = time.monotonic
    cluster.start()
    cluster.wait(1, seconds=0.5 * TIMEOUT)
    monkeypatch.setattr(time, "monotonic", lambda: real() + 100)  # as after SIGSTOP and SIGCONT
    while len(cluster.ended) < 3 and real() < cluster.began + 10:
        time.sleep(0.02)
    for process, (reason, _) in cluster.ended.items():
        assert reason.startswith(f"process {process} (host node-7), this one, stood still for 100 s")
    assert len(cluster.ended) == 3


def test_a_store_that_hangs_does_not_hold_up_the_end(cluster: Cluster):
    cluster.store.hangs.set()
    began = time.monotonic()
    cluster.beats[0]._tell("process 1 is gone", False)
    cluster.beats[1]._tell("a step hangs", True)
    assert time.monotonic() - began < 5


def test_what_is_known_when_jax_comes_first(cluster: Cluster):
    lead, worker = cluster.beats[0], cluster.beats[1]
    assert worker.explain(lead_answers=True) is None
    assert "process 0" in str(worker.explain(lead_answers=False))
    worker._judged -= 2 * TIMEOUT  # stood still, as all its threads did
    assert "process 1 (host node-7), this one, stood still" in str(worker.explain(lead_answers=True))
    lead._peers[2].heard -= 0.4 * TIMEOUT
    assert str(lead.explain(lead_answers=True)).startswith("process 2")
    lead._stop.set()
    assert lead.explain(lead_answers=True) is None, "it has left and listens to nobody"
    lead.verdict = "process 1 is gone"
    assert lead.explain(lead_answers=True) == "process 1 is gone"
