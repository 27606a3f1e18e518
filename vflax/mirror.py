"""gs:// folders and their copies on this machine's disk.

Everything but checkpoints works on a local folder, whatever lies behind it. `fetch` copies a dataset, weights or the
model of a run from a bucket to $VFLAX_CACHE/gs/BUCKET/FOLDER, and only what has changed since the last time. `opened`
gives a run with --workdir=gs://... a mirror of its own there, $VFLAX_CACHE/runs/PROCESS/BUCKET/FOLDER, which is made
equal to the bucket when the run begins, and whose files go to the bucket

    config.json, status.json, metrics.jsonl,     by process 0, when they have changed: every PUSH seconds, at each save
    goodput.jsonl, model/, frozen/, preflight/,  before it begins, and in the end
    tensorboard/, summary.*, ...
    profile/, bad-batch-*, hang-*                the same, by the process that wrote them
    export/                                      as a whole, export.json last
    checkpoints/                                 never through here: Orbax writes to the bucket itself
    .lock                                        vflax/lease.py; the compilation cache stays on the host's disk

An object cannot be appended to and is replaced in one step, so a reader of the bucket sees each file whole, as it was
some seconds ago. What a checkpoint promises (metrics up to its step, the model, the frozen weights) is there before its
save begins; what a killed host had written after its last push is lost, and a continued run writes it again. Of
goodput.jsonl the lost lines are seen as a gap, which counts as restart. vflax/lease.py keeps a second run out.

`remote` tells from a path under the copy where it lies on the bucket: nothing else needs to know that there is one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from etils import epath
from filelock import FileLock, Timeout

from vflax import bucket
from vflax.bucket import Entry
from vflax.errors import UserError
from vflax.lease import RENEW, Lease
from vflax.progress import copying

# Seconds between two looks for what has changed.
PUSH = 30.0
# Of a run, what a reader of its model needs; a run that goes on needs its records, too.
_MODEL = ("model", "frozen")
_RECORDS = ("preflight",)
_EXPORT = "export/export.json"
# With these a folder counts as whole, so they come last.
_LAST = ("frozen.json", "status.json", "summary.json")
# What other processes than the first write.
_OTHERS = ("profile/*", "bad-batch-*", "hang-*")
_SUMS = ".crc32c.json"
_WEIGHTS = (".safetensors", ".bin")


def cache_root() -> Path:
    """Where things that can be made again are kept: $VFLAX_CACHE, else ~/.cache/vflax."""
    return Path(os.environ.get("VFLAX_CACHE") or "~/.cache/vflax").expanduser().absolute()


def remote(path: Path) -> Path | epath.Path:
    """Where a file of a copy lies on its bucket; any other path is returned as it is."""
    whole = path.absolute()
    for folder, levels in ((cache_root() / "gs", 0), (cache_root() / "runs", 1)):
        if whole.is_relative_to(folder):
            parts = whole.relative_to(folder).parts[levels:]
            return bucket.path(bucket.SCHEME + "/".join(parts))
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


@functools.cache  # a run asks for its starting point several times
def fetch(url: str, *, key: str = "", weights: bool = True, only: tuple[str, ...] = ()) -> Path:
    """Copy a folder, or a file, of a bucket to this machine's disk; what is there and has the same checksum stays.

    Args:
        url: gs://BUCKET/FOLDER: a dataset, weights, a run (its model, not its checkpoints, which are read from the
            bucket); or a file.
        key: what the user called it, for messages.
        weights: False: without files of weights.
        only: names of files: those of them that are there, and nothing else.

    Returns:
        The local folder or file.

    Raises:
        UserError: it is not there, cannot be read, or the disk has no room for it.
    """
    url = bucket.check_url(url, key or "path")
    target = cache_root() / "gs" / url.removeprefix(bucket.SCHEME)
    with bucket.naming_key(key) if key else contextlib.nullcontext():
        if (entry := bucket.file_entry(url)) is not None:
            _copy(url.rpartition("/")[0], target.parent, {target.name: entry})
            return target
        wanted = _of_model(url)
        if only:
            wanted = {name: entry for name, entry in wanted.items() if name in only}
        elif not weights:
            wanted = {name: entry for name, entry in wanted.items() if not name.endswith(_WEIGHTS)}
        if not wanted:
            raise UserError(f"{url}: not there, or no {' or '.join(only) or 'file'} in it; correct the path")
        _copy(url, target, wanted, whole=weights and not only)
    return target


def _of_model(url: str) -> dict[str, Entry]:
    """What `fetch` takes of a folder: all of it, but of a run only what its model needs."""
    files, folders = bucket.children(url)
    if "model" in folders and bucket.file_entry(f"{url}/model/config.json") is not None:
        return {name: entry for name, entry in files.items() if name.endswith((".json", ".jsonl"))} | _under(
            url, _MODEL
        )
    return bucket.listing(url)


def _under(url: str, folders: tuple[str, ...]) -> dict[str, Entry]:
    return {f"{f}/{name}": entry for f in folders for name, entry in bucket.listing(f"{url}/{f}").items()}


def _copy(url: str, folder: Path, wanted: Mapping[str, Entry], whole: bool = False) -> None:
    """Bring `wanted` into `folder`; with `whole`, what an earlier call brought and is no longer wanted goes."""
    folder.mkdir(parents=True, exist_ok=True)
    # Another process of this machine may want the same.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        sums = _Sums(folder)
        missing = {name: entry for name, entry in wanted.items() if not sums.same(name, entry)}
        if whole:
            for name in sums.names() - wanted.keys():
                sums.forget(name)
                (folder / name).unlink(missing_ok=True)
        needed = sum(entry.size for entry in missing.values())
        _check_room(folder, needed, url)
        if needed > 2**20:
            print(f"{url}: copying {len(missing)} files, {needed / 1e9:.2f} GB, to {folder}", file=sys.stderr)
        with copying(url, needed) as advance:

            def bring(name: str) -> None:
                bucket.download(f"{url}/{name}", folder / name, missing[name], advance)
                sums.note(name, missing[name].crc32c)

            try:
                bucket.in_threads(bring, sorted(missing))
            except FileNotFoundError as error:
                raise UserError(
                    f"{error}: it went away while it was copied; run the same command again"
                ) from None
            finally:
                sums.save()


def _check_room(folder: Path, needed: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{url}: {needed / 1e9:.1f} GB to copy, but {folder} has {free / 1e9:.1f} GB free; set VFLAX_CACHE to a "
            "folder on a larger disk"
        )


class _Sums:
    """Checksums of the files of a copy, known again without reading a file that has the same size and date."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / _SUMS
        self._known: dict[str, list[object]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = dict(json.loads(self._file.read_text()))

    def names(self) -> set[str]:
        return set(self._known)

    def same(self, name: str, entry: Entry) -> bool:
        """Whether the local file has the content that the bucket has."""
        file = self._folder / name
        if not file.is_file() or file.stat().st_size != entry.size:
            return False
        known = self._known.get(name)
        if known is None or known[:2] != _stat(file):
            self.note(name, bucket.crc32c(file))
        return self._known[name][2] == entry.crc32c

    def note(self, name: str, crc32c: str) -> None:
        self._known[name] = [*_stat(self._folder / name), crc32c]

    def forget(self, name: str) -> None:
        self._known.pop(name, None)

    def save(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self._known))
        part.replace(self._file)


