"""Where records come from: IDX files, folders or zips of pictures, and what a task file draws itself.

tables.py has CSV, JSON and Parquet, tfds_directory.py what TFDS prepared. A record is a picture, a key that no other
has, and fields that templates name. All but the pictures is read at once; a picture when it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.archives import is_inside
from vflax.errors import UserError
from vflax.evaluate import cf_arrays
from vflax.images import ImageError

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}|(\*)")


class Picture(NamedTuple):
    """An encoded picture. digest: SHA-256 of its bytes; of one that was encoded here, of its pixels, since encoders
    of different versions write different bytes."""

    data: bytes
    digest: str


@dataclass(frozen=True)
class Record:
    """key: no other record of the source has it. file: what the picture is called in a release, perhaps without suffix;
    records that share a picture share it. read: OSError and ImageError where it cannot be had."""

    key: str
    file: str
    fields: Mapping[str, Any]
    read: Callable[[], Picture]


@dataclass(frozen=True)
class Listing:
    """All records of a source, in its order. passed_over: pictures that are there, but not of the declared path."""

    records: list[Record]
    passed_over: int = 0


@dataclass(frozen=True)
class Source:
    """words: as the task file has it. load: DATA, or None where --data was not given -> records; UserError."""

    words: str
    load: Callable[[Path | None], Listing]


def below(data: Path | None, name: str) -> Path:
    """A file or folder of the source.

    Raises:
        UserError: --data is missing, or it is not there.
    """
    if data is None:
        raise UserError(f"{name}: give --data=DIR, the folder that the task file's paths start from")
    path = data / name
    if not path.exists():
        raise UserError(
            f"--data={data}: there is no {name} in it; it is what the task file's paths start from"
        )
    return path


def checked(records: Iterable[Record], where: str) -> list[Record]:
    """The records.

    Raises:
        UserError: there is none, two have one key, or a name leads out of the folder that a release has.
    """
    found = list(records)
    if not found:
        raise UserError(f"{where}: not one record")
    twice = [key for key, count in Counter(record.key for record in found).items() if count > 1]
    if twice:
        raise UserError(
            f"{where}: key {twice[0]!r} is there twice ({len(twice):,} such keys); give each its own"
        )
    for record in found:
        if not is_inside(record.file):
            raise UserError(f"{where}: {record.file!r}: expected a path inside the folder")
    return found


# ---------------------------------------------------------------------------------------------------------
# IDX


def idx(images: str, labels: str, *, names: Sequence[str] = ()) -> Source:
    """LeCun's IDX files (MNIST and its kin), packed by gzip or not.

    Args:
        images: unsigned bytes, N x H x W. labels: N of them.
        names: of the labels, by number.

    Fields: label (its name, or the number as text), number. Key: the place, 00042.
    """

    def load(data: Path | None) -> Listing:
        arrays = cf_arrays.idx(below(data, images), below(data, labels))
        if names and max(arrays.labels, default=0) >= len(names):
            raise UserError(f"{labels}: label {max(arrays.labels)} has no name among {len(names)}")
        records = [
            Record(
                f"{at:05d}",
                f"{at:05d}.png",
                {"label": names[number] if names else str(number), "number": number},
                partial(_encoded_array, arrays.pixels[at]),
            )
            for at, number in enumerate(arrays.labels)
        ]
        return Listing(checked(records, images))

    return Source(f"idx({images!r}, {labels!r})", load)


def _encoded_array(pixels: np.ndarray) -> Picture:
    return encoded(Image.fromarray(np.ascontiguousarray(pixels)))


def encoded(image: Image.Image) -> Picture:
    """A picture without loss, as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    shape = f"{image.mode} {image.width} {image.height} ".encode()
    return Picture(buffer.getvalue(), hashlib.sha256(shape + image.tobytes()).hexdigest())


# ---------------------------------------------------------------------------------------------------------
# Folders and zips


