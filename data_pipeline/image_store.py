"""The images of a release where they lie: in folders, zip archives or tar archives, which are not unpacked.

    find     name -> where its bytes are; in the parent process, in order
    read     where -> the bytes; in the workers

A name is looked up as it stands and, in archives, below the one folder at the top that all of an archive's members
share (images_191task_1k/...), if there is one. The members of archives are kept in a SQLite file, not in memory: name,
archive, offset, sizes, method, checksum. In one archive the last member of a name counts, as when it is unpacked; of
several archives the first that has the name, and where another one holds other bytes under it, that is told.

Names that leave the image folder are refused: absolute, with `..`, a backslash or a NUL, and a link in a folder that
leads out of it (unless follow_links).
"""

from __future__ import annotations

import functools
import glob
import io
import os
import sqlite3
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import fsspec
from etils import epath

from data_pipeline.remote import download, is_remote, to_path
from vflax.errors import UserError
from vflax.images import ImageError

# No image file comes near it; a larger one would fill a worker's memory.
MAX_FILE_BYTES = 512 << 20
# Requests to a bucket that are under way at once.
REMOTE_THREADS = 32

_OPEN_ARCHIVES = 32
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A folder with one of these is a folder of images, whatever else is in it.
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_ENCRYPTED = -1  # as a method
_USUAL_HEADER = 1024  # bytes: names and extra fields of a zip's members are seldom longer

Kind = Literal["folder", "zip", "tar"]


@dataclass(frozen=True)
class Place:
    """One folder or archive. An archive that lies on a bucket is read from a local copy."""

    kind: Kind
    path: str
    name: str  # its last component: what reports call it
    url: str = ""  # of an archive: where on the bucket the original is


class Entry(NamedTuple):
    """Where the bytes of one image are."""

    place: int  # which of the store's places
    name: str  # below the folder, or of the member
    size: int  # bytes, as unpacked
    stamp: int  # folder, tar: time of the last change in ns; zip: CRC-32
    offset: int = 0  # zip: of the local header; tar: of the bytes
    stored: int = 0  # bytes in the archive
    method: int = 0  # zip: 0 stored, 8 deflate
    other: str = ""  # a later archive that holds other bytes under this name


class Missing(NamedTuple):
    """Why an image cannot be used; words as in records.Problem."""

    reason: str
    detail: str


class ImageStore:
    """The images of a release.

    Args:
        images: a folder, a zip, a tar, several of them divided by commas, a pattern with * or ?, or a folder that holds
            archives only (told by their first bytes: their names do not matter). None: there are no images.
        scratch: a folder for the index of archives (and copies of those on a bucket). What an earlier store left there
            is used again if the archives have not changed.
        follow_links: links may lead out of an image folder.

    Attributes:
        places: the folders and archives, in the order they are looked through.
        reader: reads what `find` found; picklable.

    Raises:
        UserError: there is no such folder or archive, or it cannot be read.
    """

    def __init__(
        self, images: str | os.PathLike[str] | None, scratch: Path, follow_links: bool = False
    ) -> None:
        self.places = [] if images is None else _places(os.fspath(images), scratch)
        self.reader = ImageReader(self.places)
        self._folders = {
            i: _RemoteFolder(i, place.path) if is_remote(place.path) else _Folder(i, place.path, follow_links)
            for i, place in enumerate(self.places)
            if place.kind == "folder"
        }
        self._archives: _Archives | None = None
        if len(self._folders) < len(self.places):
            self._archives = _Archives(self.places, self.reader, scratch / "images.sqlite")
        remote = any(isinstance(folder, _RemoteFolder) for folder in self._folders.values())
        self._threads = ThreadPoolExecutor(REMOTE_THREADS) if remote else None

    def find(self, names: Sequence[str]) -> list[Entry | Missing]:
        """Where these images are, in the same order. On a bucket many are asked for at once."""
        if self._threads is None:
            return [self._find(name) for name in names]
        return list(self._threads.map(self._find, names))

    def report(self) -> list[dict[str, Any]]:
        """[{path: last component, kind, entries: members (of an archive)}]."""
        counts = self._archives.counts() if self._archives else {}
        return [
            {"path": place.name, "kind": place.kind} | ({"entries": counts[i]} if i in counts else {})
            for i, place in enumerate(self.places)
        ]

    def close(self) -> None:
        if self._archives:
            self._archives.close()
        if self._threads:
            self._threads.shutdown()
        self.reader.close()

    def _find(self, name: str) -> Entry | Missing:
        if not self.places:
            return Missing(
                "image_missing", "no --images was named; give the folder or the archives that hold it"
            )
        if not _is_inside(name):
            return Missing("path_outside", "expected a path inside the image folder")
        name = str(PurePosixPath(name))
        archived = self._archives.find(name) if self._archives else None
        missing = None
        for i, folder in self._folders.items():
            if archived is not None and archived.place < i:
                break
            found = folder.find(name)
            if isinstance(found, Entry):
                return _usable(found)
            missing = missing or found
        if archived is not None:
            return _usable(archived)
        return missing or Missing("image_missing", "no archive has a member of this name")


