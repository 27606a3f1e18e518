"""The chat page in a browser, against the real application: only the engine behind it has no model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import chromium
from tests.chat.small import read_by
from tests.generate.fake_engine import FakeEngine, FakeTicket
from tests.serve.chat_page import Watched, ask, begin, png, texts, upload
from tests.serve.running import Running, free, running, until
from vflax.generate.processor import Processor
from vflax.generate.request import Delta, OnDelta, Sampling

ANSWER = "It is a red circle."


class Held(FakeEngine):
    """While `go_on` is not set, it holds its answers back where they read "It is"."""

    def __init__(self, processor: Processor) -> None:
        super().__init__(processor, lambda prompt: ANSWER)
        self.go_on = threading.Event()

    def _write(self, ticket: FakeTicket, sampling: Sampling, most: int, on_delta: OnDelta) -> None:
        written = ""

        def pass_on(delta: Delta) -> None:
            nonlocal written
            on_delta(delta)
            written += delta.text
            while written == "It is" and not ticket.cancelled.is_set() and not self.go_on.wait(0.01):
                pass

        super()._write(ticket, sampling, most, pass_on)


@pytest.fixture(scope="module")
def server(tiny: Processor) -> Iterator[Running]:
    with running(Held(tiny)) as found:
        yield found


@pytest.fixture(scope="module")
def browser(server: Running) -> Iterator[Watched]:
    with chromium.opened() as found:
        yield Watched(found, server.url)


@pytest.fixture
def engine(server: Running) -> Iterator[Held]:
    assert isinstance(server.engine, Held)
    server.engine.go_on.set()
    yield server.engine
    server.engine.go_on.set()


@pytest.fixture
def page(browser: Watched, engine: Held) -> Iterator[Any]:
    """Whatever it complains of fails the test."""
    yield browser.usual_page()
    assert browser.end() == []


def test_the_engine_is_asked_about_the_picture_that_was_uploaded(page: Any, engine: Held) -> None:
    ask(page, "What is this?", upload(data=png("blue")))
    prompt, _ = engine.submitted[-1]
    (image,) = prompt.images
    middle = len(image) // 2
    np.testing.assert_array_equal(image[middle, middle], (0, 0, 255))
    assert read_by(engine.processor, prompt).endswith("What is this? ASSISTANT:")


def test_an_answer_is_seen_while_the_engine_writes_it(page: Any, engine: Held) -> None:
    engine.go_on.clear()
    begin(page, "What is this?", upload())
    page.wait_for_selector(".turn.model:has-text('It is')")
    assert texts(page) == ["What is this?", "It is"] and engine.stats().running == 1
    engine.go_on.set()
    page.wait_for_selector(".facts")
    assert texts(page) == ["What is this?", ANSWER]


def test_stop_cancels_the_engines_request(page: Any, engine: Held) -> None:
    before = engine.stats().finished.get("cancelled", 0)
    engine.go_on.clear()
    begin(page, "What is this?")
    page.wait_for_selector(".turn.model:has-text('It is')")
    page.click("#foot .stop")
    page.wait_for_selector(".facts:has-text('Stopped')")
    until(lambda: engine.stats().finished.get("cancelled", 0) == before + 1 and free(engine))
    assert texts(page) == ["What is this?", "It is"]


def test_after_a_reload_the_conversation_goes_on_where_it_was(page: Any, engine: Held) -> None:
    ask(page, "What is this?", upload())
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert texts(page) == ["What is this?", ANSWER]
    assert page.locator(".picture img").evaluate("node => node.decode().then(() => node.naturalWidth)") == 9
    ask(page, "And now?")
    prompt, _ = engine.submitted[-1]
    assert len(prompt.images) == 1
    assert read_by(engine.processor, prompt).endswith(
        f"What is this? ASSISTANT: {ANSWER} USER: And now? ASSISTANT:"
    )


def test_no_other_host_is_asked_for_anything(page: Any, server: Running) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector("body[data-ready]")
    ask(page, "What is this?", upload())
    assert f"{server.url}/page/app.js" in asked and f"{server.url}/v1/chat/completions" in asked
    assert [url for url in asked if not url.startswith((f"{server.url}/", "data:", "blob:"))] == []
