"""Answers under way: who goes away, is slow, too late or too many holds no slot; the server ends gracefully."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import Running, answer_end, asks, free, raw, running, until
from vflax.generate.processor import Processor
from vflax.generate.request import Delta, OnDelta, Prompt, Sampling

LONG = "There are dogs and cats and birds. " * 40


def slow(tiny: Processor, **kw: Any) -> FakeEngine:
    """An engine whose answers take longer than any test."""
    return FakeEngine(tiny, lambda prompt: LONG, pace=0.2, max_length=8000, **kw)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_goes_away_frees_its_slots(tiny: Processor, stream: bool, path: str) -> None:
    with running(slow(tiny)) as server:
        body = {"messages": asks(), "prompt": "dogs", "stream": stream, "n": 3}
        with server.connect() as sock:
            sock.sendall(raw(body, path))
            until(lambda: server.engine.stats().running == 3)
        until(lambda: free(server.engine))
        until(lambda: server.service._places.held == 0)
        assert server.engine.stats().finished == {"cancelled": 3}


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(tiny: Processor) -> None:
    with running(slow(tiny, slots=1)) as server, server.connect() as first:
        first.sendall(raw({"messages": asks()}))
        until(lambda: server.engine.stats().running == 1)
        with server.connect() as second:
            second.sendall(raw({"messages": asks(), "stream": True}))
            until(lambda: server.engine.stats().waiting == 1)
        until(lambda: server.engine.stats().waiting == 0)
        assert server.engine.stats().running == 1


def test_a_half_closed_connection_is_one_that_has_gone(tiny: Processor) -> None:
    with running(slow(tiny)) as server, server.connect() as sock:
        sock.sendall(raw({"messages": asks(), "stream": True}))
        until(lambda: server.engine.stats().running == 1)
        sock.shutdown(1)
        until(lambda: free(server.engine))


@pytest.mark.parametrize("together", [True, False])
def test_a_client_that_goes_away_behind_a_second_request_frees_its_slot(
    tiny: Processor, together: bool
) -> None:
    with running(slow(tiny)) as server, server.connect() as sock:
        one = raw({"messages": asks()})
        sock.sendall(one + one if together else one)
        until(lambda: server.engine.stats().running == 1)
        sock.sendall(one)
        until(lambda: all(connection._early for connection in server.server.server_state.connections))
        sock.close()
        until(lambda: free(server.engine))
        assert server.engine.stats().finished == {"cancelled": 1}


def test_a_request_before_the_answer_to_the_one_before_is_not_taken_and_the_connection_says_so(
    tiny: Processor,
) -> None:
    engine = FakeEngine(tiny, pace=0.02)
    with running(engine) as server, server.connect() as sock:
        sock.sendall(raw({"messages": asks()}) * 3)
        found = answer_end(sock)
        assert found.count(b"HTTP/1.1 ") == 1 and b"It is a red circle." in found
        assert b"connection: close\r\n" in found
        assert len(engine.submitted) == 1


def test_what_is_sent_before_an_answer_is_not_taken_for_ever(tiny: Processor) -> None:
    with running(slow(tiny), max_body_bytes=100_000) as server, server.connect() as sock:
        sock.sendall(raw({"messages": asks()}) * 2)
        until(lambda: server.engine.stats().running == 1)
        with pytest.raises(OSError):
            for _ in range(1000):
                sock.sendall(bytes(1_000_000))
        until(lambda: free(server.engine))


def test_a_full_queue_says_when_to_come_back(tiny: Processor) -> None:
    with running(slow(tiny, slots=1), max_queue=1) as server:
        socks = [server.connect() for _ in range(2)]
        for sock in socks:
            sock.sendall(raw({"messages": asks()}))
        until(lambda: server.service._places.held == 2)
        with pytest.raises(openai.RateLimitError) as error:
            server.client().chat.completions.create(model="tiny", messages=asks())
        assert error.value.code == "queue_full" and int(error.value.response.headers["retry-after"]) >= 1
        for sock in socks:
            sock.close()
        until(lambda: server.service._places.held == 0)
        assert server.client().chat.completions.create(model="tiny", messages=asks(), max_tokens=1).choices


def test_never_more_requests_are_taken_than_there_are_places(tiny: Processor) -> None:
    engine = FakeEngine(tiny, pace=0.05, slots=2)
    with running(engine, max_queue=3) as server:

        def status(_: int) -> int:
            body = {"messages": asks(), "max_tokens": 3}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(status, range(12)))
        assert found.count(200) >= 5 and set(found) <= {200, 429}
        assert len(server.engine.submitted) == found.count(200)
        assert server.service._places.held == 0


def test_an_answer_that_misses_its_deadline_is_504_and_holds_no_slot(tiny: Processor) -> None:
    with running(slow(tiny), deadline=0.5) as server:
        with pytest.raises(openai.InternalServerError) as error:
            server.client().chat.completions.create(model="tiny", messages=asks())
        assert error.value.status_code == 504 and error.value.code == "deadline_exceeded"
        until(lambda: free(server.engine))


def test_a_stream_that_misses_its_deadline_ends_with_an_error(tiny: Processor) -> None:
    with running(slow(tiny)) as server:
        stream = server.client().chat.completions.create(
            model="tiny", messages=asks(), stream=True, extra_body={"deadline": 0.5}
        )
        with pytest.raises(openai.APIError, match="deadline") as error:
            list(stream)
        assert error.value.code == "deadline_exceeded"
        until(lambda: free(server.engine))


def test_a_clients_own_time_limit_frees_its_slot(tiny: Processor) -> None:
    with running(slow(tiny)) as server:
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.3).chat.completions.create(model="tiny", messages=asks())
        until(lambda: free(server.engine))


def test_a_client_that_does_not_read_is_cut_off(tiny: Processor) -> None:
    engine = FakeEngine(tiny, lambda prompt: LONG * 40, max_length=100_000)
    with running(engine, write_timeout=0.3) as server, server.connect() as sock:
        sock.setsockopt(1, 8, 4096)  # SO_RCVBUF: little is taken for it
        body = {"messages": asks(), "stream": True, "max_tokens": 60_000, "logprobs": True, "top_logprobs": 5}
        sock.sendall(raw(body))
        until(lambda: server.service.active == 0 and engine.submitted)
        until(lambda: free(engine))
        until(lambda: not server.server.server_state.connections)
        assert engine.stats().finished == {"cancelled": 1}


def test_a_body_that_comes_too_slowly_is_408(tiny: Processor) -> None:
    with running(FakeEngine(tiny), body_timeout=0.3) as server, server.connect() as sock:
        sock.sendall(raw({"messages": asks()})[:-5])
        found = answer_end(sock)
        assert found.startswith(b"HTTP/1.1 408") and b'"code":"too_slow"' in found


def test_headers_that_come_too_slowly_are_408(tiny: Processor) -> None:
    with running(FakeEngine(tiny), header_timeout=0.3) as server:
        for begun in (b"", b"POST /v1/completions HTTP/1.1\r\nhost:", b"\r\n"):
            with server.connect() as sock:
                sock.sendall(begun)
                assert answer_end(sock).startswith(b"HTTP/1.1 408")


def test_headers_without_end_are_refused(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 65_600)
        assert answer_end(sock).startswith(b"HTTP/1.1 431")


def test_what_is_not_http_is_refused_in_the_same_shape(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        found = answer_end(sock)
        assert found.startswith(b"HTTP/1.1 400") and b'{"error": {"message"' in found


@pytest.mark.parametrize("pieces", [1, 2, 400])
def test_a_client_that_offers_another_protocol_is_answered_in_this_one(server: Running, pieces: int) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    request = raw({"messages": asks()}).replace(b"host: x\r\n", b"host: x\r\n" + offer)
    size = -(-len(request) // pieces)
    with server.connect() as sock:
        for _ in range(2):  # its connection goes on
            for begin in range(0, len(request), size):
                sock.sendall(request[begin : begin + size])
            found = b""
            while not found.endswith(b"}}}"):
                piece = sock.recv(65536)
                assert piece, found
                found += piece
            assert found.startswith(b"HTTP/1.1 200") and b"It is a red circle." in found


def test_a_tunnel_is_refused(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer_end(sock).startswith(b"HTTP/1.1 400")


def test_a_body_that_nobody_reads_is_not_taken_for_ever(tiny: Processor) -> None:
    with running(FakeEngine(tiny), max_body_bytes=100_000, max_buffered_bytes=100_000) as server:
        sock = server.connect()
        sock.sendall(b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        with pytest.raises(OSError):
            for _ in range(1000):
                sock.sendall(bytes(1_000_000))
        sock.close()


def test_connections_are_limited(tiny: Processor) -> None:
    with running(FakeEngine(tiny), max_connections=2) as server:
        socks = [server.connect() for _ in range(2)]
        until(lambda: len(server.server.server_state.connections) == 2)
        with server.connect() as third:
            assert answer_end(third).startswith(b"HTTP/1.1 429")
        for sock in socks:
            sock.close()
        until(lambda: not server.server.server_state.connections)
        assert httpx.get(f"{server.url}/health").status_code == 200


class Breaking(FakeEngine):
    """An engine that fails at every answer's second token."""

    def submit(self, prompt: Prompt, sampling: Sampling, on_delta: OnDelta) -> Any:
        written: list[Delta] = []

        def breaking(delta: Delta) -> None:
            written.append(delta)
            if len(written) < 3:
                on_delta(delta if len(written) == 1 else Delta("", (), "failed"))

        return super().submit(prompt, sampling, breaking)


