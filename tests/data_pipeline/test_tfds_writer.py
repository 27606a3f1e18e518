"""data_pipeline/tfds_writer.py: what is written is a TFDS dataset, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipeline import tfds_writer
from data_pipeline.tfds_writer import write_dataset
from vflax.errors import UserError


def examples(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "id": f"sämple-{i}",
            "task": f"task{i % 3}",
            "conversations": [{"from": "human", "value": f"Frage {i}?"}, {"from": "gpt", "value": str(i)}],
            "images": [bytes([i % 256, k]) * (40 + i) for k in range(i % 3)],
            "sizes": [(i + 1, k + 1) for k in range(i % 3)],
            "source": "test",
        }
        for i in range(start, start + count)
    ]


def read(path: Path, split: str = "train") -> list[dict]:
    return list(tfds.builder_from_directory(path).as_data_source(split))


def digests(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_samples_come_back_through_plain_tfds_in_order_and_byte_for_byte(tmp_path):
    wanted = examples(50)
    write_dataset(tmp_path / "d", {"train": wanted}, shard_bytes=1500)
    assert len(list((tmp_path / "d").glob("*.array_record*"))) > 3
    got = read(tmp_path / "d")
    assert len(got) == 50
    for want, have in zip(wanted, got, strict=True):
        assert have["id"].decode() == want["id"]
        assert have["task"].decode() == want["task"]
        assert have["source"].decode() == "test"
        assert json.loads(have["conversations"]) == want["conversations"]
        assert list(have["images"]) == want["images"]
        np.testing.assert_array_equal(have["sizes"], np.reshape(want["sizes"], (-1, 2)))


def test_the_index_holds_every_sample_without_its_images(tmp_path):
    write_dataset(tmp_path / "d", {"train": examples(20)}, shard_bytes=1500)
    lines = [json.loads(line) for line in (tmp_path / "d/index/train.jsonl").read_text("utf-8").splitlines()]
    assert lines == [
        {
            "id": e["id"],
            "task": e["task"],
            "conversations": e["conversations"],
            "images": len(e["images"]),
            "hashes": None,
        }
        for e in examples(20)
    ]


def test_writing_again_gives_the_same_files(tmp_path):
    write_dataset(tmp_path / "d", {"train": examples(20)})
    before = digests(tmp_path / "d")
    write_dataset(tmp_path / "d", {"train": examples(20)})
    assert digests(tmp_path / "d") == before
    write_dataset(tmp_path / "e", {"train": examples(20)})
    assert digests(tmp_path / "e") == before


def test_a_second_split_joins_and_the_first_stays(tmp_path):
    write_dataset(tmp_path / "d", {"train": examples(20)})
    before = digests(tmp_path / "d")
    write_dataset(tmp_path / "d", {"test": examples(5, start=100)})
    after = digests(tmp_path / "d")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"contents.json", "dataset_info.json"}
    assert len(read(tmp_path / "d", "train")) == 20
    assert [e["id"].decode() for e in read(tmp_path / "d", "test")] == [
        f"sämple-{i}" for i in range(100, 105)
    ]


def test_a_replaced_split_leaves_none_of_its_old_shards(tmp_path):
    write_dataset(tmp_path / "d", {"train": examples(40), "test": examples(4)}, shard_bytes=1000)
    write_dataset(tmp_path / "d", {"train": examples(3)})
    assert len(read(tmp_path / "d", "train")) == 3
    assert len(read(tmp_path / "d", "test")) == 4
    assert sorted(p.name for p in (tmp_path / "d").glob("*train.array*")) == [
        "vflax-train.array_record-00000-of-00001"
    ]


def test_the_content_digest_does_not_depend_on_the_shards_but_on_every_byte(tmp_path):
    def digest(name: str, samples: list[dict], shard_bytes: int) -> str:
        write_dataset(tmp_path / name, {"train": samples}, shard_bytes=shard_bytes)
        return json.loads((tmp_path / name / "contents.json").read_text())["splits"]["train"]["sha256"]

    whole = digest("a", examples(20), 1 << 20)
    assert digest("b", examples(20), 500) == whole
    changed = examples(20)
    changed[7]["images"] = [changed[7]["images"][0][:-1] + b"!"]
    assert digest("c", changed, 1 << 20) != whole
    assert digest("d", examples(20)[::-1], 1 << 20) != whole


def test_a_failure_leaves_the_old_dataset_and_nothing_else(tmp_path):
    write_dataset(tmp_path / "d", {"train": examples(20)})
    before = digests(tmp_path)

    def broken():
        yield from examples(5)
        raise RuntimeError("the generator broke")

    with pytest.raises(RuntimeError, match="the generator broke"):
        write_dataset(tmp_path / "d", {"train": broken()}, shard_bytes=100)
    with pytest.raises(RuntimeError, match="the generator broke"):
        write_dataset(tmp_path / "new", {"train": broken()}, shard_bytes=100)
    assert digests(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_run(tmp_path, monkeypatch):
    write_dataset(tmp_path / "d", {"train": examples(20)})
    renames = 0
    rename = os.rename

    def killed(source, target):
        nonlocal renames
        renames += 1
        if renames == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(tfds_writer.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "d", {"test": examples(5)})
    assert not (tmp_path / "d").exists()
    write_dataset(tmp_path / "d", {"test": examples(5)})
    assert len(read(tmp_path / "d", "train")) == 20
    assert len(read(tmp_path / "d", "test")) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_what_a_killed_process_left_is_removed_by_the_next_run(tmp_path):
    program = f"""
import os, signal
from data_pipeline.tfds_writer import write_dataset
def samples():
    yield {examples(1)[0]!r}
    os.kill(os.getpid(), signal.SIGKILL)
write_dataset({str(tmp_path / "d")!r}, {{"train": samples()}})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    [left] = list(tmp_path.iterdir())
    assert left.name.startswith(".d.tmp-")
    write_dataset(tmp_path / "d", {"train": examples(5)})
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_of_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files, but no contents\.json"):
        write_dataset(tmp_path / "d", {"train": examples(2)})
    assert (tmp_path / "d/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("split", "count"), [("Train", 2), ("train-1", 2), ("../train", 2), ("train", 0)])
def test_a_bad_split_name_or_an_empty_split_is_refused(tmp_path, split, count):
    with pytest.raises(UserError, match="split"):
        write_dataset(tmp_path / "d", {split: examples(count)})
    assert list(tmp_path.iterdir()) == []


def test_an_example_with_a_wrong_key_is_refused_by_name(tmp_path):
    wrong = examples(1)
    wrong[0]["sise"] = wrong[0].pop("sizes")
    with pytest.raises(ValueError, match=r"sise.*sizes"):
        write_dataset(tmp_path / "d", {"train": wrong})
