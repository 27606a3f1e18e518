"""Each format reaches its own readers, and brings the model back as it was, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.parity import hf
from tests.parity.test_adapter import DECODER, adapted, our_logits
from tests.weights import hub
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.weights import hf_config, names, verify
from vflax.weights.adapter import Adapter
from vflax.weights.export import Options, export
from vflax.weights.hub import projector_file
from vflax.weights.kinds import HF, ORIGINAL, PROJECTOR, detect
from vflax.weights.load import check
from vflax.weights.open import join, open_checkpoint
from vflax.weights.source import FileSource, TensorSource

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assert_holds(source: TensorSource, expected: dict[str, torch.Tensor]) -> None:
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        wanted, found = hf.to_numpy(tensor), source.read(name)
        assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), name


def write_bin(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write pytorch_model.bin, or shards with an index, in place of the safetensors there."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[i::shards])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    hub.dump(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


# --- .bin files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", [HF, ORIGINAL])
def test_pytorch_files_are_opened_bit_for_bit(tmp_path: Path, kind: str, shards: int) -> None:
    model = hf.hub_llava(CONFIG).half()
    expected = hf.canonical_state(model)
    hf.write(tmp_path, model)
    state = dict(model.state_dict())
    if kind == ORIGINAL:
        hub.write_original(tmp_path, CONFIG, {})
        hub.write_clip(tmp_path / "clip", CONFIG, hub.tensors_of(CONFIG), "")
        state = {theirs: expected[name] for name, theirs in hub.original_names(CONFIG).items()}
    write_bin(tmp_path, state, shards)
    opened = open_checkpoint(tmp_path)
    assert opened.kind == kind and opened.files.config == CONFIG
    check(opened.source, CONFIG)
    assert_holds(opened.source, expected)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_mm_projector_bin_joins_a_tower_and_a_decoder(tmp_path: Path, kind: str) -> None:
    config = dataclasses.replace(hub.CONFIG, bridge=BridgeConfig(kind, 32, 42))
    tensors = {name: torch.from_numpy(tensor) for name, tensor in hub.tensors_of(config).items()}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    hub.write_clip(tmp_path / "clip", config, arrays, "vision_model.")
    hub.write_decoder(tmp_path / "words", config, arrays)
    theirs = {name: new for name, new in hub.original_names(config).items() if name.startswith(names.BRIDGE)}
    torch.save({new: tensors[name] for name, new in theirs.items()}, tmp_path / "mm_projector.bin")
    assert detect(tmp_path / "mm_projector.bin") == detect(tmp_path) == PROJECTOR
    found = hf_config.join_configs(
        tmp_path / "clip", tmp_path / "words", bridge=kind, feature_layer=-2, keep_cls=False
    )
    assert found == config
    source = join(config, tmp_path / "clip", tmp_path / "words", projector_file(tmp_path), 0)
    check(source, config)
    assert_holds(source, tensors)


# --- round trips --------------------------------------------------------------------------------------------


def make_model(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = hf.hub_llava(CONFIG).to(dtype)
    hf.write(folder, model, "40KB")
    return hf.canonical_state(model)


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    return hf.canonical_state(model)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_by_way_of_the_original_llava_a_model_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    expected = make_model(tmp_path / "in", dtype)
    options = Options(format="llava", max_shard_bytes=40_000, vision_tower="somebody/tower")
    export(open_checkpoint(tmp_path / "in"), tmp_path / "llava", options)
    opened = open_checkpoint(tmp_path / "llava")
    assert opened.kind == ORIGINAL
    assert_holds(opened.source, expected)
    export(opened, tmp_path / "back")
    assert_same(load_state(tmp_path / "back"), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_by_way_of_a_projector_a_bridge_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = make_model(tmp_path / "in", dtype)
    export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(format="projector"))
    bridge = {name: tensor for name, tensor in expected.items() if name.startswith(names.BRIDGE)}
    for file in ("mm_projector.bin", "mm_projector.safetensors"):
        assert_holds(FileSource.file(tmp_path / "out" / file), bridge)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_by_way_of_an_adapter_a_lora_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = hf.hub_llava(CONFIG).to(dtype)
    hf.write(tmp_path / "base", base)
    wrapped = adapted(base, target_modules=DECODER, modules_to_save=["multi_modal_projector"]).to(dtype)
    wrapped.save_pretrained(tmp_path / "in")
    opened = open_checkpoint(tmp_path / "in", base=tmp_path / "base")
    export(opened, tmp_path / "out", Options(format="lora"))
    first, again = Adapter(tmp_path / "in").source, Adapter(tmp_path / "out").source
    assert set(first.names()) == set(again.names())
    for name in first.names():
        assert again.dtype(name).name == str(dtype).removeprefix("torch.")
        assert again.read(name).tobytes() == first.read(name).tobytes(), name


# --- the original LLaVA and its projector -------------------------------------------------------------------


def test_the_original_llava_finds_every_key_and_name_that_it_reads(tmp_path: Path) -> None:
    expected = make_model(tmp_path / "in", torch.float16)
    export(
        open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(format="llava", vision_tower="openai/x")
    )
    theirs = FileSource(tmp_path / "out", rules=())
    assert set(theirs.names()) == set(hub.original_names(CONFIG).values())
    for name, new in hub.original_names(CONFIG).items():
        assert theirs.read(new).tobytes() == hf.to_numpy(expected[name]).tobytes()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert (raw["mm_vision_tower"], raw["unfreeze_mm_vision_tower"]) == ("openai/x", True)
    # What its code makes of the rest: a LlamaForCausalLM's config.
    words = transformers.LlamaConfig.from_dict({**raw, "model_type": "llama"})
    assert (words.num_key_value_heads, words.head_dim, words.rope_parameters["rope_theta"]) == (2, 10, 700.0)
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"], raw["torch_dtype"]) == (
        1,
        2,
        0,
        "float16",
    )


def test_a_tower_that_nothing_names_is_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "in", torch.float32)
    with pytest.raises(UserError, match=r"none of OpenAI's by its shape.*--vision-tower"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(format="llava"))


def test_a_projector_is_what_pretrain_mm_mlp_adapter_takes(tmp_path: Path) -> None:
    expected = make_model(tmp_path / "in", torch.bfloat16)
    export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(format="projector"))
    found = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    theirs = {name: new for name, new in hub.original_names(CONFIG).items() if name.startswith(names.BRIDGE)}
    assert (
        set(found)
        == set(theirs.values())
        == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    )
    for name, new in theirs.items():
        assert torch.equal(found[new], expected[name])


# --- PEFT ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of decoder and bridge."""
    folder = tmp_path_factory.mktemp("lora")
    base = hf.hub_llava(CONFIG)
    hf.write(folder / "base", base)
    wrapped = adapted(
        base, target_modules=DECODER, modules_to_save=["multi_modal_projector"], use_rslora=True
    )
    wrapped.save_pretrained(folder / "adapter")
    return folder


