"""Loading puts the right slices of the right tensors in place, and refuses a source that does not fit, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.weights import hub
from vflax.errors import UserError
from vflax.weights import names
from vflax.weights.load import check, load_params
from vflax.weights.source import FileSource

TENSORS = hub.tensors_of(hub.CONFIG)
TABLE = names.table(hub.CONFIG)


def load(folder: Path, dtype: type = np.float32, paths: list[str] | None = None) -> dict[str, jax.Array]:
    paths = list(TABLE) if paths is None else paths
    device = SingleDeviceSharding(jax.devices()[0])
    return load_params(
        FileSource(folder), hub.CONFIG, dict.fromkeys(paths, device), dict.fromkeys(paths, dtype)
    )


def expected(path: str) -> np.ndarray:
    entry = TABLE[path]
    layers = [entry.to_param(TENSORS[name]) for name in entry.names]
    return layers[0] if entry.layers is None else np.stack(layers)


def test_every_parameter_is_its_tensors_transposed_and_stacked(tmp_path: Path) -> None:
    hub.write_llava(tmp_path, hub.CONFIG, TENSORS, max_bytes=30_000)
    params = load(tmp_path)
    assert params.keys() == TABLE.keys()
    for path, param in params.items():
        np.testing.assert_array_equal(param, expected(path))


def test_each_leaf_is_cast_to_its_dtype(tmp_path: Path) -> None:
    hub.write_llava(tmp_path, hub.CONFIG, TENSORS)
    path = "decoder/layers/mlp/up/kernel"
    param = load(tmp_path, ml_dtypes.bfloat16, [path])[path]
    np.testing.assert_array_equal(np.asarray(param), expected(path).astype(ml_dtypes.bfloat16))


SHARDED = """
import json, pathlib, sys
import jax, numpy as np
from jax.sharding import SingleDeviceSharding
from tests.weights import hub, test_load
from vflax import sharding
from vflax.models import llava
from vflax.weights.load import load_params
from vflax.weights.source import FileSource

class Counting(FileSource):
    elements = 0
    def read(self, name, index=None):
        part = super().read(name, index)
        Counting.elements += part.size
        return part

mesh = sharding.make_mesh(2, 2, 2)
shapes = {path: jax.ShapeDtypeStruct(e.param_shape, np.float32) for path, e in test_load.TABLE.items()}
shardings = {path: jax.NamedSharding(mesh, sharding.param_spec(path, s.shape, mesh)) for path, s in shapes.items()}
params = load_params(Counting(pathlib.Path(sys.argv[1])), hub.CONFIG, shardings, dict.fromkeys(shapes, np.float32))
equal = all(np.array_equal(p, test_load.expected(path)) for path, p in params.items())
split = sum(p.addressable_shards[0].data.size < p.size for p in params.values())
size = sum(p.size for p in params.values())

alone = SingleDeviceSharding(jax.devices()[0])
kernels = ["decoder/layers/mlp/up/kernel", "decoder/layers/mlp/down/kernel"]
paths = [p for k in kernels for p in (k, k + "_scale")]
dtypes = {p: np.float32 if p.endswith("_scale") else np.int8 for p in paths}
shapes8 = {p: test_load.TABLE[k].param_shape for k in kernels for p in (k, k + "_scale")}
where = {p: jax.NamedSharding(mesh, sharding.param_spec(p, shapes8[p], mesh)) for p in paths}
source = FileSource(pathlib.Path(sys.argv[1]))
loaded = [load_params(source, hub.CONFIG, w, dtypes) for w in (where, dict.fromkeys(paths, alone))]
same = all(np.array_equal(loaded[0][p], loaded[1][p]) and loaded[0][p].dtype == dtypes[p] for p in paths)
split8 = all(loaded[0][p].addressable_shards[0].data.size < loaded[0][p].size for p in paths)
near = all(
    np.all(np.abs(test_load.expected(k) - loaded[0][k] * s[:, None]) <= s[:, None] * 0.50001)
    for k in kernels for s in [np.asarray(loaded[0][k + "_scale"])])
print(json.dumps({
    "equal": equal, "split": split, "read": Counting.elements, "all": size, "same": same, "split8": split8,
    "near": near}))
"""


def test_on_a_mesh_each_slice_is_read_once_and_lands_in_its_place(tmp_path: Path) -> None:
    hub.write_llava(tmp_path, hub.CONFIG, TENSORS)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["equal"]
    assert facts["split"] > 10
    assert facts["read"] == facts["all"]
    # Integers: the same on the mesh as on one device, though a column lies in parts.
    assert facts["same"] and facts["split8"] and facts["near"]


def test_all_that_is_missing_misshaped_and_unexpected_is_told_at_once_with_files(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    del tensors["vision_tower.vision_model.post_layernorm.bias"]
    tensors["multi_modal_projector.linear_1.bias"] = np.ones(41, np.float32)
    tensors["image_newline"] = np.ones(42, np.float32)
    hub.write_llava(tmp_path, hub.CONFIG, tensors, max_bytes=30_000)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    message = str(caught.value)
    for line in (
        "2 tensors missing",
        "language_model.model.layers.1.mlp.up_proj.weight [52, 42]",
        "vision_tower.vision_model.post_layernorm.bias [32]",
        "multi_modal_projector.linear_1.bias is [41], the config asks for [42]; in",
        "image_newline in",
    ):
        assert line in message
    assert f"{tmp_path}/model-000" in message.split("image_newline in")[1]


def test_a_part_of_the_model_needs_only_its_own_tensors(tmp_path: Path) -> None:
    bridge = {name: tensor for name, tensor in TENSORS.items() if name.startswith("multi_modal")}
    hub.write_llava(tmp_path, hub.CONFIG, bridge)
    paths = [path for path in TABLE if path.startswith("bridge/")]
    assert set(load(tmp_path, paths=paths)) == set(paths)
    with pytest.raises(UserError, match="missing"):
        load(tmp_path, paths=[*paths, "decoder/norm/scale"])


def test_a_tied_head_that_is_stored_twice_is_no_error_and_a_missing_one_of_an_untied_model_is(
    tmp_path: Path,
) -> None:
    hub.write_llava(tmp_path / "both", hub.CONFIG, TENSORS)
    check(FileSource(tmp_path / "both"), hub.with_decoder(hub.CONFIG, tie_word_embeddings=True))
    single = {name: tensor for name, tensor in TENSORS.items() if name != names.LM_HEAD}
    hub.write_llava(tmp_path / "single", hub.CONFIG, single)
    with pytest.raises(UserError, match=r"missing.*\n.*language_model\.lm_head\.weight \[360, 42\]"):
        check(FileSource(tmp_path / "single"), hub.CONFIG)


def test_a_truncated_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    hub.write_llava(tmp_path, hub.CONFIG, TENSORS, max_bytes=30_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"(?s){shard.name}.*truncated"):
        load(tmp_path)
