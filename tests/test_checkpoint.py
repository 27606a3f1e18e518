"""Checkpoints come back bit for bit, and the right ones stay."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vflax.checkpoint import Checkpointer, find_step
from vflax.errors import UserError
from vflax.step import TrainState, init_state
from vflax.weights.workdir_source import _Leaves


def state_at(step: int) -> TrainState:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = {
        "bridge/layers_0/kernel": jax.random.normal(jax.random.key(step), (3, 4)),
        "decoder/norm/scale": jnp.ones(5),
    }
    state = init_state(tx, params)
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), state.opt_state, params)
    return TrainState(jnp.int32(step), params, opt_state)


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def write_config(workdir: Path, metric: str) -> None:
    (workdir / "config.json").write_text(json.dumps({"checkpoint": {"best_metric": metric}}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Five steps, keep 2 and the best by eval/loss, which was step 2's; step 4 measured nothing."""
    write_config(tmp_path, "eval/loss")
    checkpointer = Checkpointer(tmp_path, keep=2, best_metric="eval/loss")
    for step, loss in zip(range(1, 6), [3.0, 1.0, 2.0, None, 4.0], strict=True):
        metrics = None if loss is None else {"eval/loss": loss, "eval/accuracy": 0.5}
        checkpointer.save(step, state_at(step), {"seed": 42}, metrics)
    checkpointer.close()
    return tmp_path


def test_a_state_comes_back_bit_for_bit(saved: Path):
    expected = state_at(5)
    checkpointer = Checkpointer(saved, keep=2, best_metric="eval/loss")
    restored = checkpointer.restore(5, abstract(expected))
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert checkpointer.read_record(5) == {"seed": 42, "step": 5}
    checkpointer.close()


def test_the_last_and_the_best_stay(saved: Path):
    assert sorted(int(p.name) for p in (saved / "checkpoints").iterdir()) == [2, 4, 5]
    assert [find_step(saved, which) for which in ("latest", "best", "4")] == [5, 2, 4]


def test_a_save_that_was_cut_off_is_neither_found_nor_kept(saved: Path):
    (saved / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert find_step(saved, "latest") == 5
    checkpointer = Checkpointer(saved, keep=2, best_metric="eval/loss")
    assert checkpointer.latest_step() == 5
    checkpointer.close()
    assert not (saved / "checkpoints" / "9.orbax-checkpoint-tmp").exists()


def test_a_step_that_is_not_there_is_refused_with_those_that_are(saved: Path):
    with pytest.raises(UserError, match=r"--step=3.*2, 4, 5"):
        find_step(saved, "3")


def test_a_folder_without_checkpoints_says_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"no complete checkpoint.*vflax\.launch"):
        find_step(tmp_path, "latest")


def test_best_without_a_measured_metric_is_refused(tmp_path: Path):
    write_config(tmp_path, "eval/loss")
    checkpointer = Checkpointer(tmp_path, keep=2, best_metric="eval/loss")
    checkpointer.save(1, state_at(1), {}, None)
    checkpointer.close()
    with pytest.raises(UserError, match=r"--step=best.*'eval/loss'"):
        find_step(tmp_path, "best")


def test_accuracy_is_better_when_it_is_higher(tmp_path: Path):
    write_config(tmp_path, "eval/accuracy")
    checkpointer = Checkpointer(tmp_path, keep=1, best_metric="eval/accuracy")
    for step, accuracy in enumerate([0.2, 0.9, 0.3], start=1):
        checkpointer.save(step, state_at(step), {}, {"eval/accuracy": accuracy})
    checkpointer.close()
    assert find_step(tmp_path, "best") == 2


def test_keeping_nothing_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.checkpoint\.keep=0"):
        Checkpointer(tmp_path, keep=0, best_metric="")


def test_the_best_metric_may_be_another_one_from_some_checkpoint_on(tmp_path: Path):
    write_config(tmp_path, "eval/accuracy")
    for step, metric in ((1, "eval/loss"), (2, "eval/accuracy"), (3, "eval/accuracy")):
        checkpointer = Checkpointer(tmp_path, keep=1, best_metric=metric)
        checkpointer.save(step, state_at(step), {}, {metric: 0.9 / step})
        checkpointer.close()
    assert find_step(tmp_path, "best") == 2


LARGE = {
    "embedding": ("decoder/embed_tokens/embedding", (32_000, 1024)),
    "output kernel": ("decoder/lm_head/kernel", (1024, 32_000)),
    "stacked kernel": ("decoder/layers/mlp/up/kernel", (3, 2048, 5504)),
    "stacked kernel of small layers": ("decoder/layers/attention/q/kernel", (24, 1024, 1024)),
    "embedding of a prime number of rows": ("decoder/embed_tokens/embedding", (32_003, 1024)),
}


@pytest.mark.parametrize(("path", "shape"), LARGE.values(), ids=LARGE.keys())
def test_a_large_leaf_is_stored_in_chunks_of_megabytes_and_of_one_layer(tmp_path: Path, path: str, shape):
    state = TrainState(jnp.int32(1), {path: jnp.zeros(shape)}, optax.EmptyState())
    checkpointer = Checkpointer(tmp_path, keep=1, best_metric="")
    checkpointer.save(1, state, {}, None)
    checkpointer.close()
    chunk = _Leaves(tmp_path / "checkpoints" / "1" / "params").chunk(path)
    if 32_003 in shape:
        assert chunk == shape
    else:
        assert 2**20 < 4 * math.prod(chunk) <= 2**24
    if len(shape) == 3:
        assert chunk[0] == 1


def test_a_small_leaf_is_stored_as_one(tmp_path: Path):
    path, shape = "decoder/layers/attention/q/kernel", (2, 1024, 1024)
    state = TrainState(jnp.int32(1), {path: jnp.zeros(shape)}, optax.EmptyState())
    checkpointer = Checkpointer(tmp_path, keep=1, best_metric="")
    checkpointer.save(1, state, {}, None)
    checkpointer.close()
    assert _Leaves(tmp_path / "checkpoints" / "1" / "params").chunk(path) == shape


def test_best_without_a_config_that_names_the_metric_is_refused(saved: Path):
    (saved / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: checkpoint\.best_metric is missing"):
        find_step(saved, "best")
