"""AdamW over the trainable leaves."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from tests import small, toy
from vflax import freeze, optimizer
from vflax.checkpoint import Checkpointer
from vflax.errors import UserError
from vflax.step import TrainState, init_state, make_train_step

BFLOAT16 = jnp.dtype("bfloat16")
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


@pytest.mark.parametrize("of_parameters", ["float32", "bfloat16"])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_both_moments_have_the_asked_dtype_before_and_after_a_step(moment_dtype: str, of_parameters: str):
    tx, _ = optimizer.make_optimizer(settings(moment_dtype=moment_dtype), PATHS, 10)
    given = optax.tree.cast(params(), of_parameters)
    before = tx.init(given)
    _, after = tx.update(given, before, given)
    for state in (before, after):
        assert [leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim] == [moment_dtype] * 2 * len(
            PATHS
        )


def test_float32_moments_and_updates_are_those_of_optax_to_the_bit():
    ours, theirs = optimizer.scale_by_adam(0.9, 0.999, 1e-8, jnp.dtype("float32")), optax.scale_by_adam()
    found, expected = ours.init(params()), theirs.init(params())
    for seed in range(3):
        grads = jax.tree.map(lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), params())
        (updates, found), (wanted, expected) = ours.update(grads, found), theirs.update(grads, expected)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, (updates, found), (wanted, expected))


@pytest.mark.parametrize("start", [0.0, 4.0])
def test_a_second_moment_in_bfloat16_arrives_where_rounding_to_the_nearest_leaves_it_behind(start: float):
    grads = {"a/kernel": jnp.ones((64, 64), jnp.bfloat16)}

    def second_moment(tx: optax.GradientTransformation) -> float:
        state = tx.init(grads)
        state = state._replace(nu=jax.tree.map(lambda nu: jnp.full_like(nu, start), state.nu))
        state, _ = jax.lax.scan(lambda state, _: (tx.update(grads, state)[1], None), state, length=5000)
        assert state.nu["a/kernel"].dtype == jnp.bfloat16
        return float(state.nu["a/kernel"].astype(jnp.float32).mean())

    arrived = 1 + (start - 1) * 0.999**5000
    assert second_moment(optimizer.scale_by_adam(0.9, 0.999, 1e-8, BFLOAT16)) == pytest.approx(
        arrived, rel=0.01
    )
    # optax keeps the second moment in the parameters' dtype.
    assert abs(second_moment(optax.scale_by_adam(mu_dtype=BFLOAT16)) - arrived) > 0.4


def test_rounding_by_chance_takes_a_neighbour_and_is_right_in_the_mean():
    x = jnp.concatenate([jnp.geomspace(1e-30, 1e30, 61), jnp.array([0.0, 1.0, 3.140625, -2.7])]).astype(
        jnp.float32
    )
    keys = jax.random.split(jax.random.key(0), 10_000)
    rounded = jax.vmap(optimizer.round_by_chance, (None, 0))(x, keys)
    found, exact = np.asarray(rounded, np.float64), np.asarray(x, np.float64)
    spacing = np.abs(exact) * 2.0**-7  # of neighbours in bfloat16, at the most
    assert (np.abs(found - exact) <= spacing).all()
    assert max(len(np.unique(column)) for column in found.T) == 2
    # Five deviations of the mean of so many draws between two neighbours.
    assert (np.abs(found.mean(axis=0) - exact) <= 5 * spacing / 2 / 100).all()


def test_what_bfloat16_holds_is_not_rounded():
    x = jnp.array([0.0, 1.0, 3.140625, 2.0**-120, jnp.inf], jnp.bfloat16)
    for seed in range(20):
        found = optimizer.round_by_chance(x.astype(jnp.float32), jax.random.key(seed))
        np.testing.assert_array_equal(found.astype(jnp.float32), x.astype(jnp.float32))


def second_moment_of_a_step(count: int) -> dict[str, np.ndarray]:
    """In bfloat16 after one step without a gradient, from one float32 number everywhere and `count` steps done."""
    tx = optimizer.scale_by_adam(0.9, 0.999, 1e-8, BFLOAT16)
    zero = {path: jnp.zeros((64, 64)) for path in ("a/kernel", "b/kernel")}
    state = tx.init(zero)._replace(count=jnp.int32(count), nu=jax.tree.map(jnp.ones_like, zero))
    return {path: np.asarray(leaf, np.float32) for path, leaf in tx.update(zero, state)[1].nu.items()}


def test_each_step_and_leaf_is_rounded_by_a_draw_of_its_own_and_the_same_again():
    drawn = [leaf.tobytes() for count in (3, 4) for leaf in second_moment_of_a_step(count).values()]
    assert len(set(drawn)) == 4
    assert drawn == [leaf.tobytes() for count in (3, 4) for leaf in second_moment_of_a_step(count).values()]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from vflax import sharding
from vflax.optimizer import scale_by_adam

tx = scale_by_adam(0.9, 0.999, 1e-8, jnp.dtype("bfloat16"))
zero = jnp.zeros((64, 32))  # without a gradient nothing but the rounding could differ
state = tx.init({"a": zero})._replace(nu={"a": jnp.linspace(1, 2, zero.size).reshape(zero.shape)})
found = set()
for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(*sizes, jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    where = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    put = jax.tree.map(lambda x: jax.device_put(x, where if x.ndim else NamedSharding(mesh, PartitionSpec())), state)
    nu = jax.jit(tx.update)({"a": jax.device_put(zero, where)}, put)[1].nu["a"]
    assert nu.sharding.shard_shape(nu.shape) == (64 // sizes[1], 32 // sizes[2]), nu.sharding
    found.add(np.asarray(nu).tobytes())
assert len(found) == 1
"""


def test_rounding_does_not_depend_on_how_a_moment_is_sharded():
    result = subprocess.run(
        [sys.executable, "-c", SHARDED], env=small.environment(devices=8), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


@functools.cache
def toy_run(moment_dtype: str) -> tuple[TrainState, Callable[[TrainState], tuple[TrainState, dict]]]:
    """(state before the first step, step) of the toy model on always the same rows."""
    graphdef, weights = toy.build()
    trainable, frozen = freeze.split(weights, freeze.verdicts(weights, ((r".*", "trainable"),)))
    tx, _ = optimizer.make_optimizer(settings(lr=3e-3, clip=1.0, moment_dtype=moment_dtype), trainable, 20)
    step = jax.jit(make_train_step(graphdef, tx, "global", 24))
    return init_state(tx, trainable), lambda state: step(state, frozen, toy.stacked(toy.batch(4), 1))


def losses_of(moment_dtype: str) -> list[float]:
    state, step = toy_run(moment_dtype)
    losses = []
    for _ in range(20):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_with_moments_in_bfloat16_a_model_learns_as_with_float32():
    exact = losses_of("float32")
    assert exact[-1] < 0.7 * exact[0]
    np.testing.assert_allclose(losses_of("bfloat16"), exact, rtol=0.02)


@pytest.mark.slow
def test_a_resumed_run_with_moments_in_bfloat16_is_the_same_to_the_bit(tmp_path: Path):
    state, step = toy_run("bfloat16")
    state, _ = step(step(state)[0])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
    with contextlib.closing(Checkpointer(tmp_path, 1, "")) as checkpointer:
        checkpointer.save(2, state, {}, None)
        checkpointer.wait()
        resumed = checkpointer.restore(2, abstract)
    jax.tree.map(np.testing.assert_array_equal, step(step(resumed)[0]), step(step(state)[0]))


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
