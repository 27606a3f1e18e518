"""Bad input ends the command line with exit status 1 and one message that helps, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.weights import hub
from tests.weights.test_adapter import lora_tensors, write_adapter
from vflax.templates import chat_template
from vflax.weights import safetensors_io
from vflax.weights.export import main

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
TENSORS = hub.tensors_of(CONFIG)
CHAT = "{{ messages[0]['content'] }}"


def write_hf(folder: Path, tensors: dict[str, np.ndarray] = TENSORS, max_bytes: int = 30_000) -> Path:
    hub.write_llava(folder, CONFIG, tensors, max_bytes)
    hub.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def write_original(folder: Path, **fields: Any) -> Path:
    hub.write_original(folder, CONFIG, TENSORS, **fields)
    hub.write_clip(folder / "clip", CONFIG, TENSORS, "vision_model.")
    return folder


def truncated(root: Path) -> list[str]:
    shard = sorted(write_hf(root / "in").glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    return []


def ghost_in_the_index(root: Path) -> list[str]:
    path = write_hf(root / "in") / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    hub.dump(path, index)
    return []


def two_shards_gone(root: Path) -> list[str]:
    shards = sorted(write_hf(root / "in").glob("model-*.safetensors"))
    shards[1].unlink()
    shards[3].unlink()
    return []


def not_a_number(root: Path) -> list[str]:
    norm = TENSORS["language_model.model.norm.weight"].copy()
    norm[3] = np.nan
    write_hf(root / "in", TENSORS | {"language_model.model.norm.weight": norm})
    return []


def all_at_once(root: Path) -> list[str]:
    tensors = dict(TENSORS)
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    tensors["multi_modal_projector.linear_1.bias"] = np.ones(41, np.float32)
    tensors["image_newline"] = np.ones(42, np.float32)
    write_hf(root / "in", tensors)
    return []


def wrong_projector(root: Path) -> list[str]:
    """haotian-liu/LLaVA#1884: the config.json of a LoRA run says linear where the weights are two linears."""
    write_original(root / "in", mm_projector_type="linear")
    return ["--format=projector"]


def scaled(kind: str) -> Callable[[Path], list[str]]:
    def make(root: Path) -> list[str]:
        lengths = {"short_factor": [1.0] * 5, "long_factor": [2.0] * 5} if kind == "longrope" else {}
        scaling = {"type": kind, "rope_type": kind, "factor": 2.0, **lengths}
        hub.edit(write_hf(root / "in") / "config.json", text_config={"rope_scaling": scaling})
        return []

    return make


def original_with(**fields: Any) -> Callable[[Path], list[str]]:
    def make(root: Path) -> list[str]:
        write_original(root / "in", **fields)
        return []

    return make


def foreign_adapter(layer: int, width: int) -> Callable[[Path], list[str]]:
    """An adapter that was trained on a base of another depth or width."""

    def make(root: Path) -> list[str]:
        write_hf(root / "base")
        tensors = {}
        for name, tensor in lora_tensors().items():
            wider = np.zeros((3, width), np.float32) if name.endswith("q_proj.lora_A.weight") else tensor
            tensors[name.replace("layers.1.", f"layers.{layer}.")] = wider
        write_adapter(root / "in", tensors)
        return [f"--base={root / 'base'}"]

    return make


def hf_with(*flags: str) -> Callable[[Path], list[str]]:
    def make(root: Path) -> list[str]:
        write_hf(root / "in")
        return list(flags)

    return make


def known_template(root: Path) -> list[str]:
    (write_hf(root / "in") / "chat_template.jinja").write_text(chat_template("vicuna_v1", "front"))
    return ["--template=vicuna_v1"]


