"""The HTTP side of a connection: a client that is slow to ask, or to take its answer, does not keep it."""

from __future__ import annotations

import json
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vflax.serve.errors import ApiError
from vflax.serve.settings import Settings

# Of the lines before a body, and of what may come between its chunks and behind it.
MAX_HEADER_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits. `sweep` must be called a few times a second.

    A request that comes before the one before it is answered is not taken (the connection ends with that answer, and
    the client asks again): for one that waits uvicorn stops reading, and then does not see that the client goes away.
    """

    def __init__(self, *args: Any, settings: Settings, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.parser: _Parser = _Parser(self)
        # As uvicorn has it: what comes behind a last request is no error.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._settings = settings
        self._asking_since: float | None = None  # a request's headers are awaited
        self._stuck_since: float | None = None  # what was sent has not been taken
        self._unread = 0  # bytes since the last that were headers' end, or a body's
        self._early = False  # a request came before the one before was answered; nothing more is taken
        self._thrown_away = 0  # bytes that came early, or of a body whose request was answered before

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._asking_since = time.monotonic()
        if len(self.connections) > self._settings.max_connections:
            self.refuse(ApiError(429, "too many connections", code="busy", retry_after=1))

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._early:
            self._throw_away(len(data))
            return
        if self._asking_since is None and (self.cycle is None or self.cycle.response_complete):
            self._asking_since = time.monotonic()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEADER_BYTES:
            self.refuse(ApiError(431, f"headers of more than {MAX_HEADER_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        if self.parser.offers_upgrade():  # it comes again without
            return
        self._asking_since, self._unread, self._thrown_away = None, 0, 0
        if self.cycle is not None and not self.cycle.response_complete:
            self._early, self.cycle.keep_alive = True, False
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        if self.cycle.response_complete:
            self._throw_away(len(body))
        elif not self._early:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        if not (self._early or self.parser.offers_upgrade()):
            super().on_message_complete()

    def head_without_upgrade(self) -> bytes:
        """The request's lines before its body, but for the one that offers another protocol."""
        kept = [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(kept))

    def _throw_away(self, size: int) -> None:
        self._thrown_away += size
        if self._thrown_away > self._settings.max_body_bytes:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self.refuse(ApiError(400, msg))

    def refuse(self, error: ApiError) -> None:
        """Answer what never became a request, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            content = json.dumps(error.body()).encode()
            headers = {**error.headers, "content-type": "application/json", "connection": "close"}
            headers["content-length"] = str(len(content))
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
            self.transport.write(STATUS_LINE[error.status] + lines.encode() + content)
        self.transport.close()

    def sweep(self, now: float) -> None:
        """End what takes too long. now: of time.monotonic."""
        if self._asking_since is not None and now - self._asking_since > self._settings.header_timeout:
            self.refuse(ApiError(408, "the request's headers did not come in time", code="too_slow"))
        if not self.transport.get_write_buffer_size():
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > self._settings.write_timeout:
            self.transport.abort()


class _Parser(httptools.HttpRequestParser):
    """httptools', for which a request that offers another protocol is one like any other.

    httptools takes what follows such a head for that protocol, so a body is lost. Clients do offer, as Java's own does
    HTTP/2 with its first request.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._connection = connection

    def offers_upgrade(self) -> bool:
        return self.should_upgrade() and self.get_method() != b"CONNECT"

    def feed_data(self, data: Any) -> None:
        while True:
            try:
                return super().feed_data(data)
            except httptools.HttpParserUpgrade as error:
                if not self.offers_upgrade():
                    raise
                data = self._connection.head_without_upgrade() + data[error.args[0] :]
