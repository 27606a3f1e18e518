"""uvicorn's server, which is told to end in two steps, and is there before its model is."""

from __future__ import annotations

import functools
import socket
import time
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vflax.errors import UserError
from vflax.serve.connection import Connection
from vflax.serve.errors import ApiError
from vflax.serve.service import Service
from vflax.serve.settings import Settings

# Seconds for what is left to be sent when all answers have ended.
_LAST_BYTES = 5
_SEND_BUFFER = 128 * 1024


class Doorway:
    """Stands for the application, and says 503 until there is one."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            return await self.app(scope, receive, send)
        headers = {"retry-after": "5"}
        if scope["path"] == "/health":
            return await JSONResponse({"status": "starting"}, 503, headers)(scope, receive, send)
        error = ApiError(503, "the model is being loaded", code="starting", retry_after=5)
        return await error.response()(scope, receive, send)


class Server(uvicorn.Server):
    """Told to end (SIGTERM, Ctrl-C), it takes no more requests, lets those under way end, and ends itself.

    Told twice, it ends at once.

    service: None until the model is there.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Connection, settings=settings),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=list(settings.trusted_proxies),
                timeout_graceful_shutdown=_LAST_BYTES,
            )
        )
        self.service: Service | None = None
        self._settings = settings
        self._told_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of a signal. uvicorn's own would raise it again when all is done, and the status would not be 0."""
        if self._told_at is not None:
            self.should_exit = self.force_exit = True
        self.drain()

    def drain(self) -> None:
        """End when the answers under way have ended. Of any thread."""
        self._told_at = self._told_at or time.monotonic()
        if self.service is None:
            self.should_exit = True
        else:
            self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.sweep(now)
        if self._told_at is not None and self.service is not None:
            late = now - self._told_at > self._settings.drain_timeout
            if late:
                self.service.stop()
            self.should_exit |= late or not self.service.active
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is found before minutes go into a model.

    Raises:
        UserError: naming the flags.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port={port}: from 0 (any that is free) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. What a client does not read then soon holds up what is sent, and is noticed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.bind(address)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error.strerror})") from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
