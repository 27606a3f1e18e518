"""Adapters that PEFT writes are merged to what PEFT computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.parity import hf
from tests.weights import hub
from vflax.weights import streamed, verify
from vflax.weights.kinds import ADAPTER
from vflax.weights.open import Opened, open_checkpoint

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
ADAPTERS: dict[str, dict[str, Any]] = {
    "decoder": {"target_modules": DECODER},
    "all of that name": {"target_modules": ["q_proj", "v_proj"]},
    "all linears": {"target_modules": "all-linear"},
    "rslora": {"target_modules": DECODER, "use_rslora": True},
    "ranks": {"target_modules": DECODER, "rank_pattern": {"q_proj": 5}},
    "some layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "bridge saved whole": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector"]},
    "one linear of the bridge": {"target_modules": DECODER, "modules_to_save": ["linear_2"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


def adapted(model: Any, **settings: Any) -> Any:
    """The model with a LoRA whose every tensor is drawn anew, as if it were trained."""
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, **settings)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                scale = 0.3 / np.sqrt(parameter.shape[-1])
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def our_logits(opened: Opened) -> np.ndarray:
    config = opened.files.config
    return streamed.logits(opened.source, config, *verify.fixed_batch(config, hub.PIECES))


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_an_adapter_merged_on_load_computes_what_peft_computes_with_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = hf.hub_llava(CONFIG)
    hf.write(tmp_path / "base", base)
    plain = hf.fixed_logits(base, CONFIG)
    wrapped = adapted(base, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    unmerged = hf.fixed_logits(wrapped, CONFIG)
    merged = hf.fixed_logits(wrapped.merge_and_unload(), CONFIG)
    opened = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert opened.kind == ADAPTER
    ours = our_logits(opened)
    assert np.abs(unmerged - plain).max() > 1e-2
    np.testing.assert_allclose(ours, unmerged, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours, merged, rtol=0, atol=1e-4)


def test_an_adapter_in_a_bin_file_is_the_same(tmp_path: Path) -> None:
    base = hf.hub_llava(CONFIG)
    hf.write(tmp_path / "base", base)
    wrapped = adapted(base, target_modules=DECODER, modules_to_save=["multi_modal_projector"])
    wrapped.save_pretrained(tmp_path / "safe")
    wrapped.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert [path.name for path in (tmp_path / "bin").glob("adapter_model.*")] == ["adapter_model.bin"]
    safe, old = (open_checkpoint(tmp_path / name, base=tmp_path / "base").source for name in ("safe", "bin"))
    for name in safe.names():
        np.testing.assert_array_equal(old.read(name), safe.read(name))


@pytest.mark.parametrize("tower", ["beside", "given"])
def test_a_lora_run_of_the_original_llava_on_a_bare_decoder_computes_what_it_trained(
    tmp_path: Path, tower: str
) -> None:
    """As LLaVA's finetune_lora.sh leaves it: adapter, non_lora_trainables.bin and the config.json of the whole."""
    reference = hf.hub_llava(CONFIG)
    words = transformers.LlamaForCausalLM(hf.text_config(CONFIG.decoder)).eval()
    hf.perturb(words, 3)
    words.save_pretrained(tmp_path / "vicuna")
    hub.write_tokenizer(tmp_path / "vicuna")
    out = tmp_path / "llava-lora"
    clip = out / "clip" if tower == "beside" else tmp_path / "clip"
    reference.model.vision_tower.save_pretrained(clip)
    hub.dump(
        clip / "preprocessor_config.json",
        {"crop_size": 30, "size": 30, "image_mean": hub.MEAN, "image_std": hub.STD},
    )
    # LlavaLlamaForCausalLM is a LlamaForCausalLM with this module in it.
    words.model.mm_projector = torch.nn.Sequential(
        torch.nn.Linear(32, 42), torch.nn.GELU(), torch.nn.Linear(42, 42)
    )
    wrapped = adapted(
        words, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    wrapped.save_pretrained(out)
    rest = {name: p.detach() for name, p in wrapped.named_parameters() if "mm_projector" in name}
    assert "base_model.model.model.mm_projector.0.weight" in rest
    torch.save(rest, out / "non_lora_trainables.bin")
    adapter_config = (out / "adapter_config.json").read_text()
    hub.write_original(out, CONFIG, {})
    (out / "model.safetensors").unlink()
    (out / "adapter_config.json").write_text(adapter_config)
    merged = wrapped.merge_and_unload()
    reference.model.multi_modal_projector.linear_1.load_state_dict(merged.model.mm_projector[0].state_dict())
    reference.model.multi_modal_projector.linear_2.load_state_dict(merged.model.mm_projector[2].state_dict())
    del merged.model.mm_projector
    reference.model.language_model.load_state_dict(merged.model.state_dict())
    reference.lm_head.load_state_dict(merged.lm_head.state_dict())
    opened = open_checkpoint(out, base=tmp_path / "vicuna", vision=None if tower == "beside" else clip)
    assert opened.kind == ADAPTER and opened.files.config == CONFIG
    np.testing.assert_allclose(our_logits(opened), hf.fixed_logits(reference, CONFIG), rtol=0, atol=1e-4)
