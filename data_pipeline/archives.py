"""Zip and tar archives, read without being unpacked: an index of all their members, and the bytes of one.

The index is a SQLite file: name, archive, offset, sizes, method, checksum. While it is made, a zip's directory is held
in memory (about 600 bytes a member), a tar's is not. In one archive the last member of a name counts, as when it is
unpacked; of several archives the first that has the name. A hard link in a tar is read as the file that it names;
symbolic links, sparse files and names that lead out of the archive are passed over and counted.
"""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import fsspec
from etils import epath

from data_pipeline.remote import reaching
from vflax.errors import UserError
from vflax.folders import NotWritten
from vflax.images import ImageError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_USUAL_HEADER = 1024  # bytes: names and extra fields of a zip's members are seldom longer
ENCRYPTED = -1  # as a method

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


def archive_kind(path: epath.Path, refuse_compressed: bool = True) -> Literal["zip", "tar"] | None:
    """By the first bytes: the shards of the full Vision-Flan release are zips without a suffix.

    Raises:
        UserError: nobody may read it, or it is compressed as a whole.
        NotWritten: it cannot be read for a reason of the disk's or the network's.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except PermissionError as error:
        raise UserError(f"--images={path}: {error.strerror or error}") from None
    except OSError as error:
        raise NotWritten(f"--images={path}: cannot be read ({error.strerror or error})") from None
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


def is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name) and bool(path.parts)


# ---------------------------------------------------------------------------------------------------------
# The index

_SCHEMA = """
CREATE TABLE archives (place INTEGER PRIMARY KEY, path TEXT, bytes INTEGER, changed INTEGER, code TEXT,
                       top TEXT, entries INTEGER, skipped INTEGER);
CREATE TABLE images (name TEXT PRIMARY KEY, place INTEGER, size INTEGER, stamp INTEGER, offset INTEGER,
                     stored INTEGER, method INTEGER, other TEXT) WITHOUT ROWID;
"""
_COLUMNS = "place, name, size, stamp, offset, stored, method, other"


class Archives:
    """The members of all archives.

    Args:
        places: folders among them are passed over.
        file: the index; one that an earlier run made is used if the archives and this module have not changed.
        read: gives the bytes of a member, where they must be compared.
    """

    def __init__(self, places: Sequence[Place], file: Path, read: Callable[[Entry], bytes]) -> None:
        self._places, self._read = places, read
        archives = [(i, place) for i, place in enumerate(places) if place.kind != "folder"]
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        wanted = [(i, place.path, *_size_and_change(place.path), code) for i, place in archives]
        if not file.is_file() or _indexed(file) != wanted:
            part = file.with_name(file.name + ".part")
            part.unlink(missing_ok=True)
            self._db = _connect(part)
            self._db.executescript(_SCHEMA)
            for row, (i, place) in zip(wanted, archives, strict=True):
                counted = self._add(i, place)
                self._db.execute("INSERT INTO archives VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, *counted))
            self._db.close()
            os.replace(part, file)
        self._db = _connect(file)
        tops = self._db.execute("SELECT DISTINCT top FROM archives WHERE top != '' ORDER BY place")
        self._tops = [top for (top,) in tops]

    def find(self, name: str) -> Entry | None:
        rows = self._select([name, *(f"{top}/{name}" for top in self._tops)])
        if not rows:
            return None
        first = min(rows, key=lambda row: (row.place, row.name != name))
        rows = [row for row in rows if row.place != first.place]
        others = [row for row in rows if self._differ(first, row)]  # below another top folder, or none
        return first._replace(other=self._places[others[0].place].name) if others else first

    def counts(self) -> dict[int, dict[str, int]]:
        """{place: {entries, and skipped where there are any}}."""
        rows = self._db.execute("SELECT place, entries, skipped FROM archives")
        return {
            place: {"entries": entries} | ({"skipped": skipped} if skipped else {})
            for place, entries, skipped in rows
        }

    def close(self) -> None:
        self._db.close()

    def _select(self, names: list[str]) -> list[Entry]:
        marks = ", ".join("?" * len(names))
        query = f"SELECT {_COLUMNS} FROM images WHERE name IN ({marks}) ORDER BY place"
        return [Entry(*row) for row in self._db.execute(query, names)]

    def _add(self, index: int, place: Place) -> tuple[str, int, int]:
        """Index one archive; gives the one folder at its top ("" where there is none), how many members it has, and how
        many were passed over."""
        members = _zip_members(index, place.path) if place.kind == "zip" else _tar_members(index, place.path)
        tops: set[str] = set()
        entries = skipped = 0
        self._db.execute("BEGIN")
        for entry in members:
            if entry is None or not is_inside(entry.name):
                skipped += 1
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
        return (tops.pop() if len(tops) == 1 else ""), entries, skipped

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
        return zlib.crc32(self._read(entry))


def _connect(file: Path) -> sqlite3.Connection:
    # No journal: a file that was not finished bears another name, and a finished one is only read.
    db = sqlite3.connect(file, isolation_level=None)
    db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16000;")
    return db


def _indexed(file: Path) -> list[tuple[Any, ...]]:
    db = _connect(file)
    try:
        return db.execute("SELECT place, path, bytes, changed, code FROM archives ORDER BY place").fetchall()
    except sqlite3.DatabaseError:
        return []
    finally:
        db.close()


def _size_and_change(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _zip_members(index: int, path: str) -> Iterator[Entry | None]:
    """The files of a zip; None for a symbolic link."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if stat.S_ISLNK(info.external_attr >> 16):
                    yield None
                    continue
                method = ENCRYPTED if info.flag_bits & 1 else info.compress_type
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


