"""The loss: one mean over supervised tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import optax

from vflax.constants import IGNORE_LABEL, LANES
from vflax.models.product import on_one_cpu, product
from vflax.sharding import batch_shards

# Bytes of float32 logits that one device holds at a time, where the vocabulary can be cut.
_LOGITS = 2**27
_MOST_CHUNKS = 16
# Positions of a turn, on a CPU.
_POSITIONS = 256


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


def head_loss_sum(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """`cross_entropy_sum` of the logits hidden x kernel, of as few of them at a time as fit well.

    That is a chunk of the vocabulary where the logits would be large; on one CPU some of the positions, and none but
    supervised ones.

    Args:
        hidden: [B, C, D] in the compute dtype.
        kernel: [D, V] in the compute dtype.
        targets: int32 [B, C], or IGNORE_LABEL.
    """
    if targets.size > _POSITIONS and on_one_cpu():
        return _position_by_position(hidden, kernel, targets)
    width = _width(kernel, targets)
    if width == kernel.shape[1]:
        # [B, C, D] x [D, V] -> [B, C, V], accumulated and kept in float32
        return cross_entropy_sum(product(hidden, kernel, preferred_element_type=jnp.float32), targets)
    return _chunked(hidden, kernel, targets, width)


def head_losses(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """The summands of `head_loss_sum`, float32 [B, C] in nats, 0 where nothing is supervised; without gradients."""
    log_total, target_logit = _log_likelihoods(hidden, kernel, targets, _width(kernel, targets))
    return jnp.where(targets != IGNORE_LABEL, log_total - target_logit, 0)


def _width(kernel: jax.Array, targets: jax.Array) -> int:
    """`chunk_width` on the mesh at hand."""
    rows, vocabulary = targets.shape[0], kernel.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # The tensor axis has cut the vocabulary already.
        if mesh.shape["tensor"] > 1:
            return vocabulary
        rows = math.ceil(rows / batch_shards(mesh))
    return chunk_width(rows, targets.shape[1], vocabulary)


def chunk_width(rows: int, capacity: int, vocabulary: int) -> int:
    """Columns of a chunk: so many that a device's logits of one take about _LOGITS bytes.

    Args:
        rows: of a micro-batch on one device.
        capacity: positions of a row that have logits.
        vocabulary: columns in all.
    """
    width = max(_LOGITS // (4 * rows * capacity), vocabulary // _MOST_CHUNKS)
    return min(vocabulary, -(-width // LANES) * LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, width: int) -> jax.Array:
    """The loss from chunks of `width` columns, each made once forward and once more backward.

    Chunks of positions would need less code, but their gradients of the kernel are sums over all chunks, which then
    cross the network once for each; a chunk of columns has its part of that gradient for itself.
    """
    return _chunked_forward(hidden, kernel, targets, width)[0]


def _columns(vocabulary: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _chunk_logits(hidden: jax.Array, kernel: jax.Array, columns: slice) -> jax.Array:
    # [B, C, D] x [D, Vc] -> float32 [B, C, Vc]
    return product(hidden, kernel[:, columns], preferred_element_type=jnp.float32)


def _hits(targets: jax.Array, columns: slice) -> jax.Array:
    """Which column of a chunk is a position's target: bool [B, C, Vc]."""
    return targets[..., None] == jnp.arange(columns.start, columns.stop)


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _chunked_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, width: int
) -> tuple[jax.Array, _Residuals]:
    log_total, target_logit = _log_likelihoods(hidden, kernel, targets, width)
    loss = jnp.sum(jnp.where(targets != IGNORE_LABEL, log_total - target_logit, 0))
    return loss, (hidden, kernel, targets, log_total)


