"""The next token: drawn from the distribution that the settings describe, row by row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflax.generate import sample
from vflax.generate.sample import Settings

VOCAB = 50


PLAIN = {
    "temperature": 0, "top_k": 0, "top_p": 1, "repetition": 1, "presence": 0, "frequency": 0, "seed": [0, 0],
    "logprobs": False,
}  # fmt: skip
DTYPES = {"top_k": jnp.int32, "seed": jnp.uint32, "logprobs": jnp.bool_}


def settings(rows: int, **fields: Any) -> Settings:
    """Greedy in all rows, but for what is named: a value for all, or one for each."""

    def column(name: str) -> jax.Array:
        shape = (rows, 2) if name == "seed" else (rows,)
        values = jnp.asarray(np.array(fields.get(name, PLAIN[name])), DTYPES.get(name, jnp.float32))
        return jnp.broadcast_to(values, shape)

    return Settings(*map(column, Settings._fields))


def choose(
    logits: np.ndarray, chosen: Settings, drawn: Any = 0, counts: Any = 0, seen: Any = False
) -> np.ndarray:
    token, _ = jax.jit(sample.choose)(
        jnp.asarray(logits),
        chosen,
        jnp.broadcast_to(jnp.asarray(drawn, jnp.int32), (len(logits),)),
        jnp.broadcast_to(jnp.asarray(counts, jnp.int32), logits.shape),
        jnp.broadcast_to(jnp.asarray(seen, bool), logits.shape),
        jnp.ones(len(logits), bool),
    )
    return np.asarray(token)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (1, VOCAB)).astype(np.float32)


def reference(x: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution by sorting, in float64."""
    x = x.astype(np.float64) / temperature
    if top_k:
        x = np.where(x >= np.sort(x)[-min(top_k, len(x))], x, -np.inf)
    chances = np.exp(x - x.max())
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    chances[order[before >= top_p]] = 0
    return chances / chances.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1, 0, 1), (0.5, 0, 1), (1.7, 0, 1), (1, 5, 1), (1, 0, 0.6), (1.3, 12, 0.8)]
)
def test_draws_follow_the_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> None:
    number = 40_000
    rows = np.repeat(logits, number, axis=0)
    own = settings(number, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = choose(rows, own, drawn=np.arange(number))
    expected = reference(logits[0], temperature, top_k, top_p)
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    likely = expected * number >= 5
    chi2 = ((counts - expected * number)[likely] ** 2 / (expected * number)[likely]).sum()
    # Of a chi-squared variable with n degrees of freedom, 1 in a million is beyond n + 7 sqrt(n) + 20, about.
    degrees = likely.sum() - 1
    assert chi2 < degrees + 7 * degrees**0.5 + 20


@pytest.mark.parametrize(
    "top_k, top_p", [(0, 0.9), (7, 1), (3, 0.5), (0, 1e-9), (0, 1e-300), (VOCAB, 0.999), (1, 1)]
)
def test_what_is_cut_off_is_what_a_sort_cuts_off(top_k: int, top_p: float) -> None:
    rows = np.random.default_rng(1).normal(0, 3, (200, VOCAB)).astype(np.float32)
    kept = sample.truncated(
        jnp.asarray(rows), jnp.full(200, top_k, jnp.int32), jnp.full(200, top_p, jnp.float32)
    )
    expected = np.stack([reference(row, 1.0, top_k, top_p) > 0 for row in rows])
    np.testing.assert_array_equal(np.isfinite(np.asarray(kept)), expected)


def test_the_likeliest_token_always_stays() -> None:
    x = jnp.asarray([[0.0, 5.0, 5.0, -1.0]])
    kept = sample.truncated(x, jnp.asarray([1]), jnp.asarray([0.1], jnp.float32))
    assert np.isfinite(np.asarray(kept)).tolist() == [
        [False, True, True, False]
    ]  # both of two that are as likely


def test_rows_have_their_own_settings() -> None:
    rows = np.random.default_rng(2).normal(0, 1, (4, VOCAB)).astype(np.float32)
    rows[:] = rows[0]
    mixed = settings(4, temperature=[0, 2, 2, 0], top_k=[0, 1, 0, 0])
    drawn = [choose(rows, mixed, drawn=n) for n in range(30)]
    best = int(rows[0].argmax())
    assert all(tokens[[0, 1, 3]].tolist() == [best] * 3 for tokens in drawn)
    assert len({int(tokens[2]) for tokens in drawn}) > 3


def test_a_rows_token_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 1, (16, VOCAB)).astype(np.float32)
    own = settings(16, temperature=1.2, top_p=0.9, seed=rng.integers(0, 2**32, (16, 2)))
    together = choose(rows, own, drawn=5)
    for i in range(16):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], own)
        assert choose(rows[i : i + 1], alone, drawn=5)[0] == together[i]
    swapped = jax.tree.map(lambda x: x[::-1], own)
    np.testing.assert_array_equal(choose(rows[::-1].copy(), swapped, drawn=5)[::-1], together)


def test_each_draw_of_a_seed_is_another(logits: np.ndarray) -> None:
    own = settings(1, temperature=1.5, seed=[[3, 4]])
    draws = [int(choose(logits, own, drawn=n)[0]) for n in range(40)]
    assert len(set(draws)) > 5
    assert draws == [int(choose(logits, own, drawn=n)[0]) for n in range(40)]
    other = settings(1, temperature=1.5, seed=[[4, 3]])
    assert draws != [int(choose(logits, other, drawn=n)[0]) for n in range(40)]


def test_penalties_change_what_their_papers_say() -> None:
    x = np.array([[2.0, -2.0, 1.0, 0.5]], np.float32)
    counts, seen = np.array([[2, 0, 1, 0]]), np.array([[True, True, False, False]])
    changed = sample.penalised(
        jnp.asarray(x),
        settings(1, repetition=2, presence=0.25, frequency=0.1),
        jnp.asarray(counts),
        jnp.asarray(seen),
    )
    # [2 / 2 - 0.25 - 0.2, -2 * 2, 1 - 0.25 - 0.1, 0.5]
    np.testing.assert_allclose(np.asarray(changed), [[0.55, -4.0, 0.65, 0.5]], rtol=1e-6)


def test_a_penalty_can_change_the_greedy_choice_of_its_row_alone() -> None:
    x = np.tile(np.array([[2.0, 1.9, 0.0]], np.float32), (2, 1))
    seen = np.array([[True, False, False]] * 2)
    assert choose(x, settings(2, repetition=[1, 1.5]), seen=seen).tolist() == [0, 1]


def test_of_tokens_that_are_as_likely_greedy_takes_the_first() -> None:
    assert choose(np.array([[1.0, 3.0, 3.0, 2.0]], np.float32), settings(1)).tolist() == [1]


def test_a_row_of_nan_gives_a_token_of_the_vocabulary() -> None:
    x = np.full((1, VOCAB), np.nan, np.float32)
    for temperature in (0, 1):
        assert 0 <= choose(x, settings(1, temperature=temperature, top_p=0.9, top_k=3))[0] < VOCAB
