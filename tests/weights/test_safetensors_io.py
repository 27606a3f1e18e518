"""safetensors files are read in parts, written as a stream, and damage is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vflax.errors import UserError
from vflax.weights import safetensors_io
from vflax.weights.safetensors_io import (
    SafetensorsFile,
    TensorSpec,
    plan_shards,
    write_shards,
)
from vflax.weights.tensor_files import open_directory

RNG = np.random.default_rng(0)
TENSORS = {
    "matrix": RNG.normal(size=(7, 5)).astype(np.float32),
    "half": RNG.normal(size=(3,)).astype(np.float16),
    "brain": RNG.normal(size=(4, 3, 2, 5)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "ids": np.arange(6),
}


def write(folder: Path, tensors: dict[str, np.ndarray] = TENSORS, max_bytes: int = 1 << 30) -> dict[str, str]:
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    return write_shards(folder, "model", specs, max_bytes, lambda name, index: tensors[name][index])


def test_the_safetensors_library_reads_what_is_written_here(tmp_path: Path) -> None:
    write(tmp_path)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape
        assert theirs[name].tobytes() == tensor.tobytes()


def test_what_the_safetensors_library_writes_is_read_here(tmp_path: Path) -> None:
    safetensors.numpy.save_file(TENSORS, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in TENSORS.items():
        assert file.shape(name) == tensor.shape and file.dtype(name) == tensor.dtype
        assert file.read(name).tobytes() == tensor.tobytes()


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
def test_a_part_equals_the_slice_of_the_whole(tmp_path: Path, monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(safetensors_io, "_BLOCK_BYTES", block_bytes)
    write(tmp_path)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    for name, index in {
        "matrix": (slice(2, 6), slice(1, 3)),
        "half": (slice(None, 2),),
        "brain": (slice(1, None), slice(None), slice(1, 2), slice(0, 4)),
    }.items():
        np.testing.assert_array_equal(file.read(name, index), TENSORS[name][index])


def test_shards_hold_at_most_the_given_bytes_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    files = write(tmp_path, max_bytes=150)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    found = open_directory(tmp_path)
    assert found.keys() == TENSORS.keys()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.path.name for name, file in found.items()}
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_a_tensor_larger_than_a_shard_gets_its_own() -> None:
    specs = [
        TensorSpec(name, np.dtype(np.int8), (size,))
        for name, size in (("a", 3), ("b", 100), ("c", 4), ("d", 5))
    ]
    assert [[spec.name for spec in shard] for shard in plan_shards(specs, 10)] == [["a"], ["b"], ["c", "d"]]


def test_a_truncated_file_is_refused_with_its_name_and_the_tensors_that_are_cut(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    last = SafetensorsFile(path).names()[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"(?s){path}.*{last} should end at byte .*truncated"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x10\0\0", b"version https://git-lfs.github.com/spec/v1 ", b"\x08" + b"\0" * 7 + b"not json"],
)
def test_what_is_no_safetensors_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        SafetensorsFile(path)


def test_a_header_whose_sizes_contradict_each_other_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": TENSORS["matrix"]})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[7,5]', b'"shape":[7,6]'))
    with pytest.raises(UserError, match=r"a: 140 bytes do not make a F32 tensor of shape \[7, 6\]"):
        SafetensorsFile(path)