def _log_likelihoods(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the sum of all exponentials and the target's logit, float32 [B, C] each."""
    largest = jnp.full(targets.shape, -jnp.inf)
    total, target_logit = jnp.zeros(targets.shape), jnp.zeros(targets.shape)
    for columns in _columns(kernel.shape[1], width):
        logits = _chunk_logits(hidden, kernel, columns)
        before, largest = largest, jnp.maximum(largest, logits.max(-1))
        total = total * jnp.exp(before - largest) + jnp.exp(logits - largest[..., None]).sum(-1)
        target_logit += jnp.where(_hits(targets, columns), logits, 0).sum(-1)
        # One chunk after the other: else the compiler may make them all at once.
        hidden, largest, total = jax.lax.optimization_barrier((hidden, largest, total))
    return largest + jnp.log(total), target_logit


def _chunked_backward(
    width: int, residuals: _Residuals, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    hidden, kernel, targets, log_total = residuals
    weight = jnp.where(targets != IGNORE_LABEL, grad, 0)
    d_hidden = jnp.zeros(hidden.shape, jnp.float32)
    d_kernel = []
    for columns in _columns(kernel.shape[1], width):
        p = jnp.exp(_chunk_logits(hidden, kernel, columns) - log_total[..., None])
        d_logits = ((p - _hits(targets, columns)) * weight[..., None]).astype(hidden.dtype)
        # [B, C, D] x [B, C, Vc] -> [D, Vc]
        d_kernel.append(jnp.einsum("bcd,bcv->dv", hidden, d_logits))
        # [B, C, Vc] x [D, Vc] -> [B, C, D]
        d_hidden += jnp.einsum(
            "bcv,dv->bcd", d_logits, kernel[:, columns], preferred_element_type=jnp.float32
        )
        hidden, d_hidden = jax.lax.optimization_barrier((hidden, d_hidden))
    return d_hidden.astype(hidden.dtype), jnp.concatenate(d_kernel, axis=1), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _position_by_position(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of the supervised positions alone, however many of the C places of a row they fill.

    One long answer makes C large for all rows of a run. A loop that turns as often as a batch needs it takes static
    shapes; it is for one device, for here no other waits.
    """
    # [B, C, D], [B, C] -> [N, D], [N], N a whole number of turns
    room = -targets.size % _POSITIONS
    hidden = jnp.pad(hidden.reshape(-1, hidden.shape[-1]), ((0, room), (0, 0)))
    targets = jnp.pad(targets.reshape(-1), (0, room), constant_values=IGNORE_LABEL)
    order = jnp.argsort(targets == IGNORE_LABEL, stable=True)
    count = jnp.sum(targets != IGNORE_LABEL)
    return _in_turns(hidden[order], kernel, targets[order], -(-count // _POSITIONS))


@jax.custom_vjp
def _in_turns(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, turns: jax.Array) -> jax.Array:
    """The loss of the first `turns` times _POSITIONS of hidden [N, D], kernel [D, V], targets [N]."""

    def turn(i: jax.Array, loss: jax.Array) -> jax.Array:
        return loss + cross_entropy_sum(*_logits_of_a_turn(hidden, kernel, targets, i)[1:])

    return jax.lax.fori_loop(0, turns, turn, jnp.float32(0))


def _in_turns_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, turns: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss and its gradients at once, while a turn's logits are there: the loss is a scalar, and so is what its
    gradients are multiplied with."""

    def turn(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss, d_hidden, d_kernel = carry
        own, logits, wanted = _logits_of_a_turn(hidden, kernel, targets, i)
        more, d_logits = jax.value_and_grad(cross_entropy_sum)(logits, wanted)
        d_logits = d_logits.astype(kernel.dtype)
        # [n, V] x [D, V] -> [n, D]
        d_own = jnp.einsum("nv,dv->nd", d_logits, kernel).astype(hidden.dtype)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_own, i * _POSITIONS, axis=0)
        # [n, D] x [n, V] -> [D, V]
        d_kernel += jnp.einsum("nd,nv->dv", own, d_logits, preferred_element_type=jnp.float32)
        return loss + more, d_hidden, d_kernel

    start = jnp.float32(0), jnp.zeros_like(hidden), jnp.zeros(kernel.shape, jnp.float32)
    loss, d_hidden, d_kernel = jax.lax.fori_loop(0, turns, turn, start)
    return loss, (d_hidden, d_kernel.astype(kernel.dtype))


def _in_turns_backward(
    gradients: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_kernel = ((grad * x).astype(x.dtype) for x in gradients)
    return d_hidden, d_kernel, None, None


_in_turns.defvjp(_in_turns_forward, _in_turns_backward)


def _logits_of_a_turn(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, i: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden [n, D], float32 logits [n, V] and targets [n] of turn i."""
    own, wanted = (jax.lax.dynamic_slice_in_dim(x, i * _POSITIONS, _POSITIONS) for x in (hidden, targets))
    # [n, D] x [D, V] -> [n, V]
    return own, product(own, kernel, preferred_element_type=jnp.float32), wanted
