"""vflax.generate.ask: what a model is asked is what it was trained to read; what is wrong is said before it answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.weights import hub, run
from vflax import images
from vflax.constants import IMAGE_TOKEN_ID
from vflax.conversation import stop_ids
from vflax.data.questions import ask as as_question
from vflax.data.rows import RowFormat
from vflax.data.source import Sample
from vflax.errors import UserError
from vflax.generate import ask
from vflax.generate.greedy import greedy
from vflax.models import llava
from vflax.weights.export import with_template
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.weights.source import FileSource
from vflax.workdir import ModelFiles

QUESTION = "What is in picture 7?"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, as training leaves it."""
    folder = tmp_path_factory.mktemp("ask")
    hub.write_llava(folder / "start", hub.CONFIG, hub.tensors_of(hub.CONFIG))
    run.write(
        folder / "run", FileSource(folder / "start"), hub.CONFIG, ["bridge/layers_0/kernel"], "vicuna_v1"
    )
    return folder / "run"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face LLaVA that brings no chat template."""
    folder = tmp_path_factory.mktemp("hub")
    hub.write_tokenizer(folder)
    hub.write_llava(folder, hub.CONFIG, hub.tensors_of(hub.CONFIG))
    return folder


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 25)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def answerer(workdir: Path) -> ask.Answerer:
    return ask.Answerer(open_checkpoint(workdir), "float32")


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must end with status 1."""
    assert ask.main(argv) == 1
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]  # transformers may warn of such small weights before
    assert line.startswith("error: ") and said.out == ""
    return line


def test_a_question_is_read_as_the_sample_would_be_in_training(
    answerer: ask.Answerer, workdir: Path, tmp_path: Path
) -> None:
    files = ModelFiles.load(workdir)
    data = picture(tmp_path / "a.png").read_bytes()
    format = RowFormat(
        files.tokenizer, files.template, files.position, files.rules, files.config.vision.num_tokens, 400, 1
    )
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "A dog."}]
    trained = as_question(Sample("1", "t", turns, [data]), format)
    ids, pictures = answerer.prompt(ask.Asked(QUESTION, images.decode(data)))
    np.testing.assert_array_equal(ids, trained.ids)
    np.testing.assert_array_equal(pictures, trained.images)


def test_what_is_typed_is_never_a_picture(answerer: ask.Answerer) -> None:
    ids, pictures = answerer.prompt(ask.Asked("<image> What is this?"))
    assert not (ids == IMAGE_TOKEN_ID).any() and len(pictures) == 0


def test_the_answers_are_those_of_the_runs_weights_in_the_order_of_the_questions(
    answerer: ask.Answerer, workdir: Path, tmp_path: Path
) -> None:
    files = ModelFiles.load(workdir)
    kw = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "auto"}
    graphdef, shapes = llava.abstract(files.config, **kw)
    where = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = load_params(
        open_checkpoint(workdir).source, files.config, where, dict.fromkeys(shapes, np.float32)
    )
    asked = [
        ask.Asked(QUESTION, images.decode(picture(tmp_path / "b.png", 1).read_bytes())),
        ask.Asked(QUESTION),
    ]
    expected = greedy(
        params, graphdef, [answerer.prompt(one) for one in asked],
        eos_ids=stop_ids(files.template, files.tokenizer), pad_id=files.tokenizer.pad_id, max_new_tokens=8,
        batch_size=2,
    )  # fmt: skip
    texts = [files.tokenizer.decode([int(i) for i in found.ids]).strip() for found in expected]
    assert answerer(asked, max_new_tokens=8, rows=2) == texts
    assert len(set(texts)) > 1


def test_the_command_prints_each_pair_and_writes_it_where_json_says(
    workdir: Path, answerer: ask.Answerer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(2)]
    pairs = [flag for path in paths for flag in (f"--image={path}", f"--question={QUESTION}")]
    assert (
        ask.main([f"--model={workdir}", *pairs, "--max-new-tokens=6", f"--json={tmp_path / 'a.json'}"]) == 0
    )
    found = json.loads((tmp_path / "a.json").read_text())
    expected = answerer(
        [ask.Asked(QUESTION, images.decode(path.read_bytes())) for path in paths], max_new_tokens=6
    )
    assert [one["answer"] for one in found] == expected and [one["image"] for one in found] == list(
        map(str, paths)
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [f"{path}: {QUESTION}" for path in paths]
    assert lines[1::2] == [f"  {answer}" for answer in expected]


def test_weights_in_bfloat16_are_held_in_bfloat16(workdir: Path) -> None:
    found = ask.Answerer(open_checkpoint(workdir), "bfloat16")
    assert {leaf.dtype.name for leaf in found._params.values()} == {"bfloat16"}
    assert len(found([ask.Asked(QUESTION)], max_new_tokens=3)) == 1


def test_weights_without_a_known_template_want_one_named(
    hugging_face: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--model={hugging_face}", f"--question={QUESTION}", "--max-new-tokens=3"]
    assert "--template=vicuna_v1" in refused(argv, capsys)
    named = with_template(open_checkpoint(hugging_face), "vicuna_v1")
    assert ask.Answerer(named, "float32").processor.template == "vicuna_v1"


def test_a_file_that_is_no_picture_is_named_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    argv = ["--model=nowhere", f"--image={tmp_path / 'a.jpg'}", "--question=q"]
    assert f"{tmp_path / 'a.jpg'}: not an image" in refused(argv, capsys)


def test_a_picture_that_is_cut_off_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, "JPEG")
    (tmp_path / "a.jpg").write_bytes(whole.getvalue()[:-200])
    with pytest.raises(images.ImageError):
        images.decode((tmp_path / "a.jpg").read_bytes())
    argv = ["--model=nowhere", f"--image={tmp_path / 'a.jpg'}", "--question=q"]
    assert str(tmp_path / "a.jpg") in refused(argv, capsys)


def test_a_picture_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model=nowhere", f"--image={tmp_path / 'none.png'}", "--question=q"]
    assert "none.png: cannot be read (No such file" in refused(argv, capsys)


def test_pictures_and_questions_must_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = picture(tmp_path / "a.png")
    argv = ["--model=nowhere", f"--image={path}", "--question=q", "--question=r"]
    assert "1 --image and 2 --question" in refused(argv, capsys)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused([f"--model={tmp_path / 'nowhere'}", "--question=q"], capsys)


def test_a_question_that_is_too_long_for_the_decoder_is_refused(answerer: ask.Answerer) -> None:
    with pytest.raises(UserError, match="more than the 509 positions"):
        answerer([ask.Asked("dogs " * 400)], max_new_tokens=8)
    with pytest.raises(UserError, match="an answer may have 500"):
        answerer([ask.Asked(QUESTION)], max_new_tokens=500)


def test_a_file_that_cannot_be_written_is_named(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        f"--model={workdir}",
        "--question=q",
        "--max-new-tokens=2",
        f"--json={tmp_path / 'no' / 'a.json'}",
    ]
    assert ask.main(argv) == 1
    assert "a.json: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-new-tokens=0", "--rows=-1"])
def test_counts_below_one_are_refused(flag: str) -> None:
    with pytest.raises(SystemExit):
        ask.main(["--model=m", "--question=q", flag])
