"""Sources read what was written, lazily, under canonical names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.weights import hub
from vflax.errors import UserError
from vflax.models.lora import LoraConfig
from vflax.weights import hf_config, names
from vflax.weights.load import check
from vflax.weights.open import join
from vflax.weights.safetensors_io import SafetensorsFile
from vflax.weights.source import FileSource, LoraSource, RandomSource

TENSORS = hub.tensors_of(hub.CONFIG)
BRIDGE = {name: tensor for name, tensor in TENSORS.items() if name.startswith("multi_modal_projector")}


def test_opening_a_directory_reads_no_tensor(tmp_path: Path, monkeypatch) -> None:
    hub.write_llava(tmp_path, hub.CONFIG, TENSORS, max_bytes=30_000)
    monkeypatch.setattr(SafetensorsFile, "read", lambda *args: pytest.fail("a tensor was read"))
    source = FileSource(tmp_path)
    check(source, hub.CONFIG)
    assert set(source.names()) == set(TENSORS)


def test_two_tensors_for_one_weight_are_refused(tmp_path: Path) -> None:
    hub.write_tensors(tmp_path, {"lm_head.weight": np.ones(2), "language_model.lm_head.weight": np.ones(2)})
    with pytest.raises(
        UserError, match=r"language_model\.lm_head\.weight in model\.safetensors and lm_head\.weight"
    ):
        FileSource(tmp_path)


def write_parts(tmp_path: Path, prefix: str) -> tuple[Path, Path, Path]:
    hub.write_clip(tmp_path / "clip", hub.CONFIG, TENSORS, prefix)
    hub.write_decoder(tmp_path / "llama", hub.CONFIG, TENSORS)
    theirs = {
        name.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace(
            "multi_modal_projector.linear_2", "model.mm_projector.2"
        ): tensor
        for name, tensor in BRIDGE.items()
    }
    hub.write_tensors(tmp_path / "bridge", theirs)
    return tmp_path / "clip", tmp_path / "llama", tmp_path / "bridge" / "model.safetensors"


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_clip_decoder_and_projector_join_to_the_whole_model(tmp_path: Path, prefix: str) -> None:
    clip, llama, bridge = write_parts(tmp_path, prefix)
    config = hf_config.join_configs(clip, llama, bridge="mlp2x_gelu", feature_layer=-2, keep_cls=False)
    assert config == hub.CONFIG
    source = join(config, clip, llama, bridge, seed=0)
    check(source, config)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(source.read(name), tensor)


def test_without_a_projector_the_bridge_is_random_from_the_seed(tmp_path: Path) -> None:
    clip, llama, _ = write_parts(tmp_path, "")
    name = "multi_modal_projector.linear_1.weight"
    first, again, other = (join(hub.CONFIG, clip, llama, None, seed).read(name) for seed in (1, 1, 2))
    check(join(hub.CONFIG, clip, llama, None, 1), hub.CONFIG)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_projector_of_another_kind_is_refused(tmp_path: Path) -> None:
    clip, llama, _ = write_parts(tmp_path, "")
    hub.write_tensors(
        tmp_path / "linear",
        {"model.mm_projector.weight": np.ones((42, 32)), "model.mm_projector.bias": np.ones(42)},
    )
    source = join(hub.CONFIG, clip, llama, tmp_path / "linear" / "model.safetensors", 0)
    with pytest.raises(UserError, match=r"(?s)missing.*multi_modal_projector\.linear_2\.weight"):
        check(source, hub.CONFIG)


def test_random_weights_depend_on_seed_and_name_only() -> None:
    deeper = hub.with_decoder(hub.CONFIG, num_layers=5)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensor = RandomSource(hub.CONFIG, 7).read(name)
    np.testing.assert_array_equal(RandomSource(deeper, 7).read(name), tensor)
    assert not np.array_equal(RandomSource(hub.CONFIG, 8).read(name), tensor)
    assert not np.array_equal(RandomSource(hub.CONFIG, 7).read(name.replace("up", "gate")), tensor)
    index = (slice(3, 9), slice(0, 5))
    np.testing.assert_array_equal(RandomSource(hub.CONFIG, 7).read(name, index), tensor[index])


def test_random_weights_are_whole_float32_and_of_sensible_spread() -> None:
    source = RandomSource(hub.CONFIG, 0)
    check(source, hub.CONFIG)
    assert set(source.names()) == set(names.expected(hub.CONFIG))
    for name in source.names():
        tensor = source.read(name)
        assert tensor.dtype == np.float32
        if name.endswith(".bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            # A position weighs three times what a patch of unit pixels does.
            most = 0.25 if "position" not in name else 0.07 * (3 * hub.CONFIG.vision.patch_size**2) ** 0.5
            assert 0.01 < tensor.std() < most and abs(tensor.mean()) < most / 4, name


def test_random_positions_of_one_row_or_column_are_alike() -> None:
    vision, bridge = replace(hub.CONFIG.vision, width=1536), replace(hub.CONFIG.bridge, in_width=1536)
    config = replace(hub.CONFIG, vision=vision, bridge=bridge)
    grid = config.vision.image_size // config.vision.patch_size
    source = RandomSource(config, 0)
    (name,) = [name for name in source.names() if name.endswith("position_embedding.weight")]
    cells = source.read(name)[1:]
    alike = np.corrcoef(cells)
    row, column = np.divmod(np.arange(grid * grid), grid)
    shared = (row[:, None] == row).astype(int) + (column[:, None] == column)
    assert grid > 1
    for count, share in ((0, 0.0), (1, 1 / 3), (2, 1.0)):
        np.testing.assert_allclose(alike[shared == count], share, atol=0.12)


LORA = LoraConfig(3, 6.0, 0.0, (r"decoder/layers/attention/.*",))


def test_new_adapters_lie_beside_weights_that_stay_as_they_are() -> None:
    base = RandomSource(hub.CONFIG, 0)
    source = LoraSource(base, hub.CONFIG, LORA, 5)
    check(source, hub.CONFIG, lora=LORA)
    assert set(source.names()) == set(names.expected(hub.CONFIG, LORA))
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(source.read(name), base.read(name))
    a, b = (source.read(name.replace("weight", f"lora_{x}.weight")) for x in "AB")
    assert a.dtype == b.dtype == np.float32 and not b.any()
    limit = hub.CONFIG.decoder.width**-0.5
    assert 0.9 * limit < np.abs(a).max() <= limit and abs(a.mean()) < 0.2 * limit


def test_new_adapters_depend_on_seed_and_name_only() -> None:
    name = "language_model.model.layers.1.self_attn.q_proj.lora_A.weight"
    deeper = hub.with_decoder(hub.CONFIG, num_layers=5)
    base = RandomSource(hub.CONFIG, 0)
    drawn = LoraSource(base, hub.CONFIG, LORA, 5).read(name)
    np.testing.assert_array_equal(LoraSource(RandomSource(deeper, 1), deeper, LORA, 5).read(name), drawn)
    assert not np.array_equal(LoraSource(base, hub.CONFIG, LORA, 6).read(name), drawn)
    assert not np.array_equal(LoraSource(base, hub.CONFIG, LORA, 5).read(name.replace("q_", "k_")), drawn)
    index = (slice(1, 3), slice(0, 5))
    np.testing.assert_array_equal(LoraSource(base, hub.CONFIG, LORA, 5).read(name, index), drawn[index])