class ImageReader:
    """Reads images by their entries. Picklable; archives are opened when they are needed, in each process anew."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        self.is_remote = any(is_remote(place.path) for place in places)
        self._open: dict[int, IO[bytes]] = {}

    def away(self) -> ImageReader:
        """A reader for machines that do not have the local copies: archives are read where they lie on the bucket."""
        return ImageReader([replace(place, path=place.url or place.path) for place in self.places])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, entry: Entry) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: it cannot be read (any more).
            ImageError: the archive is damaged there.
        """
        place = self.places[entry.place]
        if place.kind == "folder":
            if is_remote(place.path):
                return (epath.Path(place.path) / entry.name).read_bytes()
            with open(os.path.join(place.path, entry.name), "rb") as file:
                return file.read(MAX_FILE_BYTES)
        if is_remote(place.path):
            return _read_remote_member(place, entry)
        archive = self._archive(entry.place)
        return _read_zip(archive, entry) if place.kind == "zip" else _read_tar(archive, entry)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _archive(self, index: int) -> IO[bytes]:
        file: IO[bytes] | None = self._open.pop(
            index, None
        )  # and in again: the one used longest ago is the first
        if file is None:
            if len(self._open) >= _OPEN_ARCHIVES:
                self._open.pop(next(iter(self._open))).close()
            file = open(self.places[index].path, "rb")  # noqa: SIM115 (closed by close)
        self._open[index] = file
        return file


# ---------------------------------------------------------------------------------------------------------
# What --images names


def _places(images: str, scratch: Path) -> list[Place]:
    found = []
    for path in _paths(images):
        if path.is_dir():
            archives = _archives_of(path)
            found += [_archive_place(archive, scratch) for archive in archives]
            if not archives:
                found.append(Place("folder", os.fspath(path), path.name))
        elif path.exists():
            found.append(_archive_place(path, scratch))
        else:
            raise UserError(
                f"--images={path}: there is no such folder or archive. Expected the folder that the image paths start "
                "from, or the release's zip or tar archives"
            )
    return found


def _paths(images: str) -> list[epath.Path]:
    whole = to_path(images, "--images")
    if whole.exists():  # a comma or a star in its name means itself
        return [whole]
    paths: list[epath.Path] = []
    for part in filter(None, (part.strip() for part in images.split(","))):
        path = to_path(part, "--images")
        if any(sign in part for sign in "*?["):
            matches = path.parent.glob(path.name) if is_remote(part) else glob.glob(os.fspath(path))
            paths += (found := [epath.Path(match) for match in sorted(map(os.fspath, matches))])
            if not found:
                raise UserError(f"--images={part}: nothing matches the pattern")
        else:
            paths.append(path)
    if not paths:
        raise UserError("--images: the name is empty; leave the option out if the release has no images")
    return paths


