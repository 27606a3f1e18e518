"""MNIST's IDX files and CIFAR's pickles: read right, never run, and refused where they are not what was released."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.evaluate.cf_sets import batch, of_python2, write_archive, write_idx, write_pickles
from vflax.errors import UserError
from vflax.evaluate import cf_data
from vflax.evaluate.labels import CIFAR100


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["t10k", "train"])
def test_mnist_is_read(prefix: str, zipped: bool, tmp_path: Path) -> None:
    questions = cf_data.load(write_idx(tmp_path, [7, 0], prefix, zipped), custom=True)
    split = "test" if prefix == "t10k" else "train"
    assert [(q.key, q.answer) for q in questions] == [
        (f"mnist/{split}/00000", "7"),
        (f"mnist/{split}/00001", "0"),
    ]
    assert questions[0].text == (
        "What is the number in the image? Please only answer a single number in 0,1,2,3,4,5,6,7,8,9."
    )
    image = np.asarray(Image.open(io.BytesIO(questions[1].pictures[0].read())))
    assert image.tolist() == [[4, 5], [6, 7]]


def test_mnists_test_images_are_taken_before_its_training_images(tmp_path: Path) -> None:
    write_idx(tmp_path, [7, 0], "train")
    assert len(cf_data.load(write_idx(tmp_path, [1]), custom=True)) == 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "python 2"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifars_pickles_are_read(protocol: Any, packed: bool, tmp_path: Path) -> None:
    found = batch([3, 8])
    raw = of_python2(found) if protocol == "python 2" else pickle.dumps(found, protocol=protocol)
    data = write_archive(tmp_path, raw) if packed else write_pickles(tmp_path, raw)
    questions = cf_data.load(data, custom=True)
    assert [(q.key, q.answer) for q in questions] == [
        ("cifar10/test/00000", "cat"),
        ("cifar10/test/00001", "ship"),
    ]
    assert questions[0].text == (
        "What is the object in the image? Please only answer a single object in "
        "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck."
    )
    image = np.asarray(Image.open(io.BytesIO(questions[1].pictures[0].read())))
    assert image.shape == (32, 32, 3)
    assert image[5, 6].tolist() == [200, 1, 1]


def test_cifar100_has_its_fine_labels_under_keys_of_bytes_too(tmp_path: Path) -> None:
    found = {key.encode(): value for key, value in batch([1, 99], "fine_labels").items()} | {
        b"coarse_labels": [0, 1]
    }
    questions = cf_data.load(write_pickles(tmp_path, pickle.dumps(found), "cifar100"), custom=True)
    assert [q.answer for q in questions] == ["aquarium_fish", "worm"]
    assert questions[0].text.endswith("single object in " + ",".join(CIFAR100) + ".")


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: Harm(path),
        lambda path: batch([1]) | {"more": Harm(path)},
        lambda path: batch([1]) | {"data": np.array([Harm(path)], dtype=object)},
    ],
)
def test_nothing_in_a_pickle_is_run(harm: Callable[[Path], Any], tmp_path: Path) -> None:
    made = tmp_path / "made"
    data = write_pickles(tmp_path / "data", pickle.dumps(harm(made)))
    with pytest.raises(UserError, match=r"not readable as CIFAR \(UnpicklingError: it names posix.mkdir"):
        cf_data.load(data, custom=True)
    assert not made.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.scalar", "_codecs.decode"]
)
def test_names_that_no_image_set_needs_are_refused(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    data = write_pickles(tmp_path, f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match="which no image set needs"):
        cf_data.load(data, custom=True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        pickle.dumps([1]),
        pickle.dumps({"labels": [1]}),
        pickle.dumps(batch(["1"])),
        pickle.dumps(batch([1]) | {"labels": [1, 2]}),
        pickle.dumps(batch([1]) | {"labels": np.array([1], np.uint8)}),
        pickle.dumps(batch([1]) | {"data": np.zeros((1, 3072))}),
        pickle.dumps(batch([1]) | {"data": np.zeros((1, 3071), np.uint8)}),
        pickle.dumps(batch([1]) | {"data": [0] * 3072}),
        pickle.dumps(batch([1]))[:-20],
        b"\x80\x02}r\xff\xff\xff\x7f.",  # would have 32 GB reserved
        b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",  # an exabyte
        b"\x80\x04cnumpy.core.numeric\n_frombuffer\n(J\xff\xff\xff\x7fNNNtR.",  # 2 GB of zeros
        b"\x80\x04" + b"(" * 9999 + b"t" * 9999 + b".",
    ],
)
def test_pickles_of_something_else_are_refused(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test_batch: not readable as CIFAR"):
        cf_data.load(write_pickles(tmp_path, raw), custom=True)


def test_room_for_what_never_comes_is_not_reserved(tmp_path: Path) -> None:
    """Told of the numbers in it, before anything is read: the reader would reserve 32 GB."""
    raw = b"\x80\x02}r\xff\xff\xff\x7f."
    with pytest.raises(UserError, match=r"not readable as CIFAR \(ValueError: object 2147483647 of 2\)"):
        cf_data.load(write_pickles(tmp_path, raw), custom=True)


@settings(deadline=None)
@given(st.binary())
def test_no_bytes_break_the_reader_of_pickles(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    data = write_pickles(tmp_path_factory.mktemp("pickle"), raw)
    with pytest.raises(UserError):
        cf_data.load(data, custom=True)


@settings(deadline=None)
@given(st.binary())
def test_no_bytes_break_the_reader_of_idx(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    data = write_idx(tmp_path_factory.mktemp("idx"), [1, 2])
    (data / "t10k-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(UserError):
        cf_data.load(data, custom=True)


@pytest.mark.parametrize("number", [10, -1])
def test_a_number_that_is_no_label_is_named(number: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{number} is no label of CIFAR-10"):
        cf_data.load(write_pickles(tmp_path, pickle.dumps(batch([number]))), custom=True)


def test_an_archive_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path, pickle.dumps(batch([1])))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"cifar-10-python\.tar\.gz, cifar-10-batches-py/test_batch: not readable"
    ):
        cf_data.load(tmp_path, custom=True)


def test_mnist_of_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "a", [1, 2])
    write_idx(tmp_path / "b", [1])
    (tmp_path / "a" / "t10k-labels-idx1-ubyte.gz").write_bytes(
        (tmp_path / "b" / "t10k-labels-idx1-ubyte.gz").read_bytes()
    )
    with pytest.raises(UserError, match="1 labels, expected 2"):
        cf_data.load(tmp_path / "a", custom=True)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw[:-9], "Compressed file ended"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "cannot reshape"),
        (lambda raw: gzip.compress(b"\0\0\x0d" + gzip.decompress(raw)[3:]), "it begins with 0xd0"),
        (lambda raw: b"<html>not found</html>", "it begins with 0x3c68746d"),
    ],
)
def test_mnist_that_is_cut_off_or_of_another_kind_is_refused(
    change: Callable[[bytes], bytes], said: str, name: str, tmp_path: Path
) -> None:
    path = write_idx(tmp_path, [1, 2]) / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{name}: not readable as IDX \({said}"):
        cf_data.load(tmp_path, custom=True)


def test_mnist_is_read_whatever_its_names_say_of_gzip(tmp_path: Path) -> None:
    for path in write_idx(tmp_path, [7], zipped=False).iterdir():
        path.rename(f"{path}.gz")
    assert len(cf_data.load(tmp_path, custom=True)) == 1


def test_half_of_mnist_is_named(tmp_path: Path) -> None:
    (write_idx(tmp_path, [1]) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz: .* two files; fetch the other"):
        cf_data.load(tmp_path, custom=True)


def test_cifars_folder_without_its_test_images_is_named(tmp_path: Path) -> None:
    (write_pickles(tmp_path, b"") / "test_batch").unlink()
    with pytest.raises(UserError, match=r"test_batch: not readable as CIFAR \(FileNotFoundError"):
        cf_data.load(tmp_path, custom=True)


def test_arrays_with_the_right_labels_and_other_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = pickle.dumps(batch([number // 1000 for number in range(10000)]))
    data = write_pickles(tmp_path, raw)
    with pytest.raises(
        UserError, match=r"but not those: MD5 .*released was 40351d587109b95175f43aff81a1287e"
    ):
        cf_data.load(data)
    assert len(cf_data.load(data, custom=True)) == 10000
    released = dataclasses.replace(cf_data.DATASETS["cifar10"], md5=(hashlib.md5(raw).hexdigest(),))
    monkeypatch.setitem(cf_data.DATASETS, "cifar10", released)
    assert len(cf_data.load(data)) == 10000
