"""docs/generate.md is true: its Python, as it stands there, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.weights import hub, run
from vflax.generate import ask
from vflax.weights.open import open_checkpoint
from vflax.weights.source import FileSource

PAGE = Path(__file__).parents[2] / "docs" / "generate.md"


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
    asked = ask.Asked("How many circles are there?", picture)
    [answer] = ask.Answerer(open_checkpoint(Path("runs/tiny")), "float32")([asked], max_new_tokens=32)
    assert answer and capsys.readouterr().out == f"{answer}\n"
