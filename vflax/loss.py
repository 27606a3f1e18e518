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


def supervised_positions(labels: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Where the loss looks, so that the vocabulary product runs on these positions alone.

    LLaVA supervises a minority of positions (answers, not prompts and images), and the product with the vocabulary
    is the largest one of a small decoder.

    Args:
        labels: int32 [B, T], not shifted.
        capacity: C, at least the supervised tokens of any row; the packing plan knows it.

    Returns:
        (positions int32 [B, C], targets int32 [B, C]): the supervised positions in order, then others whose target is
        IGNORE_LABEL.
    """
    targets = shifted_targets(labels)
    # A stable sort of "not supervised" puts the supervised positions first and keeps their order.
    positions = jnp.argsort(targets == IGNORE_LABEL, axis=-1, stable=True)[:, :capacity]
    return positions, jnp.take_along_axis(targets, positions, axis=-1)


def cross_entropy_sum(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum over supervised tokens of -log p(next token), in nats.

    Args:
        logits: float32 [..., V].
        targets: int32 [...], the id that each position must predict, or IGNORE_LABEL.

    Returns:
        float32 scalar. Divide by `supervised_tokens` of the whole (global) batch for the mean.
    """
    weights = targets != IGNORE_LABEL
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(weights, targets, 0))
    return jnp.sum(losses * weights)
