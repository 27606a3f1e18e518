"""The loss is one mean over supervised tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflax import loss
from vflax.constants import IGNORE_LABEL
from vflax.loss import cross_entropy_sum, shifted_targets, supervised_positions, supervised_tokens


def test_targets_are_the_labels_of_the_next_position():
    labels = jnp.array([[IGNORE_LABEL, 5, 6, IGNORE_LABEL]])
    assert shifted_targets(labels).tolist() == [[5, 6, IGNORE_LABEL, IGNORE_LABEL]]


def test_only_supervised_tokens_are_summed():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 7))
    labels = jnp.array([[IGNORE_LABEL, 5, IGNORE_LABEL, 2], [IGNORE_LABEL] * 4])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -log_p[0, 0, 5] - log_p[0, 2, 2]
    np.testing.assert_allclose(cross_entropy_sum(logits, shifted_targets(labels)), expected, rtol=1e-6)
    assert supervised_tokens(labels) == 2


def test_a_batch_without_supervised_tokens_has_zero_loss_and_gradient():
    logits = jax.random.normal(jax.random.key(0), (1, 3, 7))
    labels = jnp.full((1, 3), IGNORE_LABEL)
    value, gradient = jax.value_and_grad(cross_entropy_sum)(logits, shifted_targets(labels))
    assert value == 0 and not np.any(np.asarray(gradient))


def test_supervised_positions_come_first_and_in_order():
    labels = jnp.array([[IGNORE_LABEL, IGNORE_LABEL, 5, IGNORE_LABEL, 7, 8]])
    positions, targets = supervised_positions(labels, 4)
    assert positions[0, :3].tolist() == [1, 3, 4]
    assert targets.tolist() == [[5, 7, 8, IGNORE_LABEL]]


@pytest.mark.parametrize("vocabulary", [1000, 1024])
def test_a_vocabulary_in_chunks_gives_the_loss_and_gradients_of_the_whole(monkeypatch, vocabulary: int):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 8, 16))
    kernel = jax.random.normal(keys[1], (16, vocabulary))
    targets = jax.random.randint(keys[2], (2, 8), 0, vocabulary).at[0, 3].set(IGNORE_LABEL)

    def value_and_grads() -> tuple:
        return jax.value_and_grad(lambda *x: loss.head_loss_sum(*x, targets) / 7, (0, 1))(hidden, kernel)

    whole = value_and_grads()
    monkeypatch.setattr(loss, "_LOGITS", 4 * 2 * 8 * 384)
    assert loss.chunk_width(2, 8, vocabulary) == 384
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), value_and_grads(), whole
    )


def test_logits_of_a_chunk_stay_near_their_limit_and_chunks_are_few():
    assert loss.chunk_width(1, 512, 32000) == 32000
    assert loss.chunk_width(4, 2048, 32000) * 4 * 2048 * 4 == 2**27
    assert 32000 / loss.chunk_width(64, 2048, 32000) <= 16


@pytest.mark.parametrize("supervised", [0, 1, 10, 80])
def test_on_a_cpu_the_loss_of_supervised_positions_is_that_of_all(monkeypatch, supervised: int):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, 40, 16))
    kernel = jax.random.normal(keys[1], (16, 100))
    chosen = jax.random.permutation(keys[2], 80)[:supervised]
    targets = jnp.full(80, IGNORE_LABEL).at[chosen].set(jax.random.randint(keys[3], (supervised,), 0, 100))
    targets = targets.reshape(2, 40)

    def value_and_grads() -> tuple:
        return jax.value_and_grad(lambda *x: loss.head_loss_sum(*x, targets) / 7, (0, 1))(hidden, kernel)

    whole = value_and_grads()
    monkeypatch.setattr(loss, "_POSITIONS", 8)
    for ours, expected in zip(*map(jax.tree.leaves, (value_and_grads(), whole)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    alone = loss.head_loss_sum(hidden, kernel, targets) / 7  # without its gradients
    np.testing.assert_allclose(alone, whole[0], rtol=1e-5)


def test_on_a_cpu_places_that_are_not_supervised_are_not_multiplied_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(loss, "_POSITIONS", 8)
    hidden, kernel = jnp.ones((2, 40, 16)), jnp.ones((16, 100))
    targets = jnp.full((2, 40), IGNORE_LABEL).at[1, 30].set(5)
    # A turn has eight places. A number that is none spoils what it is multiplied with, be it by zero.
    hidden = hidden.at[1, 8:30].set(jnp.nan)
    value, (d_hidden, d_kernel) = jax.value_and_grad(loss.head_loss_sum, (0, 1))(hidden, kernel, targets)
    assert np.isfinite(value) and np.isfinite(d_hidden).all() and np.isfinite(d_kernel).all()
