"""AdamW with per-group learning rates over the trainable leaves only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from vflax.errors import UserError

if TYPE_CHECKING:  # the step runs on images that have no ml_collections
    from ml_collections import ConfigDict

Schedule = Callable[[int], float]
SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(kind: str, peak: float, total_steps: int, warmup: float) -> Schedule:
    """A learning-rate schedule: linear warm-up from 0, then `kind` down to 0 at `total_steps`.

    The shape and ceil(total * ratio) warm-up steps are those of Hugging Face's trainer, which LLaVA uses.

    Args:
        kind: "cosine", "linear" or "constant" (stays at the peak).
        peak: learning rate after warm-up.
        total_steps: optimizer steps of the whole run.
        warmup: warm-up steps as a share of total_steps.
    """
    if kind not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule={kind!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < 1:
        raise UserError(f"config.optimizer.warmup={warmup} is a share of the run's steps: 0 <= warmup < 1")
    warmup_steps = math.ceil(total_steps * warmup)
    rest = max(1, total_steps - warmup_steps)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def group_of(path: str) -> str:
    """The learning-rate group of a parameter: "bridge" or "base"."""
    return "bridge" if path.startswith("bridge/") else "base"


def is_decayed(path: str) -> bool:
    """Weight decay leaves biases and norms alone, as in LLaVA's trainer."""
    return not path.endswith(("/bias", "/scale"))


def make_schedules(optimizer: ConfigDict, total_steps: int) -> dict[str, Schedule]:
    """{group: schedule}; `bridge_lr` of 0 means that the bridge learns at `lr`."""
    peaks = {"base": optimizer.lr, "bridge": optimizer.bridge_lr or optimizer.lr}
    return {
        group: make_schedule(optimizer.schedule, peak, total_steps, optimizer.warmup)
        for group, peak in peaks.items()
    }


def scale_by_adam(b1: float, b2: float, eps: float, moment_dtype: jnp.dtype) -> optax.GradientTransformation:
    """optax.scale_by_adam, its state too, but that both moments are kept in `moment_dtype` whatever the parameters' is.

    An update is computed in float32 from what was kept. In float32 all numbers are those of optax.scale_by_adam. In
    bfloat16 the first moment is rounded to the nearest, the second up or down by chance: a step changes it by no more
    than 1 - b2 of itself and of the squared gradient, with b2 = 0.999 often less than half of what bfloat16's 8 bits
    can tell apart, so that rounded to the nearest it would stop short of where the gradients lead it. The draw is a
    function of the step and of the leaf's place among the leaves alone: a resumed run, or another mesh, draws the same.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moment_dtype)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(nu=optax.tree.zeros_like(params, dtype=moment_dtype))

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        grads, mu, nu = optax.tree.cast((grads, state.mu, state.nu), jnp.float32)
        updates, new = adam.update(grads, state._replace(mu=mu, nu=nu))
        if moment_dtype == jnp.bfloat16:
            leaves, treedef = jax.tree.flatten(new.nu)
            # The only generator of which JAX promises the same bits under every sharding.
            keys = jax.random.split(
                jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), new.count), len(leaves)
            )
            rounded = map(round_by_chance, leaves, keys)
            new = new._replace(nu=jax.tree.unflatten(treedef, rounded))
        return updates, new

    return optax.GradientTransformation(init, update)


def round_by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to one of its two neighbours in bfloat16, the nearer the likelier: the mean over keys is x."""
    # A bfloat16 is the upper half of a float32: a random number in the lower half carries over as often as x is far up.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def make_optimizer(
    optimizer: ConfigDict, trainable: Iterable[str], total_steps: int
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
    """AdamW (Loshchilov and Hutter, 2019) behind a global-norm clip, per-group schedules.

    The transformation sees trainable leaves only: a frozen leaf has no gradient, takes no part in the norm that
    is clipped, is not decayed and holds no state.

    Args:
        optimizer: config.optimizer. `moment_dtype` is that in which both moments are kept, see `scale_by_adam`.
        trainable: paths of the trainable leaves.
        total_steps: optimizer steps of the whole run.

    Returns:
        (transformation over {path: array}, {group: schedule}).
    """
    schedules = make_schedules(optimizer, total_steps)
    paths = list(trainable)
    steps = [
        scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps, jnp.dtype(optimizer.moment_dtype)),
        optax.add_decayed_weights(optimizer.decay, mask={path: is_decayed(path) for path in paths}),
        optax.partition(
            {group: optax.scale_by_learning_rate(schedule) for group, schedule in schedules.items()},
            {path: group_of(path) for path in paths},
        ),
    ]
    if optimizer.clip:
        steps.insert(0, optax.clip_by_global_norm(optimizer.clip))
    return optax.chain(*steps), schedules
