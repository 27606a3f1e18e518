"""An adapter is merged as its files say, in parts as well as whole, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.weights import hub
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.weights import names
from vflax.weights.adapter import Adapter, scaling
from vflax.weights.export import Options, export, with_template
from vflax.weights.kinds import ADAPTER
from vflax.weights.open import open_checkpoint

CONFIG = hub.CONFIG
TENSORS = hub.tensors_of(CONFIG)
RANK, ALPHA = 3, 12
LAYER = "language_model.model.layers.1"
# In PEFT's files, for transformers 5.x: {name: canonical name of the weight}.
TARGETS = {
    f"base_model.model.model.language_model.layers.1.{module}": f"{LAYER}.{module}.weight"
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
}
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none",
    "target_modules": ["q_proj", "v_proj", "down_proj"], "base_model_name_or_path": None,
    "init_lora_weights": True, "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip


def lora_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    result = {}
    for theirs, weight in TARGETS.items():
        fan_out, fan_in = TENSORS[weight].shape
        result[f"{theirs}.lora_A.weight"] = rng.normal(size=(RANK, fan_in)).astype(np.float32)
        result[f"{theirs}.lora_B.weight"] = rng.normal(size=(fan_out, RANK)).astype(np.float32)
    return result


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    hub.write_tensors(folder, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    hub.dump(folder / "adapter_config.json", SETTINGS | fields)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    hub.write_llava(folder, CONFIG, TENSORS)
    hub.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
def test_a_weight_with_an_adapter_is_w_plus_scaled_b_a_and_the_others_stay(
    tmp_path: Path, base: Path, rslora: bool
) -> None:
    lora = lora_tensors()
    opened = open_checkpoint(write_adapter(tmp_path / "a", lora, use_rslora=rslora), base=base)
    assert opened.kind == ADAPTER
    factor = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    expected = dict(TENSORS)
    for theirs, weight in TARGETS.items():
        delta = lora[f"{theirs}.lora_B.weight"].astype(np.float64) @ lora[f"{theirs}.lora_A.weight"]
        expected[weight] = TENSORS[weight] + factor * delta
    assert set(opened.source.names()) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(
            opened.source.read(name), tensor, rtol=0, atol=1e-5 if name in TARGETS.values() else 0
        )


def test_a_part_of_a_merged_weight_is_the_slice_of_the_whole(tmp_path: Path, base: Path) -> None:
    source = open_checkpoint(write_adapter(tmp_path / "a", lora_tensors()), base=base).source
    for name in TARGETS.values():
        index = tuple(slice(n // 3, n // 2 + 2) for n in source.shape(name))
        np.testing.assert_allclose(source.read(name, index), source.read(name)[index], rtol=0, atol=1e-6)


def test_the_sum_is_float32_and_an_export_of_it_has_the_dtype_of_the_base(tmp_path: Path) -> None:
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in TENSORS.items()}
    hub.write_llava(tmp_path / "base", CONFIG, half)
    hub.write_tokenizer(tmp_path / "base")
    source = open_checkpoint(write_adapter(tmp_path / "a", lora_tensors()), base=tmp_path / "base").source
    for name in source.names():
        assert source.read(name).dtype == source.dtype(name)
        assert (source.dtype(name) == np.float32) == (name in TARGETS.values())
        assert source.source_dtype(name) == ml_dtypes.bfloat16


def test_the_base_is_found_where_the_adapter_says(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "a", lora_tensors(), base_model_name_or_path=str(base))
    opened = open_checkpoint(folder)
    assert opened.lora is not None
    assert (opened.lora.base_name, opened.lora.folder) == (str(base), base)


def test_a_base_that_is_nowhere_is_asked_for(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", lora_tensors(), base_model_name_or_path="/nowhere/llava")
    with pytest.raises(
        UserError, match=r"base_model_name_or_path is '/nowhere/llava'.*give the base with --base"
    ):
        open_checkpoint(folder)


def test_an_adapter_that_names_itself_as_its_base_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", lora_tensors(), base_model_name_or_path=str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"adapter_config\.json: its base is itself; .*--base"):
        open_checkpoint(tmp_path / "a")


def test_the_base_on_the_hub_is_that_of_the_revision_which_the_adapter_names(tmp_path: Path) -> None:
    said = {"base_model_name_or_path": "somebody/llava", "revision": "3f2a"}
    assert Adapter(write_adapter(tmp_path / "a", lora_tensors(), **said)).base == "somebody/llava@3f2a"
    said["base_model_name_or_path"] = str(tmp_path)
    assert Adapter(write_adapter(tmp_path / "b", lora_tensors(), **said)).base == str(tmp_path)


def test_an_exported_adapter_names_its_base_and_revision_again(tmp_path: Path, base: Path) -> None:
    said = {"base_model_name_or_path": "somebody/llava", "revision": "3f2a"}
    opened = open_checkpoint(write_adapter(tmp_path / "a", lora_tensors(), **said), base=base)
    export(opened, tmp_path / "out", Options(format="lora"))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: saved[key] for key in said} == said


UNSUPPORTED: dict[str, Any] = {
    "peft_type": "IA3",
    "use_dora": True,
    "fan_in_fan_out": True,
    "bias": "all",
    "lora_bias": True,
    "alpha_pattern": {"q_proj": 4},
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [5],
    "target_parameters": ["mlp.experts"],
    "alora_invocation_tokens": [1, 2],
    "init_lora_weights": "pissa",
    "lora_alpha": None,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_setting_that_is_not_merged_is_refused_by_name(tmp_path: Path, key: str) -> None:
    folder = write_adapter(tmp_path / "a", lora_tensors(), **{key: UNSUPPORTED[key]})
    with pytest.raises(UserError, match=rf"adapter_config\.json is not supported:\n  {key}=") as caught:
        Adapter(folder)
    assert ("merge it with PEFT" in str(caught.value)) == (key != "lora_alpha")


@pytest.mark.parametrize("shape", [(0, 42), (42,)], ids=["rank 0", "a row"])
def test_a_half_that_is_no_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = f"{next(iter(TARGETS))}.lora_A.weight"
    folder = write_adapter(tmp_path / "a", lora_tensors() | {name: np.ones(shape, np.float32)})
    with pytest.raises(
        UserError, match=r"(?s)no matrices; fetch these weights again.*q_proj\.lora_A\.weight \["
    ):
        Adapter(folder)


EMBEDDED = "base_model.model.model.language_model.embed_tokens"


@pytest.mark.parametrize(
    "name",
    [
        f"{EMBEDDED}.lora_embedding_A",
        f"{next(iter(TARGETS))}.lora_magnitude_vector.weight",
        f"{next(iter(TARGETS))}.lora_B.bias",
        "base_model.model.something.lora_A.weight",
    ],
)
def test_a_tensor_that_is_not_merged_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a", lora_tensors() | {name: np.ones((RANK, 42), np.float32)})
    with pytest.raises(UserError, match=r"does not know .*(lora_|something).*; merge it with PEFT"):
        Adapter(folder)


def test_a_head_with_an_adapter_is_merged_and_what_peft_saves_of_it_beside_changes_nothing(
    tmp_path: Path, base: Path
) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((RANK, 42), (hub.PIECES, RANK)))
    theirs = "base_model.model.lm_head"
    tensors = {
        f"{theirs}.lora_A.weight": a,
        f"{theirs}.lora_B.weight": b,
        f"{theirs}.base_layer.weight": TENSORS[names.LM_HEAD],
    }
    source = open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base).source
    expected = TENSORS[names.LM_HEAD] + scaling(ALPHA, RANK) * (b @ a)
    np.testing.assert_allclose(source.read(names.LM_HEAD), expected, rtol=0, atol=1e-5)


def test_a_weight_that_is_replaced_and_adapted_is_the_replacement_and_b_a(tmp_path: Path, base: Path) -> None:
    """What PEFT's base_layer beside lora_A means, whatever the base holds."""
    theirs, weight = next(iter(TARGETS.items()))
    tensors = lora_tensors()
    other = TENSORS[weight] + 1
    tensors[f"{theirs}.base_layer.weight"] = other
    source = open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base).source
    delta = tensors[f"{theirs}.lora_B.weight"] @ tensors[f"{theirs}.lora_A.weight"]
    np.testing.assert_allclose(source.read(weight), other + scaling(ALPHA, RANK) * delta, rtol=0, atol=1e-5)


