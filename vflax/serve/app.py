"""The server's routes, and what stands around all of them."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vflax.generate.processor import Processor
from vflax.generate.request import Answering
from vflax.serve import page_files
from vflax.serve.errors import ApiError, ClientGone, as_api_error
from vflax.serve.log import LOG
from vflax.serve.record import CLIENT_GONE, Record
from vflax.serve.service import Service
from vflax.serve.settings import Settings


def build_app(engine: Answering, processor: Processor, settings: Settings) -> FastAPI:
    """The server as an ASGI application; `app.state.service` is what it stands on."""
    service = Service(engine, processor, settings)
    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(title="vflax", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _not_found)
    _add_routes(app, service)
    if settings.page:
        page_files.add_routes(app, service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Envelope, service=service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.text, methods=["POST"], response_model=None)

    def model(name: str) -> dict[str, object]:
        known = {"id": name, "object": "model", "created": service.created, "owned_by": "vflax"}
        return {**known, "max_model_len": service.engine.max_length}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, object]:
        service.keys.check(request.headers.get("authorization"))
        return {"object": "list", "data": [model(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> dict[str, object]:
        service.keys.check(request.headers.get("authorization"))
        if name not in service.names:
            known = ", ".join(service.names)
            raise ApiError(404, f"this server has {known}", param="model", code="model_not_found")
        return model(name)

    @app.get("/health")
    async def health() -> Response:
        ready = service.state == "ready"
        headers = {} if ready else {"retry-after": "5"}
        return JSONResponse({"status": "ok" if ready else service.state}, 200 if ready else 503, headers)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if service.settings.protect_metrics:
            service.keys.check(request.headers.get("authorization"))
        content, media_type = service.metrics.text(request.headers.get("accept"))
        return Response(content, media_type=media_type)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.record.note(error)
    return error.response()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    told.headers |= error.headers or {}
    return await _told(request, told)


class Envelope:
    """Around every request: its id, what it is counted and logged as, and an answer where something broke."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        record = Record.of(scope)
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], *self._headers(record)]}
            await send(message)

        self._service.active += 1
        try:
            await self._app(scope, receive, sending)
        except ClientGone:
            self._service.metrics.gone.inc()
            record.facts["gone"] = True
            record.status = record.status or CLIENT_GONE
        except Exception as error:
            told = as_api_error(error)
            record.note(told)
            if record.status:  # an answer was begun: that it ends early is all that can be said
                raise
            await told.response()(scope, receive, sending)
        finally:
            self._service.active -= 1
            self._count(record)

    def _headers(self, record: Record) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", record.id.encode()), (b"x-content-type-options", b"nosniff")]
        return headers if self._service.state != "draining" else [*headers, (b"connection", b"close")]

    def _count(self, record: Record) -> None:
        metrics = self._service.metrics
        metrics.requests.labels(record.route, str(record.status)).inc()
        metrics.seconds.labels(record.route).observe(record.seconds)
        LOG.info("request", extra={"fields": record.line()})
