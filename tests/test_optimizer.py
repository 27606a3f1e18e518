"""AdamW over the trainable leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vflax import optimizer
from vflax.errors import UserError

PATHS = [
    "bridge/layers_0/kernel",
    "bridge/layers_0/bias",
    "decoder/layers/mlp/up/kernel",
    "decoder/norm/scale",
]


def settings(**changes) -> ConfigDict:
    values = {
        "lr": 1e-2, "bridge_lr": 0.0, "schedule": "constant", "warmup": 0.0, "decay": 0.0, "clip": 0.0,
        "b1": 0.9, "b2": 0.999, "eps": 1e-8, "moment_dtype": "float32",
    }  # fmt: skip
    return ConfigDict(values | changes)


def params() -> dict[str, jax.Array]:
    return {path: jnp.full((2, 2) if path.endswith("kernel") else (2,), 0.5) for path in PATHS}


def one_step(config: ConfigDict, grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
    tx, _ = optimizer.make_optimizer(config, PATHS, 10)
    updates, _ = tx.update(grads, tx.init(params()), params())
    return updates


def test_the_bridge_learns_at_its_own_rate():
    updates = one_step(settings(bridge_lr=1e-3), jax.tree.map(jnp.ones_like, params()))
    np.testing.assert_allclose(updates["bridge/layers_0/kernel"], -1e-3, rtol=1e-5)
    np.testing.assert_allclose(updates["decoder/layers/mlp/up/kernel"], -1e-2, rtol=1e-5)


def test_without_a_bridge_rate_all_learn_at_lr():
    updates = one_step(settings(), jax.tree.map(jnp.ones_like, params()))
    assert len({float(jnp.ravel(u)[0]) for u in updates.values()}) == 1


def test_biases_and_norms_are_not_decayed():
    updates = one_step(settings(decay=0.1), jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_allclose(updates["decoder/layers/mlp/up/kernel"], -1e-2 * 0.1 * 0.5, rtol=1e-5)
    assert not np.any(updates["bridge/layers_0/bias"]) and not np.any(updates["decoder/norm/scale"])


def test_the_clip_bounds_the_global_norm_of_what_adam_sees():
    tx, _ = optimizer.make_optimizer(settings(clip=1.0), PATHS, 10)
    grads = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params())
    _, state = tx.update(grads, tx.init(params()), params())
    first = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    total = np.sqrt(sum(g.size for g in grads.values()))
    np.testing.assert_allclose(first, 0.1 / total, rtol=1e-4)


def test_the_first_moment_takes_the_asked_dtype_and_the_second_stays_float32():
    tx, _ = optimizer.make_optimizer(settings(moment_dtype="bfloat16"), PATHS, 10)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tx.init(params())) if leaf.ndim]
    assert dtypes.count(jnp.bfloat16) == len(PATHS) and dtypes.count(jnp.float32) == len(PATHS)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_equal_those_of_hugging_face(kind: str):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    peak, total, ratio = 2e-5, 103, 0.03
    sgd = torch.optim.SGD([weight], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    reference = get_scheduler(
        name, sgd, num_warmup_steps=int(np.ceil(total * ratio)), num_training_steps=total
    )
    ours = optimizer.make_schedule(kind, peak, total, ratio)
    for step in range(total):
        np.testing.assert_allclose(ours(step), reference.get_last_lr()[0], rtol=1e-4, atol=1e-11)
        sgd.step()
        reference.step()


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match=r"schedule='cosin' is not one of cosine"):
        optimizer.make_schedule("cosin", 1e-3, 10, 0.0)


def test_a_warmup_that_is_no_share_is_refused():
    with pytest.raises(UserError, match=r"warmup=3"):
        optimizer.make_schedule("cosine", 1e-3, 10, 3)
