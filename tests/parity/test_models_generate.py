"""Greedy answers equal those of transformers' `generate` on the same random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.parity import hf
from vflax.generate.greedy import Answer, greedy
from vflax.models import llava

MAX_NEW_TOKENS = 12
PAD = 0
# Different lengths; with one image, with two, without any.
PROMPTS: list[list[int | str]] = [
    [4, "image", 9],
    [2, "image", 3, "image", 11],
    [21],
    [1, "image", 40],
    [5],
    ["image", 2],
    [17, "image", 3],
]


def reference_answer(
    reference: Any, config: llava.LlavaConfig, prompt: tuple[np.ndarray, np.ndarray], eos: list[int]
) -> list[int]:
    ids, images = prompt
    inputs = {"input_ids": hf.input_ids(ids[None]), "attention_mask": torch.ones((1, len(ids)))}
    if len(images):
        inputs["pixel_values"] = hf.pixel_values(images, config.vision)
    out = reference.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=eos or None,
        pad_token_id=PAD,
    )
    return out[0, len(ids) :].tolist()


def ours(reference: Any, config: llava.LlavaConfig, prompts: list[Any], eos: list[int]) -> list[Answer]:
    graphdef, _ = llava.abstract(
        config, dtype="float32", param_dtype="float32", remat="none", attention="reference"
    )
    return greedy(
        hf.params(reference.state_dict(), config),
        graphdef,
        prompts,
        eos_ids=eos,
        pad_id=PAD,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=4,
    )


def compare(answers: list[Answer], expected: list[list[int]]) -> None:
    """Equal, or first different where the best two logits lie within 1e-4: counted, none is expected."""
    ties = 0
    for i, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
        got = answer.tokens.tolist()
        if got == tokens:
            continue
        first = next(at for at, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b)
        assert answer.margins[first] <= 1e-4, (i, first, got, tokens, answer.margins[first])
        ties += 1
    print(f"first difference at a near tie: {ties} of {len(answers)} answers")
    assert ties == 0


def test_greedy_tokens_equal_generate_with_and_without_end_tokens() -> None:
    config = hf.config()
    reference = hf.llava(config, seed=2)
    # The image id would be fed back as an image in the reference; make it the last choice of all.
    with torch.no_grad():
        reference.lm_head.weight[hf.IMAGE_ID_IN_VOCABULARY] = 0
    prompts = [hf.sample(config, pieces, seed=20 + i) for i, pieces in enumerate(PROMPTS)]

    expected = [reference_answer(reference, config, prompt, []) for prompt in prompts]
    compare(ours(reference, config, prompts, [-1, -1]), expected)
    assert all(len(tokens) == MAX_NEW_TOKENS for tokens in expected)

    # Two tokens that two answers reach midway become end tokens; others go on to the end of the budget.
    eos = [expected[0][5], expected[2][3]]
    ended = [reference_answer(reference, config, prompt, eos) for prompt in prompts]
    answers = ours(reference, config, prompts, eos)
    compare(answers, ended)
    assert {len(tokens) for tokens in ended} >= {MAX_NEW_TOKENS}
    assert min(len(tokens) for tokens in ended) < MAX_NEW_TOKENS
    for answer, tokens in zip(answers, ended, strict=True):
        assert answer.ended == (tokens[-1] in eos)
        assert answer.ids.tolist() == (tokens[:-1] if answer.ended else tokens)
