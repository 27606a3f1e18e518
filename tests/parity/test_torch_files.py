"""PyTorch files are read bit for bit and in parts, nothing in them is run, and damage is named."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.weights import hub
from vflax.errors import UserError
from vflax.weights import torch_files
from vflax.weights.file_source import FileSource
from vflax.weights.tensor_files import open_directory
from vflax.weights.torch_files import TorchFile, save_torch

torch.manual_seed(0)
WIDE = torch.randn(6, 10)
TENSORS = {
    "matrix": torch.randn(7, 5),
    "half": torch.randn(3).half(),
    "brain": torch.randn(4, 3, 2, 5).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(6),
    "flags": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.randn(2, 3)),
    "transposed": torch.randn(5, 7, dtype=torch.float16).T,
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "window": WIDE[1:, 2:7],
    "rows": WIDE[2:4],
    "expanded": torch.randn(3, 1).bfloat16().expand(3, 4),
}


def values(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as numpy has it, without the code under test."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().contiguous().numpy()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def save(path: Path, content: Any, *, is_zip: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_what_torch_writes_is_read_bit_for_bit(tmp_path: Path, is_zip: bool) -> None:
    file = TorchFile(save(tmp_path / "x.bin", TENSORS, is_zip=is_zip))
    assert file.names() == tuple(TENSORS)
    for name, tensor in TENSORS.items():
        assert file.shape(name) == tensor.shape and file.dtype(name) == values(tensor).dtype
        assert_same(file.read(name), values(tensor))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_part_equals_the_slice_of_the_whole(tmp_path: Path, is_zip: bool) -> None:
    file = TorchFile(save(tmp_path / "x.bin", TENSORS, is_zip=is_zip))
    rng = np.random.default_rng(0)
    for name, tensor in TENSORS.items():
        for _ in range(20):
            bounds = [sorted(rng.integers(0, n + 1, 2)) for n in tensor.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            assert_same(file.read(name, index), values(tensor)[index])


def test_what_is_read_may_be_written_to_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    for is_zip in (True, False):
        file = TorchFile(save(tmp_path / "x.bin", TENSORS, is_zip=is_zip))
        for name in ("matrix", "transposed"):
            file.read(name)[:] = 0
            assert_same(file.read(name), values(TENSORS[name]))


def test_a_file_saved_from_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        zipped = save(tmp_path / "x.bin", TENSORS)
        old = save(tmp_path / "old.bin", TENSORS, is_zip=False)
    for path in (zipped, old):
        assert_same(TorchFile(path).read("matrix"), values(TENSORS["matrix"]))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes read are counted by Linux")
def test_a_slice_of_a_large_tensor_is_read_without_the_rest(tmp_path: Path) -> None:
    tensor = torch.arange(16 << 20, dtype=torch.int32).reshape(4096, 4096)
    path = save(tmp_path / "x.bin", {"first": torch.zeros(3), "large": tensor})
    # Modules are imported with the first file that is opened.
    TorchFile(save(tmp_path / "small.bin", TENSORS))
    before = bytes_read()
    part = TorchFile(path).read("large", (slice(100, 110), slice(5, 4000)))
    assert bytes_read() - before < 1 << 20
    assert_same(part, values(tensor)[100:110, 5:4000])


def bytes_read() -> int:
    """What this process has read so far, from files and caches alike."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def write_shards(folder: Path) -> Path:
    shards = {
        "pytorch_model-00001-of-00002.bin": ["matrix", "brain"],
        "pytorch_model-00002-of-00002.bin": ["ids"],
    }
    for file_name, held in shards.items():
        save(folder / file_name, {name: TENSORS[name] for name in held})
    weight_map = {name: file_name for file_name, held in shards.items() for name in held}
    hub.dump(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder / "pytorch_model.bin.index.json"


def test_a_sharded_directory_is_found_through_its_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    found = open_directory(tmp_path)
    assert found.keys() == {"matrix", "brain", "ids"}
    for name, file in found.items():
        assert_same(file.read(name), values(TENSORS[name]))


def test_an_index_that_contradicts_its_files_is_refused_with_every_contradiction(tmp_path: Path) -> None:
    index_path = write_shards(tmp_path)
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(("ghost", "spirit"), "pytorch_model-00001-of-00002.bin")
    hub.dump(index_path, index)
    with pytest.raises(
        UserError, match=r"(?s)bin\.index\.json.*ghost is not in pytorch_model-.*spirit is not in"
    ):
        open_directory(tmp_path)


@pytest.mark.parametrize("stem", ["adapter_model", "non_lora_trainables", "mm_projector"])
def test_other_stems_keep_their_name_in_bin(tmp_path: Path, stem: str) -> None:
    path = save(tmp_path / f"{stem}.bin", {"a": TENSORS["matrix"]})
    assert open_directory(tmp_path, stem)["a"].path == path


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    hub.write_tensors(tmp_path, {"a": np.ones(2)})
    save(tmp_path / "pytorch_model.bin", {"a": torch.zeros(2)})
    assert open_directory(tmp_path)["a"].path == tmp_path / "model.safetensors"


def test_a_source_reads_a_directory_of_pickles_under_canonical_names(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", {"lm_head.weight": TENSORS["matrix"]})
    source = FileSource(tmp_path)
    assert source.names() == ("language_model.lm_head.weight",)
    assert_same(source.read(*source.names()), values(TENSORS["matrix"]))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_bridge_is_opened_by_content_whatever_the_file_is_called(tmp_path: Path, is_zip: bool) -> None:
    path = save(tmp_path / "projector", {"model.mm_projector.0.weight": TENSORS["brain"]}, is_zip=is_zip)
    source = FileSource.file(path)
    assert_same(source.read("multi_modal_projector.linear_1.weight"), values(TENSORS["brain"]))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_beside_other_things_are_unwrapped(tmp_path: Path, key: str) -> None:
    file = TorchFile(save(tmp_path / "x.pt", {key: {"a": TENSORS["matrix"]}, "epoch": 3}))
    assert file.names() == ("a",)


def test_values_that_are_no_tensors_are_refused_by_name(tmp_path: Path) -> None:
    content = {"a": TENSORS["matrix"], "step": 3, "nested": {"b": TENSORS["half"]}, 7: TENSORS["half"]}
    path = save(tmp_path / "x.bin", content)
    with pytest.raises(UserError, match=rf"(?s){path}.*step is a int.*nested is a dict.*7 "):
        TorchFile(path)
    with pytest.raises(UserError, match=r"holds a list, expected a dict"):
        TorchFile(save(tmp_path / "list.bin", [TENSORS["matrix"]]))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_dtype_that_vflax_does_not_read_is_refused_by_name(tmp_path: Path, is_zip: bool) -> None:
    content = {"a": TENSORS["matrix"], "wave": torch.ones(2, dtype=torch.complex64)}
    file = TorchFile(save(tmp_path / "x.bin", content, is_zip=is_zip))
    assert_same(file.read("a"), values(TENSORS["matrix"]))
    with pytest.raises(UserError, match=r"x\.bin: wave has dtype complex64; vflax reads float64"):
        file.read("wave")


class Malicious:
    """Unpickling it would make a file in the working directory."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_asks_for_code_is_refused_and_nothing_is_run(
    tmp_path: Path, monkeypatch, is_zip
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "x.bin", {"a": TENSORS["matrix"], "b": Malicious()}, is_zip=is_zip)
    with pytest.raises(UserError, match=rf"{path}: refused.*posix\.system.*safetensors"):
        TorchFile(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_that_asks_for_code_is_refused_and_nothing_is_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mm_projector.bin"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"b": Malicious()}, protocol))
        with pytest.raises(UserError, match=str(path)):
            TorchFile(path)
        with pytest.raises(UserError, match=str(path)):
            FileSource.file(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path, is_zip: bool, left: float) -> None:
    path = save(tmp_path / "x.bin", TENSORS, is_zip=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(UserError, match=rf"{path}: .*cut off or damaged.*fetch it again"):
        TorchFile(path)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1", b"PK\x03\x04", b"\x80\x02"]
)
def test_what_is_no_pytorch_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: .*fetch it again"):
        open_directory(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path / 'x.bin'}: not there"):
        TorchFile(tmp_path / "x.bin")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_that_another_program_packed_anew_is_refused(tmp_path: Path, compression: int) -> None:
    path = save(tmp_path / "x.bin", {name: TENSORS[name] for name in ("matrix", "brain", "ids")})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.bin", "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(UserError, match=r"new\.bin: .*do not lie where torch\.save puts them.*safetensors"):
        TorchFile(tmp_path / "new.bin")


def test_without_torch_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "x.bin", TENSORS)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=rf"{path}: .*pip install 'vflax\[torch\]'"):
        TorchFile(path)
    with pytest.raises(UserError, match=r"pip install 'vflax\[torch\]'"):
        save_torch(tmp_path / "y.bin", [])


def test_a_torch_that_cannot_tell_where_tensors_lie_is_too_old(tmp_path: Path, monkeypatch) -> None:
    path = save(tmp_path / "x.bin", TENSORS)
    monkeypatch.delattr(torch.storage._StorageBase, "_checkpoint_offset")
    with pytest.raises(
        UserError, match=rf"torch {torch.__version__[:3]}.* is too old: pip install 'vflax\[torch\]'"
    ):
        TorchFile(path)


def test_torch_reads_what_is_written_here(tmp_path: Path) -> None:
    arrays = {name: values(tensor) for name, tensor in TENSORS.items()}
    arrays["transposed"] = arrays["transposed"].T
    arrays["matrix"].flags.writeable = False
    save_torch(tmp_path / "x.bin", arrays.items())
    theirs = torch.load(tmp_path / "x.bin", weights_only=True)
    assert list(theirs) == list(arrays)
    for name, array in arrays.items():
        assert_same(values(theirs[name]), array)
        assert_same(TorchFile(tmp_path / "x.bin").read(name), array)


def test_torch_is_imported_in_one_file_only() -> None:
    package = Path(torch_files.__file__).parent.parent
    importing = [
        path for path in package.rglob("*.py") if re.search(r"^\s*import torch$", path.read_text(), re.M)
    ]
    assert importing == [Path(torch_files.__file__)]
