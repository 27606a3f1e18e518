"""A training run reads as a whole model: trained leaves from the checkpoint, the rest from the frozen store."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.weights import hub, run
from vflax.errors import UserError
from vflax.weights import names
from vflax.weights.load import check
from vflax.weights.source import FileSource, WorkdirSource
from vflax.weights.workdir_source import _Leaves

TABLE = names.table(hub.CONFIG)
TRAINED = [path for path in TABLE if not path.startswith("vision/")]
TENSORS = {name: tensor.astype(np.float16) for name, tensor in hub.tensors_of(hub.CONFIG).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("run")
    hub.write_llava(folder / "hub", hub.CONFIG, TENSORS)
    trained = run.write(folder / "work", FileSource(folder / "hub"), hub.CONFIG, TRAINED, "vicuna_v1", (3, 7))
    return folder / "work", trained


def test_a_run_has_every_tensor_in_its_place(made) -> None:
    workdir, trained = made
    source = WorkdirSource(workdir, 7)
    assert source.config == hub.CONFIG
    check(source, hub.CONFIG)
    for path, entry in TABLE.items():
        for layer, name in enumerate(entry.names):
            if path in trained:
                param = trained[path] if entry.layers is None else trained[path][layer]
                expected = entry.to_tensor(param)
            else:
                expected = TENSORS[name]
            found = source.read(name)
            assert found.dtype == source.dtype(name) == expected.dtype
            np.testing.assert_array_equal(found, expected)
    for name in names.carried(hub.CONFIG):
        np.testing.assert_array_equal(source.read(name), TENSORS[name])


def test_a_part_of_a_trained_tensor_equals_the_slice_of_the_whole(made) -> None:
    source = WorkdirSource(made[0], 7)
    for name in ("language_model.model.layers.2.mlp.up_proj.weight", "multi_modal_projector.linear_1.weight"):
        index = (slice(3, 20), slice(5, 11))
        np.testing.assert_array_equal(source.read(name, index), source.read(name)[index])


def test_the_step_asked_for_is_the_step_read(made) -> None:
    name = "language_model.model.norm.weight"
    early, late = (WorkdirSource(made[0], step).read(name) for step in (3, 7))
    np.testing.assert_allclose(late - early, 1 / 64, atol=1e-7)


def test_the_dtype_that_a_trained_weight_came_in_is_kept(made) -> None:
    source = WorkdirSource(made[0], 7)
    name = "language_model.model.norm.weight"
    assert source.dtype(name) == np.float32
    assert source.source_dtype(name) == np.float16


@pytest.mark.parametrize(("chunk_bytes", "span"), [(None, 6), (4 * 8 * 4, 1)])
def test_a_stored_block_is_read_once_for_all_its_layers(
    tmp_path: Path, chunk_bytes: int | None, span: int
) -> None:
    leaf = jnp.arange(6 * 4 * 8, dtype=jnp.float32).reshape(6, 4, 8)
    tree = {"decoder.layers.x": leaf}
    fine = ocp.SaveArgs(chunk_byte_size=chunk_bytes, shard_axes=(0,))
    save_args = {"decoder.layers.x": fine} if chunk_bytes else None
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(1, args=ocp.args.Composite(params=ocp.args.StandardSave(tree, save_args=save_args)))
        manager.wait_until_finished()
    leaves = _Leaves(tmp_path / "checkpoints" / "1" / "params")
    blocks = []
    for layer in range(6):
        np.testing.assert_array_equal(leaves.read("decoder/layers/x", layer, None), leaf[layer])
        assert leaves._kept is not None
        blocks.append(leaves._kept[2])
    assert all(block.shape == (span, 4, 8) for block in blocks)
    assert len({id(block) for block in blocks}) == 6 // span


def test_a_run_that_lost_its_frozen_store_is_refused_with_the_folder(made, tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "copy", ignore=shutil.ignore_patterns("frozen"))
    with pytest.raises(UserError, match=r"copy/frozen/[0-9a-f]+.*copy that folder"):
        WorkdirSource(tmp_path / "copy", 7)


def test_a_step_that_is_not_there_and_a_config_of_another_model_are_refused(made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoints/5/params.*complete checkpoint"):
        WorkdirSource(made[0], 5)
    shutil.copytree(made[0], tmp_path / "copy")
    hub.edit(tmp_path / "copy" / "model" / "config.json", decoder={"mlp_dim": 53})
    with pytest.raises(UserError, match=r"decoder/layers/mlp/up/kernel is \[3, 42, 52\]"):
        WorkdirSource(tmp_path / "copy", 7)
