"""Killed with SIGKILL, a server leaves nothing behind that the next one trips over."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.process import ServerProcess, write_model
from tests.serve.running import asks, png, until
from tests.serve.test_main import free_port

pytestmark = pytest.mark.slow

GOOD = {"messages": asks("What is this?", png()), "temperature": 0, "max_tokens": 16, "logprobs": True}
# Answers that do not end before the server does.
LONG = {"messages": asks("Tell me more.", png()), "max_tokens": 300, "ignore_eos": True, "n": 2}


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Of each file a digest, and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files
    }


def choices(url: str) -> Any:
    response = httpx.post(f"{url}/v1/chat/completions", json=GOOD, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def ask_until_it_breaks(url: str, stream: bool) -> Exception:
    """Ask for one long answer after another."""
    try:
        while True:
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json={**LONG, "stream": stream}, timeout=60
            ) as own:
                assert own.status_code == 200
                own.read()
    except httpx.HTTPError as error:
        return error


def test_killed_under_load_its_clients_see_errors_and_the_next_one_on_its_port_answers_as_it_did(
    tmp_path: Path,
) -> None:
    model, port = tmp_path / "model", free_port()
    write_model(model)
    before = contents(model)
    with ServerProcess(model, tmp_path / "log", f"--port={port}") as server, ThreadPoolExecutor(8) as pool:
        expected = choices(server.url)
        clients = [pool.submit(ask_until_it_breaks, server.url, number % 2 == 0) for number in range(8)]
        until(lambda: server.numbers()["vflax_running"] == 8)
        server.kill()
        errors = [client.result(60) for client in clients]
    assert all(isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError) for error in errors), errors
    assert contents(model) == before
    with ServerProcess(model, tmp_path / "log", f"--port={port}") as server:
        assert server.port == port
        assert choices(server.url) == expected
        assert server.idle() and server.complaints() == []
    assert contents(model) == before


def test_killed_while_it_starts_it_can_be_started_again(tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    write_model(model)
    before = contents(model)
    for seconds in (0.5, 3, 6):  # imports, reads weights, compiles; elsewhere on a slow machine
        server = ServerProcess(model, tmp_path / "log", cache=cache)
        server.start()
        time.sleep(seconds)
        server.kill()
    with ServerProcess(model, tmp_path / "log", cache=cache) as server:
        assert choices(server.url)
        assert contents(model) == before