def _stat(file: Path) -> list[object]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


# --- a run's own ------------------------------------------------------------------------------------------------------


class _Mirror:
    """A run's WORKDIR: a local folder, its bucket, and a thread that brings what changes there."""

    def __init__(self, url: str, folder: Path, process: int) -> None:
        self._url, self._folder, self._process = url, folder, process
        self._lease = Lease(url) if process == 0 else None
        self._known: dict[str, list[object]] = {}  # of what both sides have
        self._pushing = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="bucket", daemon=True)
        self._said = ""

    def begin(self, say: Callable[[str], None]) -> None:
        """Claim it, make the local folder equal to it, and begin to push."""
        if self._lease is not None:
            self._lease.acquire(say)
        try:
            self.pull(clean=True)
        except BaseException:
            self._release()
            raise
        self._thread.start()

    def end(self) -> None:
        """Push what is left, and let go."""
        self._ended.set()
        self._thread.join()
        try:
            self.push()
        finally:
            self._release()

    def pull(self, clean: bool = False) -> None:
        """Bring what the bucket has; with `clean`, what it has not goes. Later than in the beginning the first process,
        which writes it, knows better."""
        if self._process == 0 and not clean:
            return
        files, _ = bucket.children(self._url)
        files.pop(".lock", None)
        wanted = files | _under(self._url, (*_MODEL, *_RECORDS))
        if (entry := bucket.file_entry(f"{self._url}/{_EXPORT}")) is not None:
            wanted[_EXPORT] = entry
        if clean:
            for name in self._local(everything=True).keys() - wanted.keys():
                (self._folder / name).unlink()
        _copy(self._url, self._folder, wanted)
        with self._pushing:
            self._known |= {name: facts for name, facts in self._local().items() if name in wanted}

    def push(self) -> None:
        """Bring what has changed here to the bucket.

        Raises:
            UserError: the bucket cannot be written, or another run has taken it over.
        """
        with self._pushing:
            if self._lease is not None:
                self._lease.check()
            now = self._local()
            changed = sorted(name for name, facts in now.items() if self._known.get(name) != facts)
            gone = sorted(self._known.keys() - now.keys())
            last = [name for name in changed if name.rpartition("/")[2] in _LAST]
            bucket.in_threads(
                lambda name: self._push_one(name, now[name]), [n for n in changed if n not in last]
            )
            for name in last:
                self._push_one(name, now[name])
            for name in gone:
                bucket.remove(f"{self._url}/{name}")
                self._known.pop(name)

    def _push_one(self, name: str, facts: list[object]) -> None:
        try:
            bucket.upload(self._folder / name, f"{self._url}/{name}")
        except FileNotFoundError:  # replaced or gone this very moment
            return
        self._known[name] = facts

    def publish(self, name: str, last: str) -> None:
        """Bring a whole folder of it to the bucket, see `publish`."""
        with self._pushing:
            if self._lease is not None:
                self._lease.check()
            publish(self._folder / name, f"{self._url}/{name}", last)

    def _local(self, everything: bool = False) -> dict[str, list[object]]:
        """{name: size and date} of the files that this process brings to the bucket."""
        found = {}
        for root, folders, files in os.walk(self._folder):
            at = Path(root).relative_to(self._folder)
            folders[:] = [
                f for f in folders if not f.startswith(".") and (everything or str(at / f) != "export")
            ]
            for file in files:
                name = (at / file).as_posix()
                if file.startswith(".") or not (everything or self._mine(name)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[name] = _stat(self._folder / name)
        return found

    def _mine(self, name: str) -> bool:
        return self._process == 0 or any(fnmatch.fnmatchcase(name, pattern) for pattern in _OTHERS)

    def _keep_up(self) -> None:
        """Renew the claim and push, until the end; what fails is tried again, and fails the run only at a save."""
        pushed = time.monotonic()
        while not self._ended.wait(min(RENEW, PUSH)):
            try:
                if self._lease is not None:
                    self._lease.renew()
                if time.monotonic() - pushed >= PUSH:
                    self.push()
                    pushed = time.monotonic()
                self._said = ""
            except Exception as error:
                if str(error) != self._said:
                    self._said = str(error)
                    print(f"warning: {error}; trying again every {RENEW:.0f} s", file=sys.stderr, flush=True)

    def _release(self) -> None:
        if self._lease is not None:
            with contextlib.suppress(UserError):  # it runs out by itself
                self._lease.release()


_OPEN: dict[Path, _Mirror] = {}


@contextlib.contextmanager
def opened(workdir: str, process: int, say: Callable[[str], None] = print) -> Iterator[Path]:
    """The local folder of a --workdir, for as long as a run is in it: a path's is itself, gs://'s its mirror.

    Args:
        workdir: as given.
        process: index of this process. The first one claims the folder; each of a machine has a mirror of its own.
        say: what to tell a person.

    Raises:
        UserError: another run is in it, or the bucket cannot be used.
    """
    if not bucket.is_url(workdir):
        yield Path(workdir).expanduser().absolute()
        return
    url = bucket.check_url(workdir, "--workdir")
    folder = cache_root() / "runs" / str(process) / url.removeprefix(bucket.SCHEME)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.run"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{url}: another process trains in it; wait for its end or stop it") from None
    from vflax.give_up import tell_too  # not for the tools that only read

    try:
        mirror = _Mirror(url, folder, process)
        mirror.begin(say)
        _OPEN[folder] = mirror
        tell_too(lambda _reason, _hang: mirror.push())
        try:
            yield folder
        except BaseException:
            try:
                mirror.end()
            except UserError as error:  # what ended the run is told by itself
                print(f"warning: {error}", file=sys.stderr)
            raise
        else:
            mirror.end()
        finally:
            del _OPEN[folder]
    finally:
        lock.release()


