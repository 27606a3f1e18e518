"""A server on localhost that speaks the chat part of OpenAI's protocol, and misbehaves as a test asks it to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data_pipeline.synthesize.parsing import TYPES
from data_pipeline.synthesize.prompts import OURS, read_prompts


@dataclass
class Answer:
    """One answer. `body` is JSON or, as bytes, sent as it is; close_after: that many bytes of it, then the connection
    goes; delay: seconds before it; hold: wait for this event first; trickle: seconds between its bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    close_after: int | None = None
    delay: float = 0.0
    trickle: float = 0.0
    hold: threading.Event | None = None


def completion(text: str | None, finish: str = "stop", usage: Any = (100, 20), **message: Any) -> Answer:
    """A good one; usage is (prompt tokens, completion tokens), or None to say nothing of it."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "test-model",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
    }
    if usage is not None:
        body["usage"] = {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": usage[0] + usage[1],
        }
    return Answer(body=body)


def failure(status: int, message: str = "it failed", code: str | None = None, **headers: str) -> Answer:
    body = {"error": {"message": message, "type": code or "error", "code": code}}
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(frozen=True)
class Seen:
    body: dict[str, Any]
    authorization: str
    time: float

    @functools.cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()

    @property
    def query(self) -> str:
        """The text that is asked about."""
        return self.body["messages"][-1]["content"]


# Called with the request and how often the same body came before; in the order of arrival, one at a time.
Script = Callable[[Seen, int], Answer]


class Server:
    """url: for --base_url. seen: every request. answered: how often each body got a whole 200. most_at_once: requests
    that were being answered at the same time."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.answered: Counter[str] = Counter()
        self.most_at_once = 0
        self._arrived: Counter[str] = Counter()
        self._at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                server._handle(self)

            def do_GET(self) -> None:
                self.send_error(404)  # it has no list of models

            def log_message(self, *args: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *args: object) -> None:
                pass  # a client that went away

        self._http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers["content-length"]))
        seen = Seen(json.loads(content), handler.headers.get("authorization", ""), time.monotonic())
        with self._lock:
            before = self._arrived[seen.key]
            self._arrived[seen.key] += 1
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if handler.path == "/v1/chat/completions":
                answer = self.script(seen, before)
            else:
                answer = failure(404, f"no such path: {handler.path}")
        try:
            if answer.hold is not None:
                answer.hold.wait()
            time.sleep(answer.delay)
        finally:
            with self._lock:
                self._at_once -= 1
        self._send(handler, answer)
        if answer.status == 200 and answer.close_after is None:
            with self._lock:
                self.answered[seen.key] += 1

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        handler.send_response(answer.status)
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        if answer.trickle:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(answer.trickle)
            return
        handler.wfile.write(body[: answer.close_after])
        handler.wfile.flush()
        if answer.close_after is not None:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Server]:
    server = Server(script)
    thread = threading.Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()
        thread.join()


# ---------------------------------------------------------------------------------------------------------
# What data_pipeline.synthesize asks it

# A reply of each type that is taken; {id} makes it one about some picture.
REPLIES = {
    "conversation": "Question:\nWhat is in {id}?\n===\nAnswer:\nThing {id} is in it.\n===\n"
    "Question:\nIs it large?\n===\nAnswer:\nYes, it is large.\n===",
    "detail": "The picture shows thing {id}. " + "It stands in the middle of a wide and empty room. " * 5,
    "complex": "Question:\nWhy might it stand there alone?\n===\nAnswer:\nThing {id} is heavy. "
    + "It takes several people to move it to another place. " * 4,
}
_TYPES = {read_prompts(OURS, name).system: name for name in TYPES}


def kind(seen: Seen) -> str:
    """The type of data that a request with our prompts asks for."""
    return _TYPES[seen.body["messages"][0]["content"]]
