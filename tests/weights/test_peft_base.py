"""What a run started from is written down, and its adapter goes out for a base that PEFT can load it on, or not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import small
from tests.weights import hub, run
from tests.weights.test_adapter import lora_tensors, write_adapter
from vflax.errors import UserError
from vflax.models.lora import LoraConfig
from vflax.start import keep, open_model, open_start
from vflax.templates import chat_template
from vflax.weights import names
from vflax.weights.export import Options, export, main
from vflax.weights.kinds import ADAPTER, HF, ORIGINAL, PARTS, RANDOM, WORKDIR
from vflax.weights.open import Opened, open_checkpoint
from vflax.weights.reading import origin_of
from vflax.weights.source import FileSource
from vflax.workdir import Origin, write_json

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
TENSORS = hub.tensors_of(CONFIG)
LORA = LoraConfig(3, 6.0, 0.0, (r"decoder/layers/attention/.*", r"bridge/.*"))
BRIDGE = [path for path in names.table(CONFIG) if path.startswith("bridge/")]
TO_ADAPTER = Options(format="lora")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start of each kind, named after it, and a run with adapters that does not say where it is from."""
    folder = tmp_path_factory.mktemp("places")
    hub.write_llava(folder / "hf", CONFIG, TENSORS)
    hub.write_tokenizer(folder / "hf")
    (folder / "hf" / "chat_template.jinja").write_text(chat_template("vicuna_v1", "auto"))
    run.write(folder / "workdir", FileSource(folder / "hf"), CONFIG, BRIDGE, "vicuna_v1")
    hub.write_original(folder / "original", CONFIG, TENSORS, tower=str(folder / "clip"))
    hub.write_clip(folder / "clip", CONFIG, TENSORS, "vision_model.")
    hub.write_decoder(folder / "words", CONFIG, TENSORS)
    hub.write_tokenizer(folder / "words")
    write_adapter(folder / "adapter", lora_tensors(), base_model_name_or_path=str(folder / "hf"))
    run.write(folder / "run", FileSource(folder / "hf"), CONFIG, BRIDGE, "vicuna_v1", lora=LORA)
    return folder


def opened_run(places: Path, folder: Path, origin: Origin | None = None, checkpoint: str = "") -> Opened:
    """A run with adapters that started from `origin`, or one of before there was origin.json, from `checkpoint`."""
    shutil.copytree(places / "run", folder)
    if origin is not None:
        origin.save(folder)
    else:
        write_json(folder / "config.json", {"init": {"checkpoint": checkpoint}})
    return open_checkpoint(folder)


def written(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


# --- what is written down ---------------------------------------------------------------------------------------------


def start_config(places: Path, **init: str) -> Any:
    config = small.config(**{f"init__{key}": str(places / name) for key, name in init.items()})
    if init:
        config.model.vision, config.model.decoder, config.tokenizer = {}, {}, ""
    return config


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ({"checkpoint": "hf"}, Origin(HF, "hf")),
        ({"checkpoint": "workdir"}, Origin(WORKDIR, "workdir", 3)),
        ({"checkpoint": "original", "vision": "clip"}, Origin(ORIGINAL, "original")),
        ({"checkpoint": "adapter"}, Origin(ADAPTER, "adapter")),
        ({"vision": "clip", "decoder": "words"}, Origin(PARTS)),
        ({}, Origin(RANDOM)),
    ],
    ids=["hf", "workdir", "original", "adapter", "parts", "random"],
)
def test_a_start_is_known_by_its_kind_and_its_absolute_path(
    places: Path, monkeypatch: pytest.MonkeyPatch, init: dict[str, str], expected: Origin
) -> None:
    monkeypatch.chdir(places)
    found = open_start(start_config(Path(), **init)).origin
    path = str(places / expected.checkpoint) if expected.checkpoint else ""
    assert found == Origin(expected.kind, path, expected.step)


def test_a_run_keeps_where_it_started_from(places: Path, tmp_path: Path) -> None:
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    keep(open_model(start_config(places, checkpoint="workdir"), tmp_path, mesh, None), tmp_path)
    assert origin_of(tmp_path) == Origin(WORKDIR, str(places / "workdir"), 3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("hf", Origin(HF, "hf")),
        ("original", Origin(ORIGINAL, "original")),
        ("cache:tiny-stage0", Origin(WORKDIR)),
        ("llava-hf/llava-1.5-7b-hf@main", Origin("", "llava-hf/llava-1.5-7b-hf@main")),
    ],
)
def test_a_run_that_did_not_write_it_down_is_judged_by_what_its_config_names(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: Origin
) -> None:
    monkeypatch.chdir(places)
    write_json(tmp_path / "config.json", {"init": {"checkpoint": said}})
    found = origin_of(tmp_path)
    here = (places / said).is_dir()
    assert found == Origin(expected.kind, str(places / said) if here else expected.checkpoint)


