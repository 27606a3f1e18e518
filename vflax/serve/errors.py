"""What a client is told when something is wrong, in the shape of OpenAI's protocol."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from vflax.serve.log import LOG

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    status: of HTTP.
    param: the field of the request that is wrong, as "messages[0].content"; None: none is.
    code: a short name that programs can look at.
    retry_after: seconds after which it may go well.
    close: the connection cannot go on, for what is left of the request was not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        if close:
            self.headers["connection"] = "close"

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """Nobody is there to take the answer."""


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it stands."""
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """Something broke here; what it was is in the log, not in the answer."""
    return ApiError(500, "internal error; its traceback is in the server's log", code="internal_error")


def too_late() -> ApiError:
    """The deadline has passed."""
    return ApiError(504, "the answer was not done by the deadline", code="deadline_exceeded")


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of an exception. One that nobody foresaw is logged here, with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return too_late()
    LOG.error("internal error", exc_info=error)
    return internal()


def draining() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
