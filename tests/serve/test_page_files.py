"""The chat page's files: where they are, with which headers, and what the page is told."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import answer_end, asks, running
from vflax.generate.processor import Processor
from vflax.serve import page_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page, in place of the one that the package has."""
    folder = tmp_path / "page"
    (folder / "vendor").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>chat</title>")
    (folder / "vendor" / "marked.js").write_text("export const a = 1")
    (folder / "style.css").write_text("a {}")
    (tmp_path / "secret").write_text("no page")
    monkeypatch.setattr(page_files, "FOLDER", folder)
    return folder


def test_the_page_is_at_the_root_and_its_files_beside_it(tiny: Processor, folder: Path) -> None:
    with running(FakeEngine(tiny)) as server:
        for path, kind in (
            ("/", "text/html"),
            ("/page/vendor/marked.js", "javascript"),
            ("/page/style.css", "text/css"),
        ):
            found = httpx.get(server.url + path)
            assert found.status_code == 200 and kind in found.headers["content-type"]
            assert found.headers["x-content-type-options"] == "nosniff"
            policy = found.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "img-src 'self' data: blob:" in policy
            assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
            again = httpx.get(server.url + path, headers={"if-none-match": found.headers["etag"]})
            assert again.status_code == 304 and found.headers["cache-control"] == "no-cache"


def test_nothing_but_the_pages_files_is_given(tiny: Processor, folder: Path) -> None:
    with running(FakeEngine(tiny)) as server:
        for path in (
            "/page/../secret",
            "/page/%2e%2e/secret",
            "/page/..%2fsecret",
            "/page/a%00b",
            "/page/vendor",
        ):
            with server.connect() as sock:
                sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
                found = answer_end(sock)
            assert found.startswith(b"HTTP/1.1 404") and b"no page" not in found


def test_the_page_is_told_the_limits_and_whether_it_needs_a_key(tiny: Processor, folder: Path) -> None:
    with running(FakeEngine(tiny), api_keys=("k",), max_images=3, model_names=("m",)) as server:
        assert httpx.get(server.url).status_code == 200
        assert httpx.get(f"{server.url}/page/config.json").json() == {
            "model": "m",
            "max_length": 1024,
            "max_images": 3,
            "max_image_bytes": 20 * 2**20,
            "max_image_pixels": 50_000_000,
            "max_request_bytes": 32 * 2**20,
            "defaults": {"temperature": 0.2, "top_p": 1.0, "max_tokens": 1024},
            "needs_key": True,
        }
        assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": asks()}).status_code == 401


def test_without_a_page_the_root_is_not_found(tiny: Processor, folder: Path) -> None:
    with running(FakeEngine(tiny), page=False) as server:
        for path in ("/", "/page/config.json", "/page/style.css"):
            assert httpx.get(server.url + path).status_code == 404
    (folder / "index.html").unlink()
    with running(FakeEngine(tiny)) as server:
        assert httpx.get(server.url).status_code == 404
        assert httpx.get(f"{server.url}/page/config.json").json()["needs_key"] is False