def test_an_engine_that_fails_at_a_request_is_500_or_an_error_in_the_stream(tiny: Processor) -> None:
    with running(Breaking(tiny)) as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(model="tiny", messages=asks())
        assert error.value.status_code == 500 and error.value.code == "internal_error"
        with pytest.raises(openai.APIError, match="internal error"):
            list(client.chat.completions.create(model="tiny", messages=asks(), stream=True))
        assert server.service._places.held == 0


def test_what_breaks_in_the_server_is_500_without_a_traceback_and_logged_with_one(
    tiny: Processor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(tiny)

    def broken(*args: Any) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(engine, "submit", broken)
    with running(engine) as server:
        for stream in (False, True):
            body = {"messages": asks(), "stream": stream}
            found = httpx.post(f"{server.url}/v1/chat/completions", json=body)
            assert found.status_code == 500 and found.json()["error"]["code"] == "internal_error"
            assert "secret" not in found.text and "Traceback" not in found.text
        assert server.service._places.held == 0
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


def test_an_engine_that_has_ended_makes_the_server_unhealthy(tiny: Processor) -> None:
    engine = FakeEngine(tiny)
    with running(engine) as server:
        engine.close()
        with pytest.raises(openai.InternalServerError) as error:
            server.client().chat.completions.create(model="tiny", messages=asks())
        assert error.value.status_code == 503 and error.value.code == "engine_closed"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.service._places.held == 0


def test_while_it_drains_what_runs_ends_and_what_is_new_is_503(tiny: Processor) -> None:
    engine = FakeEngine(tiny, pace=0.05)
    with running(engine) as server:
        answers: list[str] = []

        def ask() -> None:
            found = server.client().chat.completions.create(model="tiny", messages=asks())
            answers.append(found.choices[0].message.content or "")

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: engine.stats().running == 1)
        server.server.drain()
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        with pytest.raises(openai.InternalServerError) as error:
            server.client().chat.completions.create(model="tiny", messages=asks())
        assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
        thread.join(60)
        assert answers == ["It is a red circle."]
        until(lambda: server.server.should_exit)


def test_what_has_not_ended_when_the_drain_is_over_is_cancelled(tiny: Processor) -> None:
    with running(slow(tiny), drain_timeout=0.3) as server:
        stream = server.client().chat.completions.create(model="tiny", messages=asks(), stream=True)
        next(iter(stream))
        begun = time.monotonic()
        server.server.drain()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        until(lambda: free(server.engine))
        assert time.monotonic() - begun >= 0.3


def test_told_to_end_twice_the_server_ends_at_once(tiny: Processor) -> None:
    with running(slow(tiny), drain_timeout=1000) as server:
        with server.connect() as sock:
            sock.sendall(raw({"messages": asks(), "stream": True}))
            until(lambda: server.engine.stats().running == 1)
            server.server.handle_exit(signal.SIGTERM, None)
            until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            assert not server.server.should_exit
            server.server.handle_exit(signal.SIGTERM, None)
            answer_end(sock)
        until(lambda: free(server.engine))
