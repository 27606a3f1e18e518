"""The loss is one mean over supervised tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

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
