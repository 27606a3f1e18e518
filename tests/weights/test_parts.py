"""A tower, a decoder and a trained projector are one model to every tool; what belongs to none is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.weights import hub
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.weights import export, hf_chat, import_weights
from vflax.weights.file_source import FileSource
from vflax.weights.kinds import PARTS
from vflax.weights.load import check
from vflax.weights.open import HubFiles, open_checkpoint, open_parts
from vflax.workdir import ModelFiles

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
TENSORS = hub.tensors_of(CONFIG)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """clip/, words/ and bridge/, the last one as the first stage of LLaVA leaves it, and projector.safetensors."""
    write_parts(tmp_path)
    return tmp_path


def write_parts(root: Path, config=CONFIG, tensors=TENSORS) -> None:
    hub.write_clip(root / "clip", config, tensors, "vision_model.")
    hub.write_decoder(root / "words", config, tensors)
    hub.write_tokenizer(root / "words")
    theirs = hub.original_names(config)
    bridge = {theirs[name]: tensor for name, tensor in tensors.items() if name.startswith("multi_modal")}
    hub.write_original(root / "bridge", config, {}, tower=str(root / "clip"), image_aspect_ratio=None)
    hub.write_tensors(root / "bridge", bridge)
    (root / "bridge" / "model.safetensors").rename(root / "bridge" / "mm_projector.safetensors")
    (root / "bridge" / "tokenizer.model").unlink()
    hub.write_tensors(root, bridge)
    (root / "model.safetensors").rename(root / "projector.safetensors")


def flags(root: Path, *more: str) -> list[str]:
    return [f"--decoder={root / 'words'}", f"--bridge={root / 'bridge'}", f"--out={root / 'out'}", *more]


def test_tower_layer_and_images_are_those_that_the_projectors_config_names(parts: Path) -> None:
    opened = open_parts(None, parts / "words", parts / "bridge", None, None)
    assert opened.kind == PARTS and isinstance(opened.files, HubFiles)
    assert opened.files.config == CONFIG
    assert opened.files.rules == dataclasses.replace(hub.RULES, mode="crop")
    check(opened.source, CONFIG)
    for name, tensor in TENSORS.items():
        assert opened.source.read(name).tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_the_kind_of_a_projector_is_told_by_its_tensors(tmp_path: Path, kind: str) -> None:
    config = dataclasses.replace(CONFIG, bridge=BridgeConfig(kind, 32, 42))
    write_parts(tmp_path, config, hub.tensors_of(config))
    file = tmp_path / "projector.safetensors"
    opened = open_parts(tmp_path / "clip", tmp_path / "words", file, -2, None)
    assert opened.files.config == config
    check(opened.source, config)


def test_a_projector_without_a_config_needs_a_tower_and_a_layer_and_says_so(parts: Path) -> None:
    for vision, layer in ((None, -2), (parts / "clip", None)):
        with pytest.raises(
            UserError, match=r"no config\.json of LLaVA's beside it.*--vision.*--feature-layer"
        ):
            open_parts(vision, parts / "words", parts / "projector.safetensors", layer, None)


def test_parts_go_out_as_hugging_face_llava_bit_for_bit(parts: Path) -> None:
    assert export.main(flags(parts, "--template=vicuna_v1")) == 0
    out = FileSource(parts / "out")
    assert set(out.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert out.read(name).tobytes() == tensor.tobytes(), name


def test_parts_become_a_workdir(parts: Path) -> None:
    assert import_weights.main(flags(parts, "--template=vicuna_v1")) == 0
    assert ModelFiles.load(parts / "out").config == CONFIG
    check(open_checkpoint(parts / "out").source, CONFIG)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model=x"], "--decoder, --bridge: of a model in parts, and --model=x names a whole one"),
        (["--step=3"], "--base and --step belong to --model"),
        (["--bridge="], "name a model with --model, or its parts with --decoder, --bridge and --vision"),
        (["--decoder={clip}"], "is a CLIP vision tower, expected a LLaMA-shaped decoder"),
        (["--bridge={clip}"], "is a CLIP vision tower, expected a projector"),
        (["--vision={words}"], "is a LLaMA-shaped decoder, expected a CLIP vision tower"),
    ],
    ids=["a model, too", "a step", "no bridge", "decoder", "bridge", "tower"],
)
def test_flags_that_do_not_fit_each_other_or_what_they_name_are_refused(
    parts: Path, capsys, more: list[str], words: str
) -> None:
    more = [flag.format(clip=parts / "clip", words=parts / "words") for flag in more]
    for main in (export.main, import_weights.main):
        assert main(flags(parts, *more)) == 1
        assert words in capsys.readouterr().err
    assert not (parts / "out").exists()


def test_parts_of_other_widths_are_told_with_their_files(parts: Path, capsys) -> None:
    decoder = dataclasses.replace(CONFIG.decoder, width=48)
    wider = dataclasses.replace(CONFIG, bridge=BridgeConfig("mlp2x_gelu", 32, 48), decoder=decoder)
    hub.write_decoder(parts / "words", wider, hub.tensors_of(wider))
    assert import_weights.main(flags(parts, "--template=vicuna_v1")) == 1
    said = capsys.readouterr().err
    assert "multi_modal_projector.linear_2.weight is [42, 42], the config asks for [48, 48]" in said
    assert "mm_projector.safetensors" in said and not (parts / "out").exists()


# --- what lies beside weights -------------------------------------------------------------------------------


def test_the_tokenizer_of_other_weights_is_refused_by_export_and_import(tmp_path: Path, capsys) -> None:
    config = hub.with_decoder(hub.CONFIG, vocab_size=352)
    hub.write_original(tmp_path / "in", config, hub.tensors_of(config))
    hub.write_clip(tmp_path / "in" / "clip", config, hub.tensors_of(config), "")
    for main in (export.main, import_weights.main):
        command = [f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--template=vicuna_v1"]
        assert main(command) == 1
        said = capsys.readouterr().err
        assert "the tokenizer has 360 pieces, but the weights have 352 embeddings" in said
        assert not (tmp_path / "out").exists()


def test_of_several_chat_templates_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 2 }}"}]
    hub.dump(tmp_path / "tokenizer_config.json", {"chat_template": several})
    assert hf_chat.own_chat_template(tmp_path) == "{{ 2 }}"
    hub.dump(tmp_path / "tokenizer_config.json", {"chat_template": several[:1]})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template .* named 'default'"):
        hf_chat.own_chat_template(tmp_path)


def test_a_chat_template_that_is_no_utf_8_is_told(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template\.jinja: not readable as text in UTF-8"):
        hf_chat.own_chat_template(tmp_path)


@pytest.mark.parametrize("said", ["2", {}, [], [2, "3"], -1, 2.5, True], ids=repr)
def test_ends_of_answers_that_are_no_ids_are_told(tmp_path: Path, said: object) -> None:
    hub.write_llava(tmp_path, CONFIG, TENSORS)
    hub.write_tokenizer(tmp_path)
    hub.dump(tmp_path / "generation_config.json", {"eos_token_id": said})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id="):
        open_checkpoint(tmp_path)
