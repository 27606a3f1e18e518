"""docs/generate.md is true: its Python, as it stands there, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.weights import hub, run
from vflax import conversation as talk
from vflax.generate.greedy import greedy
from vflax.generate.processor import Processor
from vflax.models import llava
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.weights.source import FileSource

PAGE = Path(__file__).parents[2] / "docs" / "generate.md"


@pytest.mark.slow
def test_the_pages_python_prints_the_answer_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    hub.write_llava(tmp_path / "start", hub.CONFIG, hub.tensors_of(hub.CONFIG))
    source = FileSource(tmp_path / "start")
    run.write(tmp_path / "runs" / "tiny", source, hub.CONFIG, ["bridge/layers_0/kernel"], "vicuna_v1")
    pixels = np.random.default_rng(0).integers(0, 256, (25, 40, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})
    expected = answer_of(tmp_path / "runs" / "tiny", "How many circles are there?", picture)
    assert expected and capsys.readouterr().out == f"{expected}\n"


def answer_of(workdir: Path, question: str, picture: Image.Image) -> str:
    """By evaluation's own loop instead of the engine's."""
    opened = open_checkpoint(workdir)
    config, processor = opened.files.config, Processor.of(opened)
    kinds = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "auto"}
    graphdef, shapes = llava.abstract(config, **kinds)
    where = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = load_params(opened.source, config, where, dict.fromkeys(shapes, np.float32))
    turn = talk.Turn("user", (talk.Image(), talk.Text(question)))
    prompt = processor.chat(talk.Conversation((turn,)), [picture])
    [answer] = greedy(
        params, graphdef, [(prompt.ids, np.stack(prompt.images))], eos_ids=processor.stops,
        pad_id=processor.tokenizer.pad_id, max_new_tokens=32, batch_size=1,
    )  # fmt: skip
    return processor.tokenizer.decode([int(i) for i in answer.ids]).strip()
