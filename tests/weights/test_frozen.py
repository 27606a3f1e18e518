"""The frozen store keeps bytes and dtypes as they came, once."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.weights import hub
from vflax.errors import UserError
from vflax.weights import frozen, names
from vflax.weights.frozen import FrozenSource, save_frozen
from vflax.weights.source import FileSource

TENSORS = {
    name: tensor.astype(np.float16 if name.startswith("vision") else ml_dtypes.bfloat16)
    for name, tensor in hub.tensors_of(hub.CONFIG).items()
}
TABLE = names.table(hub.CONFIG)
PATHS = [path for path in TABLE if path.startswith("vision/") or path == "decoder/layers/mlp/up/kernel"]


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    hub.write_llava(tmp_path / "hub", hub.CONFIG, TENSORS)
    return FileSource(tmp_path / "hub")


def test_frozen_and_carried_tensors_come_back_bit_for_bit(tmp_path: Path, source, monkeypatch) -> None:
    monkeypatch.setattr(frozen, "_SHARD_BYTES", 20_000)
    digest = save_frozen(source, hub.CONFIG, PATHS, tmp_path / "run")
    store = FrozenSource(tmp_path / "run" / "frozen" / digest)
    wanted = {name for path in PATHS for name in TABLE[path].names} | set(names.carried(hub.CONFIG))
    assert set(store.names()) == wanted
    assert len(list((tmp_path / "run" / "frozen" / digest).glob("*.safetensors"))) > 1
    for name in wanted:
        tensor = store.read(name)
        assert tensor.dtype == TENSORS[name].dtype and tensor.tobytes() == TENSORS[name].tobytes()


def test_equal_content_has_one_place_and_is_not_written_again(tmp_path: Path, source) -> None:
    digest = save_frozen(source, hub.CONFIG, PATHS, tmp_path)
    folder = tmp_path / "frozen" / digest
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert save_frozen(source, hub.CONFIG, reversed(PATHS), tmp_path) == digest
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in (tmp_path / "frozen").iterdir()] == [digest]


def test_one_changed_bit_makes_another_hash(tmp_path: Path, source) -> None:
    digest = save_frozen(source, hub.CONFIG, PATHS, tmp_path)
    name = "vision_tower.vision_model.post_layernorm.bias"
    changed = TENSORS | {name: np.nextafter(TENSORS[name], np.float16(9))}
    hub.write_llava(tmp_path / "other", hub.CONFIG, changed)
    assert save_frozen(FileSource(tmp_path / "other"), hub.CONFIG, PATHS, tmp_path) != digest


def test_a_tensor_that_is_not_what_was_read_is_named(tmp_path: Path, source) -> None:
    folder = tmp_path / "frozen" / save_frozen(source, hub.CONFIG, PATHS, tmp_path)
    frozen.verify_frozen(folder, lambda count: None)
    record = json.loads((folder / "frozen.json").read_text())
    name, other, *_ = record["tensors"]
    record["tensors"] |= {name: "0" * 64, "more": record["tensors"].pop(other)}
    hub.dump(folder / "frozen.json", record)
    with pytest.raises(UserError) as caught:
        frozen.verify_frozen(folder, lambda count: None)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(lines) == sorted(
        [f"  {name}: its values differ", f"  {other}: written, but not wanted", "  more: not written"]
    )


def test_a_store_that_is_not_what_its_name_says_is_found(tmp_path: Path, source) -> None:
    folder = tmp_path / "frozen" / save_frozen(source, hub.CONFIG, PATHS, tmp_path)
    other = folder.rename(folder.with_name("0" * 32))
    with pytest.raises(UserError, match="not those of its name"):
        frozen.verify_frozen(other, lambda count: None)


def test_a_failed_save_leaves_nothing_that_looks_whole(tmp_path: Path, source, monkeypatch) -> None:
    read = FileSource.read

    def failing(self, name, index=None):
        if name.endswith("post_layernorm.bias"):
            raise OSError("no space left on device")
        return read(self, name, index)

    monkeypatch.setattr(FileSource, "read", failing)
    with pytest.raises(UserError, match="no space"):
        save_frozen(source, hub.CONFIG, PATHS, tmp_path)
    assert list((tmp_path / "frozen").iterdir()) == []


def test_a_source_that_does_not_fit_the_model_is_refused(tmp_path: Path, source) -> None:
    with pytest.raises(UserError, match="of another shape"):
        save_frozen(source, hub.with_decoder(hub.CONFIG, mlp_dim=53), PATHS, tmp_path)


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"frozen/abc.*copy that folder"):
        FrozenSource(tmp_path / "frozen" / "abc")
