"""The image sets of the catastrophic-forgetting suite, as people have them on disk.

    CIFAR-10, CIFAR-100   cifar-10-python.tar.gz as downloaded, or the folder in it; pickles are read without running
                          anything that stands in them
    MNIST                 t10k-images-idx3-ubyte and its labels, .gz or not
    any of them           a folder or zip of CLASS/NNNN.jpg, test.zip beside train.zip, test/ beside train/
    miniImageNet          folders of synsets (n01532829/...), in train/, val/ and test/ or not, or images in one folder
                          with CSV files of filename,label beside it

Asked is about the 10,000 test images of CIFAR and MNIST. miniImageNet's splits part its classes, not its images, and
EMT does not say what it asked about: here it is the last 100 images, by file name, of each of the 100 classes, so many
as CIFAR-100 has.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import labels
from vflax.evaluate.question import Picture, Question
from vflax.small_files import read_text


@dataclass(frozen=True)
class Dataset:
    """An image set.

    name: as keys have it; title: for people.
    labels: in the order in which the question lists them, as spelled there.
    counts: how many images of each were released; of a set of one's own, none.
    thing: what the question asks for.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    counts: tuple[int, ...] = ()
    thing: str = "object"

    @property
    def question(self) -> str:
        """EMT's (Zhai et al., 2023), as CoIN's cifar10 script has it; it names a number where that is what is seen."""
        listed = ",".join(self.labels)
        return f"What is the {self.thing} in the image? Please only answer a single {self.thing} in {listed}."

    def label(self, name: str) -> str | None:
        """The label of a class that is called so somewhere: in other letters, or by its synset."""
        name = labels.SYNSETS.get(name, (name,))[0]
        return _spelled(self.labels).get(labels.plain(name))


@lru_cache
def _spelled(names: tuple[str, ...]) -> dict[str, str]:
    return {labels.plain(name): name for name in names}


# In the order of Vision-Flan's paper.
DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("cifar10", "CIFAR-10", labels.CIFAR10, (1000,) * 10),
        Dataset("cifar100", "CIFAR-100", labels.CIFAR100, (100,) * 100),
        Dataset(
            "mnist", "MNIST", labels.MNIST, (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009), "number"
        ),
        Dataset("miniimagenet", "miniImageNet", labels.MINIIMAGENET, (100,) * 100),
    )
}
_IMAGES = (".jpg", ".jpeg", ".png")
_SPLITS = ("train", "val", "test")
_MINI_OF_CLASS, _MINI_ASKED = 600, 100
# How far below the given folder sets are looked for.
_DEPTH = 3


class _Image(NamedTuple):
    """key: without the set's name. name: as its files have it."""

    key: str
    label: str
    name: str
    read: Callable[[], bytes]


