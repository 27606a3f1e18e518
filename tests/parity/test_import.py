"""Directories that transformers writes are read bit for bit, in each of its namings and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.weights import hub
from vflax.models.llava import LlavaConfig
from vflax.weights import hf_config, hf_images, names
from vflax.weights.load import load_params
from vflax.weights.open import join
from vflax.weights.source import FileSource, TensorSource

CONFIG = hub.CONFIG
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(source: TensorSource, config: LlavaConfig) -> dict[str, jax.Array]:
    table = names.table(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_params(source, config, dict.fromkeys(table, device), dict.fromkeys(table, np.float32))


def assert_equal(found: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, param in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), param, err_msg=path)


def save(folder: Path, model: Any) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")
    if not (folder / "preprocessor_config.json").exists():
        hub.dump(folder / "preprocessor_config.json", hf_images.to_preprocessor(hub.RULES))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_llava_that_transformers_saved_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = hf.llava(CONFIG).to(dtype)
    save(tmp_path, reference)
    assert hf_config.read_llava_config(tmp_path) == CONFIG
    state = {name: tensor.float() for name, tensor in reference.state_dict().items()}
    assert_equal(load(FileSource(tmp_path), CONFIG), hf.params(state, CONFIG))
    read = FileSource(tmp_path)
    assert {read.dtype(name).name for name in read.names()} == {str(dtype).removeprefix("torch.")}


def test_module_names_of_5_and_of_4_52_are_read_bit_for_bit(tmp_path: Path) -> None:
    reference = hf.llava(CONFIG)
    state = dict(reference.state_dict())
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in state.items()
    }
    for i, tensors in enumerate((state, older)):
        folder = tmp_path / str(i)
        folder.mkdir()
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        assert_equal(load(FileSource(folder), CONFIG), hf.params(state, CONFIG))


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_clip_and_decoder_that_transformers_saved_join_bit_for_bit(
    tmp_path: Path, whole: bool, kind: str
) -> None:
    vision = hf.llava_config(CONFIG).vision_config
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        both = transformers.CLIPConfig(text_config=text, vision_config=vision.to_dict())
        clip: Any = transformers.CLIPModel(both)
        tower = clip.vision_model
    else:
        clip = tower = transformers.CLIPVisionModel(vision)
    text_config = hf.text_config(CONFIG.decoder, kind)
    classes = {"llama": transformers.LlamaForCausalLM, "mistral": transformers.MistralForCausalLM}
    words = classes[kind](text_config)
    for model in (clip, words):
        hf.perturb(model, 1)
    save(tmp_path / "clip", clip)
    save(tmp_path / "words", words)
    bridge = {
        f"model.mm_projector.{i}.{part}": torch.randn(shape)
        for i, width in ((0, 32), (2, 42))
        for part, shape in (("weight", (42, width)), ("bias", (42,)))
    }
    safetensors.torch.save_file(bridge, tmp_path / "bridge.safetensors")
    config = hf_config.join_configs(
        tmp_path / "clip", tmp_path / "words", bridge="mlp2x_gelu", feature_layer=-2, keep_cls=False
    )
    assert config == CONFIG
    state = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= {f"model.language_model.{name}": tensor for name, tensor in words.model.state_dict().items()}
    state["lm_head.weight"] = words.lm_head.weight
    for name, tensor in bridge.items():
        theirs = name.replace("mm_projector.0", "linear_1").replace("mm_projector.2", "linear_2")
        state[theirs.replace("model.linear", "model.multi_modal_projector.linear")] = tensor
    source = join(config, tmp_path / "clip", tmp_path / "words", tmp_path / "bridge.safetensors", 0)
    assert_equal(load(source, config), hf.params(state, config))


def test_a_tied_model_that_transformers_saved_is_read_without_a_head(tmp_path: Path) -> None:
    config = hub.with_decoder(CONFIG, tie_word_embeddings=True)
    reference = hf.llava(config)
    save(tmp_path, reference)
    assert hf_config.read_llava_config(tmp_path) == config
    assert_equal(load(FileSource(tmp_path), config), hf.params(reference.state_dict(), config))
