"""Training on 8 simulated devices equals training on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, sys
import jax, optax
from jax.sharding import NamedSharding, PartitionSpec
from tests import toy
from vflax import freeze, sharding
from vflax.step import init_state, make_train_step, state_shardings

graphdef, params = toy.build()
verdict = freeze.verdicts(params, ((r"vision/.*", "frozen"), (r".*", "trainable")))
for sizes in json.loads(sys.argv[1]):
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    mesh = sharding.make_mesh(*sizes, devices)
    where = sharding.param_shardings(params, mesh) if len(devices) > 1 else {
        path: NamedSharding(mesh, PartitionSpec()) for path in params}
    placed = {path: jax.device_put(x, where[path]) for path, x in params.items()}
    trainable, frozen = freeze.split(placed, verdict)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = state_shardings(jax.eval_shape(lambda p: init_state(tx, p), trainable), where, replicated)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda p: init_state(tx, p), out_shardings=shardings)(trainable)
        train_step = make_train_step(graphdef, tx, "global", 24)
        step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))
        losses = []
        for i in range(5):
            batch = jax.device_put(toy.stacked(toy.batch(16, seed=i), 2), sharding.batch_sharding(mesh))
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    moment = [x for x in jax.tree.leaves(state.opt_state) if x.shape == params["decoder/layers/mlp/up/kernel"].shape][0]
    print(json.dumps({"losses": losses, "moment_shard": moment.sharding.shard_shape(moment.shape)}))
"""


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, int, int], dict]:
    meshes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(meshes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return dict(zip(meshes, lines, strict=True))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_gives_the_losses_of_a_single_device(runs, mesh):
    single = runs[(1, 1, 1)]["losses"]
    assert single[-1] < single[0]
    np.testing.assert_allclose(runs[mesh]["losses"], single, rtol=1e-5)


def test_optimizer_moments_are_sharded_like_their_parameters(runs):
    assert runs[(1, 8, 1)]["moment_shard"] == [2, 4, 64]
    assert runs[(2, 2, 2)]["moment_shard"] == [2, 16, 32]
