"""Who may ask, how often and how much at a time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.requests import Request

from vflax.serve.errors import ApiError, ClientGone, bad

# What is said to a client that comes when all places are taken: it may be served as soon as one answer ends.
RETRY_SOON = 1.0
# Clients that a rate limit remembers. The one that was heard of longest ago is forgotten first.
_MOST_CLIENTS = 10_000


class Keys:
    """API keys, kept and compared as digests: the time that takes tells nothing of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> str:
        """A name for the key in `Bearer KEY`, for limits and logs; "" where no keys are needed.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip().encode("utf-8", "surrogateescape"))
        known = sum(hmac.compare_digest(given, digest) for digest in self._digests)  # all of them, always
        if scheme.lower() != "bearer" or not known:
            what = "the API key is not known here" if authorization else "an API key is needed"
            raise ApiError(401, f"{what}; send Authorization: Bearer KEY", code="invalid_api_key")
        return f"key:{given[:8]}"


class RateLimit:
    """A bucket for each client: it holds a minute's requests and fills at an even pace.

    Of a client only the moment is kept at which its bucket is full again (the generic cell rate algorithm). The
    in-memory stores of the `limits` package walk through all clients at each request.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, client: str) -> None:
        """Raises ApiError, 429 with the time to wait, where the bucket is empty."""
        if not self._pace:
            return
        now = self._clock()
        full_at = max(now, self._full_at.get(client, now)) + self._pace
        if full_at - now > 60 + 1e-6:
            wait = full_at - now - 60
            raise ApiError(
                429, f"more than {round(60 / self._pace)} requests a minute; wait {wait:.1f} s",
                code="rate_limit_exceeded", retry_after=wait,
            )  # fmt: skip
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        if len(self._full_at) > _MOST_CLIENTS:
            self._full_at.popitem(last=False)


class Places:
    """Places in the engine's slots and before them. Only the event loop's thread uses it, so nothing comes between."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, number: int) -> None:
        """Raises ApiError, 429, where there are not as many."""
        if self.held + number > self.most:
            raise ApiError(
                429, f"the queue is full: {self.held} answers are under way or wait", code="queue_full",
                retry_after=RETRY_SOON,
            )  # fmt: skip
        self.held += number

    def give(self, number: int = 1) -> None:
        self.held -= number


class Buffers:
    """Bytes of all requests that are being read. Only the event loop's thread uses it."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes as held until the end of the block.

        Raises:
            ApiError: 429, from that function, where all are held.
        """
        mine = 0

        def take(number: int) -> None:
            nonlocal mine
            if self.held + number > self.most:
                raise ApiError(
                    429,
                    "requests of too many bytes at a time",
                    code="busy",
                    retry_after=RETRY_SOON,
                    close=True,
                )
            mine += number
            self.held += number

        try:
            yield take
        finally:
            self.held -= mine


async def read_body(request: Request, *, most: int, seconds: float, take: Callable[[int], None]) -> bytes:
    """A request's body.

    Args:
        most: bytes.
        seconds: in which all of it must come.
        take: told of all bytes that are kept.

    Raises:
        ApiError: 413 over `most`, 408 when it takes longer, 415 for another type than JSON.
        ClientGone: the client went away.
    """
    # Any page of the web may send other types, or none, to a server on its reader's own machine. For this one a browser
    # asks first (CORS).
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type: send application/json", code="unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if not (length.isdecimal() and len(length) < 19):
        raise bad("content-length: expected a number of bytes")
    chunks, size, more = [], 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                if max(size, int(length)) > most:
                    await _discard(request, most if more else 0)
                    raise ApiError(
                        413, f"the request is larger than {most} bytes", code="request_too_large", close=True
                    )
                take(len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(
            408, f"the request did not come within {seconds:g} s", code="too_slow", close=True
        ) from None
    return b"".join(chunks)


async def _discard(request: Request, left: int) -> None:
    """Read on for a moment: most clients look for an answer only when they have sent all."""
    try:
        async with asyncio.timeout(2):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
