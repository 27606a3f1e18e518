"""A server that speaks Google Cloud Storage's JSON API, for tests of gs://, and what makes clients use it.

It is gcp-storage-emulator, with what Google's documentation says and that server leaves out: conditions on an object's
generation, an end and a beginning of listings, the generation among the headers of a download, and several requests at
the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus, server
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from data_pipeline import mini
from tests import small
from vflax.bucket import limit
from vflax.mirror import cache_root, fetch

emulator = pytest.importorskip("gcp_storage_emulator.server")
gcsfs = pytest.importorskip("gcsfs")
import fsspec  # noqa: E402
from etils.epath import backend  # noqa: E402
from fsspec.registry import _registry  # noqa: E402
from google.auth.credentials import AnonymousCredentials  # noqa: E402 (comes with gcsfs)
from google.cloud import storage  # noqa: E402

BUCKET = "vflax"


class Bucket:
    """A bucket of the server: not through gcsfs, which is what is tested.

    Attributes:
        environment: what a client needs to find it.
        refuse: called with (method, path) of each request; an HTTP status that it returns is the answer.
        requests: (method, path) of all requests so far.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.environment = {
            "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
            "FSSPEC_GS_TOKEN": "anon",
            # gcsfs would ask what kind of bucket it is over gRPC, which this server does not speak.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
            # TensorStore would look for credentials, and fail.
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []

    def connect(self) -> None:
        """Make the bucket, once the server runs."""
        options = {"api_endpoint": f"http://localhost:{self.port}"}
        client = storage.Client("test", AnonymousCredentials(), client_options=options)
        self._bucket = client.create_bucket(BUCKET)

    def upload(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self._bucket.blob(f"{prefix}/{path.relative_to(folder)}").upload_from_filename(path)

    def download(self, prefix: str, folder: Path) -> Path:
        for blob in self._bucket.list_blobs(prefix=prefix + "/"):
            path = folder / blob.name.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            blob.download_to_filename(path)
        return folder

    def generations(self, prefix: str) -> dict[str, int]:
        blobs = self._bucket.list_blobs(prefix=prefix + "/")
        return {blob.name.removeprefix(prefix + "/"): blob.generation for blob in blobs}

    def names(self, prefix: str) -> set[str]:
        return set(self.generations(prefix))

    def put(self, name: str, data: bytes) -> None:
        self._bucket.blob(name).upload_from_string(data)

    def get(self, name: str) -> bytes:
        return self._bucket.blob(name).download_as_bytes()

    def delete(self, name: str) -> None:
        self._bucket.blob(name).delete()


@contextlib.contextmanager
def serving(kind: type[Bucket] = Bucket) -> Iterator[Any]:
    """Run the server in this process; yields a `kind` of it."""
    with pytest.MonkeyPatch.context() as patch:
        bucket = kind(small.free_port())
        _complete(patch, bucket)
        running = emulator.create_server("localhost", bucket.port, in_memory=True)
        running.start()
        try:
            bucket.connect()
            yield bucket
        finally:
            running.stop()


@contextlib.contextmanager
def silent() -> Iterator[Bucket]:
    """A bucket that takes requests and never answers. Who waits without a limit is refused after two minutes."""
    with socket.create_server(("localhost", 0), backlog=100) as listening:
        refuse = threading.Timer(120, listening.close)
        refuse.start()
        try:
            yield Bucket(listening.getsockname()[1])
        finally:
            refuse.cancel()


def give_up_soon(patch: pytest.MonkeyPatch) -> None:
    """Have this process wait for an answer a tenth of a second, and not at all before it asks again."""
    patch.setattr("vflax.bucket.GS_TIME_LIMIT", 0.1)
    pause = asyncio.sleep
    patch.setattr(gcsfs.retry.asyncio, "sleep", lambda seconds: pause(0))


class _Threading(socketserver.ThreadingMixIn, server.HTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed, or has read enough, is no error."""


def _complete(patch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    """Add to the emulator what its clients here need of Google's API."""
    one_at_a_time = threading.RLock()  # the emulator's storage is not made for several
    handle = emulator.Router.handle
    patch.setattr(emulator.server, "HTTPServer", _Threading)

    def complete(self: Any, method: str) -> None:
        request = self._request_handler
        bucket.requests.append((method, request.path))
        if (status := bucket.refuse(method, request.path)) is not None:
            _answer(request, status, {"error": {"code": status, "message": f"refused with {status}"}})
            return
        with one_at_a_time:
            if not _condition_holds(request, method):
                emulator._read_raw_data(request)
                message = "At least one of the pre-conditions you specified did not hold."
                _answer(request, 412, {"error": {"code": 412, "message": message}})
                return
            handle(self, method)

    patch.setattr(emulator.Router, "handle", complete)
    write = emulator.Response.json

    def within(self: Any, value: Any) -> None:
        query = parse_qs(urlparse(self._handler.path).query)
        if isinstance(value, dict) and value.get("kind") == "storage#objects":
            low, high = query.get("startOffset", [""])[0], query.get("endOffset", [None])[0]
            value["items"] = [
                item
                for item in value["items"]
                if item["name"] >= low and (high is None or item["name"] < high)
            ]
        write(self, value)

    patch.setattr(emulator.Response, "json", within)
    write_file = emulator.Response.write_file

    def with_generation(self: Any, content: Any, **more: Any) -> None:
        found = _object(self._handler)
        if found is not None:
            self["x-goog-generation"] = found["generation"]
        write_file(self, content, **more)

    patch.setattr(emulator.Response, "write_file", with_generation)


def _object(request: Any) -> dict[str, Any] | None:
    """The object that a request is about, where it is there."""
    address = urlparse(request.path)
    parts = address.path.partition("/b/")[2].split("/o", 1)
    name = unquote(parts[1].lstrip("/")) if len(parts) == 2 else ""
    name = name or parse_qs(address.query).get("name", [""])[0]
    try:
        return request.storage.get_file_obj(parts[0], name)
    except Exception:
        return None


def _condition_holds(request: Any, method: str) -> bool:
    wanted = parse_qs(urlparse(request.path).query).get("ifGenerationMatch")
    if wanted is None or "/rewriteTo/" in request.path:
        return True
    found = _object(request)
    return wanted[0] == (found["generation"] if found else "0")


def _answer(request: Any, status: int, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    request.send_response(status, HTTPStatus(status).phrase)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `condition` returns once that is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


def host(cache: Path) -> Path:
    """The $VFLAX_CACHE of a host of its own, in the folder `cache`; what takes long to make is that of this machine."""
    cache.mkdir(parents=True, exist_ok=True)
    mini.ensure()
    (cache_root() / "xla").mkdir(exist_ok=True)
    for path in (*cache_root().glob("mini-*"), cache_root() / "xla"):
        if not (cache / path.name).exists():
            (cache / path.name).symlink_to(path)
    return cache


def environment(bucket: Bucket, cache: Path) -> dict[str, str]:
    """Of a subprocess on the host whose $VFLAX_CACHE is `cache`."""
    return small.environment() | bucket.environment | {"VFLAX_CACHE": str(cache)}


def use_here(bucket: Bucket, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Have this process be a host whose $VFLAX_CACHE is `cache`."""
    for name, value in (bucket.environment | {"VFLAX_CACHE": str(cache)}).items():
        patch.setenv(name, value)
    patch.setitem(fsspec.config.conf, "gs", {**fsspec.config.conf.get("gs", {}), "token": "anon"})
    # What the environment variables do to a process that begins with them.
    for protocol in ("gs", "gcs"):
        patch.setitem(_registry, protocol, gcsfs.core.GCSFileSystem)
    backend.fsspec_backend._get_filesystem.cache_clear()
    limit.cache_clear()
    fetch.cache_clear()
