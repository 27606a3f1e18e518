"""vflax/data/source.py: random access to a dataset, and clear words when it is not one."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.convert import convert
from data_pipeline.tfds_writer import write_dataset
from vflax.data.source import LeftOut, Source, open_source, splits
from vflax.errors import UserError


def test_samples_come_in_any_order_with_their_bytes(dataset, mixed_examples):
    source = open_source(dataset, "train")
    assert len(source) == 40
    for i in np.random.default_rng(0).permutation(40).tolist():
        sample, want = source[i], mixed_examples[i]
        assert (sample.id, sample.task) == (want["id"], want["task"])
        assert sample.conversations == want["conversations"]
        assert sample.images == want["images"]
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            source[outside]


def test_texts_and_tasks_are_read_without_images(dataset, mixed_examples, monkeypatch):
    source = open_source(dataset, "train")
    monkeypatch.setattr(type(source), "__getitem__", None)
    texts = list(source.texts())
    assert [(t.id, t.task, t.num_images) for t in texts] == [
        (e["id"], e["task"], len(e["images"])) for e in mixed_examples
    ]
    assert [t.conversations for t in texts] == [e["conversations"] for e in mixed_examples]
    assert source.tasks == [e["task"] for e in mixed_examples]


def test_tasks_are_read_once_and_kept_beside_the_data_or_elsewhere(
    tmp_path, dataset, mixed_examples, monkeypatch
):
    wanted = [e["task"] for e in mixed_examples]
    for place, options in (("preflight", ()), ("kept", (tmp_path / "kept",))):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(dataset, tmp_path / "d", ignore=shutil.ignore_patterns("preflight"))
        if place == "kept":
            (tmp_path / "d" / "preflight").write_text("in the way, as on a read-only disk")
        root = tmp_path / "d" if place == "preflight" else tmp_path
        open_source(tmp_path / "d", "train").load_tasks(*options)
        (file,) = (root / place).glob("tasks-*.npz")
        with monkeypatch.context() as patch:
            patch.setattr(Source, "texts", None)
            again = open_source(tmp_path / "d", "train")
            again.load_tasks(*options)
            assert again.tasks == wanted
        file.write_bytes(file.read_bytes()[:100])  # damaged: read anew
        again = open_source(tmp_path / "d", "train")
        again.load_tasks(*options)
        assert again.tasks == wanted


def test_a_pickled_source_and_many_threads_read_the_same(dataset):
    source = open_source(dataset, "train")
    wanted = [source[i] for i in range(40)]
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.__getitem__, range(40))) == wanted


def test_the_fingerprint_follows_the_samples_not_the_directory(tmp_path, dataset, mixed_examples):
    first = open_source(dataset, "train").fingerprint
    write_dataset(tmp_path / "copy", {"train": mixed_examples})
    assert open_source(tmp_path / "copy", "train").fingerprint == first
    write_dataset(tmp_path / "less", {"train": mixed_examples[:-1]})
    assert open_source(tmp_path / "less", "train").fingerprint != first
    assert open_source(dataset, "test").fingerprint != first


def test_a_tfds_directory_of_another_writer_is_read_too(tmp_path, dataset, mixed_examples):
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d/contents.json").unlink()
    shutil.rmtree(tmp_path / "d/index")
    source = open_source(tmp_path / "d", "train")
    assert source.tasks == [e["task"] for e in mixed_examples]
    assert source.fingerprint == open_source(tmp_path / "d", "train").fingerprint
    assert source.fingerprint != open_source(tmp_path / "d", "test").fingerprint


def test_an_index_that_does_not_belong_to_the_shards_is_refused(tmp_path, dataset):
    shutil.copytree(dataset, tmp_path / "d")
    index = tmp_path / "d/index/train.jsonl"
    index.write_text(index.read_text().replace("one", "two"))
    with pytest.raises(UserError, match=r"train\.jsonl is missing or is not the one of these shards"):
        list(open_source(tmp_path / "d", "train").texts())


def test_splits_are_listed_and_nothing_is_an_empty_list(tmp_path, dataset):
    assert splits(dataset) == ["test", "train"]
    assert splits(tmp_path) == []


def broken(path, kind: str) -> None:
    if kind == "no metadata":
        (path / "dataset_info.json").unlink()
    elif kind == "bad metadata":
        (path / "dataset_info.json").write_text("{")
    elif kind == "no shard":
        next(path.glob("*train*00001*")).unlink()
    elif kind == "other features":
        features = json.loads((path / "features.json").read_text())
        del features["featuresDict"]["features"]["conversations"]
        (path / "features.json").write_text(json.dumps(features))


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("nothing", "train", "there is no such directory"),
        ("no metadata", "train", "it has no dataset_info.json"),
        ("bad metadata", "train", "TFDS cannot read"),
        ("no shard", "train", "1 shards of split train are missing, first vflax-train"),
        ("other features", "train", "features conversations are missing"),
        ("whole", "trian", "no split 'trian'; it has: test, train"),
    ],
)
def test_what_cannot_be_opened_is_named_with_what_was_expected(tmp_path, dataset, kind, split, message):
    if kind != "nothing":
        shutil.copytree(dataset, tmp_path / "d")
        broken(tmp_path / "d", kind)
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path / "d", split)
    assert str(tmp_path / "d") in str(error.value)


def converted(tmp_path: Path) -> Path:
    """A dataset of two samples, which a conversion made from five entries."""
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "one"}]
    entries: list[dict] = [
        {"id": f"s{i}", "task_name": f"task{i % 2}", "conversations": turns} for i in range(4)
    ]
    entries[2]["image"] = entries[3]["image"] = "gone.jpg"
    file = tmp_path / "annotation.json"
    file.write_text(json.dumps([*entries, {"id": "", "conversations": turns}]))
    convert("vision_flan", file, tmp_path, tmp_path / "d")
    return tmp_path / "d"


def test_who_was_left_out_of_the_release_is_known(tmp_path, dataset):
    source = open_source(converted(tmp_path), "train")
    assert len(source) == 2
    assert source.left_out() == [
        LeftOut("s2", "task0", "image_missing"),
        LeftOut("s3", "task1", "image_missing"),
        LeftOut("record 4", "", "broken_record"),
    ]
    assert open_source(dataset, "train").left_out() == []


@pytest.mark.parametrize("file", ["quarantine/train.jsonl", "manifest.json"])
def test_a_list_of_those_left_out_that_cannot_be_read_is_refused(tmp_path, file):
    path = converted(tmp_path)
    text = (path / file).read_text()
    (path / file).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=rf"{file}: who was left out of split train cannot be read"):
        open_source(path, "train").left_out()
