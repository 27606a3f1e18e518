"""Whether an endpoint is there, as far as asking costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vflax.endpoint.account import Account, Tokens
from vflax.endpoint.asking import Asker, Request, Stop
from vflax.endpoint.responses import Responses, open_nothing
from vflax.endpoint.session import Endpoint, _ask_all, ask_all
from vflax.errors import UserError


@contextlib.contextmanager
def telling(answers: dict[str, tuple[int, object]]) -> Iterator[str]:
    """The address of a server that gives these to GET, by path, and 404 else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, {"error": {"message": "no such path"}}))
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 1, "owned_by": "me"}


LISTED = {"/v1/models": (200, {"object": "list", "data": [model("one"), model("two")]})}


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param({}, id="tells no models"),
        pytest.param(
            {"/v1/models": (403, {"error": {"message": "this key may only chat"}})}, id="may not tell"
        ),
        pytest.param({"/v1/models": (200, {"models": []})}, id="tells something else"),
        pytest.param({**LISTED, "/v1/models/judge": (200, model("judge"))}, id="knows more than it lists"),
        pytest.param({"/v1/models": (200, {"object": "list", "data": [model("judge")]})}, id="lists it"),
    ],
)
def test_an_endpoint_that_may_have_the_model_is_right(answers: dict[str, tuple[int, object]]) -> None:
    with telling(answers) as url:
        Endpoint("judge", url).check()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (LISTED, "has no model judge; it has one, two"),
        ({"/v1/models": (401, {"error": {"message": "who are you"}})}, "refuses the key in OPENAI_API_KEY"),
    ],
)
def test_an_endpoint_that_cannot_answer_is_told(answers: dict[str, tuple[int, object]], said: str) -> None:
    with telling(answers) as url, pytest.raises(UserError, match=said):
        Endpoint("judge", url).check()


def test_an_address_where_nobody_listens_is_told() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1 cannot be reached .*start what serves it"):
        Endpoint("judge", "http://127.0.0.1:9/v1").check()


def test_afterwards_signals_do_what_they_did_before() -> None:
    async def settle(asker: Asker, job: object) -> str | None:
        return ""

    def own(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, own) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open_nothing() as responses:
            account = Account(None, None, Tokens(), Tokens())
            endpoint = Endpoint("m", "http://127.0.0.1:9/v1")
            ask_all(endpoint, responses, account, [1, 2], 2, settle, show_progress=False)
        assert [signal.getsignal(number) for number in before] == [own, own]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_full_disk_lets_no_request_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget has room for one at a time: the second waits for the first, whose loss cannot be written down."""

    async def full(self: Responses, key: str, why: str, bound: Tokens) -> None:
        await asyncio.sleep(0)
        raise UserError("the disk is full")

    async def settle(asker: Asker, job: int) -> str | None:
        message = {"role": "user", "content": f"word {job}"}
        return await asker.ask(Request("m", [message], {"max_tokens": 100}, 0)) and ""

    monkeypatch.setattr(Responses, "put_lost", full)
    silent = socket.create_server(("127.0.0.1", 0))  # takes what is sent, and says nothing
    try:
        endpoint = Endpoint(
            "m", f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout=0.3, retries=0, price_in=1, price_out=1,
            budget=150 / 1e6,
        )  # fmt: skip
        with open_nothing() as responses:
            account = Account(endpoint.prices, endpoint.budget, Tokens(), Tokens())

            async def bounded() -> Stop:
                asked = _ask_all(endpoint, responses, account, [1, 2], 2, settle, False)
                return (await asyncio.wait_for(asked, 10))[1]

            stop = asyncio.run(bounded())
    finally:
        silent.close()
    assert stop.reason == "the disk is full"