def _archives_of(folder: epath.Path) -> list[epath.Path]:
    """The archives of a folder that holds no images itself, such as a clone of the full release; else none."""
    archives = []
    for path in _children(folder):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in _IMAGE_SUFFIXES or path.is_dir():
            return []
        if _archive_kind(path, refuse_compressed=False):
            archives.append(path)
        elif not path.suffix:
            return []
    return sorted(archives, key=os.fspath)


def _children(folder: epath.Path) -> Iterator[epath.Path]:
    if is_remote(folder):
        yield from folder.iterdir()
    else:
        with os.scandir(folder) as entries:  # lazy: a folder of images is left at its first one
            for entry in entries:
                yield epath.Path(entry.path)


def _archive_place(path: epath.Path, scratch: Path) -> Place:
    kind = _archive_kind(path)
    if kind is None:
        raise UserError(f"--images={path}: neither a folder nor a zip or tar archive, by its first bytes")
    if not is_remote(path):
        return Place(kind, os.path.abspath(path), path.name)
    copies = scratch / "archives"
    copies.mkdir(exist_ok=True)
    download(path, copies / path.name)
    return Place(kind, os.fspath(copies / path.name), path.name, os.fspath(path))


def _archive_kind(path: epath.Path, refuse_compressed: bool = True) -> Literal["zip", "tar"] | None:
    """By the first bytes: the shards of the full Vision-Flan release are zips without a suffix."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"--images={path}: {error.strerror or error}") from None
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if head[257:262] == b"ustar":
        return "tar"
    packed = [name for magic, name in _COMPRESSED.items() if head.startswith(magic)]
    if packed and refuse_compressed:
        raise UserError(
            f"--images={path}: compressed as a whole ({packed[0]}), so no image in it can be read without all before "
            "it. Decompress it first (gunzip and the like); the .tar that comes out need not be unpacked"
        )
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name) and bool(path.parts)


def _usable(entry: Entry) -> Entry | Missing:
    if entry.size > MAX_FILE_BYTES:
        return Missing(
            "image_damaged", f"a file of {entry.size:,} bytes is no image; the limit is {MAX_FILE_BYTES:,}"
        )
    if entry.method == _ENCRYPTED:
        return Missing("image_damaged", "encrypted in its zip archive")
    if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Missing(
            "image_damaged", f"zip compression method {entry.method} is not read; unpack the archive"
        )
    return entry


# ---------------------------------------------------------------------------------------------------------
# Folders


class _Folder:
    """A local folder; a file is looked at by lstat, its folder's real place is remembered."""

    def __init__(self, index: int, root: str, follow_links: bool) -> None:
        self._index, self._root, self._follow = index, root, follow_links
        self._real_root = os.path.realpath(root)
        self._real = functools.lru_cache(4096)(os.path.realpath)

    def find(self, name: str) -> Entry | Missing:
        path = os.path.join(self._root, name)
        try:
            found = os.lstat(path)
            if not self._follow and not self._stays_inside(path, stat.S_ISLNK(found.st_mode)):
                return Missing(
                    "path_outside", "a link that leads out of the image folder (--follow_links allows it)"
                )
            if stat.S_ISLNK(found.st_mode):
                found = os.stat(path)
        except OSError as error:
            return Missing("image_missing", error.strerror or str(error))
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "not a file"
            return Missing("image_missing", f"it is {what}")
        return Entry(self._index, name, found.st_size, found.st_mtime_ns)

    def _stays_inside(self, path: str, is_link: bool) -> bool:
        real = os.path.realpath(path) if is_link else os.path.join(self._real(os.path.dirname(path)), "")
        return real.startswith(os.path.join(self._real_root, ""))


