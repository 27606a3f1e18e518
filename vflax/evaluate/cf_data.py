"""The image sets of the catastrophic-forgetting suite, as people have them on disk.

    CIFAR-10, CIFAR-100   cifar-10-python.tar.gz as downloaded, or the folder in it
    MNIST                 t10k-images-idx3-ubyte and its labels, .gz or not
    any of them           a folder or zip of CLASS/NNNN.jpg, test.zip beside train.zip, test/ beside train/
    miniImageNet          folders of synsets (n01532829/...), in train/, val/ and test/ or not, or images in one folder
                          with CSV files of filename,label beside it

A folder is one set, or has some of the four anywhere in it, three folders deep: DIR/mnist, DIR/cifar10/test.zip.
Nothing is unpacked on the disk, and nothing in a pickle is run.

Asked is about the 10,000 test images of CIFAR and MNIST. miniImageNet's splits part its classes, not its images, and
EMT does not say what it asked about: here it is the last 100 images, by file name, of each of the 100 classes, so many
as CIFAR-100 has.
"""

from __future__ import annotations

import csv
import io
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import cf_arrays, labels
from vflax.evaluate.question import Picture, Question
from vflax.small_files import read_text


@dataclass(frozen=True)
class Dataset:
    """An image set.

    name: as keys have it; title: for people.
    labels: in the order in which the question lists them, as spelled there.
    counts: how many images of each were released; of a set of one's own, none.
    md5: of what was released in arrays: MNIST's images and labels, unpacked; CIFAR's pickle.
    thing: what the question asks for.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    counts: tuple[int, ...] = ()
    md5: tuple[str, ...] = ()
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
        Dataset("cifar10", "CIFAR-10", labels.CIFAR10, (1000,) * 10, ("40351d587109b95175f43aff81a1287e",)),
        Dataset("cifar100", "CIFAR-100", labels.CIFAR100, (100,) * 100, ("f0ef6b0ae62326f3e7ffdfab6717acfc",)),
        Dataset(
            "mnist", "MNIST", labels.MNIST, (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
            ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"), "number",
        ),
        Dataset("miniimagenet", "miniImageNet", labels.MINIIMAGENET, (100,) * 100),
    )
}  # fmt: skip
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


_Images = tuple[list[_Image], tuple[str, ...]]
"""Images, and the MD5 of the files that they lie in together; none where each is a file."""


class _Source(NamedTuple):
    """kind: sources of one kind have the same keys, so that either may be read."""

    dataset: Dataset
    kind: str
    where: Path
    images: Callable[[], _Images]


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
    ordered = [found[name] for name in dict.fromkeys((*DATASETS, *found)) if name in found]
    return [question for source in ordered for question in _asked(source, custom)]


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


def _asked(source: _Source, custom: bool) -> list[Question]:
    dataset, (images, md5) = source.dataset, source.images()
    if not custom:
        check(dataset, Counter(image.label for image in images), str(source.where))
        if md5 and md5 != dataset.md5:
            raise UserError(
                f"{source.where}: as many images as {dataset.title} has, but not those: MD5 {', '.join(md5)}, released "
                f"was {', '.join(dataset.md5)}. Fetch it again, or say --custom for a set of your own"
            )
    found: dict[str, Question] = {}
    for image in images:
        key = f"{dataset.name}/{image.key}"
        if key in found:
            raise UserError(f"{source.where}: {image.name} is there twice; keep one of them")
        groups = {"class": f"{dataset.name}/{image.label}", "dataset": dataset.name}
        picture = Picture(image.name, image.read)
        found[key] = Question(key, dataset.question, image.label, groups, key, (picture,))
    return list(found.values())


# --- where they lie ---------------------------------------------------------------------------------------------------

_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
# In which folder of the archive which file has the test images, and a file that lies beside it.
_PICKLES = {
    "cifar10": ("cifar-10-batches-py", "test_batch", "batches.meta"),
    "cifar100": ("cifar-100-python", "test", "meta"),
}


def _sources(path: Path, depth: int = 0) -> Iterator[_Source]:
    """All of a file or folder; folders before archives, as those are what was unpacked of these."""
    if path.is_file():
        yield from _of_file(path)
        return
    inside = sorted(path.iterdir())
    names = {entry.name for entry in inside}
    yield from _of_idx(path, names)
    for name, (folder, member, beside) in _PICKLES.items():
        if path.name == folder or ({member, beside} <= names and (path / member).is_file()):
            yield _of_arrays(name, "pickle", "test", path, partial(cf_arrays.cifar, path / member))
    whole = _of_classes(path, own=False)
    if whole is not None:
        yield whole
        return
    # Of train and test, test.
    wanted = [
        e for e in inside if not (e.name.startswith("train") and e.name.replace("train", "test") in names)
    ]
    for entry in wanted:
        if entry.is_dir() and depth < _DEPTH:
            yield from _sources(entry, depth + 1)
    for entry in wanted:
        if entry.is_file():
            yield from _of_file(entry)


def _of_file(path: Path) -> Iterator[_Source]:
    if path.suffix == ".zip":
        source = _of_zip(path, own=False)
        if source is not None:
            yield source
    for name, (folder, member, _) in _PICKLES.items():
        if path.name == _ARCHIVES[name]:
            reader = partial(cf_arrays.cifar, path, f"{folder}/{member}")
            yield _of_arrays(name, "pickle", "test", path, reader)


# --- arrays -----------------------------------------------------------------------------------------------------------


def _of_idx(folder: Path, names: set[str]) -> Iterator[_Source]:
    """MNIST; the test images, where those for training are there, too."""
    for prefix, split in (("t10k", "test"), ("train", "train")):
        both = []
        for what, rank in (("images", 3), ("labels", 1)):
            pattern = re.compile(rf"{prefix}-{what}[-.]idx{rank}-ubyte(\.gz)?")
            both += sorted(folder / name for name in names if pattern.fullmatch(name))[:1]
        if len(both) == 1:
            raise UserError(f"{both[0]}: MNIST's images and labels are two files; fetch the other, too")
        if both:
            yield _of_arrays("mnist", "idx", split, folder, partial(cf_arrays.idx, *both))
            return


def _of_arrays(
    name: str, kind: str, split: str, where: Path, reader: Callable[[], cf_arrays.Arrays]
) -> _Source:
    dataset = DATASETS[name]

    def images() -> _Images:
        numbers, pixels, names, md5 = reader()
        if wrong := set(numbers) - set(range(len(dataset.labels))):
            raise UserError(f"{where}: {min(wrong)} is no label of {dataset.title}; fetch it again")
        found = [
            _Image(f"{split}/{n:05d}", dataset.labels[number], name, partial(_png, pixels[n]))
            for n, (number, name) in enumerate(zip(numbers, names, strict=True))
        ]
        return found, md5

    return _Source(dataset, kind, where, images)


def _png(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3], bytes -> a file without loss."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


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
        dataset = _own(folder.resolve().name, names)
    if dataset is None:
        return None
    if tables:
        return _Source(dataset, "folder", folder, partial(_of_tables, folder, tables, dataset))

    def images() -> _Images:
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
            members = sorted(name for name in archive.namelist() if _is_image(name))
    # A damaged list of names: zipfile raises what its parsers do.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{path}: not readable as a zip ({error}); fetch it again") from None
    # Names are only compared, nothing is written; some tools of Windows write backslashes.
    files = [(PurePosixPath(name.replace("\\", "/")), partial(_of_archive, path, name)) for name in members]
    files = [(name, read) for name, read in files if len(name.parts) > 1 and name.parts[0] != "__MACOSX"]
    classes = {name.parent.name for name, _ in files}
    dataset = _named_so(classes) or (_own(path.stem, classes) if own else None)
    if dataset is None:
        return None
    return _Source(dataset, "folder", path, partial(_by_class, files, path, dataset))


def _by_class(
    files: Sequence[tuple[PurePosixPath, Callable[[], bytes]]], where: Path, dataset: Dataset
) -> _Images:
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


def _of_tables(folder: Path, tables: Sequence[Path], dataset: Dataset) -> _Images:
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


def _last_of_mini(found: dict[str, list[_Image]], dataset: Dataset) -> _Images:
    whole = dataset.name == "miniimagenet" and all(len(own) == _MINI_OF_CLASS for own in found.values())
    ordered = [sorted(own, key=lambda image: image.key) for own in found.values()]
    return [image for own in ordered for image in (own[-_MINI_ASKED:] if whole else own)], ()


def _named_so(classes: set[str]) -> Dataset | None:
    """The set that most of the classes belong to."""
    fits = {
        dataset: sum(dataset.label(name) is not None for name in classes) for dataset in DATASETS.values()
    }
    best = max(fits, key=lambda dataset: fits[dataset])
    return best if 2 * fits[best] > len(classes) else None


def _own(name: str, classes: set[str]) -> Dataset | None:
    """A set of somebody's own; None: it has no classes.

    Raises:
        UserError: it is called like one of the four.
    """
    if not classes:
        return None
    dataset = Dataset(labels.plain(name), name, tuple(sorted(classes)))
    if dataset.name in DATASETS:
        raise UserError(
            f"{name}: its classes are not those of {DATASETS[dataset.name].title}; call it otherwise"
        )
    return dataset


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
    try:
        return _archive(path, os.getpid()).read(name)
    # RuntimeError: it is encrypted, or packed in a way that zipfile does not know.
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, RuntimeError) as error:
        raise UserError(f"{path}, {name}: not readable ({error}); fetch it again") from None


@lru_cache
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """Open, since its list of names takes longer to read than an image; not shared with a process that was forked."""
    return zipfile.ZipFile(path)
