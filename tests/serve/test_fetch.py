"""Remote pictures: only from public addresses, whatever name, redirect or spelling leads elsewhere."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import png, running
from vflax.generate.processor import Processor
from vflax.serve.errors import ApiError
from vflax.serve.fetch import Fetcher, is_public

PICTURE = png()


class Pages(BaseHTTPRequestHandler):
    """/picture, /redirect/URL, /large, /slow, /packed, /missing; `asked` remembers (path, Host)."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["host"]))
        status, headers, body = 200, {}, PICTURE
        if self.path.startswith("/redirect/"):
            status, headers, body = 302, {"location": self.path.removeprefix("/redirect/")}, b""
        elif self.path == "/large":
            body = bytes(100_000)
        elif self.path == "/slow":
            time.sleep(1)
        elif self.path == "/packed":
            headers = {"content-encoding": "gzip"}
        elif self.path == "/missing":
            status = 404
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[ThreadingHTTPServer]:
    Pages.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


async def here(host: str, port: int) -> list[str]:
    """Every name is this machine."""
    return ["127.0.0.1"]


def fetch(url: str, **kw: Any) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(50_000, 10 if "seconds" not in kw else kw.pop("seconds"), **kw)
        try:
            return await fetcher.fetch(url, "where", lambda number: None)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(url: str, **kw: Any) -> str:
    with pytest.raises(ApiError) as error:
        fetch(url, **kw)
    assert error.value.status == 400 and error.value.param == "where"
    return error.value.message


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%1",
        "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:4136:e378::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_everybodys_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_everybodys_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0",
        "10.0.0.1", "169.254.169.254", "[fe80::1]",
    ],
)  # fmt: skip
def test_no_spelling_of_an_address_in_here_is_asked(pages: ThreadingHTTPServer, host: str) -> None:
    refusal(f"http://{host}:{pages.server_port}/picture")
    assert Pages.asked == []


def test_a_picture_comes_from_the_address_that_was_looked_at_by_the_urls_name(
    pages: ThreadingHTTPServer,
) -> None:
    looked_at: list[str] = []

    def public(address: Any) -> bool:
        looked_at.append(str(address))
        return True

    url = f"http://pictures.example:{pages.server_port}/picture"
    assert fetch(url, resolve=here, public=public) == PICTURE
    assert looked_at == ["127.0.0.1"] and Pages.asked == [
        ("/picture", f"pictures.example:{pages.server_port}")
    ]


def test_a_name_is_resolved_once_so_that_it_cannot_mean_something_else_later(
    pages: ThreadingHTTPServer,
) -> None:
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    url = f"http://rebind.example:{pages.server_port}/picture"
    assert fetch(url, resolve=rebinding, public=lambda address: str(address) == "127.0.0.1") == PICTURE
    assert answers == [["10.0.0.1"]]


def test_a_name_with_one_private_address_among_public_ones_is_refused(pages: ThreadingHTTPServer) -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["8.8.8.8", "127.0.0.1"]

    assert "public" in refusal(f"http://mixed.example:{pages.server_port}/picture", resolve=mixed)
    assert Pages.asked == []


@pytest.mark.parametrize(
    "target", ["http://10.0.0.1/picture", "http://inside.example/picture", "//inside.example/x"]
)
def test_a_redirect_to_an_address_in_here_is_not_followed(pages: ThreadingHTTPServer, target: str) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "outside.example" else ["10.0.0.1"]

    def public(address: Any) -> bool:
        return str(address) == "127.0.0.1"

    url = f"http://outside.example:{pages.server_port}/redirect/{target}"
    assert "public" in refusal(url, resolve=resolve, public=public)
    assert len(Pages.asked) == 1


def test_a_redirect_to_another_kind_of_url_is_not_followed(pages: ThreadingHTTPServer) -> None:
    url = f"http://a.example:{pages.server_port}/redirect/file:///etc/passwd"
    assert "expected http" in refusal(url, resolve=here, public=lambda address: True)


def test_redirects_are_followed_a_few_times(pages: ThreadingHTTPServer) -> None:
    url = f"http://a.example:{pages.server_port}" + "/redirect/" * 3 + "/picture"
    assert fetch(url, resolve=here, public=lambda address: True) == PICTURE
    url = f"http://a.example:{pages.server_port}" + "/redirect/" * 4 + "/picture"
    assert "redirects" in refusal(url, resolve=here, public=lambda address: True)


@pytest.mark.parametrize(
    ("path", "says"),
    [("/large", "more than 50000"), ("/slow", "0.3 s"), ("/packed", "compressed"), ("/missing", "cannot")],
)
def test_what_is_large_slow_packed_or_missing_is_refused(
    pages: ThreadingHTTPServer, path: str, says: str
) -> None:
    url = f"http://a.example:{pages.server_port}{path}"
    seconds = 0.3 if path == "/slow" else 30
    assert says in refusal(url, resolve=here, public=lambda address: True, seconds=seconds)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pw@a.example/",
        "http://",
        "http:///x",
        "ftp://a.example/",
        "http://a.example/" + "a" * 5000,
    ],
)
def test_urls_that_are_odd_are_refused(url: str) -> None:
    refusal(url, resolve=here, public=lambda address: True)


def test_proxies_of_the_environment_are_not_used(
    pages: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    url = f"http://a.example:{pages.server_port}/picture"
    assert fetch(url, resolve=here, public=lambda address: True) == PICTURE


def test_a_server_fetches_pictures_where_it_is_allowed(pages: ThreadingHTTPServer, tiny: Processor) -> None:
    with running(FakeEngine(tiny), allow_remote_images=True) as server:

        def ask(host: str) -> httpx.Response:
            url = f"http://{host}:{pages.server_port}/picture"
            content = [{"type": "image_url", "image_url": {"url": url}}]
            return httpx.post(
                f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
            )

        refused = ask("127.0.0.1").json()["error"]
        assert (
            refused["code"] == "invalid_image_url" and refused["param"] == "messages[0].content[0].image_url"
        )
        assert Pages.asked == []
        server.service.fetcher = Fetcher(10_000, 30, resolve=here, public=lambda address: True)
        assert ask("pictures.example").is_success
        assert len(server.engine.submitted[-1][0].images) == 1