class _RemoteFolder:
    """A folder on a bucket."""

    def __init__(self, index: int, root: str) -> None:
        self._index, self._root = index, epath.Path(root)

    def find(self, name: str) -> Entry | Missing:
        try:
            found = (self._root / name).stat()
        except FileNotFoundError:
            return Missing("image_missing", "No such file or directory")
        if found.is_directory:
            return Missing("image_missing", "it is a directory")
        return Entry(self._index, name, found.length, int(found.mtime * 1e9))


# ---------------------------------------------------------------------------------------------------------
# Archives

_SCHEMA = """
CREATE TABLE archives (place INTEGER PRIMARY KEY, path TEXT, bytes INTEGER, changed INTEGER, top TEXT, entries INTEGER);
CREATE TABLE images (name TEXT PRIMARY KEY, place INTEGER, size INTEGER, stamp INTEGER, offset INTEGER,
                     stored INTEGER, method INTEGER, other TEXT) WITHOUT ROWID;
"""
_COLUMNS = "place, name, size, stamp, offset, stored, method, other"


class _Archives:
    """The members of all archives, in a SQLite file."""

    def __init__(self, places: Sequence[Place], reader: ImageReader, file: Path) -> None:
        self._places, self._reader = places, reader
        archives = [(i, place) for i, place in enumerate(places) if place.kind != "folder"]
        wanted = [(i, place.path, *_size_and_change(place.path)) for i, place in archives]
        if not file.is_file() or _indexed(file) != wanted:
            part = file.with_name(file.name + ".part")
            part.unlink(missing_ok=True)
            self._db = _connect(part)
            self._db.executescript(_SCHEMA)
            for row, (i, place) in zip(wanted, archives, strict=True):
                top, entries = self._add(i, place)
                self._db.execute("INSERT INTO archives VALUES (?, ?, ?, ?, ?, ?)", (*row, top, entries))
            self._db.close()
            os.replace(part, file)
        self._db = _connect(file)
        tops = self._db.execute("SELECT DISTINCT top FROM archives WHERE top != '' ORDER BY place")
        self._tops = [top for (top,) in tops]

    def find(self, name: str) -> Entry | None:
        rows = self._select([name]) or self._select([f"{top}/{name}" for top in self._tops])
        if not rows:
            return None
        first = rows[0]
        others = [row for row in rows[1:] if self._differ(first, row)]  # the same name below two top folders
        return first._replace(other=self._places[others[0].place].name) if others else first

    def counts(self) -> dict[int, int]:
        return dict(self._db.execute("SELECT place, entries FROM archives"))

    def close(self) -> None:
        self._db.close()

    def _select(self, names: list[str]) -> list[Entry]:
        marks = ", ".join("?" * len(names))
        query = f"SELECT {_COLUMNS} FROM images WHERE name IN ({marks}) ORDER BY place"
        return [Entry(*row) for row in self._db.execute(query, names)]

    def _add(self, index: int, place: Place) -> tuple[str, int]:
        """Index one archive; gives the one folder at its top ("" where there is none) and the number of members."""
        members = _zip_members(index, place.path) if place.kind == "zip" else _tar_members(index, place.path)
        tops: set[str] = set()
        entries = 0
        self._db.execute("BEGIN")
        for entry in members:
            if not _is_inside(entry.name):
                continue
            entry = entry._replace(name=str(PurePosixPath(entry.name)))
            top, slash, _ = entry.name.partition("/")
            if top == "__MACOSX":  # what macOS's archiver adds to every zip
                continue
            if len(tops) < 2:
                tops.add(top if slash else "")
            self._insert(entry)
            entries += 1
        self._db.execute("COMMIT")
        return (tops.pop() if len(tops) == 1 else ""), entries

    def _insert(self, entry: Entry) -> None:
        values = (entry.name, entry.place, *entry[2:])
        insert = "INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        if self._db.execute(f"INSERT OR IGNORE {insert}", values).rowcount:
            return
        [there] = self._select([entry.name])
        if there.place == entry.place:
            self._db.execute(f"INSERT OR REPLACE {insert}", values)
        elif not there.other and self._differ(there, entry):
            name = self._places[entry.place].name
            self._db.execute("UPDATE images SET other = ? WHERE name = ?", (name, entry.name))

    def _differ(self, one: Entry, two: Entry) -> bool:
        return one.size != two.size or self._checksum(one) != self._checksum(two)

    def _checksum(self, entry: Entry) -> int:
        """CRC-32; a zip states it, of a tar the bytes are read."""
        if self._places[entry.place].kind == "zip":
            return entry.stamp
        return zlib.crc32(self._reader.read(entry))


