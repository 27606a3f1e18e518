"""The key tables cover the model exactly, and both directions of each entry agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.weights import hub
from vflax.models import llava
from vflax.models.bridge import BridgeConfig
from vflax.models.llava import LlavaConfig
from vflax.models.lora import SCALE, LoraConfig
from vflax.weights import names

KW = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "reference"}
BRIDGES = {
    kind: dataclasses.replace(hub.CONFIG, bridge=BridgeConfig(kind, 32, 42))
    for kind in ("linear", "mlp3x_gelu")
}
CONFIGS = {
    "plain": hub.CONFIG,
    "all tower layers": hub.with_vision(hub.CONFIG, feature_layer=-1),
    "first tower layer": hub.with_vision(hub.CONFIG, feature_layer=1),
    "no tower layer": hub.with_vision(hub.CONFIG, feature_layer=0),
    "tied": hub.with_decoder(hub.CONFIG, tie_word_embeddings=True),
    **BRIDGES,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_table_has_every_parameter_of_the_model_with_its_shape_and_no_other(config: LlavaConfig) -> None:
    _, params = llava.abstract(config, **KW)
    table = names.table(config)
    assert {path: x.shape for path, x in params.items()} == {path: e.param_shape for path, e in table.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_carried_and_computed_tower_layers_make_the_whole_tower(config: LlavaConfig) -> None:
    computed = {name for entry in names.table(config).values() for name in entry.names}
    carried = set(names.carried(config))
    assert not computed & carried
    layers = {
        int(name.split(".layers.")[1].split(".")[0])
        for name in computed | carried
        if "tower.vision_model.encoder" in name
    }
    assert layers == set(range(config.vision.num_layers))
    assert "vision_tower.vision_model.post_layernorm.weight" in carried


LORA = LoraConfig(3, 6.0, 0.0, (r"decoder/layers/.*", r"vision/layers/mlp/.*", r"bridge/.*"), "int8")


def test_with_adapters_too_the_table_has_every_parameter_but_scales_which_come_from_their_kernel() -> None:
    _, params = llava.abstract(hub.CONFIG, lora=LORA, **KW)
    table = names.table(hub.CONFIG, LORA)
    scales = {path for path in params if path.endswith(SCALE)}
    assert len(scales) == 7 and all(names.weight_of(path) in table for path in scales)
    shapes = {path: x.shape for path, x in params.items() if path not in scales}
    assert shapes == {path: e.param_shape for path, e in table.items()}
    assert {names.weight_of(path) for path in shapes} == set(shapes)


def test_adapters_are_named_and_laid_out_as_in_peft() -> None:
    decoder = hub.CONFIG.decoder
    tensors = names.expected(hub.CONFIG, LORA)
    up = "language_model.model.layers.1.mlp.up_proj"
    assert tensors[f"{up}.lora_A.weight"] == (3, decoder.width)
    assert tensors[f"{up}.lora_B.weight"] == (decoder.mlp_dim, 3)
    assert "multi_modal_projector.linear_2.lora_A.weight" in tensors
    assert not [name for name in names.expected(hub.CONFIG) if "lora" in name]


def test_tensor_and_parameter_are_each_other_s_inverse() -> None:
    rng = np.random.default_rng(0)
    for entry in names.table(hub.CONFIG).values():
        tensor = rng.normal(size=entry.tensor_shape)
        param = entry.to_param(tensor)
        assert param.shape == entry.shape
        np.testing.assert_array_equal(entry.to_tensor(param), tensor)


def test_a_part_of_a_parameter_is_found_in_the_tensor_and_back() -> None:
    rng = np.random.default_rng(0)
    for entry in names.table(hub.CONFIG).values():
        tensor = rng.normal(size=entry.tensor_shape)
        index = tuple(slice(n // 3, n // 2 + 1) for n in entry.shape)
        found = entry.tensor_index(index)
        np.testing.assert_array_equal(entry.to_param(tensor[found]), entry.to_param(tensor)[index])
        assert entry.param_index(found) == index


NAMINGS = {
    "4.x hub": (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "4.52 module": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.",
    ),
    "5.x module": (
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.",
    ),
    "5.x saved": (
        "vision_tower.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
}


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS.keys())
def test_each_hugging_face_naming_of_a_llava_becomes_the_canonical_one(naming: tuple[str, ...]) -> None:
    for name in names.expected(hub.CONFIG):
        for canonical, theirs in zip(NAMINGS["4.x hub"], naming, strict=True):
            if name.startswith(canonical):
                assert names.canonical(theirs + name.removeprefix(canonical)) == name
                break
        else:
            pytest.fail(f"{name} has none of the prefixes")


def test_buffers_and_text_towers_are_left_aside_and_unknown_names_stand_as_they_came() -> None:
    for name in (
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "logit_scale",
        "vision_model.embeddings.position_ids",
    ):
        assert names.canonical(name) is None
    assert names.canonical("model.layers.3.self_attn.rotary_emb.inv_freq") is None
    assert names.canonical("image_newline") == "image_newline"


def test_a_projector_of_the_original_llava_numbers_its_linears_over_the_activations() -> None:
    found = [names.canonical(f"model.mm_projector.{i}.weight") for i in (0, 2, 4)]
    assert found == [f"multi_modal_projector.linear_{i}.weight" for i in (1, 2, 3)]
    assert names.canonical("model.mm_projector.bias") == "multi_modal_projector.linear_1.bias"
