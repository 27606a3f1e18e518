"""The soak: a minute of it, and that it sees what it is there for."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import Any

import pytest

from tests.generate.fake_engine import FakeEngine
from tests.serve import soak
from tests.serve.running import running
from tests.serve.soak import SLOTS, Clients, Sample, Soaked
from vflax.generate.processor import Processor


@pytest.mark.slow
def test_after_a_minute_at_full_slots_all_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main(["--seconds=60"])
    told = capsys.readouterr()
    assert status == 0, told.out + told.err
    assert "tokens/s by thirds" in told.out and "memory: " in told.out


def soaked(**fields: Any) -> Soaked:
    """A soak of half a minute in which all went well, but for these fields."""
    samples = [Sample(at, 100 * at, SLOTS) for at in range(31)]
    good: dict[str, Any] = {"samples": samples, "memory": (1000, 1049), "kinds": Counter(whole=2000)}
    return Soaked(**good | fields)


def test_a_soak_in_which_all_went_well_has_no_problem() -> None:
    assert soaked().problems() == [] and soaked().rates() == [100, 100, 100]


SLOWER = [Sample(at, 100 * at if at < 20 else 2000 + 49 * (at - 20), SLOTS) for at in range(31)]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"samples": SLOWER}, "49 tokens/s in the last third, 100 in the first"),
        ({"samples": [Sample(at, 100 * at, SLOTS / 2) for at in range(31)]}, "50% of the slots ran"),
        ({"memory": (1000, 1051)}, "memory grew"),
        ({"memory": (0, 0), "kinds": Counter(whole=30)}, "30 requests: too few"),
        ({"wrong": ["late request 3: 500"]}, "1 wrong answers, as: late request 3: 500"),
    ],
)
def test_a_soak_tells_each_problem(fields: dict[str, Any], problem: str) -> None:
    (found,) = soaked(**fields).problems()
    assert problem in found


@pytest.mark.parametrize("changes", [False, True])
def test_its_clients_see_an_answer_that_is_not_the_one_of_before(tiny: Processor, changes: bool) -> None:
    number, found = itertools.count(), Soaked()
    engine = FakeEngine(tiny, lambda prompt: f"There are {next(number) if changes else 5} birds.", slots=64)
    with running(engine, max_queue=1000) as server:
        clients = Clients(server.url, 0, 0, found)
        while found.kinds.total() + len(found.wrong) < 100:
            clients.end = time.monotonic() + 0.3
            asyncio.run(clients.run())
    assert bool(found.wrong) == changes, found.wrong[:1]


def test_a_soak_too_short_to_tell_anything_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--seconds=nan"]) == 1
    assert capsys.readouterr().err == "error: --seconds=nan: at least 10\n"
