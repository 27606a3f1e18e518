"""The chat page as a person uses it, for tests of it in a browser."""

from __future__ import annotations

import io
import re
from typing import Any

from PIL import Image

MESSAGE = "#foot textarea"


def png(color: str = "red", size: tuple[int, int] = (9, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def upload(name: str = "red.png", data: bytes | None = None, kind: str = "image/png") -> dict[str, Any]:
    """A file, as Playwright takes it."""
    return {"name": name, "mimeType": kind, "buffer": data or png()}


class Watched:
    """A browser; what its pages complain of, and what they ask of other hosts, is written down.

    expected: a pattern of complaints that belong to the test.
    """

    def __init__(self, browser: Any, url: str) -> None:
        self._browser, self._url = browser, url.rstrip("/") + "/"
        self._contexts: list[Any] = []
        self._complaints: list[str] = []
        self.expected = ""
        self._usual = self.context()

    def context(self, **options: Any) -> Any:
        """A context of its own for this test."""
        context = self._browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        context.set_default_timeout(15_000)
        context.on("console", lambda message: self._complaints.append(message.text))
        context.on("weberror", lambda error: self._complaints.append(str(error.error)))
        context.on("request", self._look)
        self._contexts.append(context)
        return context

    def page(self, context: Any = None, path: str = "", **options: Any) -> Any:
        page = (context or self.context(**options)).new_page()
        return self._open(page, path)

    def usual_page(self) -> Any:
        """The page in a context that tests share, with nothing kept: quicker, for the files are in its cache."""
        page = self._usual.new_page()
        everything = {"origin": self._url.rstrip("/"), "storageTypes": "all"}
        self._usual.new_cdp_session(page).send("Storage.clearDataForOrigin", everything)
        return self._open(page)

    def end(self) -> list[str]:
        """Closes what the test has opened; gives the complaints that it has not expected."""
        self._usual.set_offline(False)
        for page in self._usual.pages:
            page.close()
        for context in self._contexts[1:]:
            context.close()
        self._contexts = [self._usual]
        found = [one for one in self._complaints if not (self.expected and re.search(self.expected, one))]
        self._complaints, self.expected = [], ""
        return found

    def _open(self, page: Any, path: str = "") -> Any:
        page.goto(self._url + path)
        page.wait_for_selector("body[data-ready]")
        return page

    def _look(self, request: Any) -> None:
        if not request.url.startswith((self._url, "data:", "blob:")):
            self._complaints.append(f"asked for {request.url}")


def ask(page: Any, text: str, *files: dict[str, Any]) -> None:
    """Sends a message, and waits for the end of its answer."""
    begin(page, text, *files)
    page.wait_for_selector(".turn:last-child.model .tools")


def begin(page: Any, text: str, *files: dict[str, Any]) -> None:
    if files:
        page.set_input_files("#foot input[type=file]", list(files))
        page.wait_for_function(
            "n => document.querySelectorAll('#foot .thumbs img').length === n", arg=len(files)
        )
        page.wait_for_selector("#foot .draft:not(.reading)")
    page.fill(MESSAGE, text)
    page.press(MESSAGE, "Enter")
    page.wait_for_selector(".turn.model:last-child")


def texts(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".turn .text, .turn .body").all_inner_texts()]
