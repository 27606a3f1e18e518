"""From logits to the next token of each row.

A row's token is a function of its own logits, settings, seed and of how many tokens it has drawn, whatever stands in
other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vflax.generate.request import MAX_LOGPROBS

Array = Any  # jax.Array inside programs, NumPy's on the way in


class Settings(NamedTuple):
    """`vflax.generate.request.Sampling` of R rows, each an array [R]; of one, NumPy's scalars."""

    temperature: Array  # float32; 0: greedy
    top_k: Array  # int32; 0: all
    top_p: Array  # float32
    repetition: Array  # float32; 1: none
    presence: Array  # float32
    frequency: Array  # float32
    seed: Array  # uint32 [R, 2], the two halves of 64 bits
    logprobs: Array  # bool: wanted


class Logprobs(NamedTuple):
    """Of R rows, float32: of the chosen token [R], of the likeliest [R, N], and these tokens' ids, int32 [R, N]."""

    chosen: jax.Array
    top: jax.Array
    ids: jax.Array


def choose(
    logits: jax.Array,
    settings: Settings,
    drawn: jax.Array,
    counts: jax.Array,
    seen: jax.Array,
    runs: jax.Array,
) -> tuple[jax.Array, Logprobs]:
    """The next token of each row, and logprobs, which are zeros where no row wants them.

    The order is that of Hugging Face's generate: penalties, temperature, top-k, top-p.

    Args:
        logits: float32 [R, V].
        settings: of the rows.
        drawn: int32 [R], how many tokens the row has drawn before.
        counts: int32 [R, V], how often its answer holds each token.
        seen: bool [R, V], whether its prompt or answer holds it.
        runs: bool [R]; of other rows nothing is wanted.

    Returns:
        int32 [R], and the logprobs.
    """
    penalties = (settings.repetition != 1) | (settings.presence != 0) | (settings.frequency != 0)
    draws, wanted = settings.temperature > 0, settings.logprobs & runs

    def chosen() -> tuple[jax.Array, Logprobs]:
        own = jax.lax.cond(penalties.any(), lambda: penalised(logits, settings, counts, seen), lambda: logits)
        greedy = first_largest(own)
        drawn_now = jax.lax.cond(draws.any(), lambda: _draw(own, settings, drawn), lambda: greedy)
        token = jnp.where(draws, drawn_now, greedy)
        return token, logprobs(logits, token, wanted)

    def greedy() -> tuple[jax.Array, Logprobs]:
        return first_largest(logits), _no_logprobs(logits)

    # One question on the way of what most ask for: a GPU's host has to wait for each answer.
    return jax.lax.cond((penalties | draws | wanted).any(), chosen, greedy)


def penalised(logits: jax.Array, settings: Settings, counts: jax.Array, seen: jax.Array) -> jax.Array:
    """Logits [R, V] after the three penalties, see `vflax.generate.request.Sampling`."""
    repetition = settings.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return (
        logits
        - settings.presence[:, None] * (counts > 0)
        - settings.frequency[:, None] * counts.astype(jnp.float32)
    )


def first_largest(x: jax.Array) -> jax.Array:
    """argmax over the last axis, int32, as a maximum and a search: XLA's own argmax takes a CPU several times as long.

    A row with NaN has no largest; it gives its last index, as any other token would be as wrong.
    """
    is_largest = x == x.max(axis=-1, keepdims=True)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(is_largest, index, x.shape[-1] - 1).min(axis=-1)


def _draw(logits: jax.Array, settings: Settings, drawn: jax.Array) -> jax.Array:
    """One draw per row from softmax(logits / temperature), cut by top-k and top-p.

    It is the largest after adding Gumbel noise (Maddison et al., arXiv 1411.0030).
    """
    x = logits / jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
    cut = ((settings.top_k > 0) | (settings.top_p < 1)).any()
    x = jax.lax.cond(cut, lambda: truncated(x, settings.top_k, settings.top_p), lambda: x)

    def noise(seed: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, number), x.shape[-1:], jnp.float32)

    return first_largest(x + jax.vmap(noise)(settings.seed, drawn))


def truncated(x: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """x [R, V] with -inf where top-k [R] and then top-p [R] leave a token out; tokens as likely as the last one stay.

    Both keep all that reaches a threshold, which is found bit by bit: 32 sums over V take a fraction of a sort's time.
    """
    keys = _ordered(x)
    k = jnp.where(top_k > 0, top_k, x.shape[-1])
    x = jnp.where(keys >= _largest(lambda t: (keys >= t).sum(axis=-1) >= k, k)[:, None], x, -jnp.inf)
    probabilities = jax.nn.softmax(x, axis=-1)

    def enough(threshold: jax.Array) -> jax.Array:
        return jnp.where(keys >= threshold, probabilities, 0).sum(axis=-1) >= top_p

    # A top-p that is nothing in 32 bits is reached by no token at all: the likeliest stays.
    least = jnp.minimum(_largest(enough, k), keys.max(axis=-1))
    kept = (keys >= least[:, None]) | (top_p >= 1)[:, None]
    return jnp.where(kept, x, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest uint32 threshold of each row for which holds([R, 1]) -> bool [R] is true.

    Where it is false for a threshold, it is false for larger ones.
    """

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(tried[:, None]), tried, found)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(like.shape, jnp.uint32))


def logprobs(logits: jax.Array, chosen: jax.Array, wanted: jax.Array) -> Logprobs:
    """Of the model's own distribution; zeros where no row wants them.

    Args:
        logits: float32 [R, V].
        chosen: int32 [R].
        wanted: bool [R].
    """
    number = min(MAX_LOGPROBS, logits.shape[-1])

    def compute() -> Logprobs:
        all_of_them = jax.nn.log_softmax(logits, axis=-1)
        top, ids = jax.lax.top_k(all_of_them, number)
        return Logprobs(
            jnp.take_along_axis(all_of_them, chosen[:, None], axis=-1)[:, 0], top, ids.astype(jnp.int32)
        )

    return jax.lax.cond(wanted.any(), compute, lambda: _no_logprobs(logits))


def _no_logprobs(logits: jax.Array) -> Logprobs:
    rows, number = logits.shape[0], min(MAX_LOGPROBS, logits.shape[-1])
    return Logprobs(
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, number), jnp.float32),
        jnp.zeros((rows, number), jnp.int32),
    )
