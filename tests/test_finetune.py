"""docs/finetune.md is true: its command, as it stands there, on a small model and a few pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import small
from tests.weights import hub
from vflax.templates import chat_template
from vflax.weights.kinds import WORKDIR
from vflax.weights.open import open_checkpoint

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs" / "finetune.md"


def command() -> str:
    """The page's command."""
    (found,) = re.findall(r"```bash\n(python -m data_pipeline.*?)```", PAGE.read_text(), re.S)
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's folder after the command: mine.json, images, a LLaVA, and what the command made."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    samples = []
    (folder / "images").mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        talk = [("human", "<image>\nWhat is in picture 7?"), ("gpt", "There are 49 dogs, cats and birds.")]
        turns = [{"from": who, "value": text} for who, text in talk]
        samples.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(samples))
    hub.write_llava(folder / "llava", hub.CONFIG, hub.tensors_of(hub.CONFIG))
    hub.write_tokenizer(folder / "llava")
    (folder / "llava" / "chat_template.jinja").write_text(chat_template("vicuna_v1", "auto"))
    line = command().strip().replace("python -m", f"{sys.executable} -m")
    line = line.replace("llava-hf/llava-1.5-7b-hf@main", "llava")
    # What a small model and 24 samples need to be otherwise.
    line += " --config.epochs=3 --config.data.max_length=256 --config.dtype=float32 --config.lora.rank=4"
    done = subprocess.run(
        line, shell=True, cwd=folder, env=small.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_command_ends_in_a_verified_hugging_face_directory(folder: Path) -> None:
    record = json.loads((folder / "runs" / "mine" / "export" / "export.json").read_text())
    assert record["verified"] and record["max_abs_logit_diff"] <= 1e-5
    assert open_checkpoint(folder / "runs" / "mine" / "export").files.config == hub.with_decoder(
        hub.CONFIG, vocab_size=384
    )


def test_what_is_not_adapted_is_in_the_result_as_it_was(folder: Path) -> None:
    before = open_checkpoint(folder / "llava").source
    after = open_checkpoint(folder / "runs" / "mine" / "export").source
    changed = {
        name for name in before.names() if not np.array_equal(before.read(name), after.read(name)[:360])
    }
    linears = {name for name in before.names() if re.search(r"language_model.*_proj\.weight|projector", name)}
    assert changed == linears


def test_the_loss_falls(folder: Path) -> None:
    facts = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
    assert facts["last_loss"] < facts["first_loss"]


def test_the_page_s_other_command_writes_an_adapter_that_gives_the_same_model(folder: Path) -> None:
    (line,) = re.findall(r"`(python -m vflax.weights.export .*?)`", PAGE.read_text())
    line = line.replace("python -m", f"{sys.executable} -m")
    done = subprocess.run(
        line, shell=True, cwd=folder, env=small.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    merged = open_checkpoint(folder / "adapter", base=folder / "llava")
    run = open_checkpoint(folder / "runs" / "mine")
    assert run.kind == WORKDIR
    for name in run.source.names():
        np.testing.assert_array_equal(merged.source.read(name), run.source.read(name), err_msg=name)
