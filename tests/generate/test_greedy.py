"""Greedy generation: the cache changes nothing, rows stop by themselves, compilations are bounded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.generate.greedy import Prompt, bucket, greedy, make_generate
from vflax.models import llava
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig

CONFIG = llava.LlavaConfig(
    VisionConfig(12, 4, 24, 32, 3, 3, "quick_gelu", 1e-5, -2, False, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
    BridgeConfig("linear", 24, 40),
    DecoderConfig(61, 40, 56, 2, 4, 2, 16, 1e-5, 1e4, None, 256, False),
)
N = CONFIG.vision.num_tokens
KW: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "reference"}
GRAPHDEF, _ = llava.abstract(CONFIG, **KW)
MAX_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def params() -> llava.Params:
    rng = np.random.default_rng(3)
    _, shapes = llava.abstract(CONFIG, **KW)
    drawn = {path: rng.normal(scale=0.25, size=x.shape) for path, x in shapes.items()}
    return {
        path: jnp.asarray(x + 1 if path.endswith("scale") else x, jnp.float32) for path, x in drawn.items()
    }


def prompt(num_text: int, num_images: int, seed: int) -> Prompt:
    rng = np.random.default_rng(seed)
    text = rng.integers(1, 61, num_text).astype(np.int32)
    images = rng.integers(0, 256, (num_images, 12, 12, 3), np.uint8)
    return np.concatenate([np.full(N * num_images, IMAGE_TOKEN_ID, np.int32), text]), images


PROMPTS = [prompt(5, 0, 0), prompt(13, 1, 1), prompt(2, 2, 2), prompt(11, 1, 3), prompt(1, 0, 4)]
NO_END = [-1, -1]


def ask(params: llava.Params, prompts: list[Prompt], eos: list[int], **kw: Any) -> Any:
    settings = {"pad_id": 0, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 2} | kw
    return greedy(params, GRAPHDEF, prompts, eos_ids=eos, **settings)


@pytest.fixture(scope="module")
def answers(params: llava.Params) -> Any:
    return ask(params, PROMPTS, NO_END)


def test_cached_decoding_equals_reading_the_whole_sequence_again(params, answers) -> None:
    apply = jax.jit(lambda *batch: llava.merge(GRAPHDEF, params)(*batch))
    length, slots = 64, 2
    for (ids, images), answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.tokens) == MAX_NEW_TOKENS and not answer.ended
        whole = np.concatenate([ids, answer.tokens])
        row = np.pad(whole, (0, length - len(whole)))[None]
        segments = np.pad(np.ones_like(whole), (0, length - len(whole)))[None]
        slot_images = np.pad(images, ((0, slots - len(images)), (0, 0), (0, 0), (0, 0)))[None]
        positions = np.arange(length, dtype=np.int32)[None]
        logits = np.asarray(apply(row, slot_images, segments, positions))[0]
        chosen = logits[len(ids) - 1 : len(whole) - 1]
        np.testing.assert_array_equal(chosen.argmax(-1), answer.tokens)
        best_two = np.sort(chosen, axis=-1)[:, -2:]
        np.testing.assert_allclose(answer.margins, best_two[:, 1] - best_two[:, 0], atol=1e-4)


def test_a_row_stops_at_any_end_token_and_the_others_go_on(params, answers) -> None:
    eos = [int(answers[1].tokens[2]), int(answers[3].tokens[0])]
    for free, answer in zip(answers, ask(params, PROMPTS, eos), strict=True):
        tokens = free.tokens.tolist()
        hits = [i for i, token in enumerate(tokens) if token in eos]
        stop = hits[0] + 1 if hits else MAX_NEW_TOKENS
        assert answer.tokens.tolist() == tokens[:stop]
        assert answer.ended == bool(hits)
        assert answer.ids.tolist() == tokens[: stop - bool(hits)]
        assert len(answer.margins) == stop


def test_answers_do_not_depend_on_the_batch(params, answers) -> None:
    for free, answer in zip(answers, ask(params, PROMPTS, NO_END, batch_size=8), strict=True):
        np.testing.assert_array_equal(free.tokens, answer.tokens)


def test_the_loop_ends_when_every_row_has_ended(params) -> None:
    generate = make_generate(GRAPHDEF, max_new_tokens=MAX_NEW_TOKENS, pad_id=7)
    ids = np.array([[3, 4, 5, 0], [0, 0, 0, 0]], np.int32)
    segments = (ids > 0).astype(np.int32)
    positions = np.broadcast_to(np.arange(4, dtype=np.int32), ids.shape)
    images = np.zeros((2, 0, 12, 12, 3), np.uint8)
    out = generate(params, ids, images, segments, positions, np.arange(61, dtype=np.int32))
    # Every token ends: one is written by the first row, none by the empty one.
    assert np.asarray(out.lengths).tolist() == [1, 0]
    assert (np.asarray(out.tokens)[0, 1:] == 7).all() and (np.asarray(out.tokens)[1] == 7).all()
    assert np.isinf(np.asarray(out.margins)[0, 1:]).all() and np.isfinite(np.asarray(out.margins)[0, 0])


def test_compilations_are_bounded_by_buckets(params) -> None:
    generate = make_generate(GRAPHDEF, max_new_tokens=MAX_NEW_TOKENS, pad_id=0)
    ask(params, [prompt(10, 1, 0)], NO_END)
    before = generate._cache_size()
    prompts = [prompt(length, 1, length) for length in range(2, 21)]
    assert len(ask(params, prompts, NO_END)) == len(prompts)
    assert generate._cache_size() == before


def test_bucket_covers_a_length_and_wastes_at_most_a_quarter_above_128() -> None:
    for length in range(1, 5000):
        size = bucket(length)
        assert size >= length and size % 32 == 0
        assert size - length < max(32, length / 4)
    assert len({bucket(length) for length in range(1, 4097)}) <= 24


def test_prompts_that_cannot_be_read_are_all_named(params) -> None:
    ids, images = prompt(4, 1, 0)
    empty = (np.zeros(0, np.int32), images[:0])
    with pytest.raises(UserError) as error:
        ask(params, [empty, (ids, images[:0]), (ids, images)], [])
    assert "prompt 0 has no tokens" in str(error.value)
    assert f"prompt 1 has 0 images of {N} tokens, but {N} placeholders" in str(error.value)
    assert "prompt 2" not in str(error.value)
