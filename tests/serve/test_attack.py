"""Ten thousand requests that nobody should send, to the real server of a small model in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.serve.attackers import GOOD, Attackers, ask_patiently
from tests.serve.attacks import MAX_BODY, MAX_CHOICES, MAX_IMAGE, MAX_PIXELS
from tests.serve.process import ServerProcess, write_model
from tests.serve.running import until

pytestmark = pytest.mark.slow

SEED, NUMBER, WARM = 6, 10_000, 1_000
PLACES = 16 * MAX_CHOICES
FLAGS = (
    f"--max-body-bytes={MAX_BODY}", f"--max-buffered-bytes={16 * MAX_BODY}", f"--max-image-bytes={MAX_IMAGE}",
    f"--max-image-pixels={MAX_PIXELS}", f"--max-choices={MAX_CHOICES}", "--slots=8", f"--max-queue={PLACES - 8}",
    "--header-timeout=2", "--body-timeout=2", "--write-timeout=2", "--default-max-tokens=24",
)  # fmt: skip


@dataclass
class Attacked:
    """A server after all attacks, and what was measured: bytes in memory and open files after the first ones."""

    server: ServerProcess
    attackers: Attackers
    memory: int
    files: int


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    folder = tmp_path_factory.mktemp("attacked")
    write_model(folder / "model")
    with ServerProcess(folder / "model", folder / "log", *FLAGS) as server:
        attackers = Attackers(server.port, SEED)
        attackers.send(range(WARM))
        server.wait_until_idle()
        found = Attacked(server, attackers, server.memory(), server.open_files())
        attackers.send(range(WARM, NUMBER))
        print(f"seed {SEED}: {dict(attackers.statuses)}")
        yield found


def test_no_attack_breaks_the_server_or_is_left_without_an_answer(attacked: Attacked) -> None:
    wrong = attacked.attackers.wrong
    assert not wrong, f"{len(wrong)} of {NUMBER}, among them:\n" + "\n".join(wrong[:5])


def test_many_attacks_reach_the_engine_and_refusals_of_all_kinds_come(attacked: Attacked) -> None:
    numbers = attacked.server.numbers()
    finished = sum(count for name, count in numbers.items() if name.startswith("vflax_finished_total"))
    assert finished > NUMBER / 3 and numbers["vflax_images_total"] > NUMBER / 20
    came = {status for status in range(600) if answered(numbers, status)}
    assert {200, 400, 404, 405, 408, 413, 415, 499, 504} <= came
    assert attacked.attackers.statuses[431]  # of what never became a request, only the client knows


def test_good_requests_in_between_have_the_answer_of_the_first(attacked: Attacked) -> None:
    assert attacked.attackers.good
    assert asyncio.run(ask_patiently(attacked.server.url, GOOD)) == attacked.attackers.good


def test_no_slot_page_or_open_file_stays_held(attacked: Attacked) -> None:
    attacked.server.wait_until_idle()
    until(lambda: attacked.server.open_files() <= attacked.files)


def test_all_places_and_all_room_for_bodies_are_free_again(attacked: Attacked) -> None:
    attacked.server.wait_until_idle()
    padding = " " * (MAX_BODY - 1_000)
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "user": padding,
        "n": MAX_CHOICES,
        "max_tokens": 1,
    }

    async def all_at_once() -> list[int]:
        asked = (ask_patiently(attacked.server.url, body) for _ in range(PLACES // MAX_CHOICES))
        return [len(choices) for choices in await asyncio.gather(*asked)]

    before = answered(attacked.server.numbers(), 429)
    assert sum(asyncio.run(all_at_once())) == PLACES
    assert answered(attacked.server.numbers(), 429) == before


def test_nothing_but_refusals_is_in_the_log(attacked: Attacked) -> None:
    assert attacked.server.complaints() == []


def test_memory_is_what_it_was_after_the_first_thousand(attacked: Attacked) -> None:
    attacked.server.wait_until_idle()
    now = attacked.server.memory()
    print(f"memory: {attacked.memory / 2**20:.0f} MiB after {WARM}, {now / 2**20:.0f} MiB after {NUMBER}")
    assert now <= 1.05 * attacked.memory


def test_told_to_end_it_ends_with_status_0(attacked: Attacked) -> None:
    assert attacked.server.end() == 0


def answered(numbers: dict[str, float], status: int) -> float:
    """How many requests had this status."""
    label = f'status="{status}"'
    return sum(count for name, count in numbers.items() if "http_requests_total" in name and label in name)