class _Source(NamedTuple):
    """kind: sources of one kind have the same keys, so that either may be read."""

    dataset: Dataset
    kind: str
    where: Path
    images: Callable[[], list[_Image]]


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The questions about all sets that are found.

    Args:
        data: a file, a folder of one set, or a folder that has several in it.
        custom: parts of the sets, or folders of classes of one's own.

    Raises:
        UserError: none is there, one is there in two ways, or it is not what was released.
    """
    found: dict[str, _Source] = {}
    for source in _sources(data):
        first = found.setdefault(source.dataset.name, source)
        if first.kind != source.kind:
            raise UserError(
                f"{data}: {source.dataset.title} is there twice, as {first.where} and as {source.where}, which name "
                "its images differently; say the one that was asked about as --data"
            )
    if not found and custom:
        own = _of_classes(data, own=True) if data.is_dir() else _of_zip(data, own=True)
        found = {own.dataset.name: own} if own else {}
    if not found:
        raise UserError(
            f"{data}: none of {', '.join(d.title for d in DATASETS.values())}. Expected cifar-10-python.tar.gz, "
            "t10k-images-idx3-ubyte.gz and its labels, folders or a zip of CLASS/NNNN.jpg, or folders that have these; "
            "for classes of your own, name their folder and say --custom"
        )
    ordered = {name: found[name] for name in (*DATASETS, *found) if name in found}
    return [question for source in ordered.values() for question in _asked(source, custom)]


def check(dataset: Dataset, seen: Counter[str], where: str) -> None:
    """Refuse what is not the test set as released, by its number of images of each label.

    Raises:
        UserError: naming labels and numbers.
    """
    wrong = [
        f"{label}: {seen[label]:,} images, released were {count:,}"
        for label, count in zip(dataset.labels, dataset.counts, strict=True)
        if seen[label] != count
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{where}: not the test set of {dataset.title} as it was released, or a part of it: "
            f"{'; '.join(wrong[:5])}{more}. Fetch it again, or say --custom for a set of your own"
        )


def _asked(source: _Source, custom: bool) -> Iterator[Question]:
    dataset, images = source.dataset, source.images()
    if not custom:
        check(dataset, Counter(image.label for image in images), str(source.where))
    text = dataset.question
    for image in images:
        key = f"{dataset.name}/{image.key}"
        groups = {"class": f"{dataset.name}/{image.label}", "dataset": dataset.name}
        yield Question(key, text, image.label, groups, key, (Picture(image.name, image.read),))


# --- where they lie ---------------------------------------------------------------------------------------------------


def _sources(path: Path, depth: int = 0) -> Iterator[_Source]:
    """All of a file or folder; folders before archives, as those are what was unpacked of these."""
    if path.is_file():
        yield from _of_file(path)
        return
    inside = sorted(path.iterdir())
    names = {entry.name for entry in inside}
    idx = _idx_files(path)
    if idx is not None:
        yield _Source(DATASETS["mnist"], "idx", path, partial(_of_idx, *idx))
    for name, (_, member, beside) in _PICKLES.items():
        if (path / member).is_file() and (path / beside).is_file():
            read = partial(_of_pickle, path / member, None, DATASETS[name])
            yield _Source(DATASETS[name], "pickle", path, read)
    whole = _of_classes(path, own=False)
    if whole is not None:
        yield whole
        return
    for entry in inside:
        other = entry.name.replace("train", "test")
        beside_test = entry.name.startswith("train") and other in names
        if entry.is_dir() and depth < _DEPTH and not beside_test:
            yield from _sources(entry, depth + 1)
    for entry in inside:
        beside_test = entry.name.startswith("train") and entry.name.replace("train", "test") in names
        if entry.is_file() and not beside_test:
            yield from _of_file(entry)


def _of_file(path: Path) -> Iterator[_Source]:
    if path.suffix == ".zip":
        source = _of_zip(path, own=False)
        if source is not None:
            yield source
    for name, (folder, member, _) in _PICKLES.items():
        if path.name == _ARCHIVES[name]:
            read = partial(_of_pickle, path, f"{folder}/{member}", DATASETS[name])
            yield _Source(DATASETS[name], "pickle", path, read)


# --- MNIST ------------------------------------------------------------------------------------------------------------


def _idx_files(folder: Path) -> tuple[Path, Path, str] | None:
    """Images, labels and split; the test's, where both are there."""
    names = [entry.name for entry in folder.iterdir()]
    for prefix, split in (("t10k", "test"), ("train", "train")):
        both = []
        for what, rank in (("images", 3), ("labels", 1)):
            pattern = re.compile(rf"{prefix}-{what}[-.]idx{rank}-ubyte(\.gz)?")
            both += sorted(folder / name for name in names if pattern.fullmatch(name))[:1]
        if len(both) == 2:
            return both[0], both[1], split
    return None


def _of_idx(images: Path, answers: Path, split: str) -> list[_Image]:
    pixels, numbers = _idx(images, 3), _idx(answers, 1)
    if len(pixels) != len(numbers) or numbers.max(initial=0) > 9:
        raise UserError(
            f"{answers}: {len(numbers):,} labels up to {numbers.max(initial=0)}, expected {len(pixels):,} up to 9 as "
            f"{images.name} has images; fetch both again"
        )
    return [
        _Image(f"{split}/{n:05d}", str(number), f"{n:05d}.png", partial(_png, pixels[n]))
        for n, number in enumerate(numbers)
    ]


