"""Photographs for the study of forgetting: each picture in one place, CF's from the test sets, labels kept."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data_pipeline import photographs
from vflax.data.source import open_source
from vflax.errors import UserError
from vflax.evaluate import cf_data
from vflax.evaluate.labels import CIFAR10


def write_cifar(folder: Path, per_class: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for label in CIFAR10:
                for number in range(per_class):
                    file = io.BytesIO()
                    PIL.Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(file, "JPEG")
                    archive.writestr(f"{label}/{number:04d}.jpg", file.getvalue())


def write_mnist(folder: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    pixels, labels = rng.integers(0, 255, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
    images = struct.pack(">4I", 0x0803, count, 28, 28) + pixels.tobytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x0801, count) + labels.tobytes())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sets, and as many as they hold asked of them."""
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", (3, 2, 1))
    monkeypatch.setattr(photographs, "DIGITS", (20, 10, 10))
    write_cifar(tmp_path / "in" / "cifar10-jpg", 5)
    write_mnist(tmp_path / "in" / "mnist", 40)
    return tmp_path / "in"


def samples(path: Path) -> list[tuple[str, list[dict[str, str]], bytes]]:
    read = open_source(path, "train")
    found = [read[i] for i in range(len(read))]
    return [(s.task, s.conversations, s.images[0]) for s in found]


def test_every_picture_is_in_one_place_with_its_own_label(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert photographs.main([f"--source={source}", f"--out={out}"]) == 0
    captions, questions = samples(out / "captions"), samples(out / "questions")
    assert Counter(task for task, *_ in captions) == {"PHOTOGRAPHS+caption": 30, "DIGITS+caption": 20}
    assert Counter(task for task, *_ in questions) == {"PHOTOGRAPHS+object": 20, "DIGITS+number": 10}
    asked = cf_data.load(out / "cf", custom=True)
    assert Counter(question.groups["dataset"] for question in asked) == {"cifar10": 10, "mnist": 10}
    pictures = [data for *_, data in captions + questions] + [q.pictures[0].read() for q in asked]
    assert len(set(pictures)) == len(pictures)
    with zipfile.ZipFile(source / "cifar10-jpg" / "train.zip") as archive:
        of = {archive.read(name): name.partition("/")[0] for name in archive.namelist()}
    for task, turns, data in captions + questions:
        if task.startswith("PHOTOGRAPHS"):
            assert turns[1]["value"].split()[-1] == of[data]


def test_the_last_digits_are_those_that_cf_asks_about(source: Path, tmp_path: Path):
    photographs.write(source, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "cf" / "mnist").rglob("*.png"))
    assert names == [f"{number:05d}.png" for number in range(30, 40)]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("cifar10-jpg/train.zip", "no train.zip of CIFAR-10"),
        ("mnist/t10k-labels-idx1-ubyte", "no MNIST (t10k-labels-idx1-ubyte"),
    ],
)
def test_a_set_that_is_not_there_is_named_and_nothing_is_left(
    lost: str, said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (source / lost).unlink()
    assert photographs.main([f"--source={source}", f"--out={tmp_path / 'out'}"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_with_too_few_images_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", (4, 2, 1))
    with pytest.raises(UserError, match="fewer than 6 images of airplane"):
        photographs.write(source, tmp_path / "out")


def test_a_folder_that_is_there_is_not_written_over(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        photographs.write(source, tmp_path / "out")
