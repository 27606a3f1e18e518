"""Models of this process and behind an address answer alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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
LONG = Ask("long", "word " * 2000, (), 12)


def answers(model: Local | Remote, asked: list[Ask]) -> dict[str, tuple[str | None, str, tuple[int, int]]]:
    found: dict[str, tuple[str | None, str, tuple[int, int]]] = {}

    def on_answer(key: str, text: str | None, finish: str, tokens: tuple[int, int]) -> None:
        assert key not in found
        found[key] = text, finish, tokens

    assert model.answer(asked, on_answer) == ""
    return found


def test_an_address_gives_the_same_predictions_as_the_model_itself(tmp_path: Path) -> None:
    engine = small_engine.engine(tmp_path)
    here = answers(Local(engine, engine.processor, {}), [*ASKED, LONG])
    assert set(here) == {ask.key for ask in [*ASKED, LONG]}
    assert {key for key, (text, _, _) in here.items() if text is None} == {"long"}
    assert all(prompt > 8 * len(ask.pictures) for ask in ASKED for prompt, _ in [here[ask.key][2]])
    assert all(1 <= answer <= 12 for key, (_, _, (_, answer)) in here.items() if key != "long")
    with running(engine) as server:  # type: ignore[arg-type]
        remote = Remote(Endpoint("small", f"{server.url}/v1"), tmp_path / "replies.sqlite")
        there = answers(remote, [*ASKED, LONG])
    assert there.pop("long")[:2] == here.pop("long")[:2] == (None, "too_long")
    assert there == here


def test_what_is_too_long_has_no_prediction_and_the_rest_has(tmp_path: Path) -> None:
    engine = small_engine.engine(tmp_path)
    found = answers(Local(engine, engine.processor, {}), [ASKED[0], LONG, ASKED[1]])
    assert found["long"][:2] == (None, "too_long")
    assert found["one/0"][0] is not None
    engine.close()


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    engine = small_engine.engine(tmp_path)
    broken = Ask("bad", "What?", (Picture("broken.png", lambda: b"\x89PNG no"),), 12)
    with pytest.raises(UserError, match=r"bad: picture broken\.png: .*fetch it again"):
        answers(Local(engine, engine.processor, {}), [ASKED[0], broken])
    with pytest.raises(UserError, match=r"bad: picture broken\.png"):
        answers(Remote(Endpoint("m", "http://127.0.0.1:9/v1"), tmp_path / "a.sqlite"), [broken])
    engine.close()


def remote(url: str, folder: Path, **options: int) -> Remote:
    return Remote(Endpoint("m", url, concurrency=2, retry_wait=0.01, **options), folder / "replies.sqlite")


def test_an_engine_that_breaks_is_told(tmp_path: Path) -> None:
    class Broken:
        """Ends each request as an engine does that broke."""

        layout = SimpleNamespace(shards=1, slots=2)

        def submit(self, prompt: object, sampling: object, on_delta: Callable[[object], None]) -> object:
            on_delta(SimpleNamespace(text="", tokens=(), finish="failed"))
            return SimpleNamespace(prompt_tokens=1, cancel=lambda: None)

    local = Local(Broken(), small_engine.processor(tmp_path), {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the engine failed while it answered; run the same command again"):
        answers(local, ASKED[:4])


def test_a_cameras_several_jpegs_in_one_are_sent_as_a_jpeg(tmp_path: Path) -> None:
    file, image = io.BytesIO(), PIL.Image.new("RGB", (8, 8))
    image.save(file, "MPO", save_all=True, append_images=[image])
    assert PIL.Image.open(file).format == "MPO"
    with serving(lambda seen, before: completion("Yes.")) as server:
        answers(remote(server.url, tmp_path), [Ask("a", "?", (Picture("a.jpg", file.getvalue),), 4)])
    assert (
        server.seen[0]
        .body["messages"][0]["content"][0]["image_url"]["url"]
        .startswith("data:image/jpeg;base64,")
    )


def test_an_address_is_asked_greedily_with_pictures_before_text(tmp_path: Path) -> None:
    with serving(lambda seen, before: completion("Yes.")) as server:
        assert answers(remote(server.url, tmp_path), ASKED[-1:]) == {"two": ("Yes.", "stop", (100, 20))}
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
            ASKED, lambda key, text, *_: found.update({key: text})
        )
        assert "1 without a reply" in reason
        assert set(found) == {ask.key for ask in ASKED} - {"one/3"}
        asked = len(server.seen)
        server.seen += [server.seen[0]] * 20
        assert (
            remote(server.url, tmp_path).answer(ASKED, lambda key, text, *_: found.update({key: text})) == ""
        )
        assert len(server.seen) == asked + 21
    assert found["one/3"] == "What is in picture 3?"


def test_a_refused_key_is_told(tmp_path: Path) -> None:
    with (
        serving(lambda seen, before: failure(401)) as server,
        pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY"),
    ):
        answers(remote(server.url, tmp_path), ASKED[:1])


def test_parameters_of_ones_own_are_laid_over_the_usual_ones(tmp_path: Path) -> None:
    own = {"max_tokens": None, "max_completion_tokens": 99, "temperature": None}
    with serving(lambda seen, before: completion("Yes.")) as server:
        endpoint = Endpoint("m", server.url)
        model = Remote(endpoint, tmp_path / "replies.sqlite", own)
        answers(model, ASKED[:1])
        sent = server.seen[0].body
    assert sent["max_completion_tokens"] == 99
    assert not {"max_tokens", "temperature"} & set(sent)
    assert model.identity["parameters"] == own


@pytest.mark.parametrize(
    "refusal",
    [
        failure(400, "too many tokens", "context_length_exceeded"),
        failure(400, "This model's maximum context length is 2048 tokens. However, you requested 4096"),
        failure(400, "The decoder prompt (length 2512) is longer than the maximum model length of 2048."),
        failure(400, "The input (2512 tokens) is longer than the model's context length (2048 tokens)."),
    ],
)
def test_what_is_too_long_for_an_address_has_no_prediction(refusal: Answer, tmp_path: Path) -> None:
    with serving(lambda seen, before: refusal) as server:
        assert answers(remote(server.url, tmp_path), ASKED[:1])["one/0"][:2] == (None, "too_long")


def test_a_full_disk_stops_an_address_without_a_traceback(tmp_path: Path) -> None:
    def on_answer(*_: object) -> None:
        raise UserError("cannot be written")

    with (
        serving(lambda seen, before: completion("Yes.")) as server,
        pytest.raises(UserError, match="be written"),
    ):
        remote(server.url, tmp_path).answer(ASKED, on_answer)
