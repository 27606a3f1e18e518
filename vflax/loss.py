"""The loss: one mean over supervised tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vflax.constants import IGNORE_LABEL


def shifted_targets(labels: jax.Array) -> jax.Array:
    """What each position must predict: the label of the next one.

    Args:
        labels: int32 [..., T], IGNORE_LABEL where not supervised. The first token of a packed segment is never
            supervised, so that a shift cannot cross from one segment into the next.

    Returns:
        int32 [..., T]; the last column is IGNORE_LABEL.
    """
    return jnp.concatenate([labels[..., 1:], jnp.full_like(labels[..., :1], IGNORE_LABEL)], axis=-1)


def supervised_tokens(labels: jax.Array) -> jax.Array:
    """How many tokens the loss counts: float32 scalar."""
    return jnp.sum(shifted_targets(labels) != IGNORE_LABEL).astype(jnp.float32)


def cross_entropy_sum(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sum over supervised tokens of -log p(next token), in nats.

    Args:
        logits: float32 [B, T, V].
        labels: int32 [B, T], not shifted.

    Returns:
        float32 scalar. Divide by `supervised_tokens` of the whole (global) batch for the mean.
    """
    targets = shifted_targets(labels)
    weights = targets != IGNORE_LABEL
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(weights, targets, 0))
    return jnp.sum(losses * weights)
