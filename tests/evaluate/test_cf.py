"""The catastrophic-forgetting suite: its image sets however they lie on disk, and both rules from every format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vflax.errors import UserError
from vflax.evaluate import cf, cf_data
from vflax.evaluate.judging import Judged
from vflax.evaluate.labels import CIFAR10, CIFAR100, MINIIMAGENET, SYNSETS
from vflax.evaluate.question import Question

# (class, number, prediction, judge's answer). Matcher: airplane 1 of 2, cat 1 of 2, dog 0 of 2. Judge: 2, 1, 1.
CIFAR_ROWS = [
    ("airplane", 0, "an aeroplane", "Yes"),
    ("airplane", 1, "something that flies", "Yes."),
    ("cat", 0, "Cat", "yes"),
    ("cat", 1, "a cat or a dog", "No"),
    ("dog", 0, "", "No, it is empty"),
    ("dog", 1, "a puppy", "Yes, a puppy is a dog"),
]
# (digit, prediction, judge's answer). Matcher 3 of 4; judge 2 of 4: it says neither yes nor no to one.
MNIST_ROWS = [
    (7, "The number in the image is 7:", "Yes"),
    (0, "The number in the image is 8:", "No"),
    (1, "one", "I cannot tell"),
    (4, "4", "Yes"),
]


# --- what people have on disk -----------------------------------------------------------------------------------------


def write_idx(folder: Path, digits: list[int], prefix: str = "t10k", zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(len(digits) * 4, dtype=np.uint8)
    for name, head, body in (
        ("images-idx3", struct.pack(">4I", 0x803, len(digits), 2, 2), pixels.tobytes()),
        ("labels-idx1", struct.pack(">2I", 0x801, len(digits)), bytes(digits)),
    ):
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(head + body) if zipped else head + body)
    return folder


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_classes(folder: Path, rows: list[tuple[Any, ...]] = CIFAR_ROWS) -> Path:
    for name, number, *_ in rows:
        path = folder / name / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def write_zip(path: Path, rows: list[tuple[Any, ...]] = CIFAR_ROWS, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, number, *_ in rows:
            archive.writestr(f"{prefix}{name}/{number:04d}.jpg", png(number))
    return path


def batch(labels: list[int], kind: str = "labels") -> dict[str, Any]:
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None].repeat(3072, 1)
    pixels[:, :1024] = 200  # red
    files = [f"thing_s_{n:06d}.png" for n in range(len(labels))]
    return {kind: labels, "data": pixels, "filenames": files}


def of_python2(found: dict[str, Any]) -> bytes:
    """As cPickle of Python 2 wrote CIFAR: protocol 2, its text and the pixels as byte strings."""

    def text(value: bytes) -> bytes:
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    (kind, labels), (_, pixels), (_, files) = found.items()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b")
    array += b"\x87R(" + number(1) + number(len(pixels)) + number(3072) + b"\x86" + dtype + b"\x89"
    array += text(pixels.tobytes()) + b"tb"
    whole = b"\x80\x02}(" + text(kind.encode()) + b"](" + b"".join(map(number, labels)) + b"e"
    whole += text(b"data") + array
    whole += text(b"filenames") + b"](" + b"".join(text(name.encode()) for name in files) + b"eu."
    return whole


def write_pickles(folder: Path, raw: bytes, name: str = "cifar10") -> Path:
    inner, member, beside = cf_data._PICKLES[name]
    (folder / inner).mkdir(parents=True, exist_ok=True)
    (folder / inner / member).write_bytes(raw)
    (folder / inner / beside).write_bytes(b"")
    return folder / inner


def write_archive(folder: Path, raw: bytes, name: str = "cifar10") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner, member, _ = cf_data._PICKLES[name]
    path = folder / cf_data._ARCHIVES[name]
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"{inner}/{member}")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return path


def write_mini(folder: Path, each: int, layout: str) -> Path:
    """miniImageNet: by "classes", by "splits" of classes, or in one folder with "tables"."""
    splits = ["train"] * 64 + ["val"] * 16 + ["test"] * 20
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in splits}
    for split, synset in zip(splits, SYNSETS, strict=True):
        inner = {"classes": synset, "splits": f"{split}/{synset}", "tables": "images"}[layout]
        (folder / inner).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            name = f"{synset}{number:08d}.jpg"
            (folder / inner / name).write_bytes(b"")
            rows[split].append((name, synset))
    if layout == "tables":
        for split, own in rows.items():
            with (folder / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("filename", "label"), *own])
    return folder


# --- sets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["t10k", "train"])
def test_mnist_is_read(prefix: str, zipped: bool, tmp_path: Path) -> None:
    questions = cf.load(write_idx(tmp_path, [7, 0], prefix, zipped), custom=True)
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
    assert len(cf.load(write_idx(tmp_path, [1]), custom=True)) == 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "python 2"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifars_pickles_are_read(protocol: Any, packed: bool, tmp_path: Path) -> None:
    found = batch([3, 8])
    raw = of_python2(found) if protocol == "python 2" else pickle.dumps(found, protocol=protocol)
    data = write_archive(tmp_path, raw) if packed else write_pickles(tmp_path, raw)
    questions = cf.load(data, custom=True)
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
    questions = cf.load(write_pickles(tmp_path, pickle.dumps(found), "cifar100"), custom=True)
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
    with pytest.raises(UserError, match=r"not readable as CIFAR-10 \(UnpicklingError: it names posix.mkdir"):
        cf.load(data, custom=True)
    assert not made.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.scalar", "_codecs.decode"]
)
def test_names_that_no_image_set_needs_are_refused(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    data = write_pickles(tmp_path, f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match="which no image set needs"):
        cf.load(data, custom=True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        pickle.dumps([1]),
        pickle.dumps({"labels": [1]}),
        pickle.dumps(batch([10])),
        pickle.dumps(batch([-1])),
        pickle.dumps(batch([1]) | {"labels": [1, 2]}),
        pickle.dumps(batch([1]) | {"data": np.zeros((1, 3072))}),
        pickle.dumps(batch([1]) | {"data": np.zeros((1, 3071), np.uint8)}),
        pickle.dumps(batch([1]) | {"data": [0] * 3072}),
        pickle.dumps(batch([1]))[:-20],
        b"\x80\x02}r\xff\xff\xff\x7f.",  # would have 32 GB reserved
    ],
)
def test_pickles_of_something_else_are_refused(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test_batch: not readable as CIFAR-10"):
        cf.load(write_pickles(tmp_path, raw), custom=True)


@settings(deadline=None)
@given(st.binary())
def test_no_bytes_break_the_reader_of_pickles(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    data = write_pickles(tmp_path_factory.mktemp("pickle"), raw)
    with pytest.raises(UserError):
        cf.load(data, custom=True)


@settings(deadline=None)
@given(st.binary())
def test_no_bytes_break_the_reader_of_idx(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    data = write_idx(tmp_path_factory.mktemp("idx"), [1, 2])
    (data / "t10k-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(UserError):
        cf.load(data, custom=True)


def test_an_archive_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path, pickle.dumps(batch([1])))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"cifar-10-python\.tar\.gz, cifar-10-batches-py/test_batch: not readable"
    ):
        cf.load(tmp_path, custom=True)


def test_mnist_of_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "a", [1, 2])
    write_idx(tmp_path / "b", [1])
    (tmp_path / "a" / "t10k-labels-idx1-ubyte.gz").write_bytes(
        (tmp_path / "b" / "t10k-labels-idx1-ubyte.gz").read_bytes()
    )
    with pytest.raises(UserError, match="1 labels up to 1, expected 2"):
        cf.load(tmp_path / "a", custom=True)


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
    questions = cf.load(tmp_path, custom=True)
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
        assert [q.key.split("/", 2)[2] for q in cf.load(data, custom=True)] == [
            f"{name}/{number:04d}" for name, number, *_ in CIFAR_ROWS
        ]
    trained = cf.load(tmp_path / "zips" / "train.zip", custom=True)
    assert trained[0].key == "cifar10/train/cat/0007"


def test_classes_may_be_spelled_otherwise(tmp_path: Path) -> None:
    data = write_classes(tmp_path, [("Aquarium Fish", 0), ("pickup-truck", 0)])
    assert [q.answer for q in cf.load(data, custom=True)] == ["aquarium_fish", "pickup_truck"]


def test_a_folder_that_is_no_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"yak/0000\.jpg: 'yak' is no label of CIFAR-10"):
        cf.load(write_zip(tmp_path / "a.zip", [*CIFAR_ROWS, ("yak", 0)]), custom=True)


@pytest.mark.parametrize("layout", ["classes", "splits", "tables"])
def test_of_miniimagenet_the_last_100_images_of_each_class_are_asked_about(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cf_data, "_MINI_OF_CLASS", 6)
    monkeypatch.setattr(cf_data, "_MINI_ASKED", 2)
    questions = cf.load(write_mini(tmp_path, 6, layout), custom=True)
    assert len(questions) == 200
    assert questions[0].key == "miniimagenet/test/n01532829/n0153282900000004"
    assert [q.answer for q in questions[::2]] == list(MINIIMAGENET)
    assert "in house finch,robin,triceratops," in questions[0].text


def test_miniimagenet_as_released_is_taken_and_a_split_of_it_is_named(tmp_path: Path) -> None:
    assert len(cf.load(write_mini(tmp_path, 100, "splits"))) == 10000
    with pytest.raises(
        UserError, match=r"miniImageNet as it was released.*house finch: 0 images.*and 75 more"
    ):
        cf.load(tmp_path / "test")


def test_a_table_that_names_an_image_which_is_not_there_is_refused(tmp_path: Path) -> None:
    write_mini(tmp_path, 1, "tables")
    (tmp_path / "images" / "n0153282900000000.jpg").unlink()
    with pytest.raises(UserError, match=r"train\.csv: n0153282900000000\.jpg,n01532829: no such image"):
        cf.load(tmp_path, custom=True)


def test_several_sets_lie_in_one_folder_in_the_papers_order(tmp_path: Path) -> None:
    write_idx(tmp_path / "a" / "MNIST" / "raw", [7])
    write_classes(tmp_path / "z")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "0.jpg").write_bytes(b"")
    questions = cf.load(tmp_path, custom=True)
    assert [q.groups["dataset"] for q in questions] == ["cifar10"] * 6 + ["mnist"]


def test_an_archive_beside_what_was_unpacked_of_it_is_no_second_set(tmp_path: Path) -> None:
    write_archive(tmp_path, pickle.dumps(batch([1])))
    write_pickles(tmp_path, pickle.dumps(batch([1])))
    assert len(cf.load(tmp_path, custom=True)) == 1
    write_classes(tmp_path / "jpg")
    with pytest.raises(UserError, match="CIFAR-10 is there twice"):
        cf.load(tmp_path, custom=True)


@pytest.mark.parametrize(
    "write", [write_classes, lambda path, rows: write_zip(path.with_suffix(".zip"), rows)]
)
def test_classes_of_ones_own_are_a_set_named_after_their_folder(
    write: Callable[[Path, list[tuple[Any, ...]]], Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "Game_Park", [("yak", 0), ("elk", 0)])
    questions = cf.load(data, custom=True)
    assert [q.key for q in questions] == ["game park/test/elk/0000", "game park/test/yak/0000"]
    assert questions[0].text.endswith("a single object in elk,yak.")
    with pytest.raises(UserError, match="none of CIFAR-10, CIFAR-100, MNIST, miniImageNet"):
        cf.load(data)


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
        cf.load(write(tmp_path))


def test_a_whole_set_is_no_part(tmp_path: Path) -> None:
    found = batch([number // 1000 for number in range(10000)])
    assert len(cf.load(write_pickles(tmp_path, pickle.dumps(found)))) == 10000


# --- judges -----------------------------------------------------------------------------------------------------------


def test_the_judge_is_asked_emts_question() -> None:
    question = Question("cifar100/test/00001", "?", "aquarium_fish", {}, "1")
    request = cf.judge_request(question, "a picture of a fish in a tank")
    assert request.messages == [
        {
            "role": "system",
            "content": "You are a helpful and precise assistant for checking the quality of the answer.",
        },
        {
            "role": "user",
            "content": 'Please only answer the question in yes or no. Is the "Prediction" correctly predicting the '
            'right "Label"? Label: Aquarium_fish, Prediction: a picture of a fish in a tank',
        },
    ]
    assert (request.model, request.temperature) == ("gpt-3.5-turbo", 0)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("NO!", "no"),
        ("No, although some would say yes", "no"),
        ("The answer is yes.", "yes"),
        ("I would say no", "no"),
        ("Yes and no", "yes"),
        ("It is both yes and no", None),
        ("The eyes are wrong", None),
        ("Nothing", None),
        ("", None),
    ],
)
def test_verdicts_are_read(text: str, read: str | None) -> None:
    assert cf.read_verdict(text) == read


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_the_reader_of_verdicts(text: str) -> None:
    assert cf.read_verdict(text) in ("yes", "no", None)


# --- predictions ------------------------------------------------------------------------------------------------------

CIFAR_PROMPT = (
    "What is the object in the image? Please only answer a single object in " + ",".join(CIFAR10) + "."
)
MNIST_PROMPT = "What is the number in the image? Please only answer a single number in 0,1,2,3,4,5,6,7,8,9."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(format: str) -> list[dict[str, Any]]:
    """All predictions in one file."""
    every = [
        (
            f"cifar10/test/{name}/{number:04d}",
            f"./CIFAR10/test/{name}/{number:04d}.jpg",
            name,
            text,
            verdict,
            CIFAR_PROMPT,
        )
        for name, number, text, verdict in CIFAR_ROWS
    ]
    every += [
        (f"mnist/test/{number:05d}", str(number), str(digit), text, verdict, MNIST_PROMPT)
        for number, (digit, text, verdict) in enumerate(MNIST_ROWS)
    ]
    if format == "vflax":
        return [{"key": key, "prediction": text, "finish": "stop"} for key, _, _, text, _, _ in every]
    if format == "judged":
        return [
            {"key": key, "prediction": text, "verdict": cf.read_verdict(verdict), "judge": "x"}
            for key, _, _, text, verdict, _ in every
        ]
    if format == "review":
        judged = 'Is the "Prediction" correctly predicting the right "Label"? Label: %s, Prediction: %s'
        return [
            {"question_id": number, "prompt": judged % (label.capitalize(), text), "text": verdict}
            for number, (_, _, label, text, verdict, _) in enumerate(every)
        ]
    return [
        {"question_id": id, "prompt": asked, "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
        | ({"label": label.capitalize()} if format == "emt" else {})
        for _, id, label, text, _, asked in every
    ]


def write_data(folder: Path) -> Path:
    write_classes(folder / "cifar")
    write_idx(folder / "mnist", [digit for digit, *_ in MNIST_ROWS])
    return folder


@pytest.mark.parametrize("format", ["vflax", "llava", "emt", "judged"])
def test_every_format_gives_the_matchers_numbers(format: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", rows_of(format))
    assert cf.recognise(path) == format
    found = cf.score(path, format, write_data(tmp_path / "data"), "strict", custom=True)
    # CIFAR-10: 2 of 6; MNIST: 3 of 4.
    assert found.metrics["cifar10/strict"] == pytest.approx(100 / 3)
    assert found.metrics["mnist/strict"] == 75
    assert (
        found.score == found.metrics["mean of 2 of 4"] == found.metrics["strict"] == pytest.approx(650 / 12)
    )
    # Unread: the thing that flies, cat or dog, nothing, and the puppy.
    assert (found.n, found.missing, found.unparsed) == (10, 0, 4)
    assert found.groups["dataset"]["mnist"]["n"] == 4
    assert found.groups["class"]["cifar10/cat"]["strict"] == 50
    assert found.manifest["confusion"]["cifar10"] == {
        "airplane": {"airplane": 1, "(none)": 1},
        "cat": {"cat": 1, "(several)": 1},
        "dog": {"(none)": 2},
    }
    assert found.manifest["confusion"]["mnist"]["0"] == {"8": 1}
    assert found.manifest["sets"] == {"cifar10": 6, "mnist": 4}


@pytest.mark.parametrize("mode", cf.MODES)
def test_both_numbers_are_there_once_a_judge_has_answered(mode: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "graded.jsonl", rows_of("judged"))
    found = cf.score(path, "judged", write_data(tmp_path / "data"), mode, custom=True)
    # The judge: CIFAR-10 4 of 6, MNIST 2 of 4.
    assert found.metrics["cifar10/judge"] == pytest.approx(400 / 6)
    assert found.metrics["mnist/judge"] == 50
    assert found.metrics["judge"] == pytest.approx((400 / 6 + 50) / 2)
    assert found.metrics["strict"] == pytest.approx(650 / 12)
    assert found.score == found.metrics["judge" if mode == "official" else "strict"]
    assert found.unparsed == (1 if mode == "official" else 4)
    assert found.groups["class"]["cifar10/dog"] == {"n": 2, "strict": 0, "judge": 50}
    assert found.manifest["judges"] == ["x"]
    assert found.printed["cifar10 Accuracy"] == "Accuracy: 4/6 = 0.6666666666666666"
    assert found.intervals["mnist/judge"][0] < 50 < found.intervals["mnist/judge"][1]


def test_several_runs_of_a_judge_count_alike(tmp_path: Path) -> None:
    data = write_idx(tmp_path / "data", [7, 1])
    rows = [
        {"key": "mnist/test/00000", "prediction": "8", "grades": ["yes", "no", None, "no"]},
        {"key": "mnist/test/00001", "prediction": "1", "grades": ["yes"] * 4},
    ]
    path = write_lines(tmp_path / "graded.jsonl", rows)
    assert cf.recognise(path) == "judged"
    found = cf.score(path, "judged", data, "official", custom=True)
    assert found.score == pytest.approx(100 * (1 / 4 + 1) / 2)
    assert found.verdicts[0].parsed == "yes, no, neither, no"
    assert found.printed["mnist Accuracy"] == "Accuracy: 5/8 = 0.625"


def test_the_judge_step_takes_it_as_a_task() -> None:
    task: Judged = cf  # type: ignore[assignment]
    assert task.read_grade("Yes.") == "yes"
    assert task.judge_request(Question("k", "?", "cat", {}, "k"), "a cat", 0).max_tokens > 1
    assert (task.RUNS, task.ATTEMPTS) == (1, 1)


def test_coins_judge_files_have_all_that_is_needed(tmp_path: Path) -> None:
    rows = rows_of("review")
    write_lines(tmp_path / "a" / "cifar10_prompts.jsonl", rows[:6])
    path = write_lines(tmp_path / "a" / "prompt_0.jsonl", rows[6:])
    assert cf.recognise(tmp_path / "a") == cf.recognise(path) == "review"
    found = cf.score(tmp_path / "a", "review", None, "official", custom=True)
    assert found.metrics["cifar10/judge"] == pytest.approx(400 / 6)
    assert found.metrics["mnist/judge"] == 50
    assert found.metrics["strict"] == pytest.approx(650 / 12)
    assert found.printed["mnist Accuracy"] == "Accuracy: 2/4 = 0.5"


def test_a_folder_has_a_file_for_each_set_and_questions_may_share_ids(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("question_id", "text", "label")} for row in rows_of("emt")]
    for number, row in enumerate(rows):
        row["question_id"] = number if number < 6 else number - 6
    write_lines(tmp_path / "CIFAR-10.jsonl", rows[:6])
    write_lines(tmp_path / "digits.jsonl", rows[6:])  # known by its labels
    assert cf.recognise(tmp_path) == "emt"
    assert cf.score(tmp_path, "emt", None, "strict", custom=True).score == pytest.approx(650 / 12)


def test_official_needs_verdicts(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax"))
    with pytest.raises(
        UserError, match=r"10 of 10 predictions have no verdict.*Run the judge step.*--mode=strict"
    ):
        cf.score(path, "vflax", data, "official", custom=True)
    rows = rows_of("judged")
    del rows[2]["verdict"]
    path = write_lines(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError, match=r"line 3: not graded\. .* run the judge step"):
        cf.score(path, "judged", data, "official", custom=True)


def test_a_question_without_prediction_is_wrong_and_counted_by_both_rules(tmp_path: Path) -> None:
    rows = rows_of("judged")
    rows[0]["prediction"] = None  # the model could not be asked
    path = write_lines(tmp_path / "a.jsonl", rows[:-1])
    found = cf.score(path, "judged", write_data(tmp_path / "data"), "official", custom=True)
    assert (found.n, found.missing) == (10, 2)
    assert found.metrics["cifar10/judge"] == 50
    assert found.metrics["mnist/strict"] == 50
    assert found.manifest["confusion"]["mnist"]["4"] == {"(missing)": 1}


def test_a_set_without_any_prediction_is_no_part_of_the_score(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax")[6:])
    found = cf.score(path, "vflax", write_data(tmp_path / "data"), "strict", custom=True)
    assert found.metrics["mean of 1 of 4"] == found.score == 75
    assert found.manifest["score"] == "mean of 1 of 4"
    assert found.n == 4


def test_all_four_sets_make_the_mean(tmp_path: Path) -> None:
    names = {"cifar10": "cat", "cifar100": "aquarium_fish", "mnist": "8", "miniimagenet": "house finch"}
    for name, label in names.items():
        said = label if name != "mnist" else "9"
        write_lines(
            tmp_path / f"{name}.jsonl", [{"question_id": "0", "text": said, "label": label.capitalize()}]
        )
    found = cf.score(tmp_path, "emt", None, "strict", custom=True)
    assert found.score == found.metrics["mean"] == 75


def test_limit_takes_the_first_of_each_class(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax"))
    found = cf.score(path, "vflax", write_data(tmp_path / "data"), "strict", custom=True, limit=1)
    assert (found.n, found.missing) == (3 + 4, 0)
    assert found.metrics["cifar10/strict"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("format", ["vflax", "emt", "judged"])
def test_the_order_of_rows_does_not_matter(format: str, tmp_path: Path) -> None:
    rows, data = rows_of(format), write_data(tmp_path / "data")
    straight = cf.score(write_lines(tmp_path / "a.jsonl", rows), format, data, "strict", custom=True)
    random.Random(0).shuffle(rows)
    shuffled = cf.score(write_lines(tmp_path / "b.jsonl", rows), format, data, "strict", custom=True)
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals


def test_pickled_images_are_called_by_place_or_file(tmp_path: Path) -> None:
    data = write_pickles(tmp_path / "data", pickle.dumps(batch([3, 8])))
    for names in (
        ["0", 1],
        ["thing_s_000000.png", "x/ship/thing_s_000001.png"],
        ["cifar10/test/00000", "00001"],
    ):
        rows = [{"question_id": id, "text": text} for id, text in zip(names, ["cat", "cat"], strict=True)]
        found = cf.score(write_lines(tmp_path / "a.jsonl", rows), "llava", data, "strict", custom=True)
        assert found.score == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "answered twice"),
        (lambda rows: [rows[0] | {"question_id": "cifar10/test/cat/0009"}], "no question of this CF"),
        (lambda rows: [rows[0] | {"question_id": "0000"}], r"0000 is the name of 3 images, as cifar10/test/airplane"),
        (lambda rows: [rows[0] | {"label": "Dog"}], "the right answer is 'dog' there and 'airplane' in the data"),
        (lambda rows: [{"question_id": "x", "text": "a cat"}], "of which set is question x"),
        (lambda rows: [{"question_id": 1}], "line 1: lacks text"),
        (lambda rows: [], "empty"),
    ],
)  # fmt: skip
def test_predictions_that_do_not_fit_are_refused(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", change(rows_of("emt")))
    if said == "empty":
        with pytest.raises(UserError, match=said):
            cf.recognise(path)
        return
    with pytest.raises(UserError, match=said):
        cf.score(path, "llava", write_data(tmp_path / "data"), "strict", custom=True)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (rows_of("llava"), r"say --data=DIR of CIFAR, MNIST and miniImageNet"),
        (rows_of("emt"), r"CIFAR-10 as it was released, or a part of it: airplane: 2 images"),
        ([rows_of("emt")[0] | {"label": "yak"}], "'yak' is no label of CIFAR-10"),
    ],
)
def test_without_data_labels_must_be_there_and_whole(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=said):
        cf.score(path, "llava", None, "strict")


def test_a_judges_file_of_other_wording_is_refused(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [{"question_id": 0, "prompt": 'the right "Label"?', "text": "Yes"}]
    )
    assert cf.recognise(path) == "review"
    with pytest.raises(UserError, match="judged otherwise"):
        cf.score(path, "review", None, "official")


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    assert cf.recognise(write_lines(tmp_path / "a.jsonl", [{"other": 1}])) is None
    (tmp_path / "empty").mkdir()
    assert cf.recognise(tmp_path / "empty") is None


def test_a_set_of_ones_own_is_scored_and_named(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "farm", [("yak", 0), ("elk", 0)])
    rows = [{"key": f"farm/test/{name}/0000", "prediction": "a yak"} for name in ("yak", "elk")]
    found = cf.score(write_lines(tmp_path / "a.jsonl", rows), "vflax", data, "strict", custom=True)
    assert found.score == found.metrics["mean of 1, your own among them"] == 50


@pytest.mark.parametrize("style", ["llava", "plain"])
def test_every_style_asks_emts_question(style: str, tmp_path: Path) -> None:
    question = cf.load(write_classes(tmp_path), custom=True)[0]
    assert cf.prompt(question, style) == question.text == CIFAR_PROMPT


@pytest.mark.real_data
def test_real_images_answered_by_one_word(shared_data: Path, tmp_path: Path) -> None:
    questions = cf.load(shared_data)
    assert len(questions) == 20000
    rows = [{"key": q.key, "prediction": "It is 7" if "mnist" in q.key else "A frog."} for q in questions]
    found = cf.score(write_lines(tmp_path / "a.jsonl", rows), "vflax", shared_data, "strict")
    assert found.metrics["mnist/strict"] == pytest.approx(10.28)  # 1,028 sevens
    assert found.metrics["cifar10/strict"] == 10
    assert found.unparsed == 0
    for question in questions[::4999]:
        assert Image.open(io.BytesIO(question.pictures[0].read())).size in ((28, 28), (32, 32))


@pytest.mark.real_data
def test_mnist_alone_in_coins_form(shared_data: Path, tmp_path: Path) -> None:
    questions = cf.load(shared_data / "mnist")
    rows = [
        {"question_id": n, "prompt": q.text, "text": f"The number is {q.answer}.", "label": q.answer}
        for n, q in enumerate(questions)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert cf.score(path, "emt", None, "strict").score == 100
    assert cf.score(path, "emt", shared_data / "mnist", "strict").score == 100
    path = write_lines(tmp_path / "b.jsonl", rows[:5000])
    with pytest.raises(UserError, match="MNIST as it was released, or a part of it"):
        cf.score(path, "emt", None, "strict")
    found = cf.score(path, "emt", shared_data / "mnist", "strict")
    assert (found.score, found.missing) == (50, 5000)


def test_a_question_is_answered_once_also_where_labels_make_the_questions(tmp_path: Path) -> None:
    rows = rows_of("emt")
    with pytest.raises(UserError, match=r"dog/0001\.jpg: answered twice"):
        path = write_lines(tmp_path / "a.jsonl", [*rows, rows[5]])
        cf.score(path, "emt", None, "strict", custom=True)
    with pytest.raises(UserError, match="the right answer is 'dog' there and 'cat' in the data"):
        path = write_lines(tmp_path / "b.jsonl", [*rows, rows[5] | {"label": "Cat"}])
        cf.score(path, "emt", None, "strict", custom=True)