# --- bases that PEFT can use ------------------------------------------------------------------------------------------


def test_an_adapter_names_the_hugging_face_llava_by_its_absolute_path(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places)
    export(opened_run(places, tmp_path / "run", checkpoint="hf"), tmp_path / "out", TO_ADAPTER)
    write_adapter(tmp_path / "other", lora_tensors(), base_model_name_or_path="hf")
    export(open_checkpoint(tmp_path / "other"), tmp_path / "again", TO_ADAPTER)
    export(open_checkpoint(tmp_path / "out"), tmp_path / "named", Options(format="lora", base_name="hf"))
    for name in ("out", "again", "named"):
        assert written(tmp_path / name)["base_model_name_or_path"] == str(places / "hf")


def test_an_adapter_names_the_hub_id_and_commit_that_the_run_started_from(
    places: Path, tmp_path: Path
) -> None:
    opened = opened_run(places, tmp_path / "run", Origin(HF, "somebody/llava@3f2a"))
    export(opened, tmp_path / "out", TO_ADAPTER)
    found = written(tmp_path / "out")
    assert (found["base_model_name_or_path"], found["revision"]) == ("somebody/llava", "3f2a")


@pytest.mark.parametrize("kind", [WORKDIR, ORIGINAL, ADAPTER, PARTS, RANDOM])
def test_a_base_that_peft_cannot_use_is_refused_whatever_it_is_called(
    places: Path, tmp_path: Path, kind: str
) -> None:
    opened = opened_run(places, tmp_path / "run", Origin(kind, "llava-hf/llava-1.5-7b-hf@main"))
    with pytest.raises(UserError, match=rf"its base llava-hf/llava-1.5-7b-hf@main is {kind}\. PEFT loads"):
        export(opened, tmp_path / "out", TO_ADAPTER)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_is_refused(places: Path, tmp_path: Path) -> None:
    opened = opened_run(places, tmp_path / "run", checkpoint="/nowhere/llava")
    with pytest.raises(UserError, match=r"its base /nowhere/llava is nowhere to be found"):
        export(opened, tmp_path / "out", TO_ADAPTER)


def follow(error: UserError, folder: Path) -> None:
    """Give the commands that a refusal names, with folders for BASE and ADAPTER."""
    commands = re.findall(r"python -m vflax\.weights\.export (.*)", str(error))
    assert len(commands) == 2
    for line in commands:
        line = line.replace("BASE", str(folder / "base")).replace("ADAPTER", str(folder / "adapter"))
        assert main(shlex.split(line.replace("NAME", "vicuna_v1"))) == 0


def assert_same_model(adapter: Path, base: Path, opened: Opened) -> None:
    merged = open_checkpoint(adapter, base=base).source
    assert set(merged.names()) == set(opened.source.names())
    for name in merged.names():
        np.testing.assert_array_equal(merged.read(name), opened.source.read(name), err_msg=name)


def test_the_commands_of_the_refusal_give_a_base_and_an_adapter_that_make_the_run(
    places: Path, tmp_path: Path
) -> None:
    opened = opened_run(places, tmp_path / "a run", Origin(WORKDIR, "/somewhere/else"))
    with pytest.raises(UserError) as caught:
        export(opened, tmp_path / "out", TO_ADAPTER)
    follow(caught.value, tmp_path)
    assert written(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "base")
    assert_same_model(tmp_path / "adapter", tmp_path / "base", opened)
    base, start = FileSource(tmp_path / "base"), FileSource(places / "hf")
    for name in base.names():
        learned = name.startswith("multi_modal_projector.")
        assert (base.read(name).tobytes() != start.read(name).tobytes()) == learned, name
    assert json.loads((tmp_path / "base" / "export.json").read_text())["without_adapters"]
    assert "step 3, without its adapters" in (tmp_path / "base" / "README.md").read_text()


def test_they_do_so_for_an_adapter_on_an_original_llava(places: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "in", lora_tensors(), base_model_name_or_path=str(places / "original"))
    opened = open_checkpoint(tmp_path / "in")
    with pytest.raises(UserError, match=rf"original is {ORIGINAL}") as caught:
        export(opened, tmp_path / "out", TO_ADAPTER)
    follow(caught.value, tmp_path)
    assert_same_model(tmp_path / "adapter", tmp_path / "base", opened)


