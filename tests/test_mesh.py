"""Training on 8 simulated devices equals training on one."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests import small

SCRIPT = """
import json, sys
from pathlib import Path
import jax, optax
from jax.sharding import NamedSharding, PartitionSpec
from tests import toy
from vflax import freeze, sharding
from vflax.checkpoint import Checkpointer
from vflax.models.lora import LoraConfig
from vflax.step import init_state, make_train_step, state_shardings

STEPS = 5
LORA = LoraConfig(4, 8.0, 0.2, (r"decoder/layers/.*",), "int8")
MODELS = {
    "plain": (*toy.build(), ((r"vision/.*", "frozen"), (r".*", "trainable")), None),
    "lora": (*toy.build(LORA), ((r"bridge/.*|.*/lora_[ab]", "trainable"), (r".*", "frozen")), 5),
}
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
checkpointer = Checkpointer(Path(sys.argv[2]), keep=1, best_metric="")


def train(sizes, start=0, stop=STEPS, model="plain"):
    graphdef, params, rules, dropout_seed = MODELS[model]
    verdict = freeze.verdicts(params, rules)
    learns = "decoder/layers/mlp/up/" + ("kernel" if model == "plain" else "lora_b")
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    mesh = sharding.make_mesh(*sizes, devices)
    where = sharding.param_shardings(params, mesh) if len(devices) > 1 else {
        path: NamedSharding(mesh, PartitionSpec()) for path in params}
    trainable, frozen = freeze.split({path: jax.device_put(x, where[path]) for path, x in params.items()}, verdict)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda p: init_state(tx, p), trainable)
    shardings = state_shardings(abstract, where, replicated)
    with jax.set_mesh(mesh):
        if start:
            state = checkpointer.restore(start, jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings))
        else:
            state = jax.jit(lambda p: init_state(tx, p), out_shardings=shardings)(trainable)
        train_step = make_train_step(graphdef, tx, "global", 24, dropout_seed)
        step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))
        losses = []
        for i in range(start, stop):
            batch = jax.device_put(toy.stacked(toy.batch(16, seed=i), 2), sharding.batch_sharding(mesh))
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        if stop < STEPS:
            checkpointer.save(stop, state, {}, None)
            checkpointer.wait()
    moment = [x for x in jax.tree.leaves(state.opt_state) if x.shape == params[learns].shape][0]
    return {"losses": losses, "moment_shard": moment.sharding.shard_shape(moment.shape)}


found = {str(sizes): train(sizes) for sizes in json.loads(sys.argv[1])}
for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    found[f"lora {sizes}"] = train(sizes, model="lora")
found["resumed"] = {"losses": train((1, 8, 1), stop=3)["losses"] + train((2, 2, 2), start=3)["losses"]}
checkpointer.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    meshes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(meshes), str(tmp_path_factory.mktemp("run"))],
        env=small.environment(devices=8),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_gives_the_losses_of_a_single_device(runs, mesh):
    single = runs["[1, 1, 1]"]["losses"]
    assert single[-1] < single[0]
    np.testing.assert_allclose(runs[str(list(mesh))]["losses"], single, rtol=1e-5)


def test_a_run_continued_on_another_mesh_has_the_losses_of_one_that_was_not_stopped(runs):
    np.testing.assert_allclose(runs["resumed"]["losses"], runs["[1, 1, 1]"]["losses"], rtol=1e-5)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_adapters_with_dropout_beside_integers_learn_the_same_on_a_mesh(runs, mesh):
    single = runs["lora (1, 1, 1)"]["losses"]
    assert single[-1] < single[0]
    np.testing.assert_allclose(runs[f"lora {mesh}"]["losses"], single, rtol=1e-5)


def test_optimizer_moments_are_sharded_like_their_parameters(runs):
    assert runs["[1, 8, 1]"]["moment_shard"] == [2, 4, 64]
    assert runs["[2, 2, 2]"]["moment_shard"] == [2, 16, 32]