def test_names_with_peft_s_word_for_the_adapter_are_the_same(tmp_path: Path, base: Path) -> None:
    lora = lora_tensors()
    worded = {re.sub(r"(lora_[AB])", r"\1.default", name): tensor for name, tensor in lora.items()}
    first, second = (
        open_checkpoint(write_adapter(tmp_path / name, tensors), base=base).source
        for name, tensors in (("a", lora), ("b", worded))
    )
    for weight in TARGETS.values():
        np.testing.assert_array_equal(second.read(weight), first.read(weight))


def test_a_rank_stabilised_adapter_goes_out_and_comes_in_as_one(tmp_path: Path, base: Path) -> None:
    opened = open_checkpoint(write_adapter(tmp_path / "a", lora_tensors(), use_rslora=True), base=base)
    export(opened, tmp_path / "out", Options(format="lora"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"] is True
    again = open_checkpoint(tmp_path / "out", base=base)
    for weight in TARGETS.values():
        np.testing.assert_array_equal(again.source.read(weight), opened.source.read(weight))


def test_adapters_of_several_ranks_come_in_and_go_out_merged_alone(tmp_path: Path, base: Path) -> None:
    lora = lora_tensors()
    theirs, weight = next(iter(TARGETS.items()))
    a, b = (np.ones(shape, np.float32) for shape in ((5, 42), (TENSORS[weight].shape[0], 5)))
    lora |= {f"{theirs}.lora_A.weight": a, f"{theirs}.lora_B.weight": b}
    folder = write_adapter(tmp_path / "a", lora, rank_pattern={"q_proj": 5})
    opened = open_checkpoint(folder, base=base)
    expected = TENSORS[weight] + scaling(ALPHA, 5) * (b @ a)
    np.testing.assert_allclose(opened.source.read(weight), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"the ranks \[3, 5\].*export the merged model with --format=hf"):
        export(opened, tmp_path / "out", Options(format="lora"))
    assert not (tmp_path / "out").exists()
    export(with_template(opened, "vicuna_v1"), tmp_path / "merged")


def test_an_adapter_for_a_base_of_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    decoder = dataclasses.replace(CONFIG.decoder, width=48)
    wider = dataclasses.replace(CONFIG, decoder=decoder, bridge=BridgeConfig("mlp2x_gelu", 32, 48))
    tensors = hub.tensors_of(wider)
    hub.write_llava(tmp_path / "base", wider, tensors)
    hub.write_tokenizer(tmp_path / "base")
    with pytest.raises(UserError) as caught:
        open_checkpoint(write_adapter(tmp_path / "a", lora_tensors()), base=tmp_path / "base")
    message = str(caught.value)
    assert "the adapter belongs to another base" in message
    for weight in TARGETS.values():
        assert f"{weight} is {list(tensors[weight].shape)} in {tmp_path / 'base'}" in message
    assert (
        f"lora_A is [{RANK}, 42]" in message and str(tmp_path / "a" / "adapter_model.safetensors") in message
    )


@pytest.mark.parametrize("form", ["weight", "modules_to_save.default.weight"])
@pytest.mark.parametrize(("module", "weight"), [("lm_head", names.LM_HEAD), (EMBEDDED, names.EMBEDDING)])
def test_an_adapter_for_a_base_of_another_vocabulary_is_refused_with_file_and_key(
    tmp_path: Path, base: Path, module: str, weight: str, form: str
) -> None:
    name = f"base_model.model.{module.removeprefix('base_model.model.')}.{form}"
    longer = {name: np.ones((hub.PIECES + 5, 42), np.float32)}
    with pytest.raises(UserError) as caught:
        open_checkpoint(write_adapter(tmp_path / "a", lora_tensors() | longer), base=base)
    file = tmp_path / "a" / "adapter_model.safetensors"
    assert f"{weight} is [365, 42] in {file} ({name}), [360, 42] in {base}" in str(caught.value)
    assert "name the one that it was trained on" in str(caught.value)


def test_an_adapter_for_a_deeper_base_is_refused_with_the_layers_that_are_not_there(
    tmp_path: Path, base: Path
) -> None:
    deeper = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in lora_tensors().items()}
    with pytest.raises(UserError, match=r"layers\.7\.self_attn\.q_proj\.weight is not in the base"):
        open_checkpoint(write_adapter(tmp_path / "a", deeper), base=base)


def test_half_an_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    tensors = lora_tensors()
    del tensors[next(iter(tensors)).replace("lora_A", "lora_B")]
    with pytest.raises(
        UserError, match=r"q_proj\.weight: only lora_A is there, in .*adapter_model\.safetensors"
    ):
        open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base)


