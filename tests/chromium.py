"""The browser that pages are looked at in. Where there is none, tests that ask for it skip and say so."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
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
