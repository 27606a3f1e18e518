"""A training run reads as a whole model: trained leaves from the checkpoint, the rest from the frozen store."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from tests.weights import hub, run
from vflax import checkpoint
from vflax.errors import UserError
from vflax.models.lora import LoraConfig
from vflax.weights import names, safetensors_io, workdir_source
from vflax.weights.load import check
from vflax.weights.open import open_checkpoint
from vflax.weights.source import FileSource, RandomSource, TensorSource, WorkdirSource
from vflax.weights.views import nbytes
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


def stored(folder: Path, leaf: jax.Array, save_args: ocp.SaveArgs) -> _Leaves:
    """A checkpoint of one leaf "x"."""
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        params = ocp.args.StandardSave({"x": leaf}, save_args={"x": save_args})
        manager.save(1, args=ocp.args.Composite(params=params))
        manager.wait_until_finished()
    return _Leaves(folder / "checkpoints" / "1" / "params")


CHUNKS = {
    "one": (ocp.SaveArgs(), (6, 4, 8)),
    "layers": (ocp.SaveArgs(chunk_byte_size=4 * 8 * 4, shard_axes=(0,)), (1, 4, 8)),
    "columns": (ocp.SaveArgs(chunk_byte_size=6 * 4 * 4, shard_axes=(2,)), (6, 4, 1)),
    "tiles": (ocp.SaveArgs(chunk_byte_size=2 * 4 * 4, shard_axes=(0,)), (1, 2, 4)),
}


@pytest.mark.parametrize(("save_args", "chunk"), CHUNKS.values(), ids=CHUNKS.keys())
def test_a_leaf_reads_the_same_however_it_is_chunked(tmp_path: Path, save_args: ocp.SaveArgs, chunk) -> None:
    leaf = jnp.arange(6 * 4 * 8, dtype=jnp.float32).reshape(6, 4, 8)
    leaves = stored(tmp_path, leaf, save_args)
    assert leaves.chunk("x") == chunk
    part = (slice(1, 3), slice(3, 7))
    np.testing.assert_array_equal(leaves.read("x", None, None), leaf)
    for layer in range(6):
        np.testing.assert_array_equal(leaves.read("x", layer, None), leaf[layer])
        np.testing.assert_array_equal(leaves.read("x", layer, part), leaf[layer][part])


def bytes_read() -> int:
    """Of files, by tensorstore, in this process so far."""
    (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def read_in_blocks(source: TensorSource) -> int:
    """Read all of a source as an export does; returns the bytes."""
    total = 0
    for name in source.names():
        for index in safetensors_io.row_blocks(source.shape(name), source.dtype(name).itemsize):
            total += source.read(name, index).nbytes
    return total


# Chunks that hold parts of several rows, and rows that lie in several chunks.
WIDE = hub.with_decoder(hub.CONFIG, vocab_size=3000, mlp_dim=1024)
LORA = LoraConfig(4, 8.0, 0.0, ("decoder/layers/.*",))


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole weights", "adapters"])
def test_an_export_in_small_blocks_reads_each_stored_chunk_once(tmp_path: Path, monkeypatch, lora) -> None:
    for module, name, value in (
        (checkpoint, "_LARGE_LEAF", 8000), (checkpoint, "_CHUNK_BYTES", 16_000),
        (safetensors_io, "_BLOCK_BYTES", 4000), (workdir_source, "_KEPT_BYTES", 128_000),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    # With adapters these alone are trained.
    paths = [] if lora else [path for path in names.table(WIDE) if path.startswith("decoder/")]
    run.write(tmp_path, RandomSource(WIDE, 0), WIDE, paths, "vicuna_v1", (3,), lora=lora)
    params = tmp_path / "checkpoints" / "3" / "params"
    size = sum(path.stat().st_size for path in params.rglob("*") if path.is_file())
    opened = open_checkpoint(tmp_path).source
    before = bytes_read()
    assert read_in_blocks(opened) == nbytes(opened)
    # What describes the chunks is read, too, and some of it again.
    assert bytes_read() - before < 1.2 * size


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
