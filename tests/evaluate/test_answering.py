"""Models of this process and behind an address answer alike."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data_pipeline.openai_server import Answer, Seen, completion, failure, serving
from tests.generate import small_engine
from tests.serve.running import running
from vflax.endpoint.session import Endpoint
from vflax.errors import UserError
from vflax.evaluate.answering import Local, Remote
from vflax.evaluate.infer import Ask
from vflax.evaluate.question import Picture


def picture(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return Picture(f"{seed}.png", file.getvalue)


ASKED = [
    *(Ask(f"one/{n}", f"What is in picture {n}?", (picture(n),), 12) for n in range(12)),
    Ask("none", "What is two and two?", (), 12),
    Ask("two", "What is different?", (picture(0), picture(1)), 12),
]


def answers(model: Local | Remote, asked: list[Ask]) -> dict[str, tuple[str | None, str]]:
    found: dict[str, tuple[str | None, str]] = {}

    def on_answer(key: str, text: str | None, finish: str) -> None:
        assert key not in found
        found[key] = text, finish

    assert model.answer(asked, on_answer) == ""
    return found


def test_an_address_gives_the_same_predictions_as_the_model_itself(tmp_path: Path) -> None:
    engine = small_engine.engine(tmp_path)
    here = answers(Local(engine, engine.processor, {}), ASKED)
    assert set(here) == {ask.key for ask in ASKED}
    with running(engine) as server:  # type: ignore[arg-type]
        remote = Remote(Endpoint("small", f"{server.url}/v1"), tmp_path / "replies.sqlite")
        assert answers(remote, ASKED) == here


def test_what_is_too_long_has_no_prediction_and_the_rest_has(tmp_path: Path) -> None:
    engine = small_engine.engine(tmp_path)
    long = Ask("long", "word " * 2000, (), 12)
    found = answers(Local(engine, engine.processor, {}), [ASKED[0], long, ASKED[1]])
    assert found["long"] == (None, "too_long")
    assert found["one/0"][0] is not None
    engine.close()


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    engine = small_engine.engine(tmp_path)
    broken = Ask("bad", "What?", (Picture("broken.png", lambda: b"\x89PNG no"),), 12)
    with pytest.raises(UserError, match=r"bad: picture broken\.png: .*fetch it again"):
        answers(Local(engine, engine.processor, {}), [ASKED[0], broken])
    with pytest.raises(UserError, match=r"picture broken\.png"):
        answers(Remote(Endpoint("m", "http://127.0.0.1:9/v1"), tmp_path / "a.sqlite"), [broken])
    engine.close()


def remote(url: str, folder: Path, **options: int) -> Remote:
    return Remote(Endpoint("m", url, concurrency=2, retry_wait=0.01, **options), folder / "replies.sqlite")


def test_an_address_is_asked_greedily_with_pictures_before_text(tmp_path: Path) -> None:
    with serving(lambda seen, before: completion("Yes.")) as server:
        assert answers(remote(server.url, tmp_path), ASKED[-1:]) == {"two": ("Yes.", "stop")}
    body = server.seen[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 12)
    types = [part["type"] for part in body["messages"][0]["content"]]
    assert types == ["image_url", "image_url", "text"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_stopped_address_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    def script(seen: Seen, before: int) -> Answer:
        text = seen.body["messages"][0]["content"][-1]["text"]
        return failure(500) if "picture 3" in text and len(server.seen) < 20 else completion(text)

    found: dict[str, str | None] = {}
    with serving(script) as server:
        reason = remote(server.url, tmp_path, retries=1).answer(
            ASKED, lambda key, text, _: found.update({key: text})
        )
        assert "1 without a reply" in reason
        assert set(found) == {ask.key for ask in ASKED} - {"one/3"}
        asked = len(server.seen)
        server.seen += [server.seen[0]] * 20
        assert (
            remote(server.url, tmp_path).answer(ASKED, lambda key, text, _: found.update({key: text})) == ""
        )
        assert len(server.seen) == asked + 21
    assert found["one/3"] == "What is in picture 3?"


def test_a_refused_key_is_told(tmp_path: Path) -> None:
    with (
        serving(lambda seen, before: failure(401)) as server,
        pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY"),
    ):
        answers(remote(server.url, tmp_path), ASKED[:1])
