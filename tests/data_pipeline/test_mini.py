"""The mini dataset on disk: converted, deterministic, cached, safe when two processes want it at once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline import mini
from data_pipeline.mini import build, vocabulary
from data_pipeline.mini.plan import STAGES, make_plan
from vflax.errors import UserError

SCALE = 0.02


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> mini.MiniData:
    return mini.ensure(tmp_path_factory.mktemp("cache"), SCALE)


def _images(folder: Path, split: str) -> dict[str, str]:
    """File name -> sha256 of the pictures that a split's annotations name."""
    annotations = json.loads((folder / f"annotation_{split}.json").read_text())
    names = [sample["image"] for sample in annotations]
    return {name: hashlib.sha256((folder / "images" / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_a_tfds_directory_with_train_and_test(data: mini.MiniData, stage: str) -> None:
    builder = tfds.builder_from_directory(str(getattr(data, stage)))
    for split in ("train", "test"):
        annotations = json.loads((data.release(stage) / f"annotation_{split}.json").read_text())
        source = builder.as_data_source(split)
        assert len(source) == len(annotations) > 0
        for i in (0, len(source) - 1):
            assert source[i]["id"].decode() == annotations[i]["id"]
            assert json.loads(source[i]["conversations"]) == annotations[i]["conversations"]
            with Image.open(io.BytesIO(source[i]["images"][0])) as picture:
                assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_no_held_out_picture_is_a_training_picture_of_any_stage(data: mini.MiniData) -> None:
    hashes: dict[str, set[str]] = {"train": set(), "test": set()}
    for stage in STAGES:
        for split, found in hashes.items():
            found |= set(_images(data.release(stage), split).values())
    assert len(hashes["train"]) > 300 and len(hashes["test"]) > 30
    assert not hashes["train"] & hashes["test"]


def test_building_again_gives_the_same_bytes(data: mini.MiniData, tmp_path: Path) -> None:
    again = mini.MiniData.at(tmp_path)
    build.build(tmp_path, SCALE)
    assert (again.tokenizer / "tokenizer.model").read_bytes() == (
        data.tokenizer / "tokenizer.model"
    ).read_bytes()
    for stage in STAGES:
        for split in ("train", "test"):
            name = f"annotation_{split}.json"
            assert (again.release(stage) / name).read_bytes() == (data.release(stage) / name).read_bytes()
            assert _images(again.release(stage), split) == _images(data.release(stage), split)
        contents = [json.loads((getattr(d, stage) / "contents.json").read_text()) for d in (again, data)]
        assert contents[0] == contents[1]


def test_what_is_in_the_cache_is_not_made_again(data: mini.MiniData, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("built a second time")

    monkeypatch.setattr(build, "build", fail)
    assert mini.ensure(data.root.parent, SCALE) == data


def test_the_cache_folder_comes_from_the_environment(
    data: mini.MiniData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFLAX_CACHE", str(data.root.parent))
    assert mini.ensure(scale=SCALE) == data


def test_two_processes_at_once_make_one_whole_dataset(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from data_pipeline import mini;"
        f"print(mini.ensure(Path({str(tmp_path)!r}), 0.004).root)"
    )
    repository = Path(mini.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    roots = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(roots) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [Path(roots.pop()).name]


def test_a_build_that_fails_leaves_nothing_under_the_datasets_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bytes:
        raise RuntimeError("no tokenizer today")

    monkeypatch.setattr(build, "train_tokenizer", fail)
    with pytest.raises(RuntimeError, match="no tokenizer today"):
        mini.ensure(tmp_path, 0.004)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_worker_that_fails_stops_the_build_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_digits", lambda: _WithoutImages())
    with pytest.raises(RuntimeError, match="IndexError"):
        mini.ensure(tmp_path, 0.004)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


class _WithoutImages:
    def __init__(self) -> None:
        self.target = load_digits().target
        self.images = np.zeros((1, 8, 8))


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"file.*VFLAX_CACHE"):
        mini.ensure(file / "cache", SCALE)


def test_the_tokenizer_encodes_any_text_and_gives_it_back(data: mini.MiniData) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    for text in ("What color is this?", "Grüße aus 東京\n\t  двa  spaces 🙂", " leading", "4711"):
        ids = model.encode(text)
        assert model.unk_id() not in ids
        assert model.decode(ids) == text


def test_the_full_tokenizer_spends_few_pieces_on_prompts_and_answers() -> None:
    items = make_plan(load_digits().target)
    model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.train_tokenizer(items))
    assert model.vocab_size() == vocabulary.VOCAB_SIZE
    answers = {item.answer for item in items if item.stage == "stage1"}
    assert np.mean([len(model.encode(answer)) / len(answer.split()) for answer in answers]) < 1.4
    questions = {item.human.replace("<image>", "").strip() for item in items if item.stage == "stage1"}
    assert np.mean([len(model.encode(q)) / len(q.split()) for q in questions]) < 1.6


def test_the_tokenizer_learns_from_training_texts_alone() -> None:
    items = make_plan(load_digits().target, SCALE)
    train = [item for item in items if item.split == "train"]
    assert vocabulary.train_tokenizer(items) == vocabulary.train_tokenizer(train)
