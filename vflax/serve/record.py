"""What is known of a request when it is over: a line in the log, and some numbers for /metrics."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from vflax.serve.errors import ApiError

_WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ROUTES = {
    "/", "/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models",
}  # fmt: skip
# Of a client that has gone before it was answered; nginx's.
CLIENT_GONE = 499


@dataclass
class Record:
    """A request. Nothing that its sender wrote goes into it but the id, its path and names of fields.

    facts: what the handler adds for the log.
    """

    id: str
    method: str
    path: str
    route: str
    start: float = field(default_factory=time.monotonic)
    status: int = 0
    first_token: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scope: Scope) -> Record:
        """The client's own id is taken where it is well-formed."""
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        own = given if _WELL_FORMED.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        return cls(own, scope["method"], scope["path"][:200], _route(scope["path"]))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def note(self, error: ApiError) -> None:
        """An error that the client was told of."""
        self.facts |= {"error": error.code or "invalid_request", "error_status": error.status}
        if error.param:
            self.facts["param"] = error.param[:200]

    def line(self) -> dict[str, Any]:
        """The fields of its line in the log."""
        facts: dict[str, Any] = {
            "request_id": self.id, "method": self.method, "path": self.path, "status": self.status,
            "seconds": round(self.seconds, 4), **self.facts,
        }  # fmt: skip
        if self.first_token is not None:
            facts["first_token_seconds"] = round(self.first_token, 4)
        return facts


def _route(path: str) -> str:
    """A path as a label: of few values, whatever is asked for."""
    for prefix in ("/v1/models/", "/page/"):
        if path.startswith(prefix):
            return prefix + "..."
    return path if path in _ROUTES else "other"