class Place:
    """A folder or a zip of files, which is not unpacked.

    Raises:
        UserError: neither.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise UserError(f"{path}: neither a folder nor a whole zip ({error}); fetch it again") from None

    def names(self) -> list[str]:
        """Of all files, sorted; what systems leave behind is none (.DS_Store, __MACOSX)."""
        if self._zip is not None:
            found: Iterable[str] = (info.filename for info in self._zip.infolist() if not info.is_dir())
        else:
            found = (
                path.relative_to(self._path).as_posix() for path in self._path.rglob("*") if path.is_file()
            )
        return sorted(
            name for name in found if not any(p.startswith(".") or p == "__MACOSX" for p in name.split("/"))
        )

    def read(self, name: str) -> Picture:
        """
        Raises:
            OSError, ImageError: it is not there, or damaged.
        """
        if not is_inside(name):
            raise ImageError(f"{name!r} leads out of {self._path.name}")
        data = (self._path / name).read_bytes() if self._zip is None else self._member(self._zip, name)
        return Picture(data, hashlib.sha256(data).hexdigest())

    def _member(self, archive: zipfile.ZipFile, name: str) -> bytes:
        try:
            return archive.read(name)
        except KeyError:
            raise FileNotFoundError(f"{self._path.name} has no member {name}") from None
        # zipfile's and zlib's own, for damage and for an encrypted member.
        except Exception as error:
            raise ImageError(f"damaged in {self._path.name}: {error}") from None


def pictures(*places: str, path: str = "{label}/{file}") -> Source:
    """Pictures in folders or zips, whose paths tell what they show.

    Args:
        places: folders and zips; "." is DATA itself.
        path: of a picture below its place. "{name}" is a field, as much as it can be within one part of the path, "*"
            anything: "{label}/{file}", "*/{alphabet}/{character}/{file}", "{breed}_{number}.jpg".

    Fields: those of `path`. Key: the path, with the place's name in front where there are several.
    """
    pattern = _pattern(path)
    if not places:
        raise UserError('pictures(): expected the folders or zips that hold them; "." is --data itself')

    def load(data: Path | None) -> Listing:
        records, passed_over = [], 0
        suffixes = picture_suffixes()
        for name in places:
            place = Place(below(data, name))
            for file in place.names():
                if PurePosixPath(file).suffix.lower() not in suffixes:
                    continue
                match = pattern.fullmatch(file)
                if match is None:
                    passed_over += 1
                    continue
                key = f"{PurePosixPath(name).stem}/{file}" if len(places) > 1 else file
                records.append(Record(key, key, match.groupdict(), partial(place.read, file)))
        if not records:
            raise UserError(
                f"{', '.join(places)}: none of {passed_over:,} pictures has a path like {path!r}; "
                "it starts below the folder or zip"
            )
        return Listing(checked(records, ", ".join(places)), passed_over)

    return Source(f"pictures({', '.join(map(repr, places))}, path={path!r})", load)


def _pattern(path: str) -> re.Pattern[str]:
    at, parts = 0, []
    for found in _FIELD.finditer(path):
        parts.append(re.escape(path[at : found.start()]))
        parts.append(f"(?P<{found[1]}>[^/]+)" if found[1] else "[^/]*")
        at = found.end()
    try:
        return re.compile("".join(parts) + re.escape(path[at:]))
    except re.error as error:
        raise UserError(f"path={path!r}: {error}; each field once") from None


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """.jpg and all others that Pillow reads."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


# ---------------------------------------------------------------------------------------------------------
# Generators


def generated(function: Callable[[Path | None], Iterator[dict[str, Any]]]) -> Source:
    """What a generator in the task file yields: sets that are drawn, or files of a form of their own.

    Args:
        function: given DATA (None where --data was not given); yields dicts of fields. "picture" is a Pillow image,
            the bytes of a file, or its path below DATA; "key" is optional, the place otherwise.
    """

    def load(data: Path | None) -> Listing:
        records: list[Record] = []
        try:
            for at, fields in enumerate(function(data)):
                records.append(_generated(at, fields, data))
        # Whatever a person's generator raises.
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(f"{function.__name__}: record {len(records)}: {kind}{error}") from error
        return Listing(checked(records, function.__name__))

    return Source(f"generated({function.__name__})", load)


def _generated(at: int, fields: Any, data: Path | None) -> Record:
    if not isinstance(fields, dict) or "picture" not in fields:
        raise UserError(
            f"yielded {fields!r:.60}; expected a dict with a picture: yield dict(picture=..., label=...)"
        )
    rest = {name: value for name, value in fields.items() if name not in ("picture", "key")}
    key, picture = str(fields.get("key", f"{at:05d}")), fields["picture"]
    if isinstance(picture, Image.Image):
        found = encoded(picture)
        return Record(key, f"{key}.png", rest, lambda: found)
    if isinstance(picture, bytes):
        found = Picture(picture, hashlib.sha256(picture).hexdigest())
        return Record(key, key, rest, lambda: found)
    if isinstance(picture, str | os.PathLike):
        name = PurePosixPath(picture).as_posix()
        return Record(key, name, rest, partial(Place(below(data, ".")).read, name))
    raise UserError(
        f"picture is a {type(picture).__name__}; expected a Pillow image, bytes or a path below --data"
    )