def test_an_adapter_of_a_convolution_is_refused(tmp_path: Path, base: Path) -> None:
    name = "base_model.model.model.vision_tower.embeddings.patch_embedding"
    tensors = {
        f"{name}.lora_A.weight": np.ones((RANK, 3, 5, 5), np.float32),
        f"{name}.lora_B.weight": np.ones((32, RANK, 1, 1), np.float32),
    }
    with pytest.raises(UserError, match=r"patch_embedding\.weight is \[32, 3, 5, 5\]"):
        open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base)


def test_an_adapter_on_a_bare_decoder_needs_the_config_of_the_whole_model(tmp_path: Path) -> None:
    hub.write_decoder(tmp_path / "words", CONFIG, TENSORS)
    bare = {name.replace("language_model.", ""): tensor for name, tensor in lora_tensors().items()}
    with pytest.raises(UserError, match=r"without the original LLaVA's config\.json beside the adapter"):
        open_checkpoint(write_adapter(tmp_path / "a", bare), base=tmp_path / "words")


def write_llava_lora(folder: Path, **fields: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A LoRA run of the original LLaVA: (its folder, the bridge that it trained under canonical names)."""
    bare = {name.replace("language_model.", ""): tensor for name, tensor in lora_tensors().items()}
    write_adapter(folder, bare, **fields)
    bridge = {name: 1 + TENSORS[name] for name in TENSORS if name.startswith(names.BRIDGE)}
    wrapped = {
        f"base_model.model.{hub.original_names(CONFIG)[name]}": tensor for name, tensor in bridge.items()
    }
    hub.write_tensors(folder / "rest", wrapped)
    # What a file of tensors is, its content says.
    (folder / "rest" / "model.safetensors").rename(folder / "non_lora_trainables.bin")
    return folder, bridge


def test_an_adapter_on_an_original_llava_takes_all_else_from_it(tmp_path: Path) -> None:
    hub.write_original(tmp_path / "base", CONFIG, TENSORS)
    hub.write_clip(tmp_path / "clip", CONFIG, TENSORS, "vision_model.")
    folder, bridge = write_llava_lora(tmp_path / "a")
    opened = open_checkpoint(folder, base=tmp_path / "base", vision=tmp_path / "clip")
    assert opened.files.config == CONFIG
    for name, tensor in (TENSORS | bridge).items():
        assert np.array_equal(opened.source.read(name), tensor) == (name not in TARGETS.values()), name


def test_an_adapter_on_a_bare_decoder_goes_out_as_one_for_the_llava_that_is_named(tmp_path: Path) -> None:
    hub.write_decoder(tmp_path / "words", CONFIG, TENSORS)
    hub.write_clip(tmp_path / "clip", CONFIG, TENSORS, "vision_model.")
    hub.write_original(tmp_path / "a", CONFIG, {}, tower=str(tmp_path / "clip"))
    (tmp_path / "a" / "model.safetensors").unlink()
    write_llava_lora(tmp_path / "a", base_model_name_or_path=str(tmp_path / "words"))
    opened = open_checkpoint(tmp_path / "a")
    with pytest.raises(UserError, match=r"(?s)its base .*words is a LLaMA-shaped decoder.*--base-name"):
        export(opened, tmp_path / "out", Options(format="lora"))
    export(opened, tmp_path / "out", Options(format="lora", base_name="somebody/llava"))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "somebody/llava"
    assert saved["modules_to_save"] == ["multi_modal_projector"]


def test_a_tower_is_not_taken_from_elsewhere_where_the_base_has_it(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="only an original LLaVA takes its tower from elsewhere"):
        open_checkpoint(write_adapter(tmp_path / "a", lora_tensors()), base=base, vision=tmp_path)


def test_only_a_merged_model_holds_no_half_of_an_adapter(tmp_path: Path, base: Path) -> None:
    opened = open_checkpoint(write_adapter(tmp_path / "a", lora_tensors()), base=base)
    assert opened.lora is not None
    assert not [name for name in opened.source.names() if "lora" in name]
    assert set(opened.lora.tensors.names()) == {
        f"{weight.removesuffix('.weight')}.lora_{half}.weight" for weight in TARGETS.values() for half in "AB"
    }