def test_peft_computes_with_an_exported_adapter_what_we_compute(lora: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(lora / "adapter", base=lora / "base")
    record = export(opened, tmp_path / "out", Options(format="lora", torch=True))
    base = transformers.LlavaForConditionalGeneration.from_pretrained(
        lora / "base", attn_implementation="eager"
    )
    plain = hf.fixed_logits(base, CONFIG)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    theirs = hf.fixed_logits(wrapped, CONFIG)
    assert np.abs(theirs - plain).max() > 1e-2
    np.testing.assert_allclose(our_logits(opened), theirs, rtol=0, atol=1e-4)
    assert record["torch"]["max_abs_logit_diff"] <= 1e-4
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["multi_modal_projector"] and saved["use_rslora"]


class Llava4(torch.nn.Module):
    """The module tree of LlavaForConditionalGeneration in transformers before 4.52, its names alone."""

    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        reference = hf.hub_llava(CONFIG)
        self.config = reference.config
        self.vision_tower = torch.nn.Module()
        self.vision_tower.vision_model = reference.model.vision_tower
        self.multi_modal_projector = reference.model.multi_modal_projector
        self.language_model = transformers.LlamaForCausalLM(hf.text_config(CONFIG.decoder))

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it."""


def test_with_names_of_4x_every_tensor_of_an_adapter_arrives(lora: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(lora / "adapter", base=lora / "base")
    record = export(opened, tmp_path / "out", Options(format="lora", names_4x=True, torch=True))
    assert record["torch"]["outcome"].startswith("not computed")
    wrapped: Any = peft.PeftModel.from_pretrained(Llava4(), tmp_path / "out")
    state = peft.get_peft_model_state_dict(wrapped)
    sent = FileSource(tmp_path / "out", (), "adapter_model")
    assert set(state) == set(sent.names())
    for name, tensor in state.items():
        assert torch.equal(tensor, torch.from_numpy(sent.read(name))), name
    assert not [name for name in state if "vision_tower" in name]


def test_an_adapter_of_the_head_reaches_peft(tmp_path: Path) -> None:
    base = hf.hub_llava(CONFIG)
    hf.write(tmp_path / "base", base)
    wrapped = adapted(base, target_modules=r".*\.q_proj|(.*\.)?lm_head")
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    opened = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    record = export(opened, tmp_path / "out", Options(format="lora", torch=True))
    assert record["torch"]["max_abs_logit_diff"] <= 1e-4


def test_a_head_that_peft_saved_whole_beside_its_adapter_goes_back_to_peft(tmp_path: Path) -> None:
    hf.write(tmp_path / "base", hf.hub_llava(CONFIG))
    wrapped = adapted(hf.hub_llava(CONFIG), target_modules=r".*\.q_proj|(.*\.)?lm_head")
    with torch.no_grad():  # as if it had been another base's
        wrapped.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    opened = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    np.testing.assert_allclose(our_logits(opened), hf.fixed_logits(wrapped, CONFIG), rtol=0, atol=1e-4)
    record = export(opened, tmp_path / "out", Options(format="lora", torch=True))
    assert record["torch"]["max_abs_logit_diff"] <= 1e-4
    theirs, ours = (FileSource(tmp_path / name, (), "adapter_model") for name in ("adapter", "out"))
    assert set(ours.names()) == set(theirs.names())


# --- --verify=torch -----------------------------------------------------------------------------------------


def test_transformers_computes_an_export_where_memory_allows(tmp_path: Path) -> None:
    make_model(tmp_path / "in", torch.float32)
    record = export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(torch=True))
    assert record["torch"]["max_abs_logit_diff"] <= 1e-4
    assert "In transformers: largest logit difference" in (tmp_path / "out" / "README.md").read_text()


def test_where_memory_is_short_the_export_says_so_and_is_done(tmp_path: Path, monkeypatch) -> None:
    make_model(tmp_path / "in", torch.float32)
    monkeypatch.setattr(verify, "host_memory", lambda: 1000)
    record = export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(torch=True))
    assert record["torch"] == {"outcome": record["torch"]["outcome"]}
    assert record["torch"]["outcome"].startswith("not computed: float32 needs")
    assert record["verified"] and (tmp_path / "out" / "config.json").is_file()


def test_logits_of_transformers_that_differ_are_found(tmp_path: Path, monkeypatch) -> None:
    make_model(tmp_path / "in", torch.float32)
    compute = "vflax.weights.torch_files.transformers_logits"
    monkeypatch.setattr(compute, lambda *args: np.zeros((1, 60, 384), np.float32))
    with pytest.raises(UserError, match="transformers computes logits that differ by up to"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(torch=True))
    assert not (tmp_path / "out").exists()
