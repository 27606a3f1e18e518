"""What an operator sees: health, metrics, request ids and logs."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import Running, asks, png, raw, running, until
from vflax.generate.processor import Processor
from vflax.serve import log

SECRET = "a question that nobody else may read"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The server's log."""
    kept = {
        name: (lg.handlers, lg.propagate, lg.level)
        for name in ("vflax.serve", "uvicorn")
        if (lg := logging.getLogger(name))
    }
    stream = io.StringIO()
    log.write_to(stream)
    yield stream
    for name, (handlers, propagate, level) in kept.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def metrics(server: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def ask(server: Running, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"messages": asks(SECRET, png()), **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)


def test_health_is_ok_while_requests_are_taken(server: Running) -> None:
    found = httpx.get(f"{server.url}/health")
    assert found.status_code == 200 and found.json() == {"status": "ok"}


def test_metrics_count_requests_tokens_images_and_times(tiny: Processor) -> None:
    with running(FakeEngine(tiny)) as server:
        usage = ask(server).json()["usage"]
        ask(server, temperature=9)
        httpx.get(f"{server.url}/v1/{'x' * 50}")
        found = metrics(server)
        route = ("route", "/v1/chat/completions")
        assert found["vflax_http_requests_total", (route, ("status", "200"))] == 1
        assert found["vflax_http_requests_total", (route, ("status", "400"))] == 1
        assert found["vflax_http_requests_total", (("route", "other"), ("status", "404"))] == 1
        assert found["vflax_http_request_seconds_count", (route,)] == 2
        assert found["vflax_prompt_tokens_total", ()] == usage["prompt_tokens"]
        assert found["vflax_answer_tokens_total", ()] == usage["completion_tokens"]
        assert found["vflax_time_to_first_token_seconds_count", ()] == 1
        assert found["vflax_time_between_tokens_seconds_count", ()] == usage["completion_tokens"] - 1
        assert found["vflax_images_total", ()] == 1 and found["vflax_pages", ()] == 64
        assert found["vflax_finished_total", (("reason", "stop"),)] == 1


def test_metrics_tell_what_runs_and_who_went_away(tiny: Processor) -> None:
    with running(FakeEngine(tiny, pace=0.1, slots=1)) as server:
        with server.connect() as sock:
            sock.sendall(raw({"messages": asks(), "n": 2}))
            until(lambda: server.engine.stats().running == 1)
            found = metrics(server)
            assert found["vflax_running", ()] == 1 and found["vflax_waiting", ()] == 1
        until(lambda: metrics(server)["vflax_clients_gone_total", ()] == 1)
        until(lambda: metrics(server)["vflax_finished_total", (("reason", "cancelled"),)] == 2)


def test_a_clients_own_request_id_comes_back_if_it_is_well_formed(server: Running) -> None:
    assert ask(server, headers={"x-request-id": "my-1.x"}).headers["x-request-id"] == "my-1.x"
    made = {
        ask(server, headers={"x-request-id": odd}).headers["x-request-id"] for odd in ("a b", "x" * 200, '"}')
    }
    assert len(made) == 3 and all(re.fullmatch(r"req_[0-9a-f]{32}", one) for one in made)


def test_a_request_is_one_line_of_json_without_what_was_asked(tiny: Processor, lines: io.StringIO) -> None:
    with running(FakeEngine(tiny), api_keys=("the-key",)) as server:
        headers = {"x-request-id": "id-1", "authorization": "Bearer the-key"}
        usage = ask(server, headers=headers, clients_own=1, user=SECRET).json()["usage"]
        ask(server, headers={**headers, "x-request-id": "id-2"}, stop=SECRET, top_k=-7)
    assert SECRET not in lines.getvalue() and "the-key" not in lines.getvalue()
    assert "iVBOR" not in lines.getvalue()
    found = {one["request_id"]: one for one in map(json.loads, lines.getvalue().splitlines())}
    one = found["id-1"]
    assert one["level"] == "info" and one["status"] == 200 and one["path"] == "/v1/chat/completions"
    assert one["prompt_tokens"] == usage["prompt_tokens"]
    assert one["completion_tokens"] == usage["completion_tokens"]
    assert one["finish"] == ["stop"] and one["images"] == 1 and one["ignored"] == ["clients_own", "user"]
    assert one["seconds"] >= one["first_token_seconds"] > 0 and one["client"].startswith("key:")
    two = found["id-2"]
    assert two["status"] == 400 and two["param"] == "top_k" and two["error"] == "invalid_request"


def test_a_line_of_the_log_is_one_line_whatever_is_asked_for(server: Running, lines: io.StringIO) -> None:
    httpx.get(f"{server.url}/%0A%7B%22level%22:1%7D")
    until(lambda: lines.getvalue())
    (line,) = lines.getvalue().splitlines()
    assert json.loads(line)["status"] == 404


def test_browsers_of_other_origins_may_ask_only_where_it_is_allowed(server: Running, tiny: Processor) -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    url = "/v1/chat/completions"
    assert "access-control-allow-origin" not in httpx.options(server.url + url, headers=preflight).headers
    with running(FakeEngine(tiny), cors_origins=("https://a.example",)) as allowing:
        found = httpx.options(allowing.url + url, headers=preflight)
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(allowing.url + url, headers={**preflight, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
