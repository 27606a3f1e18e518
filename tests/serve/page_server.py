"""A server on localhost for tests of the chat page: its files, and answers that a test has written beforehand."""

from __future__ import annotations

import contextlib
import json
import mimetypes
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from vflax.serve.page_files import FOLDER, POLICY

CONFIG = {
    "model": "tiny-chat",
    "max_length": 2048,
    "max_images": 4,
    "max_image_bytes": 20 * 2**20,
    "max_image_pixels": 10_000,
    "max_request_bytes": 8 * 2**20,
    "defaults": {"temperature": 0.2, "top_p": 1.0, "max_tokens": 512},
    "needs_key": False,
}


@dataclass
class Answer:
    """One answer to /v1/chat/completions.

    pieces: of its text; each counts as a token. hold: so many of them are sent, then `PageServer.release` is waited
        for; None: all at once.
    end: how a stream ends: well, with an event that holds an error, or with the connection cut off.
    status, message, param, code, headers: of an error that comes in place of a stream.
    """

    pieces: Sequence[str] = ("It is ", "a **red** ", "circle.")
    hold: int | None = None
    end: Literal["done", "error", "drop"] = "done"
    finish: str = "stop"
    status: int = 200
    message: str = "it failed"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """A request for an answer, as it came."""

    body: dict[str, Any]
    key: str | None


class PageServer(ThreadingHTTPServer):
    """The server. Answers are taken from `answers`, first come first served; when there are none, `Answer()` is given.

    asked: the requests for answers; taken: set when one of them has its answer; left: set when a client went away
        before its answer was complete.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()

    def reset(self) -> None:
        """As it was at its start."""
        self.config: dict[str, Any] = dict(CONFIG)
        self.answers: list[Answer] = []
        self.asked: list[Asked] = []
        self.release = threading.Event()
        self.taken = threading.Event()
        self.left = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no news."""


@contextlib.contextmanager
def serving() -> Iterator[PageServer]:
    """A server that runs."""
    with PageServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/page/config.json":
            return self._send_json(200, self.server.config)
        file = FOLDER / (path.removeprefix("/page/") if path != "/" else "index.html")
        if not file.is_file() or FOLDER not in file.resolve().parents:
            return self._send_json(404, {"error": {"message": f"{path}: not found"}})
        return self._send(200, mimetypes.guess_type(file.name)[0] or "text/plain", file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            return self._send_json(404, {"error": {"message": f"{self.path}: not found"}})
        server = self.server
        server.asked.append(Asked(body, self.headers.get("authorization")))
        answer = server.answers.pop(0) if server.answers else Answer()
        server.taken.set()
        if answer.status != 200:
            error = {"message": answer.message, "type": "error", "param": answer.param, "code": answer.code}
            return self._send_json(answer.status, {"error": error}, answer.headers)
        try:
            return self._stream(answer)
        except OSError:
            server.left.set()
            self.close_connection = True

    def _stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._event(_chunk({"role": "assistant", "content": ""}))
        for number, piece in enumerate(answer.pieces):
            if number == answer.hold:
                self._wait()
            self._event(_chunk({"content": piece}))
        if answer.hold is not None and answer.hold >= len(answer.pieces):
            self._wait()
        if answer.end == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if answer.end == "error":
            self._event({"error": {"message": answer.message, "type": "server_error", "code": answer.code}})
        else:
            self._event(_chunk({}, answer.finish))
            number = len(answer.pieces)
            usage = {"prompt_tokens": 70, "completion_tokens": number, "total_tokens": 70 + number}
            self._event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
            self._write(b"data: [DONE]\n\n")
        self._write(b"")

    def _wait(self) -> None:
        """For `release`; raises ConnectionError when the client goes away first."""
        while not self.server.release.wait(0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionError("the client has gone")

    def _event(self, value: dict[str, Any]) -> None:
        self._write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())

    def _write(self, data: bytes) -> None:
        """A chunk of HTTP's; an empty one is the last."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), headers)

    def _send(self, status: int, kind: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        told = {"content-type": kind, "content-length": str(len(data)), "content-security-policy": POLICY}
        told |= {"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}
        for name, value in (told | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "tiny-chat",
        "choices": [choice],
    }
