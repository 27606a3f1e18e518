"""The catastrophic-forgetting suite's image sets, however they lie on disk."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.cf_sets import (
    CIFAR_ROWS,
    batch,
    png,
    write_archive,
    write_classes,
    write_idx,
    write_mini,
    write_pickles,
    write_zip,
)
from vflax.errors import UserError
from vflax.evaluate import cf_data
from vflax.evaluate.labels import MINIIMAGENET


@pytest.mark.parametrize(
    "write",
    [
        lambda root: write_classes(root),
        lambda root: write_classes(root / "test"),
        lambda root: write_zip(root / "test.zip"),
        lambda root: write_zip(root / "cifar10.zip", prefix="cifar10/test/"),
        lambda root: write_zip(root / "below" / "test.zip"),
    ],
)
def test_folders_and_zips_of_classes_are_read(write: Callable[[Path], Path], tmp_path: Path) -> None:
    write(tmp_path)
    questions = cf_data.load(tmp_path, custom=True)
    assert [(q.key, q.answer) for q in questions] == [
        (f"cifar10/test/{name}/{number:04d}", name) for name, number, *_ in CIFAR_ROWS
    ]
    assert questions[3].pictures[0].read() == png(1)


def test_of_train_and_test_the_test_images_are_asked_about(tmp_path: Path) -> None:
    more = [("truck", 5), ("cat", 7)]
    write_zip(tmp_path / "zips" / "train.zip", more)
    write_zip(tmp_path / "zips" / "test.zip")
    write_classes(tmp_path / "folders" / "train", more)
    write_classes(tmp_path / "folders" / "test")
    with zipfile.ZipFile(write_zip(tmp_path / "both.zip", prefix="test/"), "a") as archive:
        archive.writestr("train/truck/0005.jpg", png())
    for data in (tmp_path / "zips", tmp_path / "folders", tmp_path / "both.zip"):
        assert [q.key.split("/", 2)[2] for q in cf_data.load(data, custom=True)] == [
            f"{name}/{number:04d}" for name, number, *_ in CIFAR_ROWS
        ]
    trained = cf_data.load(tmp_path / "zips" / "train.zip", custom=True)
    assert trained[0].key == "cifar10/train/cat/0007"


def test_classes_may_be_spelled_otherwise(tmp_path: Path) -> None:
    data = write_classes(tmp_path, [("Aquarium Fish", 0), ("pickup-truck", 0)])
    assert [q.answer for q in cf_data.load(data, custom=True)] == ["aquarium_fish", "pickup_truck"]


def test_a_folder_that_is_no_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"yak/0000\.jpg: 'yak' is no label of CIFAR-10"):
        cf_data.load(write_zip(tmp_path / "a.zip", [*CIFAR_ROWS, ("yak", 0)]), custom=True)


@pytest.mark.parametrize("layout", ["classes", "splits", "tables"])
def test_of_miniimagenet_the_last_100_images_of_each_class_are_asked_about(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cf_data, "_MINI_OF_CLASS", 6)
    monkeypatch.setattr(cf_data, "_MINI_ASKED", 2)
    questions = cf_data.load(write_mini(tmp_path, 6, layout), custom=True)
    assert len(questions) == 200
    assert questions[0].key == "miniimagenet/test/n01532829/n0153282900000004"
    assert [q.answer for q in questions[::2]] == list(MINIIMAGENET)
    assert "in house finch,robin,triceratops," in questions[0].text


def test_miniimagenet_as_released_is_taken_and_a_split_of_it_is_named(tmp_path: Path) -> None:
    assert len(cf_data.load(write_mini(tmp_path, 100, "splits"))) == 10000
    with pytest.raises(
        UserError, match=r"miniImageNet as it was released.*house finch: 0 images.*and 75 more"
    ):
        cf_data.load(tmp_path / "test")


def test_a_table_that_names_an_image_which_is_not_there_is_refused(tmp_path: Path) -> None:
    write_mini(tmp_path, 1, "tables")
    (tmp_path / "images" / "n0153282900000000.jpg").unlink()
    with pytest.raises(UserError, match=r"train\.csv: n0153282900000000\.jpg,n01532829: no such image"):
        cf_data.load(tmp_path, custom=True)


def test_several_sets_lie_in_one_folder_in_the_papers_order(tmp_path: Path) -> None:
    write_idx(tmp_path / "a" / "MNIST" / "raw", [7])
    write_classes(tmp_path / "z")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "0.jpg").write_bytes(b"")
    questions = cf_data.load(tmp_path, custom=True)
    assert [q.groups["dataset"] for q in questions] == ["cifar10"] * 6 + ["mnist"]


def test_an_archive_beside_what_was_unpacked_of_it_is_no_second_set(tmp_path: Path) -> None:
    write_archive(tmp_path, pickle.dumps(batch([1])))
    write_pickles(tmp_path, pickle.dumps(batch([1])))
    assert len(cf_data.load(tmp_path, custom=True)) == 1
    write_classes(tmp_path / "jpg")
    with pytest.raises(UserError, match="CIFAR-10 is there twice"):
        cf_data.load(tmp_path, custom=True)


@pytest.mark.parametrize(
    "write", [write_classes, lambda path, rows: write_zip(path.with_suffix(".zip"), rows)]
)
def test_classes_of_ones_own_are_a_set_named_after_their_folder(
    write: Callable[[Path, list[tuple[Any, ...]]], Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "Game_Park", [("yak", 0), ("elk", 0)])
    questions = cf_data.load(data, custom=True)
    assert [q.key for q in questions] == ["game park/test/elk/0000", "game park/test/yak/0000"]
    assert questions[0].text.endswith("a single object in elk,yak.")
    with pytest.raises(UserError, match="none of CIFAR-10, CIFAR-100, MNIST, miniImageNet"):
        cf_data.load(data)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            lambda root: write_idx(root, [7, 0]),
            r"MNIST as it was released, or a part of it: 0: 1 images.*were 980",
        ),
        (lambda root: write_idx(root, [7], "train"), "MNIST as it was released"),
        (lambda root: write_classes(root), r"airplane: 2 images, released were 1,000; automobile: 0 images"),
        (lambda root: write_pickles(root, pickle.dumps(batch([1]))), "the test set of CIFAR-10"),
        (lambda root: root, "none of CIFAR-10, CIFAR-100, MNIST, miniImageNet"),
    ],
)
def test_what_was_not_released_so_is_named(write: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        cf_data.load(write(tmp_path))


def test_an_image_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_zip(tmp_path / "a.zip"), "a") as archive:
        archive.writestr("again/cat/0001.jpg", png())
    with pytest.raises(UserError, match=r"a\.zip: cat/0001\.jpg is there twice"):
        cf_data.load(tmp_path, custom=True)


def test_nothing_of_a_zip_is_written_wherever_its_names_point(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in" / "a.zip", prefix=f"../../../{tmp_path}/out/")
    questions = cf_data.load(path, custom=True)
    assert questions[3].key == "cifar10/test/cat/0001"
    assert questions[3].pictures[0].read() == png(1)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "in", path]


def test_a_zip_with_backslashes_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat", "dog"):
            archive.writestr(f"cifar10\\test\\{name}\\0001.jpg", png(1))
    questions = cf_data.load(tmp_path / "a.zip", custom=True)
    assert [q.key for q in questions] == ["cifar10/test/cat/0001", "cifar10/test/dog/0001"]
    assert questions[1].pictures[0].read() == png(1)


@pytest.mark.parametrize("what", ["content", "encrypted"])
def test_an_image_of_a_zip_that_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip")
    raw = path.read_bytes()
    if what == "content":
        raw = raw.replace(png(1), png(1)[:-5] + bytes(5))
    else:
        raw = b"PK\x01\x02".join(part[:4] + b"\x01" + part[5:] for part in raw.split(b"PK\x01\x02"))
    path.write_bytes(raw)
    question = cf_data.load(path, custom=True)[3]
    with pytest.raises(UserError, match=r"a\.zip, cat/0001\.jpg: not readable \(.*fetch it again"):
        question.pictures[0].read()


@settings(deadline=None)
@given(st.data())
def test_no_damage_to_a_zip_breaks_its_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write_zip(tmp_path_factory.mktemp("zip") / "a.zip", CIFAR_ROWS[:2])
    raw = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        for question in cf_data.load(path, custom=True):
            question.pictures[0].read()
    except UserError:
        pass


def test_classes_of_ones_own_that_are_called_like_a_set_are_refused(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "MNIST", [("yak", 0), ("elk", 0)])
    with pytest.raises(UserError, match="its classes are not those of MNIST; call it otherwise"):
        cf_data.load(data, custom=True)


@pytest.mark.real_data
def test_real_sets_are_whole_wherever_they_lie(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "digits").symlink_to(shared_data / "mnist")
    (tmp_path / "cifar10").symlink_to(shared_data / "cifar10-jpg")
    questions = cf_data.load(tmp_path)
    assert [q.key for q in questions] == [q.key for q in cf_data.load(shared_data)]
    assert Counter(q.groups["dataset"] for q in questions) == {"cifar10": 10000, "mnist": 10000}
    assert len(cf_data.load(shared_data / "cifar10-jpg" / "test.zip")) == 10000
    with pytest.raises(
        UserError, match=r"train\.zip: not the test set of CIFAR-10 .* airplane: 5,000 images"
    ):
        cf_data.load(shared_data / "cifar10-jpg" / "train.zip")
