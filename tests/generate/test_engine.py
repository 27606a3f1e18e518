"""The engine: each request is answered as if it were alone."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.generate import small_engine
from tests.generate.small_engine import Sink, ask, begin, picture, prompt, whole_logits
from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.generate.engine import Engine
from vflax.generate.request import Closed, Delta, Prompt, PromptTooLong, Sampling

# Slots and pages for two.
TWO = {"slots": 2, "cache_tokens": 240}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = small_engine.engine(tmp_path_factory.mktemp("engine"))
    yield found
    found.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Of each test its own: tests share an engine, which remembers prompts."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def requests(number: int, seed: int) -> list[tuple[Prompt, dict]]:
    """Prompts of all lengths, some of which begin alike, with and without images, sampled in many ways."""
    rng = np.random.default_rng(seed)
    shared = [prompt(rng, int(rng.integers(20, 150)), images) for images in (0, 1, 2)]
    found = []
    for i in range(number):
        own = prompt(rng, int(rng.integers(1, 120)), int(rng.integers(0, 3)) if i % 3 else 0)
        if i % 2:
            base = shared[int(rng.integers(len(shared)))]
            own = Prompt(np.concatenate([base.ids, own.ids]), (*base.images, *own.images))
        if own.ids[-1] == IMAGE_TOKEN_ID:
            own = Prompt(np.append(own.ids, 5).astype(np.int32), own.images)
        sampling = {
            "max_tokens": int(rng.integers(1, 12)),
            "temperature": float(rng.choice([0, 0.7, 1.3])),
            "top_p": float(rng.choice([1, 0.8])),
            "top_k": int(rng.choice([0, 20])),
            "repetition_penalty": float(rng.choice([1, 1.2])),
            "frequency_penalty": float(rng.choice([0, 0.3])),
            "logprobs": [None, 3][int(rng.integers(2))],
            "seed": i,
        }
        found.append((own, sampling))
    return found


def test_the_logits_of_200_requests_are_the_same_bits_alone_and_among_others(
    engine: Engine, tmp_path: Path
) -> None:
    asked = requests(200, seed=1)
    # A second engine, so that no page is known from the first.
    alone = small_engine.engine(tmp_path)
    expected = [ask(alone, own, logits=True, **sampling) for own, sampling in asked]
    alone.close()
    order = np.random.default_rng(2).permutation(len(asked))
    together = {i: begin(engine, asked[i][0], logits=True, **asked[i][1]) for i in order}
    for i, (reference, (own, _)) in enumerate(zip(expected, asked, strict=True)):
        found = together[i].wait()
        assert found.ids == reference.ids, f"request {i} of {len(own.ids)} tokens"
        assert len(found.logits) == len(found.ids) == len(reference.logits)
        for a, b in zip(found.logits, reference.logits, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len({tuple(sink.ids) for sink in expected}) > 150  # they are not all the same answer


def test_tokens_written_several_at_a_time_are_those_written_one_by_one(engine: Engine) -> None:
    for own, sampling in requests(20, seed=3):
        sampling["max_tokens"] = 30
        assert ask(engine, own, **sampling).ids == ask(engine, own, logits=True, **sampling).ids


@pytest.mark.parametrize("length, images", [(1, 0), (2, 0), (33, 0), (40, 1), (90, 3), (300, 2)])
def test_the_logits_are_those_of_the_whole_forward_pass(
    engine: Engine, rng: np.random.Generator, length: int, images: int
) -> None:
    own = prompt(rng, length, images)
    if own.ids[-1] == IMAGE_TOKEN_ID:
        own = Prompt(np.append(own.ids, 9).astype(np.int32), own.images)
    found = ask(engine, own, logits=True, max_tokens=20, ignore_eos=True)
    expected = whole_logits(own, found.ids)
    np.testing.assert_allclose(np.stack(found.logits), expected, atol=2e-4, rtol=2e-4)
    assert found.ids == expected.argmax(axis=-1).tolist()


def test_nothing_is_compiled_after_the_start(engine: Engine) -> None:
    compiled = engine.compiled
    sinks = [begin(engine, own, **sampling) for own, sampling in requests(30, seed=5)]
    for sink in sinks:
        sink.wait()
    assert engine.compiled == compiled <= 4 + len(engine.row_sizes)


def test_a_picture_is_looked_at_once_and_its_prompt_is_read_once(
    engine: Engine, rng: np.random.Generator
) -> None:
    base = prompt(rng, 60, 1)
    before = engine.stats()
    tails = [rng.integers(3, 300, 9).astype(np.int32) for _ in range(5)]
    sinks = [
        begin(engine, Prompt(np.concatenate([base.ids, tail]), base.images), max_tokens=3) for tail in tails
    ]
    for sink in sinks:
        sink.wait()
    after = engine.stats()
    assert after.images - before.images == 1
    whole_chunks = len(base.ids) // 32 * 32
    assert after.cached_tokens - before.cached_tokens >= 4 * whole_chunks


def test_a_ticket_says_how_much_of_its_prompt_was_known(engine: Engine, rng: np.random.Generator) -> None:
    own = prompt(rng, 70)
    for known in (0, 64):
        sink = Sink()
        ticket = engine.submit(own, Sampling(max_tokens=1), sink)
        sink.wait()
        assert (ticket.prompt_tokens, ticket.cached_tokens) == (70, known)


def test_the_same_text_with_another_picture_is_another_prompt(
    engine: Engine, rng: np.random.Generator
) -> None:
    own = prompt(rng, 60, 1)
    other = Prompt(own.ids, (picture(rng),))
    first = ask(engine, own, logits=True, max_tokens=1)
    second = ask(engine, other, logits=True, max_tokens=1)
    assert not np.array_equal(first.logits[0], second.logits[0])
    np.testing.assert_allclose(second.logits[0], whole_logits(other, second.ids)[0], atol=2e-4, rtol=2e-4)


def test_more_requests_than_slots_and_pages_are_all_answered_in_turn(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    small = small_engine.engine(tmp_path, **TWO)
    sinks = [begin(small, prompt(rng, 60), max_tokens=50, ignore_eos=True) for _ in range(7)]
    assert [len(sink.wait().ids) for sink in sinks] == [50] * 7
    stats = small.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    small.close()


def test_a_request_joins_while_another_runs_and_leaves_before_it(
    engine: Engine, rng: np.random.Generator
) -> None:
    long = begin(engine, prompt(rng, 10), max_tokens=300, ignore_eos=True, logits=True)
    short = ask(engine, prompt(rng, 10), max_tokens=2, ignore_eos=True)
    assert short.finish == "length" and not long.done.is_set()
    assert len(long.wait().ids) == 300


def test_a_cancelled_answer_ends_and_its_slot_and_pages_are_free(
    engine: Engine, rng: np.random.Generator
) -> None:
    begun, sink = threading.Event(), Sink()

    def on_delta(delta: Delta) -> None:
        begun.set()
        sink(delta)

    ticket = engine.submit(prompt(rng, 10), Sampling(max_tokens=490, ignore_eos=True), on_delta)
    assert begun.wait(60)
    ticket.cancel()
    ticket.cancel()
    assert sink.wait().finish == "cancelled" and len(sink.ids) < 490
    assert (engine.stats().running, engine.stats().pages_used) == (0, 0)


def test_what_waits_can_be_cancelled_too(tmp_path: Path, rng: np.random.Generator) -> None:
    small = small_engine.engine(tmp_path, **TWO)
    running = [begin(small, prompt(rng, 5), max_tokens=100, ignore_eos=True, logits=True) for _ in range(2)]
    sink = Sink()
    small.submit(prompt(rng, 5), Sampling(max_tokens=5), sink).cancel()
    assert sink.wait().finish == "cancelled" and sink.tokens == []
    small.close()
    assert {sink.wait().finish for sink in running} <= {"cancelled", "length"}


def test_an_answer_ends_at_its_stop_string_which_is_not_part_of_it(
    engine: Engine, rng: np.random.Generator
) -> None:
    own = prompt(rng, 12)
    whole = ask(engine, own, max_tokens=40, ignore_eos=True)
    stop = whole.text[10:13]
    found = ask(engine, own, max_tokens=40, ignore_eos=True, stop=(stop,))
    assert found.finish == "stop" and found.text == whole.text[: whole.text.index(stop)]
    assert len(found.ids) < 40


def test_the_text_of_the_pieces_is_the_text_of_the_tokens(engine: Engine, rng: np.random.Generator) -> None:
    words = engine.processor.tokenizer
    for temperature in (0.0, 1.5):
        found = ask(engine, prompt(rng, 9), max_tokens=60, temperature=temperature, ignore_eos=True)
        assert found.text == words.decode(found.ids)


def test_white_space_around_an_answer_of_a_chat_is_not_part_of_it(
    engine: Engine, rng: np.random.Generator
) -> None:
    own = prompt(rng, 9)
    plain = ask(engine, own, max_tokens=40, ignore_eos=True)
    chat = ask(engine, Prompt(own.ids, own.images, chat=True), max_tokens=40, ignore_eos=True)
    assert chat.text == plain.text.strip()


def test_logprobs_are_those_of_the_models_own_distribution(engine: Engine, rng: np.random.Generator) -> None:
    found = ask(
        engine,
        prompt(rng, 20),
        max_tokens=6,
        ignore_eos=True,
        temperature=1.4,
        top_k=3,
        logprobs=4,
        logits=True,
    )
    for token, logits in zip(found.tokens, found.logits, strict=True):
        chances = logits - np.log(np.exp(logits.astype(np.float64)).sum())
        assert token.logprob == pytest.approx(chances[token.id], abs=1e-4)
        best = np.argsort(-logits, kind="stable")[:4]
        assert [id for id, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(chances[best].tolist(), abs=1e-4)


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(
    engine: Engine, rng: np.random.Generator
) -> None:
    own = prompt(rng, 20)
    answers = [
        ask(engine, own, max_tokens=20, temperature=1.5, ignore_eos=True, seed=s).ids
        for s in (1, 1, 2, 2**32 + 1)
    ]
    assert answers[0] == answers[1]
    assert len({tuple(ids) for ids in answers}) == 3


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(
    engine: Engine, rng: np.random.Generator
) -> None:
    with pytest.raises(
        PromptTooLong, match=r"490 tokens .* may have 30: together more than the 509"
    ) as found:
        begin(engine, prompt(rng, 490), max_tokens=30)
    assert (found.value.tokens, found.value.limit) == (490, 509)
    assert begin(engine, prompt(rng, 490), max_tokens=19, ignore_eos=True).wait().finish == "length"


def test_without_max_tokens_an_answer_goes_on_to_the_end_of_the_room(
    engine: Engine, rng: np.random.Generator
) -> None:
    assert len(ask(engine, prompt(rng, 480), ignore_eos=True).ids) == 29


@pytest.mark.parametrize(
    "ids, images, said",
    [
        ([], 0, "no tokens"),
        ([4, IMAGE_TOKEN_ID, 5], 1, "1 image tokens, but its 1 images have 36 each"),
        ([4, *[IMAGE_TOKEN_ID] * 36], 1, "ends with an image"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(
    engine: Engine, rng: np.random.Generator, ids: list[int], images: int, said: str
) -> None:
    own = Prompt(np.array(ids, np.int32), tuple(picture(rng) for _ in range(images)))
    with pytest.raises(UserError, match=said):
        begin(engine, own)


def test_a_request_whose_owner_raises_is_ended_and_the_others_go_on(
    engine: Engine, rng: np.random.Generator
) -> None:
    def raising(delta: Delta) -> None:
        raise RuntimeError("the owner is broken")

    engine.submit(prompt(rng, 5), Sampling(max_tokens=400, ignore_eos=True), raising)
    assert ask(engine, prompt(rng, 5), max_tokens=5, ignore_eos=True).finish == "length"
    other = begin(engine, prompt(rng, 5), max_tokens=300, ignore_eos=True, logits=True).wait()
    assert other.finish == "length" and engine.stats().running == 0


def test_closing_lets_what_was_taken_finish_when_it_drains(tmp_path: Path, rng: np.random.Generator) -> None:
    own = small_engine.engine(tmp_path, **TWO)
    sinks = [begin(own, prompt(rng, 5), max_tokens=20, ignore_eos=True) for _ in range(5)]
    own.close(drain=True)
    assert [sink.finish for sink in sinks] == ["length"] * 5
    with pytest.raises(Closed, match="closed"):
        begin(own, prompt(rng, 5))


def test_an_engine_that_breaks_fails_its_requests_and_takes_no_more(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = small_engine.engine(tmp_path, **TWO)
    begun = threading.Event()

    def broken(*args: object) -> None:
        begun.wait(60)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(own._runner, "decode", broken)
    sinks = [begin(own, prompt(rng, 5), max_tokens=20) for _ in range(3)]
    begun.set()
    assert [sink.wait().finish for sink in sinks] == ["failed"] * 3
    with pytest.raises(Closed, match="broke"):
        begin(own, prompt(rng, 5))
    own.close()
