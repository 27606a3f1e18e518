"""Penalties, temperature, top-k and top-p leave the distribution that transformers' own processors leave."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.generate.test_sample import settings
from vflax.generate import sample

VOCAB = 400


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 50, 0.9), (1.4, 0, 0.5), (1.0, 7, 1.0)]
)
def test_processed_scores_equal_those_of_transformers(
    penalty: float, temperature: float, top_k: int, top_p: float
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, VOCAB)).astype(np.float32)
    before = rng.integers(0, VOCAB, (6, 30))
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    )
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(torch.tensor(before), torch.tensor(logits)).numpy()
    seen = np.zeros((6, VOCAB), bool)
    np.put_along_axis(seen, before, True, axis=1)
    ours = sample.penalised(
        jnp.asarray(logits),
        settings(6, repetition=penalty),
        jnp.zeros((6, VOCAB), jnp.int32),
        jnp.asarray(seen),
    )
    ours = sample.truncated(
        ours / temperature, jnp.full(6, top_k, jnp.int32), jnp.full(6, top_p, jnp.float32)
    )
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-6)
