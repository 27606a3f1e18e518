"""The images of a release where they lie: in folders, zip archives or tar archives, which are not unpacked.

    find     name -> where its bytes are; in the parent process, in order
    read     where -> the bytes; in the workers

A name is looked up as it stands and, in archives, below the one folder at the top that all of an archive's members
share (images_191task_1k/...), if there is one. Of several folders and archives the first that has the name counts;
where another archive holds other bytes under it, that is told (Entry.other).

Names that leave the image folder are refused: absolute, with `..`, a backslash or a NUL, and a link in a folder that
leads out of it (unless follow_links).
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from etils import epath

from data_pipeline.archives import (
    ENCRYPTED,
    Archives,
    Entry,
    Place,
    archive_kind,
    is_inside,
    read_member,
    read_remote_member,
)
from data_pipeline.remote import check_name, download, is_remote, reaching, to_path
from vflax.errors import UserError
from vflax.folders import NotWritten

# No image file comes near it; a larger one would fill a worker's memory.
MAX_FILE_BYTES = 512 << 20
# Requests to a bucket that are under way at once.
REMOTE_THREADS = 32

_OPEN_ARCHIVES = 32
# A folder with one of these is a folder of images, whatever else is in it.
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# What lies beside the archives of a release; any other file without a suffix may be an image.
_NO_IMAGES = {"LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "CHECKSUMS", "MD5SUMS", "SHA256SUMS"}
_OTHER_SUFFIXES = (".gif", ".jpg", ".png", ".jpeg", ".webp")


class Missing(NamedTuple):
    """Why an image cannot be used; words as in records.Problem."""

    reason: str
    detail: str


def why_missing(error: OSError, path: str) -> str:
    """What to say of a file that is not there, or that nobody may read.

    Raises:
        NotWritten: any other error (of the disk, the network, a mount that is gone, too many open files): no word about
            the file, and no reason to leave its sample out.
    """
    about_the_file = FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError
    if isinstance(error, about_the_file) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return error.strerror or str(error)
    raise NotWritten(
        f"{path}: cannot be read ({error.strerror or error}); is the disk or the mount there? The same command goes on "
        "with what is finished"
    ) from error


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
        with reaching(os.fspath(images or "")):
            self.places = [] if images is None else _places(os.fspath(images), scratch)
        self.reader = ImageReader(self.places)
        self._folders = {
            i: _RemoteFolder(i, place.path) if is_remote(place.path) else _Folder(i, place.path, follow_links)
            for i, place in enumerate(self.places)
            if place.kind == "folder"
        }
        self._archives: Archives | None = None
        if len(self._folders) < len(self.places):
            self._archives = Archives(self.places, scratch / "images.sqlite", self.reader.read)
        self._counts = self._archives.counts() if self._archives else {}
        remote = any(isinstance(folder, _RemoteFolder) for folder in self._folders.values())
        self._threads = ThreadPoolExecutor(REMOTE_THREADS) if remote else None

    def find(self, names: Sequence[str]) -> list[Entry | Missing]:
        """Where these images are, in the same order. On a bucket many are asked for at once."""
        names = [str(PurePosixPath(name)) if is_inside(name) else name for name in names]
        # Not in the threads: SQLite's connection belongs to the one that made it.
        archived = [self._in_archives(name) for name in names]
        look = map if self._threads is None else self._threads.map
        return list(map(self._hinted, names, look(self._find, names, archived)))

    def report(self) -> list[dict[str, Any]]:
        """[{path: last component, kind, and of an archive what Archives.counts tells}]."""
        return [
            {"path": place.name, "kind": place.kind} | self._counts.get(i, {})
            for i, place in enumerate(self.places)
        ]

    def close(self) -> None:
        if self._archives:
            self._archives.close()
        if self._threads:
            self._threads.shutdown()
        self.reader.close()

    def _in_archives(self, name: str) -> Entry | None:
        return self._archives.find(name) if self._archives and is_inside(name) else None

    def _find(self, name: str, archived: Entry | None) -> Entry | Missing:
        if not self.places:
            return Missing(
                "image_missing", "no --images was named; give the folder or the archives that hold it"
            )
        if not is_inside(name):
            return Missing("path_outside", "expected a path inside the image folder")
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
        return missing or Missing("image_missing", self._not_in_archives())

    def _hinted(self, name: str, found: Entry | Missing) -> Entry | Missing:
        """With the name that an archive has instead, if it has one."""
        if self._archives and isinstance(found, Missing) and found.reason == "image_missing":
            detail = found.detail + _hint(filter(self._in_archives, _spellings(name)))
            return found._replace(detail=detail)
        return found

    def _not_in_archives(self) -> str:
        skipped = sum(count.get("skipped", 0) for count in self._counts.values())
        hint = (
            f"; {skipped:,} members were passed over (symbolic links, names with .. or \\)" if skipped else ""
        )
        return "no archive has a member of this name" + hint


def _spellings(name: str) -> list[str]:
    """The name with other suffixes: of OCR-VQA some that the annotations call .jpg are stored as .gif."""
    stem, suffix = os.path.splitext(name)
    return [stem + other for other in _OTHER_SUFFIXES if other != suffix]


def _hint(others: Iterable[str]) -> str:
    name = next(iter(others), None)
    return f"; but there is {os.path.basename(name)}: rename it, or the entry's image" if name else ""


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
            NotWritten: its archive cannot be opened (any more), or the bucket does not answer.
            ImageError: the archive is damaged there.
        """
        place = self.places[entry.place]
        if place.kind == "folder":
            if is_remote(place.path):
                path = epath.Path(place.path) / entry.name
                with reaching(path):
                    return path.read_bytes()
            with open(os.path.join(place.path, entry.name), "rb") as file:
                return file.read(MAX_FILE_BYTES)
        try:
            if is_remote(place.path):
                return read_remote_member(place, entry)
            archive = self._archive(entry.place)
        except OSError as error:
            raise NotWritten(
                f"{place.path}: the archive cannot be opened any more ({error.strerror or error}); the same command "
                "goes on with what is finished"
            ) from None
        return read_member(archive, place.kind, entry)

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
            if not archives and next(_children(path), None) is None:
                raise UserError(
                    f"--images={path}: an empty folder; is the disk mounted? For text alone leave --images out"
                )
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
        if archive_kind(path, refuse_compressed=False):
            archives.append(path)
        elif not path.suffix and path.name.upper() not in _NO_IMAGES:
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
    check_name(path, "--images")
    kind = archive_kind(path)
    if kind is None:
        raise UserError(f"--images={path}: neither a folder nor a zip or tar archive, by its first bytes")
    if not is_remote(path):
        return Place(kind, os.path.abspath(path), path.name)
    copies = scratch / "archives"
    copies.mkdir(exist_ok=True)
    url = os.fspath(path)
    # By the whole address: train/images.zip and val/images.zip are two.
    copy = copies / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{path.name}"
    download(path, copy)
    return Place(kind, os.fspath(copy), path.name, url)


def _usable(entry: Entry) -> Entry | Missing:
    if entry.size > MAX_FILE_BYTES:
        return Missing(
            "image_damaged", f"a file of {entry.size:,} bytes is no image; the limit is {MAX_FILE_BYTES:,}"
        )
    if entry.method == ENCRYPTED:
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
            reason = why_missing(error, path)
            return Missing("image_missing", reason + _hint(filter(os.path.exists, _spellings(path))))
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
        path = self._root / name
        try:
            with reaching(path):
                found = path.stat()
        except FileNotFoundError:
            return Missing("image_missing", "No such file or directory")
        if found.is_directory:
            return Missing("image_missing", "it is a directory")
        return Entry(self._index, name, found.length, int(found.mtime * 1e9))
