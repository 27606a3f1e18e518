"""The weights of a directory are found, and an index that contradicts its files is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.weights import hub
from vflax.errors import UserError
from vflax.weights.tensor_files import open_directory, open_file


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    hub.write_tensors(tmp_path, {"a": np.ones(20), "b": np.ones(20)}, max_bytes=200)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"(?s)index\.json.*ghost is not in model-"):
        open_directory(tmp_path)
    index["weight_map"]["ghost"] = "model-00009-of-00009.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00009-of-00009\.safetensors: not there"):
        open_directory(tmp_path)


def test_a_directory_without_weights_is_refused_with_the_names_that_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"{tmp_path}: no weights.*model\.safetensors.*pytorch_model\.bin\.index"
    ):
        open_directory(tmp_path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*, adapter_model\.bin"):
        open_directory(tmp_path, "adapter_model")
    with pytest.raises(UserError, match="no such directory"):
        open_directory(tmp_path / "elsewhere")


def test_a_safetensors_file_whose_length_begins_like_a_pickle_is_read_as_safetensors(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x280)
    path = tmp_path / "projector"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert open_file(path).read("a").tolist() == [7]