def _connect(file: Path) -> sqlite3.Connection:
    # No journal: a file that was not finished bears another name, and a finished one is only read.
    db = sqlite3.connect(file, isolation_level=None)
    db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16000;")
    return db


def _indexed(file: Path) -> list[tuple[Any, ...]]:
    db = _connect(file)
    try:
        return db.execute("SELECT place, path, bytes, changed FROM archives ORDER BY place").fetchall()
    except sqlite3.DatabaseError:
        return []
    finally:
        db.close()


def _size_and_change(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _zip_members(index: int, path: str) -> Iterator[Entry]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                method = _ENCRYPTED if info.flag_bits & 1 else info.compress_type
                yield Entry(
                    index,
                    _zip_name(info),
                    info.file_size,
                    info.CRC,
                    info.header_offset,
                    info.compress_size,
                    method,
                )
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"--images={path}: not a whole zip archive ({error}). An interrupted download ends like this: compare its "
            "size with the release's"
        ) from None


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A name that is not marked as UTF-8 is UTF-8 all the same if it can be: Info-ZIP writes such ones."""
    name = info.orig_filename
    if info.flag_bits & 0x800 or name.isascii():
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _tar_members(index: int, path: str) -> Iterator[Entry]:
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or it would remember every one
                if member.isreg() and not member.issparse():
                    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                    stamp = int(member.mtime * 1e9)
                    yield Entry(index, name, member.size, stamp, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(
            f"--images={path}: not a whole tar archive ({error}). An interrupted download ends like this: compare its "
            "size with the release's"
        ) from None


def _read_zip(file: IO[bytes], entry: Entry) -> bytes:
    file.seek(entry.offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC[0]):
        raise ImageError("the zip archive is damaged: no member begins where its directory says")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    file.seek(name + extra, os.SEEK_CUR)
    data = file.read(entry.stored)
    if entry.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1)
        except zlib.error as error:
            raise ImageError(f"the zip archive is damaged: {error}") from None
    if len(data) != entry.size or zlib.crc32(data) != entry.stamp:
        raise ImageError("the zip archive is damaged: the checksum of the member does not fit")
    return data


def _read_tar(file: IO[bytes], entry: Entry) -> bytes:
    file.seek(entry.offset)
    data = file.read(entry.size)
    if len(data) != entry.size:
        raise ImageError("the tar archive ends inside this member")
    return data


def _read_remote_member(place: Place, entry: Entry) -> bytes:
    """By one request for its range of bytes; by two where the header of a zip's member is unusually long."""
    files, path = fsspec.core.url_to_fs(place.path)
    here = entry._replace(offset=0)
    if place.kind == "tar":
        data = files.cat_file(path, start=entry.offset, end=entry.offset + entry.size) if entry.size else b""
        return _read_tar(io.BytesIO(data), here)
    end = entry.offset + _USUAL_HEADER + entry.stored
    data = files.cat_file(path, start=entry.offset, end=end)
    if len(data) >= _LOCAL_HEADER.size:
        _, name, extra = _LOCAL_HEADER.unpack(data[: _LOCAL_HEADER.size])
        whole = entry.offset + _LOCAL_HEADER.size + name + extra + entry.stored
        if whole > end:
            data += files.cat_file(path, start=end, end=whole)
    return _read_zip(io.BytesIO(data), here)