def push(workdir: Path) -> None:
    """Bring what has changed in a run's folder to its bucket, now; for a folder on a disk this does nothing.

    Raises:
        UserError: the bucket cannot be written, or another run has taken it over.
    """
    if workdir in _OPEN:
        _OPEN[workdir].push()


def pull(workdir: Path) -> None:
    """Bring what another process has pushed; for a folder on a disk this does nothing.

    Raises:
        UserError: the bucket cannot be read.
    """
    if workdir in _OPEN:
        _OPEN[workdir].pull()


def push_folder(workdir: Path, name: str, last: str) -> None:
    """Bring one whole folder of a run to its bucket, as `publish` does; for a folder on a disk this does nothing."""
    if workdir in _OPEN:
        _OPEN[workdir].publish(name, last)


# --- whole folders ----------------------------------------------------------------------------------------------------


def publish(folder: Path, url: str, last: str) -> None:
    """Make a folder of a bucket equal to a local one. While that goes on, the file `last`, with which the folder counts
    as whole, is not there.

    Raises:
        UserError: the bucket cannot be written.
    """
    new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    old = bucket.listing(url)
    if last in old:
        bucket.remove(f"{url}/{last}")
    with copying(url, sum(path.stat().st_size for path in new.values())) as advance:

        def bring(name: str) -> None:
            bucket.upload(new[name], f"{url}/{name}")
            advance(new[name].stat().st_size)

        bucket.in_threads(bring, sorted(new.keys() - {last}))
        bucket.in_threads(
            lambda name: bucket.remove(f"{url}/{name}"), sorted(old.keys() - new.keys() - {last})
        )
        bring(last)


@contextlib.contextmanager
def writing(out: str, last: str, replace: bool) -> Iterator[Path]:
    """The local folder in which a tool makes what --out names. For gs:// it goes to the bucket in the end, and is then
    removed here; what goes wrong before leaves the bucket as it was.

    Args:
        out: as given.
        last: the file that says that it is whole.
        replace: whether one that is there, and is whole, may give way.

    Raises:
        UserError: something else is there, or the bucket cannot be used.
    """
    if not bucket.is_url(out):
        yield Path(out)
        return
    url = bucket.check_url(out, "--out")
    there = bucket.listing(url)
    if there and not (replace and last in there):
        is_none = " and is none that is whole" if replace else ""
        raise UserError(
            f"{url}: is there already{is_none}; choose another --out{'' if replace else ', or --replace'}"
        )
    folder = cache_root() / "out" / str(os.getpid()) / url.removeprefix(bucket.SCHEME)
    try:
        yield folder
        publish(folder, url, last)
    finally:
        shutil.rmtree(cache_root() / "out" / str(os.getpid()), ignore_errors=True)
