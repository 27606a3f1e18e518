"""Every format is opened by what its files say, and gives the tensors that were put into it, bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.weights import hub, run
from tests.weights.test_names import NAMINGS
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import names
from vflax.weights.kinds import ADAPTER, CLIP, DECODER, HF, ORIGINAL, PROJECTOR, WORKDIR, detect
from vflax.weights.load import check
from vflax.weights.open import HubFiles, Opened, join, open_checkpoint
from vflax.weights.source import FileSource, TensorSource

CONFIG = hub.CONFIG
TENSORS = hub.tensors_of(CONFIG)


def with_bridge(kind: str) -> LlavaConfig:
    return dataclasses.replace(CONFIG, bridge=BridgeConfig(kind, 32, 42))


def assert_holds(source: TensorSource, tensors: dict[str, np.ndarray]) -> None:
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        found = source.read(name)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), name


def assert_opens(opened: Opened, config: LlavaConfig, tensors: dict[str, np.ndarray]) -> None:
    assert opened.files.config == config and opened.files.rules == hub.RULES
    check(opened.source, config)
    assert_holds(opened.source, tensors)


def without_tower(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_tower.")}


# --- Hugging Face LLaVA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [1 << 40, 30_000], ids=["whole", "sharded"])
@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS.keys())
def test_hugging_face_llava_is_opened_in_each_of_its_namings(
    tmp_path: Path, naming: tuple[str, ...], max_bytes: int
) -> None:
    theirs = {}
    for name, tensor in TENSORS.items():
        prefix, new = next(p for p in zip(NAMINGS["4.x hub"], naming, strict=True) if name.startswith(p[0]))
        theirs[new + name.removeprefix(prefix)] = tensor
    hub.write_llava(tmp_path, CONFIG, theirs, max_bytes)
    hub.write_tokenizer(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.kind == HF
    assert_opens(opened, CONFIG, TENSORS)


VARIANTS = {
    "tied": hub.with_decoder(CONFIG, tie_word_embeddings=True),
    "one key per query": hub.with_decoder(CONFIG, num_kv_heads=6),
    "one key for all queries": hub.with_decoder(CONFIG, num_kv_heads=1),
    "rows for added tokens": hub.with_decoder(CONFIG, vocab_size=384),
    "CLS kept": hub.with_vision(CONFIG, keep_cls=True),
    "first layer": hub.with_vision(CONFIG, feature_layer=0),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_hugging_face_llava_of_every_shape_is_opened(tmp_path: Path, config: LlavaConfig) -> None:
    tensors = hub.tensors_of(config)
    hub.write_llava(tmp_path, config, tensors)
    hub.write_tokenizer(tmp_path)
    assert_opens(open_checkpoint(tmp_path), config, tensors)


# --- the original LLaVA -------------------------------------------------------------------------------------

ORIGINALS = VARIANTS | {
    kind: with_bridge(kind) for kind in ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu")
}


@pytest.mark.parametrize("config", ORIGINALS.values(), ids=ORIGINALS.keys())
def test_original_llava_with_its_tower_in_the_shards_is_opened(tmp_path: Path, config: LlavaConfig) -> None:
    tensors = hub.tensors_of(config)
    hub.write_clip(tmp_path / "model" / "clip", config, hub.tensors_of(config, seed=1), "vision_model.")
    hub.write_original(tmp_path / "model", config, tensors, max_bytes=30_000)
    opened = open_checkpoint(tmp_path / "model")
    assert opened.kind == ORIGINAL
    assert_opens(opened, config, tensors)


def test_original_llava_on_mistral_is_opened(tmp_path: Path) -> None:
    hub.write_original(
        tmp_path, CONFIG, TENSORS, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"]
    )
    hub.write_clip(tmp_path / "clip", CONFIG, TENSORS, "vision_model.")
    assert_opens(open_checkpoint(tmp_path), CONFIG, TENSORS)


TOWER_PLACES: dict[str, Callable[[Path], tuple[Path, str, bool]]] = {
    "beside the weights": lambda root: (root / "llava" / "clip", "clip", False),
    "a path": lambda root: (root / "clip", str(root / "clip"), False),
    "given": lambda root: (root / "clip", "somebody/a-tower-that-is-not-here", True),
}


@pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["CLIPModel", "CLIPVisionModel"])
@pytest.mark.parametrize("place", TOWER_PLACES.values(), ids=TOWER_PLACES.keys())
def test_original_llava_without_its_tower_takes_it_from_where_it_is(
    tmp_path: Path, place: Callable[[Path], tuple[Path, str, bool]], prefix: str
) -> None:
    folder, said, given = place(tmp_path)
    hub.write_original(tmp_path / "llava", CONFIG, without_tower(TENSORS), tower=said)
    hub.write_clip(folder, CONFIG, TENSORS, prefix)
    opened = open_checkpoint(tmp_path / "llava", vision=folder if given else None)
    assert_opens(opened, CONFIG, TENSORS)
    assert isinstance(opened.files, HubFiles) and opened.files.tower == said


def test_original_llava_whose_tower_is_nowhere_is_refused_with_what_to_give(tmp_path: Path) -> None:
    hub.write_original(tmp_path, CONFIG, without_tower(TENSORS), tower="/nowhere/clip")
    with pytest.raises(
        UserError, match=r"mm_vision_tower is /nowhere/clip.*its weights are needed.*--vision"
    ):
        open_checkpoint(tmp_path)


def test_original_llava_with_its_tower_needs_only_the_small_files_of_another(tmp_path: Path) -> None:
    hub.write_original(tmp_path / "llava", CONFIG, TENSORS)
    hub.write_clip(tmp_path / "llava" / "clip", CONFIG, TENSORS, "")
    (tmp_path / "llava" / "clip" / "model.safetensors").unlink()
    assert_opens(open_checkpoint(tmp_path / "llava"), CONFIG, TENSORS)


def test_original_llava_before_1_5_says_less_and_means_the_defaults_of_its_code(tmp_path: Path) -> None:
    config, rules = with_bridge("linear"), dataclasses.replace(hub.RULES, mode="crop")
    tensors = hub.tensors_of(config)
    absent = ("image_aspect_ratio", "mm_projector_type", "mm_patch_merge_type", "mm_vision_select_feature")
    hub.write_original(tmp_path, config, tensors, model_type="llava", **dict.fromkeys(absent))
    hub.write_clip(tmp_path / "clip", config, tensors, "vision_model.")
    opened = open_checkpoint(tmp_path)
    assert (opened.kind, opened.files.config, opened.files.rules) == (ORIGINAL, config, rules)
    assert_holds(opened.source, tensors)


def test_the_chat_template_of_a_bare_decoder_is_not_that_of_an_original_llava(tmp_path: Path) -> None:
    hub.write_original(tmp_path, CONFIG, TENSORS)
    hub.write_clip(tmp_path / "clip", CONFIG, TENSORS, "")
    hub.dump(tmp_path / "tokenizer_config.json", {"chat_template": "{{ messages[0]['content'] }}"})
    files = open_checkpoint(tmp_path).files
    assert isinstance(files, HubFiles) and files.chat is None
    (tmp_path / "chat_template.jinja").write_text("{{ 'exported' }}")
    files = open_checkpoint(tmp_path).files
    assert isinstance(files, HubFiles) and files.chat == "{{ 'exported' }}"


# --- parts --------------------------------------------------------------------------------------------------

BRIDGES = {kind: with_bridge(kind) for kind in ("linear", "mlp2x_gelu", "mlp3x_gelu")}


@pytest.mark.parametrize("config", BRIDGES.values(), ids=BRIDGES.keys())
def test_a_projector_joins_a_tower_and_a_decoder(tmp_path: Path, config: LlavaConfig) -> None:
    tensors = hub.tensors_of(config)
    theirs = hub.original_names(config)
    bridge = {theirs[name]: tensors[name] for name in tensors if name.startswith(names.BRIDGE)}
    hub.write_clip(tmp_path / "clip", config, tensors, "vision_model.")
    hub.write_decoder(tmp_path / "words", config, tensors)
    hub.write_tensors(tmp_path, bridge)
    source = join(config, tmp_path / "clip", tmp_path / "words", tmp_path / "model.safetensors", 0)
    check(source, config)
    assert_holds(source, tensors)


def test_a_part_of_a_model_is_no_model(tmp_path: Path) -> None:
    hub.write_clip(tmp_path / "clip", CONFIG, TENSORS, "")
    hub.write_decoder(tmp_path / "words", CONFIG, TENSORS)
    for folder in ("clip", "words"):
        with pytest.raises(
            UserError, match=r"a part of a model: name the parts, --vision=CLIP --decoder=LLAMA"
        ):
            open_checkpoint(tmp_path / folder)


# --- detection ----------------------------------------------------------------------------------------------


def make_adapter(folder: Path) -> None:
    folder.mkdir()
    hub.dump(folder / "adapter_config.json", {"peft_type": "LORA"})


def make_projector(folder: Path) -> None:
    hub.write_tensors(folder, {"model.mm_projector.weight": np.ones((42, 32), np.float32)})
    (folder / "model.safetensors").rename(folder / "anything.safetensors")


def make_first_stage(folder: Path) -> None:
    """What the first stage of the original LLaVA leaves: a projector and the config.json of the whole model."""
    hub.write_original(folder, CONFIG, without_tower(TENSORS))
    (folder / "model.safetensors").unlink()
    make_projector(folder)
    (folder / "anything.safetensors").rename(folder / "mm_projector.safetensors")


def make_workdir(folder: Path) -> None:
    hub.write_llava(folder / "start", CONFIG, TENSORS)
    bridge = [path for path in names.table(CONFIG) if path.startswith("bridge/")]
    run.write(folder, FileSource(folder / "start"), CONFIG, bridge, "vicuna_v1")


KINDS: dict[str, Callable[[Path], Any]] = {
    HF: lambda folder: hub.write_llava(folder, CONFIG, TENSORS),
    ORIGINAL: lambda folder: hub.write_original(folder, CONFIG, TENSORS),
    CLIP: lambda folder: hub.write_clip(folder, CONFIG, TENSORS, "vision_model."),
    DECODER: lambda folder: hub.write_decoder(folder, CONFIG, TENSORS),
    ADAPTER: make_adapter,
    PROJECTOR: make_projector,
    "first stage": make_first_stage,
    WORKDIR: make_workdir,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_directory_is_its_files_say_and_not_its_name(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "x")
    for name in ("llava-lora-mpt-v0", "llava-v1.5-7b", "vicuna", "clip", "mm_projector"):
        shutil.move(tmp_path / "x", tmp_path / name)
        assert detect(tmp_path / name) == {"first stage": PROJECTOR}.get(kind, kind)
        shutil.move(tmp_path / name, tmp_path / "x")


def test_a_file_of_projector_tensors_is_a_projector(tmp_path: Path) -> None:
    make_projector(tmp_path)
    assert detect(tmp_path / "anything.safetensors") == PROJECTOR


def test_what_is_nothing_that_vflax_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a vflax WORKDIR"):
        detect(tmp_path)
    with pytest.raises(UserError, match="not there"):
        detect(tmp_path / "gone")
    hub.dump(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(UserError, match="model_type='gpt2': vflax reads llava"):
        detect(tmp_path)


def test_arguments_that_a_format_does_not_need_are_refused(tmp_path: Path) -> None:
    hub.write_llava(tmp_path / "hf", CONFIG, TENSORS)
    with pytest.raises(UserError, match="only a LoRA adapter has a base"):
        open_checkpoint(tmp_path / "hf", base=tmp_path)
    with pytest.raises(UserError, match="only an original LLaVA takes its tower from elsewhere"):
        open_checkpoint(tmp_path / "hf", vision=tmp_path)
