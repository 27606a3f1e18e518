"""A small Hugging Face hub on this machine: what huggingface_hub asks a hub for, and a list of what it asked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]


@dataclass
class Hub:
    """Repos of a server, and what was asked of it.

    repos: {"org/name": {revision: commit}}.  commits: {commit: {file name: bytes}}.
    gated: repos whose files nobody may have.
    cut: {file name: bytes after which the first download of it breaks off}.
    asked: (method, path, Range header or "") of every request.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, repo: str, files: dict[str, bytes] | Path, revision: str = "main") -> str:
        """Put files, or those of a folder, under a revision; returns the commit."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.repos.setdefault(repo, {})[revision] = commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [
            path.rpartition("/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        ]


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub with nothing in it yet."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(cache: Path, endpoint: str, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with its hub at `endpoint`: huggingface_hub reads these variables once, when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *args], env=kept | ours | env, cwd=cwd, capture_output=True, text=True, timeout=120
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            repo, what, revision = found.groups()
        elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            (repo, revision, what) = found.groups()
        else:
            return self._error(404, "EntryNotFound")
        if repo not in self.hub.repos:
            return self._error(401, "RepoNotFound")
        commit = self.hub.repos[repo].get(revision or "main", revision)
        if commit not in self.hub.commits:
            return self._error(404, "RevisionNotFound")
        files = self.hub.commits[commit]
        if not path.startswith("/api/"):
            if repo in self.hub.gated:
                return self._error(403, "GatedRepo")
            return self._file(commit, what, files) if what in files else self._error(404, "EntryNotFound")
        if what == "tree":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files.items()]
            return self._json(tree)
        siblings = [{"rfilename": n, "size": len(b), "blobId": _etag(b)} for n, b in files.items()]
        self._json({"id": repo, "sha": commit, "siblings": siblings})

    def _file(self, commit: str, name: str, files: dict[str, bytes]) -> None:
        data, start = files[name], 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.cut.pop(name, len(data))
        self.wfile.write(data[start:end])
        self.close_connection = end < len(data)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
