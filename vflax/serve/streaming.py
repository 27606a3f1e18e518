"""Answers that are sent as they are written: server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vflax.serve.answers import Bundle
from vflax.serve.errors import ApiError, ClientGone, as_api_error

T = TypeVar("T")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. It is cancelled as soon as the client goes away.

    receive: of a request whose body was read.

    Raises:
        ClientGone: the client went away first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait({task, gone})  # what they hold is given back before the request is over


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends each object that comes as an event, then [DONE]; after an error an event that holds it, and no [DONE].

    The bundle is left however it ends, so what nobody waits for is cancelled. A client that does not read holds back
    `send`; the connection cuts it off (vflax.serve.connection), which is seen here as its going away.

    seconds: until the deadline.
    on_error: told of an error that ends the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        bundle: Bundle,
        events: AsyncGenerator[dict[str, Any], None],
        seconds: float,
        on_error: Callable[[ApiError], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._bundle, self._events, self._seconds, self._on_error = bundle, events, seconds, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._bundle:
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds), contextlib.aclosing(self._events) as events:
                async for event in events:
                    await send(_event(json.dumps(event, ensure_ascii=False, separators=(",", ":"))))
                await send(_event("[DONE]"))
        except Exception as error:
            told = as_api_error(error)
            self._on_error(told)
            await send(_event(json.dumps(told.body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
