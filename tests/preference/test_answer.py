"""python -m vflax.preference answer, and which commands need no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generate.small_engine import compiled_once
from tests.preference.question_files import named, write_set
from tests.serve.process import write_model
from vflax.preference.__main__ import main
from vflax.preference.questions import read_answers, read_questions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    folder.mkdir()
    write_model(folder)
    return folder


def answer(model: Path, folder: Path, *more: str) -> int:
    with compiled_once():
        return main(
            ["answer", f"--model={model}", f"--questions={folder / 'questions.jsonl'}",
             f"--images={folder / 'images'}", f"--out={folder / 'out'}", "--template=vicuna_v1", "--max-tokens=4",
             "--cache-tokens=4096", "--pictures=8", *more]
        )  # fmt: skip


@pytest.mark.slow
def test_a_models_answers_are_read_by_the_other_commands(model: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 3)
    assert answer(model, folder) == 0
    questions = read_questions(folder / "questions.jsonl")
    found = read_answers(folder / "out" / "predictions.jsonl", questions)
    assert len(found) == 3
    assert {said.finish for said in found} <= {"stop", "length"}
    first = (folder / "out" / "predictions.jsonl").read_bytes()
    assert answer(model, folder) == 0
    assert (folder / "out" / "predictions.jsonl").read_bytes() == first


def test_a_picture_that_is_missing_is_told_before_the_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "set", 3)
    (folder / "images" / "1.png").unlink()
    assert answer(tmp_path / "no model", folder) == 1
    assert "1.png: not there; question 1 is about it" in capsys.readouterr().err


def test_measuring_style_needs_no_jax(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 3)
    program = (
        "import sys; from vflax.preference.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(status or ('jax' in sys.modules))"
    )
    arguments = ["style", *named(folder), f"--out={tmp_path / 'out'}"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
    assert json.loads((tmp_path / "out" / "style.json").read_text())["groups"]["all"] == 3
