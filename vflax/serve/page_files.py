"""The chat page: static files, and what the page must know of the server."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from vflax.serve.service import Service

FOLDER = Path(__file__).parent / "page"
# Nothing from other hosts, nothing inline, and nobody may put the page into a frame. Pictures of the user's own are
# data: and blob: URLs.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Browsers ask each time, and by the ETag are told that it is the same still.
    "cache-control": "no-cache",
}


class PageFiles(StaticFiles):
    """Static files with the headers that keep strangers out of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if "\0" in path:  # older Starlettes ask the file system, which raises ValueError
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def add_routes(app: FastAPI, service: Service) -> None:
    """`/`, `/page/config.json` and all else under `/page/`. Where the folder has no page, only the configuration."""

    @app.get("/page/config.json")
    async def config() -> dict[str, object]:
        limits = service.settings
        return {
            "model": service.names[0],
            "max_length": service.engine.max_length,
            "max_images": limits.max_images,
            "max_image_bytes": limits.max_image_bytes,
            "max_image_pixels": limits.max_image_pixels,
            "max_request_bytes": limits.max_body_bytes,
            "defaults": {
                "temperature": limits.default_temperature,
                "top_p": limits.default_top_p,
                "max_tokens": limits.default_max_tokens,
            },
            "needs_key": bool(service.keys),
        }

    if not (FOLDER / "index.html").is_file():
        return
    files = PageFiles(directory=FOLDER)
    app.mount("/page", files)

    @app.get("/")
    async def root(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)