def _idx(path: Path, rank: int) -> np.ndarray:
    """Unsigned bytes of so many dimensions (LeCun's IDX format)."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        kind, shape = struct.unpack_from(">I", raw)[0], struct.unpack_from(f">{rank}I", raw, 4)
        if kind != 0x800 + rank:
            raise ValueError(f"it begins with {kind:#x}, not {0x800 + rank:#x}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise UserError(f"{path}: not readable as IDX ({error}); fetch it again") from None


# --- CIFAR ------------------------------------------------------------------------------------------------------------

_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
# In which folder of the archive which file has the test images, and a file that lies beside it.
_PICKLES = {
    "cifar10": ("cifar-10-batches-py", "test_batch", "batches.meta"),
    "cifar100": ("cifar-100-python", "test", "meta"),
}


def _of_pickle(path: Path, member: str | None, dataset: Dataset) -> list[_Image]:
    """Of a file, or of a member of an archive."""
    where = f"{path}, {member}" if member else str(path)
    try:
        if member is None:
            raw = path.read_bytes()
        else:
            with tarfile.open(path) as archive:
                file = archive.extractfile(member)
                raw = file.read() if file is not None else b""
        found = _unpickle(raw)
        numbers = found["fine_labels"] if "fine_labels" in found else found["labels"]
        pixels, files = found["data"].array(), found["filenames"]
        if not len(pixels) == len(numbers) == len(files) or pixels.shape[1:] != (3072,):
            raise ValueError(f"{len(numbers)} labels and {len(files)} names of {pixels.shape} bytes")
        if not set(numbers) <= set(range(len(dataset.labels))):
            raise ValueError(f"labels from {min(numbers)} to {max(numbers)}")
        return [
            _Image(f"test/{n:05d}", dataset.labels[number], str(name), partial(_png, _channels_last(row)))
            for n, (number, name, row) in enumerate(zip(numbers, files, pixels, strict=True))
        ]
    # A pickle that is damaged, or was made to do harm, raises anything: the reader has no bound on what it makes of it.
    except Exception as error:
        raise UserError(
            f"{where}: not readable as {dataset.title} ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _channels_last(row: np.ndarray) -> np.ndarray:
    """[3072], red first -> [32, 32, 3]."""
    return row.reshape(3, 32, 32).transpose(1, 2, 0)


class _Array:
    """What a pickle says of a numpy array; numpy itself is not asked until the bytes are counted."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Of unsigned bytes.

        Raises:
            ValueError: it is none.
        """
        _, shape, kind, columns_first, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(kind, _Kind) or kind.name != "u1":
            raise ValueError("expected an array of unsigned bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if columns_first else "C")


class _Kind:
    """Of a numpy array's elements."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which bytes have not."""


