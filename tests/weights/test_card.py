"""The card of an export tells how the model was made, of a run from what the run wrote down itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.weights import hub, run
from tests.weights.test_adapter import lora_tensors, write_adapter
from vflax import config as configs
from vflax.weights import card, names
from vflax.weights.export import Options, export
from vflax.weights.open import open_checkpoint
from vflax.weights.source import FileSource
from vflax.workdir import write_json

CONFIG = hub.CONFIG
RECIPE = configs.plain(configs.load_config("configs/stage1.py:7b"))
DATA = {
    "position": 7,
    "samples": "5a3d71c09b",
    "rendering": "77aa00ee12",
    "lengths": "0123abcd",
    "plan": "feedbeef",
}
METRICS: list[dict[str, Any]] = [
    {"step": 3, "eval/loss": 9.0},
    {"step": 7, "train/loss": 1.5, "learning_rate": 2e-5},
    {"step": 7, "eval/loss": 1.2345678, "eval/accuracy/vqa": 0.625},
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a run writes down."""
    folder = tmp_path_factory.mktemp("work")
    hub.write_llava(folder / "start", CONFIG, hub.tensors_of(CONFIG))
    bridge = [path for path in names.table(CONFIG) if path.startswith("bridge/")]
    run.write(folder, FileSource(folder / "start"), CONFIG, bridge, "vicuna_v1", (3, 7), {"data": DATA})
    write_json(folder / "config.json", RECIPE)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS))
    return folder


@pytest.fixture(scope="module")
def text(workdir: Path) -> str:
    export(open_checkpoint(workdir, step="7"), workdir / "export")
    return (workdir / "export" / "README.md").read_text()


def test_the_front_matter_is_what_the_hub_reads(workdir: Path, text: str) -> None:
    found = ModelCard.load(workdir / "export" / "README.md")
    assert (found.data.library_name, found.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert found.data.tags == ["llava", "vision-language", "vflax"]
    assert found.text.lstrip().startswith("# LLaVA model")


def test_the_recipe_is_that_of_the_run(text: str) -> None:
    for key in (
        "epochs",
        "batch.samples",
        "optimizer.lr",
        "data.max_length",
        "image.mode",
        "init.checkpoint",
    ):
        value = configs.flatten(RECIPE)[key]
        assert f"| {key} | {value} |" in text
    assert "`vision/.*`: frozen, `bridge/.*`: trainable, `decoder/.*`: trainable." in text


def test_every_key_of_the_recipe_is_a_key_of_a_config() -> None:
    known = {
        key
        for stage in (0, 1, 2)
        for key in configs.flatten(configs.plain(configs.load_config(f"configs/stage{stage}.py")))
    }
    assert not {key for key in card._RECIPE if not key.startswith("lora.")} - known


def test_the_data_is_named_by_its_fingerprint(text: str) -> None:
    for key in ("samples", "rendering", "lengths", "plan"):
        assert f"- {key}: {DATA[key]}" in text
    assert f"- source: {RECIPE['data']['sources'][0]['path']}" in text


def test_the_figures_are_those_of_the_exported_step(text: str) -> None:
    assert "| eval/loss | 1.235 |" in text and "| eval/accuracy/vqa | 0.625 |" in text
    assert "train/loss" not in text and "9" not in text.split("## Figures")[1].split("##")[0]


def test_what_was_verified_is_said(text: str) -> None:
    assert f"{len(names.expected(CONFIG))} tensors were read back and compared bit for bit" in text
    assert "written by vflax" in text.lower() and "step 7" in text


def test_a_directory_without_a_run_has_a_card_without_recipe(tmp_path: Path) -> None:
    config = hub.with_decoder(CONFIG, vocab_size=384)
    hub.write_llava(tmp_path / "in", config, hub.tensors_of(config))
    hub.write_tokenizer(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert "## Recipe" not in found.text and "## Use" in found.text


@pytest.mark.parametrize(
    ("said", "named"), [("llava-hf/llava-1.5-7b-hf", True), ("/data/private/llava", False), ("", False)]
)
def test_the_card_of_an_adapter_names_a_base_that_others_can_fetch(
    tmp_path: Path, said: str, named: bool
) -> None:
    hub.write_llava(tmp_path / "base", CONFIG, hub.tensors_of(CONFIG))
    hub.write_tokenizer(tmp_path / "base")
    write_adapter(tmp_path / "in", lora_tensors(), base_model_name_or_path=said)
    opened = open_checkpoint(tmp_path / "in", base=tmp_path / "base")
    export(opened, tmp_path / "out", Options(format="lora"))
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.library_name == "peft"
    assert found.data.base_model == (said if named else None)
    assert "/data/private" not in found.content
