"""The browser that pages are looked at in. Where there is none, tests that ask for it skip and say so."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def path() -> str:
    """Of the program."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip(
            "no chromium on this machine (apt-get install chromium): the page is not tried in a browser"
        )
    return found


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """Playwright's Browser. For a module, not for the session: while it is open, asyncio.run fails in its thread."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = path()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def pages_of(browser: Any, file: Path, **always: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file from disk as often as asked; what the browser complains of, or asks others for, fails at the end.

    Args:
        browser: of `opened`.
        file: the page.
        always: of every context.
    """
    errors: list[str] = []
    contexts = []

    def open_it(width: int = 1280, **context: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **(always | context)))
        page = contexts[-1].new_page()
        watch(page, errors)
        page.goto(file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []


def watch(page: Any, errors: list[str]) -> None:
    """Adds what a page complains of, and every address that is not of itself."""
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request",
        lambda sent: errors.append(sent.url) if sent.url[:5] not in ("file:", "data:", "blob:") else None,
    )