def _of_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """An array as protocol 5 has it."""
    found = _Array()
    found.state = (1, shape, kind, order == "F", bytes(raw))
    return found


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 of Python 3 has them."""
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Plain containers and arrays of bytes; whatever else a pickle names is refused, and nothing of it is run."""

    _KNOWN = {
        ("multiarray", "_reconstruct"): _Array, ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Kind,
        ("numeric", "_frombuffer"): _of_buffer, ("_codecs", "encode"): _latin1,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        found = self._KNOWN.get((re.sub(r"^numpy\._?core\.", "", module), name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no image set needs")
        return found


def _unpickle(raw: bytes) -> dict[str, Any]:
    """A dictionary under text keys; text of Python 2 is read as latin1, which holds all bytes."""
    for number, (opcode, value, _) in enumerate(pickletools.genops(raw)):
        # A damaged one would have gigabytes reserved for what it never puts there.
        if opcode.name.endswith("PUT") and isinstance(value, int) and value > number:
            raise ValueError(f"object {value} of {number}")
    found = _Plain(io.BytesIO(raw), encoding="latin1").load()
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}


# --- folders and zips of classes --------------------------------------------------------------------------------------


def _of_classes(folder: Path, own: bool) -> _Source | None:
    """Of CLASS/NNNN.jpg, SPLIT/CLASS/NNNN.jpg, or pictures with CSV files; None: no classes that are known."""
    tables = sorted(path for path in folder.glob("*.csv") if _names_labels(path))
    parents = [folder, *(folder / name for name in _SPLITS if (folder / name).is_dir())]
    classes = [entry for parent in parents for entry in sorted(parent.iterdir()) if entry.is_dir()]
    classes = [entry for entry in classes if entry.name not in _SPLITS]
    names = {row[1] for path in tables for row in _table(path)} or {entry.name for entry in classes}
    dataset = _named_so(names)
    if dataset is None and own:
        names = {entry.name for entry in classes if any(_is_image(path.name) for path in entry.iterdir())}
        dataset = Dataset(labels.plain(folder.name), folder.name, tuple(sorted(names))) if names else None
    if dataset is None:
        return None
    if tables:
        return _Source(dataset, "folder", folder, partial(_of_tables, folder, tables, dataset))

    def images() -> list[_Image]:
        files = [
            (PurePosixPath(path.relative_to(folder).as_posix()), path.read_bytes)
            for entry in classes
            for path in sorted(entry.iterdir())
            if _is_image(path.name)
        ]
        return _by_class(files, folder, dataset)

    return _Source(dataset, "folder", folder, images)


def _of_zip(path: Path, own: bool) -> _Source | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(name) for name in archive.namelist() if _is_image(name)]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not readable as a zip ({error}); fetch it again") from None
    names = sorted(name for name in names if len(name.parts) > 1 and name.parts[0] != "__MACOSX")
    classes = {name.parent.name for name in names}
    dataset = _named_so(classes)
    if dataset is None and own and classes:
        dataset = Dataset(labels.plain(path.stem), path.stem, tuple(sorted(classes)))
    if dataset is None:
        return None
    files = [(name, partial(_of_archive, path, str(name))) for name in names]
    return _Source(dataset, "folder", path, partial(_by_class, files, path, dataset))


def _by_class(
    files: Sequence[tuple[PurePosixPath, Callable[[], bytes]]], where: Path, dataset: Dataset
) -> list[_Image]:
    """In the order of labels, then of names; of the test split, where there are splits of images."""
    mini = dataset.name == "miniimagenet"
    if not mini and any("test" in path.parts for path, _ in files):
        files = [(path, read) for path, read in files if "test" in path.parts]
    found: dict[str, list[_Image]] = {label: [] for label in dataset.labels}
    for path, read in files:
        label = dataset.label(path.parent.name)
        if label is None:
            raise UserError(
                f"{where}: {path}: {path.parent.name!r} is no label of {dataset.title}; fetch it again"
            )
        trained = not mini and "train" in (where.stem, *path.parts)
        key = f"{'train' if trained else 'test'}/{path.parent.name}/{path.stem}"
        found[label].append(_Image(key, label, f"{path.parent.name}/{path.name}", read))
    return _last_of_mini(found, dataset)


def _of_tables(folder: Path, tables: Sequence[Path], dataset: Dataset) -> list[_Image]:
    files = {path.name: path for path in folder.rglob("*") if _is_image(path.name)}
    found: dict[str, list[_Image]] = {label: [] for label in dataset.labels}
    for table in tables:
        for name, synset in _table(table):
            label, path = dataset.label(synset), files.get(name)
            if label is None or path is None:
                raise UserError(f"{table}: {name},{synset}: no such image, or no such class; fetch it again")
            image = _Image(f"test/{synset}/{path.stem}", label, f"{synset}/{name}", path.read_bytes)
            found[label].append(image)
    return _last_of_mini(found, dataset)


def _last_of_mini(found: dict[str, list[_Image]], dataset: Dataset) -> list[_Image]:
    whole = dataset.name == "miniimagenet" and all(len(own) == _MINI_OF_CLASS for own in found.values())
    ordered = [sorted(own, key=lambda image: image.key) for own in found.values()]
    return [image for own in ordered for image in (own[-_MINI_ASKED:] if whole else own)]


def _named_so(classes: set[str]) -> Dataset | None:
    """The set that most of the classes belong to."""
    fits = {
        dataset: sum(dataset.label(name) is not None for name in classes) for dataset in DATASETS.values()
    }
    best = max(fits, key=lambda dataset: fits[dataset])
    return best if 2 * fits[best] > len(classes) else None


def _names_labels(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline(100).strip().split(",")[:2] == ["filename", "label"]


def _table(path: Path) -> list[tuple[str, str]]:
    """filename, label of each row."""
    rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row][1:]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{path}: expected filename,label in each row; fetch it again")
    return [(row[0], row[1]) for row in rows]


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES) and not PurePosixPath(name).name.startswith(".")


def _of_archive(path: Path, name: str) -> bytes:
    return _archive(path, os.getpid()).read(name)


@lru_cache
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """Open, since its list of names takes longer to read than an image; not shared with a process that was forked."""
    return zipfile.ZipFile(path)


def _png(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3], bytes -> a file without loss."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()