def _tar_members(index: int, path: str) -> Iterator[Entry | None]:
    """The files of a tar, then its hard links; None for a symbolic link, a sparse file, or a link to nothing."""
    targets: set[str] = set()  # of hard links
    for member in _tar_headers(path):
        if member.islnk():
            targets.add(member.linkname)
        elif _is_plain(member):
            yield _tar_entry(index, member)
        elif not member.isdir():
            yield None
    if not targets:
        return
    known: dict[str, Entry] = {}
    for member in _tar_headers(path):  # once more: a link has its file's bytes as they stood before it
        entry = _tar_entry(index, member) if _is_plain(member) else None
        if member.islnk():
            target = known.get(member.linkname)
            entry = target and target._replace(name=_tar_name(member))
            yield entry
        if entry and member.name in targets:
            known[member.name] = entry


def _tar_headers(path: str) -> Iterator[tarfile.TarInfo]:
    """
    Raises:
        UserError: a header is damaged, or the end is missing.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or it would remember every one
                yield member
            # tarfile takes a damaged or cut header for the end.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if not block:
                raise tarfile.ReadError(
                    f"it ends at byte {archive.offset:,} without the two empty blocks that close a tar; if it was "
                    f"written so, `head -c 1024 /dev/zero >>{os.path.basename(path)}` adds them"
                )
            if block != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header is readable at byte {archive.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"--images={path}: not a whole tar archive ({error}). An interrupted download ends like this: compare its "
            "size with the release's"
        ) from None


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _tar_entry(index: int, member: tarfile.TarInfo) -> Entry:
    stamp = int(member.mtime * 1e9) if abs(member.mtime) < 9e9 else 0  # an extended header may say anything
    return Entry(index, _tar_name(member), member.size, stamp, member.offset_data, member.size)


def _tar_name(member: tarfile.TarInfo) -> str:
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------
# The bytes of a member


def read_member(file: IO[bytes], kind: Kind, entry: Entry) -> bytes:
    """The bytes of one member of an open archive.

    Raises:
        ImageError: the archive is damaged there.
    """
    return _read_zip(file, entry) if kind == "zip" else _read_tar(file, entry)


def read_remote_member(place: Place, entry: Entry) -> bytes:
    """The same of an archive on a bucket, by one request for its range of bytes; by two where a zip's header is long.

    Raises:
        FileNotFoundError: the archive is not there any more.
        Unreachable: the bucket does not answer.
        ImageError: the archive is damaged there.
    """
    here = entry._replace(offset=0)
    if place.kind == "tar":
        data = _fetch(place.path, entry.offset, entry.offset + entry.size)
        return _read_tar(io.BytesIO(data), here)
    end = entry.offset + _USUAL_HEADER + entry.stored
    data = _fetch(place.path, entry.offset, end)
    if len(data) >= _LOCAL_HEADER.size:
        _, name, extra = _LOCAL_HEADER.unpack(data[: _LOCAL_HEADER.size])
        whole = entry.offset + _LOCAL_HEADER.size + name + extra + entry.stored
        if whole > end:
            data += _fetch(place.path, end, whole)
    return _read_zip(io.BytesIO(data), here)


def _fetch(url: str, start: int, end: int) -> bytes:
    if start == end:
        return b""
    with reaching(url):
        files, path = fsspec.core.url_to_fs(url)
        return files.cat_file(path, start=start, end=end)


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
