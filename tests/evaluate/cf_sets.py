"""The catastrophic-forgetting suite's image sets as people have them on disk, small."""

from __future__ import annotations

import csv
import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vflax.evaluate import cf_data
from vflax.evaluate.labels import SYNSETS

# (class, number, prediction, judge's answer). Matcher: airplane 1 of 2, cat 1 of 2, dog 0 of 2. Judge: 2, 1, 1.
CIFAR_ROWS = [
    ("airplane", 0, "an aeroplane", "Yes"),
    ("airplane", 1, "something that flies", "Yes."),
    ("cat", 0, "Cat", "yes"),
    ("cat", 1, "a cat or a dog", "No"),
    ("dog", 0, "", "No, it is empty"),
    ("dog", 1, "a puppy", "Yes, a puppy is a dog"),
]


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