CASES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "truncated shard": (truncated, ["model-00003-of", "it is truncated, fetch it again"]),
    "ghost in the index": (ghost_in_the_index, ["index.json", "ghost is not in model-000"]),
    "two shards gone": (two_shards_gone, ["model-00002-of", "model-00004-of", "not there"]),
    "NaN": (not_a_number, ["language_model.model.norm.weight in", "NaN", "model-000"]),
    "missing, unexpected, mis-shaped": (
        all_at_once,
        [
            "1 tensors missing:\n    language_model.model.layers.1.mlp.up_proj.weight [52, 42]",
            "1 tensors of another shape:\n    multi_modal_projector.linear_1.bias is [41], the config asks for [42]",
            "1 tensors unexpected:\n    image_newline in",
            "model-000",
            "Check that config.json belongs to these files",
        ],
    ),
    "wrong mm_projector_type": (
        wrong_projector,
        [
            "multi_modal_projector.linear_2.weight in",
            "multi_modal_projector.linear_2.bias in",
            "model.safetensors (model.mm_projector.2.weight)",
            "The bridge of these files is mlp2x_gelu, the config says linear",
            "mm_projector_type",
        ],
    ),
    "another width": (
        foreign_adapter(1, 48),
        [
            "belongs to another base",
            "q_proj.weight is [60, 42] in",
            "lora_A is [3, 48]",
            "adapter_model.safetensors",
        ],
    ),
    "another depth": (
        foreign_adapter(9, 42),
        ["belongs to another base", "layers.9.self_attn.q_proj.weight is not in the base"],
    ),
    **{kind: (scaled(kind), [f"rope_scaling type='{kind}'"]) for kind in ("yarn", "dynamic", "longrope")},
    "start and end": (original_with(mm_use_im_start_end=True), ["mm_use_im_start_end=True"]),
    "s2": (original_with(s2=True), ["s2=True"]),
    "anyres": (original_with(image_aspect_ratio="anyres"), ["image_aspect_ratio='anyres'"]),
    "merged patches": (original_with(mm_patch_merge_type="spatial"), ["mm_patch_merge_type='spatial'"]),
    "template of a model that has one": (known_template, ["says itself that it is vicuna_v1"]),
    "flags of llava": (hf_with("--vision-tower=x"), ["--vision-tower belongs to --format=llava"]),
    "flags of lora": (
        hf_with("--names-4x", "--base-name=x"),
        ["--names-4x belongs to --format=lora; --base-name belongs to --format=lora"],
    ),
    "no adapter": (hf_with("--format=lora"), ["is Hugging Face LLaVA without an adapter", "--format=hf"]),
    "a size": (hf_with("--max-shard-size=lots"), ["--max-shard-size=lots: expected a size such as 5GB"]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_one_message_that_helps_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, expected = CASES[case]
    flags = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("export: ") == 1 and "Traceback" not in captured.err
    for words in expected:
        assert words in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_flags_are_told_before_a_model_is_looked_for(tmp_path: Path, capsys) -> None:
    assert main([f"--model={tmp_path / 'gone'}", f"--out={tmp_path / 'out'}", "--names-4x"]) == 1
    assert "--names-4x belongs to --format=lora" in capsys.readouterr().err


def test_a_template_that_does_not_exist_is_refused(tmp_path: Path, capsys) -> None:
    (write_hf(tmp_path / "in") / "chat_template.jinja").unlink()
    assert main([f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--template=nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "library"), [([], "torch"), (["--format=lora"], "peft")], ids=["hf", "lora"]
)
def test_without_the_library_that_verify_needs_the_message_says_what_to_install(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, flags: list[str], library: str
) -> None:
    write_hf(tmp_path / "in")
    monkeypatch.setitem(sys.modules, library, None)
    assert main([f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--verify=torch", *flags]) == 1
    assert f"--verify=torch needs {library}: pip install " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_torch_a_projector_is_refused_before_a_model_is_looked_for(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main([f"--model={tmp_path / 'gone'}", f"--out={tmp_path / 'out'}", "--format=projector"]) == 1
    assert "--format=projector needs torch: pip install 'vflax[torch]'" in capsys.readouterr().err


# --- a full disk --------------------------------------------------------------------------------------------


def no_space(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_the_middle_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    write = safetensors_io.write_file

    def filling_up(path: Path, *args: Any) -> str:
        return no_space() if "00003-of" in path.name else write(path, *args)

    monkeypatch.setattr(safetensors_io, "write_file", filling_up)


def at(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The disk is full when the file of that name is written."""

    def fill(monkeypatch: pytest.MonkeyPatch) -> None:
        write = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda path, *a, **kw: no_space() if path.name == name else write(path, *a, **kw),
        )

    return fill


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "weights": in_the_middle_of_the_weights,
    "tokenizer": at("tokenizer.json"),
    "config": at("config.json"),
    "card": at("README.md"),
    "record": at("export.json"),
    "the new name": lambda monkeypatch: monkeypatch.setattr("vflax.folders.swap", no_space),
}


@pytest.mark.parametrize("fill", FULL.values(), ids=FULL.keys())
def test_a_disk_that_fills_up_leaves_nothing_behind_and_keeps_an_earlier_export(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    write_hf(tmp_path / "in")
    command = [f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--max-shard-size=30KB"]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        fill(patch)
        assert main([*command, "--replace", "--dtype=bfloat16"]) == 1
    assert f"{tmp_path / 'out'}: not written: no space left on the disk" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys) -> None:
    write_hf(tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    assert main([f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'file' / 'out'}"]) == 1
    assert f"{tmp_path / 'file' / 'out'}: not written: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
