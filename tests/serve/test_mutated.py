"""Some hundreds of requests that are broken in all kinds of places: none is a 5xx, and no place stays held."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from typing import Any

import httpx

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import asks, free, png, until
from vflax.generate.processor import Processor
from vflax.serve.app import build_app
from vflax.serve.settings import Settings

CHAT = {
    "model": "tiny", "messages": [{"role": "system", "content": "Be brief."}, *asks("What is this?", png())],
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["x"], "max_tokens": 4, "n": 1, "stream": False,
    "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1, "user": "me", "deadline": 60.0,
}  # fmt: skip
TEXT = {"model": "tiny", "prompt": ["dogs"], "max_tokens": 4, "logprobs": 1, "stream": True, "echo": False}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, -(2**200), 0.5, 1e308, -1e308, "", "x", "\x00", "\ud800", "</s>",
    "data:image/png;base64,", "data:image/png;base64,iVBOR", "http://127.0.0.1/", [], [[]], [None], {}, {"a": {}},
    "a" * 5000, {"type": "text", "text": "x"}, [{"type": "image_url"}], [{"role": "user", "content": None}],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def mutated(body: Any, draw: random.Random) -> bytes:
    """A body with one to three things changed: values, names, or bytes."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        *path, last = draw.choice(places(body)[1:])
        inner = body
        for key in path:
            inner = inner[key]
        kind = draw.random()
        if kind < 0.6:
            inner[last] = copy.deepcopy(draw.choice(ODD))
        elif kind < 0.8:
            inner.pop(last)
        elif isinstance(inner, dict):
            inner[draw.choice(["tools", "x", "\x00", "logit_bias", "messages"])] = copy.deepcopy(
                draw.choice(ODD)
            )
        if not body or not places(body)[1:]:
            break
    data = bytearray(json.dumps(body, ensure_ascii=True).encode())
    for _ in range(draw.choice([0, 0, 0, 1, 5])):
        at = draw.randrange(len(data))
        data[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        if not data:
            break
    return bytes(data)


def test_no_mutated_request_is_a_5xx_or_keeps_its_place(tiny: Processor) -> None:
    engine, draw = FakeEngine(tiny), random.Random(0)
    app = build_app(engine, tiny, Settings())
    statuses: Counter[int] = Counter()

    async def ask_all() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            for number in range(600):
                path, body = draw.choice([("chat/completions", CHAT), ("completions", TEXT)])
                content = mutated(body, draw)
                headers = {"content-type": "application/json"}
                response = await client.post(f"/v1/{path}", content=content, headers=headers)
                statuses[response.status_code] += 1
                assert response.status_code < 500, (number, content, response.text)
                if response.status_code != 200:
                    assert response.json()["error"]["message"]
                assert '"code": "internal_error"' not in response.text
            until(lambda: free(engine))
            await asyncio.sleep(0)  # what the engine has posted is delivered

    asyncio.run(ask_all())
    assert app.state.service._places.held == 0 and app.state.service._buffers.held == 0
    assert statuses[200] > 30 and statuses[400] > 100, statuses
