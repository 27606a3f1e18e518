"""A server that runs in this process, on a port of its own, with an engine that writes what it is told."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from tests.generate.fake_engine import FakeEngine
from tests.weights import hub
from vflax import conversation as talk
from vflax.generate.processor import Processor
from vflax.serve.app import build_app
from vflax.serve.server import Server, listen, url_of
from vflax.serve.service import Service
from vflax.serve.settings import Settings
from vflax.tokenizer import load_tokenizer

IMAGE_TOKENS = 4


def processor(folder: Path) -> Processor:
    """Of a small model that is called "tiny"."""
    hub.write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    stops = talk.stop_ids("vicuna_v1", tokenizer)
    return Processor("tiny", tokenizer, "vicuna_v1", "front", hub.RULES, stops, IMAGE_TOKENS)


@dataclass
class Running:
    """url: where it is; engine: what it asks."""

    url: str
    engine: FakeEngine
    service: Service
    server: Server

    def client(self, key: str = "none", **kw: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **kw}
        )

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        sock = socket.create_connection((host, int(port)))
        sock.settimeout(60)
        return sock


@contextlib.contextmanager
def running(engine: FakeEngine, **settings: Any) -> Iterator[Running]:
    """A server, until the end of the block."""
    chosen = Settings(**settings)
    app = build_app(engine, engine.processor, chosen)
    server = Server(app, chosen)
    server.service = app.state.service
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(url_of(sock), engine, app.state.service, server)
    finally:
        app.state.service.drain()
        server.should_exit = True
        thread.join(60)
        app.state.service.close()
        engine.close()
    assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def free(engine: FakeEngine) -> bool:
    """Whether no slot is held."""
    stats = engine.stats()
    return stats.running == 0 and stats.waiting == 0


def png(width: int = 20, height: int = 10, colour: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def asks(text: str = "What is this?", *pictures: bytes) -> list[Any]:
    """The messages of a question."""
    return [{"role": "user", "content": [{"type": "text", "text": text}, *map(image_part, pictures)]}]


def answer_end(sock: Any) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def raw(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return (head + "\r\n").encode() + content
