"""AdamW with per-group learning rates over the trainable leaves only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

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


def make_optimizer(
    optimizer: ConfigDict, trainable: Iterable[str], total_steps: int
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
    """AdamW (Loshchilov and Hutter, 2019) behind a global-norm clip, per-group schedules.

    The transformation sees trainable leaves only: a frozen leaf has no gradient, takes no part in the norm that
    is clipped, is not decayed and holds no state.

    Args:
        optimizer: config.optimizer. `moment_dtype` is that of the first moment; the second stays float32,
            because its decay of 0.999 is lost in bfloat16's 8 bits.
        trainable: paths of the trainable leaves.
        total_steps: optimizer steps of the whole run.

    Returns:
        (transformation over {path: array}, {group: schedule}).
    """
    schedules = make_schedules(optimizer, total_steps)
    paths = list(trainable)
    steps = [
        optax.scale_by_adam(
            optimizer.b1, optimizer.b2, optimizer.eps, mu_dtype=jnp.dtype(optimizer.moment_dtype)
        ),
        optax.add_decayed_weights(optimizer.decay, mask={path: is_decayed(path) for path in paths}),
        optax.partition(
            {group: optax.scale_by_learning_rate(schedule) for group, schedule in schedules.items()},
            {path: group_of(path) for path in paths},
        ),
    ]
    if optimizer.clip:
        steps.insert(0, optax.clip_by_global_norm(optimizer.clip))
    return optax.chain(*steps), schedules
