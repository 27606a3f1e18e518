"""What a request cannot have is refused in OpenAI's shape, and the field is named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import Running, asks, data_url, free, image_part, png, running, until
from vflax.generate.processor import Processor

USER = {"role": "user", "content": "hi"}


def post(server: Running, body: Any, path: str = "chat/completions", **kw: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60, **kw)


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response that has OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": {"a": 1}}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**40}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"deadline": 0}, "deadline"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"min_p": 0.1}, "min_p"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, USER]}, "messages[1].role"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}, USER]},
            "messages[1].tool_calls",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [image_part(b"")]}, USER]},
            "messages[1].content",
        ),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(server: Running, fields: dict[str, Any], param: str) -> None:
    taken = len(server.engine.submitted)
    error = refused(post(server, {"messages": asks(), **fields}))
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert len(server.engine.submitted) == taken


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt[0]"),
        ({}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"prompt": ["a"] * 17}, "prompt"),
    ],
)
def test_a_field_of_a_text_that_cannot_be_is_named(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    assert refused(post(server, fields, "completions"))["param"] == param


def test_fields_that_ask_for_nothing_and_fields_that_nobody_knows_are_let_pass(server: Running) -> None:
    fields = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": None, "functions": None,
        "modalities": ["text"], "parallel_tool_calls": True, "store": False, "metadata": {"a": "b"}, "min_p": 0.0,
        "service_tier": "auto", "some_clients_own": {"x": [1]}, "top_k": -1, "temperature": 0, "top_p": 1, "stop": None,
        "n": None, "stream": None, "stream_options": None, "max_tokens": None, "logprobs": None, "seed": None,
    }  # fmt: skip
    assert post(server, {"messages": asks(), **fields}).status_code == 200
    assert server.engine.submitted[-1][1].top_k == 0


def test_developer_means_system_and_parts_may_stand_wherever_text_may(
    server: Running, tiny: Processor
) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    for messages in (
        [{"role": "developer", "content": parts}, USER],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
    ):
        assert post(server, {"messages": messages}).status_code == 200
    (one, _), (two, _) = server.engine.submitted[-2:]
    np.testing.assert_array_equal(one.ids, two.ids)
    assert "Be brief. USER: hi ASSISTANT:" in tiny.tokenizer.decode(one.ids)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 5000, b'{"a":' * 5000],
)
def test_what_is_not_a_request_in_json_is_refused(server: Running, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused(httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers))


def test_a_request_of_more_values_than_a_conversation_has_is_refused(server: Running) -> None:
    body = b'{"messages": [' + b"[]," * 60_000 + b"[]]}"
    headers = {"content-type": "application/json"}
    error = refused(httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers))
    assert "values" in error["message"]


def test_another_type_than_json_or_none_is_refused(server: Running) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}]}'

    def send(**headers: str) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)

    for headers in ({}, {"content-type": "text/plain"}):
        assert "application/json" in refused(send(**headers), 415)["message"]
    assert send(**{"content-type": "application/json; charset=utf-8"}).is_success


def test_unknown_places_and_methods_are_errors_of_the_same_shape(server: Running) -> None:
    refused(httpx.get(f"{server.url}/v1/nothing"), 404)
    refused(httpx.get(f"{server.url}/v1/chat/completions"), 405)
    refused(httpx.post(f"{server.url}/v1/embeddings", json={}), 404)


@pytest.fixture(scope="module")
def strict(tiny: Processor) -> Iterator[Running]:
    """A server that takes small pictures only."""
    with running(FakeEngine(tiny), max_image_pixels=40_000, max_image_bytes=100_000) as found:
        yield found


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (data_url(b"no picture"), "invalid_image"),
        (data_url(b""), "invalid_image"),
        (data_url(png(200, 200)[:-60]), "invalid_image"),
        (data_url(png(60, 10, kind="TIFF")), "invalid_image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "invalid_image"),
        (data_url(bomb()), "image_too_large"),
        (data_url(png(201, 200)), "image_too_large"),
        (data_url(b"\x89PNG" + bytes(150_000)), "image_too_large"),
        (data_url(png())[:-3], "invalid_image_url"),
        ("data:image/png;base64,a$$$", "invalid_image_url"),
        ("data:image/png,abc", "invalid_image_url"),
        ("data:", "invalid_image_url"),
        ("http://example.org/a.png", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("", "invalid_image_url"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_a_picture_that_cannot_be_used_is_named(strict: Running, url: str, code: str) -> None:
    content = [image_part(png()), {"type": "image_url", "image_url": {"url": url}}]
    error = refused(post(strict, {"messages": [{"role": "user", "content": content}]}))
    assert error["code"] == code and error["param"] == "messages[0].content[1].image_url"
    assert not strict.engine.submitted


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_of_the_webs_formats_are_read(server: Running, kind: str) -> None:
    assert post(server, {"messages": asks("?", png(30, 20, kind=kind))}).is_success
    assert len(server.engine.submitted[-1][0].images) == 1


def test_more_pictures_than_are_allowed_are_refused(tiny: Processor) -> None:
    with running(FakeEngine(tiny), max_images=2) as server:
        assert post(server, {"messages": asks("?", png(), png())}).is_success
        assert (
            refused(post(server, {"messages": asks("?", png(), png(), png())}))["code"] == "too_many_images"
        )


def test_a_request_that_is_too_large_is_refused_with_and_without_its_length(tiny: Processor) -> None:
    with running(FakeEngine(tiny), max_body_bytes=10_000) as server:
        url, headers = f"{server.url}/v1/chat/completions", {"content-type": "application/json"}
        body = b'{"messages": "' + b"a" * 10_000 + b'"}'
        error = refused(httpx.post(url, content=body, headers=headers), 413)
        assert error["code"] == "request_too_large"
        pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))
        refused(httpx.post(url, content=pieces, headers=headers), 413)
        assert post(server, {"messages": asks()}).is_success


def test_bytes_of_all_requests_together_are_limited_and_given_back(tiny: Processor) -> None:
    with running(FakeEngine(tiny, max_length=8000), max_body_bytes=6000, max_buffered_bytes=6000) as server:
        with server.connect() as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 6000\r\n"
                b"content-type: application/json\r\n\r\n" + b"a" * 5000
            )
            until(lambda: server.service._buffers.held >= 5000)
            response = post(server, {"messages": asks("a" * 1500)})
            assert refused(response, 429)["code"] == "busy" and response.headers["retry-after"]
        until(lambda: server.service._buffers.held == 0)
        assert post(server, {"messages": asks("a" * 1500)}).is_success
        assert free(server.engine)