def test_what_is_named_as_base_must_be_one(places: Path, tmp_path: Path) -> None:
    opened = opened_run(places, tmp_path / "run", Origin(HF, str(places / "hf")))
    for base in (places / "workdir", places / "original"):
        with pytest.raises(
            UserError, match=rf"--base-name={base} is (a vflax WORKDIR|original LLaVA)\. PEFT"
        ):
            export(opened, tmp_path / "out", Options(format="lora", base_name=str(base)))
    with pytest.raises(UserError, match=r"runs/typo: not there"):
        export(opened, tmp_path / "out", Options(format="lora", base_name="runs/typo"))


def test_a_base_that_is_another_model_is_found(places: Path, tmp_path: Path) -> None:
    opened = opened_run(places, tmp_path / "run", Origin(HF, str(places / "hf")))
    wider = hub.with_decoder(CONFIG, num_heads=7, num_kv_heads=1)
    for name, config, seed in (("wider", wider, 0), ("drawn otherwise", CONFIG, 1)):
        hub.write_llava(tmp_path / name, config, hub.tensors_of(config, seed))
        hub.write_tokenizer(tmp_path / name)
    with pytest.raises(
        UserError, match=r"(?s)the adapter belongs to another base.*q_proj\.weight is \[70, 42\]"
    ):
        export(opened, tmp_path / "out", Options(format="lora", base_name=str(tmp_path / "wider")))
    other = tmp_path / "drawn otherwise"
    with pytest.raises(UserError, match=rf"logits .* differ .*; is {other} the base of this adapter\?"):
        export(opened, tmp_path / "out", Options(format="lora", base_name=str(other)))
    assert not (tmp_path / "out").exists()


def test_only_a_model_with_adapters_goes_out_without_them(places: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--without-adapters: .* is Hugging Face LLaVA without an adapter"):
        export(open_checkpoint(places / "hf"), tmp_path / "out", Options(without_adapters=True))
    with pytest.raises(UserError, match=r"--without-adapters belongs to --format=hf\|llava"):
        export(open_checkpoint(places / "run"), tmp_path / "out", Options("lora", without_adapters=True))


# --- weights that learn beside their adapters -------------------------------------------------------------------------


def test_a_kernel_that_learned_beside_its_adapter_is_the_learned_one_and_b_a(places: Path) -> None:
    opened = open_checkpoint(places / "run")
    assert opened.lora is not None
    for linear in ("linear_1", "linear_2"):
        stem = f"multi_modal_projector.{linear}"
        learned = TENSORS[f"{stem}.weight"] + np.float32(1 / 64)
        a, b = (opened.lora.tensors.read(f"{stem}.lora_{half}.weight") for half in "AB")
        expected = learned + LORA.scale * (b @ a)
        assert np.abs(expected - learned).max() > 1e-4
        np.testing.assert_allclose(opened.source.read(f"{stem}.weight"), expected, rtol=0, atol=1e-6)


def test_a_bridge_that_learned_goes_out_whole_with_its_adapters_merged(places: Path, tmp_path: Path) -> None:
    opened = opened_run(places, tmp_path / "run", Origin(HF, str(places / "hf")))
    export(opened, tmp_path / "out", TO_ADAPTER)
    sent = FileSource(tmp_path / "out", (), "adapter_model")
    bridge = {name for name in sent.names() if "multi_modal_projector" in name}
    assert bridge == {
        f"base_model.model.model.multi_modal_projector.linear_{i}.{leaf}"
        for i in (1, 2)
        for leaf in ("weight", "bias")
    }
    assert "multi_modal_projector" not in written(tmp_path / "out")["target_modules"]
    assert_same_model(tmp_path / "out", places / "hf", opened)


def test_a_decoder_s_kernel_that_learned_keeps_a_run_from_going_out_as_an_adapter(
    places: Path, tmp_path: Path
) -> None:
    learned = ["decoder/layers/attention/q/kernel"]
    run.write(tmp_path / "run", FileSource(places / "hf"), CONFIG, learned, "vicuna_v1", lora=LORA)
    Origin(HF, str(places / "hf")).save(tmp_path / "run")
    with pytest.raises(UserError, match=r"it changes .*layers\.0\.self_attn\.q_proj\.weight.* --format=hf"):
        export(open_checkpoint(tmp_path / "run"), tmp_path / "out", TO_ADAPTER)
    assert not (tmp_path / "out").exists()
