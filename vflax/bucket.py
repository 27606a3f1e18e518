"""gs://: who talks to Google Cloud Storage does it through here, with gcsfs.

Orbax and TensorStore write checkpoints by themselves, with the same time limit. Every failure
that a person can mend comes out as a UserError that names the path; what is temporary is tried again by gcsfs (six
times, half a minute in all when a request is refused at once) and by TensorStore before it comes out.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from etils import epath

from vflax.constants import GS_TIME_LIMIT
from vflax.errors import UserError

SCHEME = "gs://"
# Orbax's mark of a checkpoint that is whole: on a bucket no folder can be renamed for that.
COMMITTED = "commit_success.txt"
# Seconds for one whole request: the largest carry 50 MB.
_REQUEST_LIMIT = 300.0
# Times that TensorStore asks again, waiting up to 32 s in between: about five minutes, so that a disturbance of the
# network costs a run time and not its last steps.
TENSORSTORE_CONTEXT = {"gcs_request_retries": {"max_retries": 12}}
# Bytes that are fetched, or sent, at once, and how many transfers go on at the same time.
_BLOCK = 32 << 20
_TRANSFERS = 8


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies on a bucket."""
    return os.fspath(path).startswith(SCHEME)


def check_url(url: str, key: str) -> str:
    """A folder on a bucket, without a slash at its end; `key` is what the user called it.

    Raises:
        UserError: it names no folder, or gcsfs is not installed.
    """
    bucket, _, folder = url.removeprefix(SCHEME).rstrip("/").partition("/")
    if not bucket or not folder or folder.startswith("/") or "//" in folder:
        raise UserError(f"{key}={url}: expected gs://BUCKET/FOLDER")
    with naming_key(key):
        limit()
    return f"{SCHEME}{bucket}/{folder}"


@contextlib.contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Put the name of a flag or key in front of what is said of its value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


@functools.cache
def limit() -> None:
    """Give every gs:// open of this process its time limit: gcsfs's, and so epath's and Orbax's. A process that this
    one starts has to call it itself, before its first open. TensorStore has its own from vflax/__init__.py. Listings
    are not kept: other hosts write, too.

    Raises:
        UserError: gcsfs is not installed.
    """
    try:
        import aiohttp
        import gcsfs  # noqa: F401 (fsspec imports it late, and says less)
    except ImportError as error:
        raise UserError(
            f"gs:// needs a package that is not there ({error}): pip install 'vflax[gcs]'"
        ) from None
    fsspec.config.conf.setdefault("gs", {}).update(
        requests_timeout=aiohttp.ClientTimeout(
            total=_REQUEST_LIMIT, sock_connect=GS_TIME_LIMIT, sock_read=GS_TIME_LIMIT
        ),
        use_listings_cache=False,
    )
    # It prints the traceback of each error that it raises as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class Unreachable(UserError):
    """A bucket that does not answer: the same may go well later."""


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """Use a bucket; for a path on a disk this does nothing.

    Raises:
        FileNotFoundError: it is not there.
        UserError: every other failure, naming the path and what to do. Unreachable: it may go well later.
    """
    if not is_url(path):
        yield
        return
    try:
        yield
    except (FileNotFoundError, FileExistsError, UserError):
        raise
    except Exception as error:
        # gcsfs raises its own, aiohttp's, google-auth's and OSError; TensorStore ValueError.
        raise _explained(os.fspath(path), error) from None


def _explained(path: str, error: Exception) -> UserError:
    bucket = SCHEME + path.removeprefix(SCHEME).partition("/")[0]
    said = " ".join(f"{type(error).__name__} {error}".split())[:300]
    code = str(getattr(error, "code", ""))
    if "Forbidden" in said or code == "403" or "403" in said.partition(":")[0]:
        return UserError(
            f"{path}: no permission ({said}). The account that runs this needs roles/storage.objectUser on {bucket}: "
            f"gcloud storage buckets add-iam-policy-binding {bucket} --role=roles/storage.objectUser --member=..."
        )
    if code == "401" or type(error).__module__.startswith("google.auth") or "Anonymous caller" in said:
        return UserError(
            f"{path}: no credentials ({said}). On your own machine: gcloud auth application-default login; on a VM: "
            "create it with a service account and the scope cloud-platform"
        )
    return Unreachable(
        f"{path}: the bucket does not answer ({said}). Check the network and the name of the bucket, and run the same "
        "command again"
    )


def path(url: str) -> epath.Path:
    """A path for reading and writing, with the limits of this file.

    Raises:
        UserError: gcsfs is not installed.
    """
    limit()
    return epath.Path(url)


def _files() -> Any:
    limit()
    return fsspec.filesystem("gcs")


# --- files and folders ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A file on a bucket: bytes, and the CRC-32C of them as the bucket tells it."""

    size: int
    crc32c: str


def listing(url: str) -> dict[str, Entry]:
    """{name under `url`: Entry} of all files of a folder and of its folders; {} where nothing is.

    Raises:
        UserError: as `reaching`.
    """
    found = _asked(url, "find", {})
    prefix = url.removeprefix(SCHEME).rstrip("/") + "/"
    return {
        name.removeprefix(prefix): _entry(facts)
        for name, facts in found.items()
        if name.startswith(prefix) and not name.endswith("/")  # a folder's own mark
    }


def children(url: str) -> tuple[dict[str, Entry], set[str]]:
    """(files, names of folders) that lie in a folder itself; nothing where there is no such folder.

    Raises:
        UserError: as `reaching`.
    """
    found = _asked(url, "ls", [])
    files, folders = {}, set()
    for facts in found:
        name = facts["name"].rstrip("/").rpartition("/")[2]
        if facts["type"] == "directory":
            folders.add(name)
        elif not facts["name"].endswith("/") and facts["name"] != url.removeprefix(SCHEME):
            files[name] = _entry(facts)
    return files, folders


def _asked(url: str, question: str, nothing: Any) -> Any:
    """What gcsfs says, in detail, of what lies under a folder; `nothing` where there is no such folder."""
    with reaching(url):
        try:
            return getattr(_files(), question)(url, detail=True)
        except FileNotFoundError:
            return nothing


def file_entry(url: str) -> Entry | None:
    """Of a file; None: there is none of that name.

    Raises:
        UserError: as `reaching`.
    """
    with reaching(url):
        try:
            facts = _files().info(url)
        except FileNotFoundError:
            return None
    return _entry(facts) if facts["type"] == "file" else None


def _entry(facts: Mapping[str, Any]) -> Entry:
    return Entry(int(facts["size"]), facts.get("crc32c", ""))


def download(url: str, target: Path, entry: Entry, advance: Callable[[int], None]) -> None:
    """Fetch a file block by block; it has its name when it is whole. What an earlier, broken off copy has is kept.

    Args:
        url: the file.
        target: where it goes.
        entry: what it is.
        advance: is told how many bytes have come.

    Raises:
        UserError: as `reaching`; or its checksum is not that of the bucket, twice.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{base64.b64decode(entry.crc32c).hex()}.part")
    for _ in range(2):
        if _complete(url, part, entry, advance) == entry.crc32c:
            os.replace(part, target)
            return
        part.unlink()
    raise UserError(
        f"{url}: what arrives has another checksum than the bucket tells; it may be changing: run again"
    )


def _complete(url: str, part: Path, entry: Entry, advance: Callable[[int], None]) -> str:
    """Bring the rest of a file; returns the CRC-32C of what is there then."""
    import google_crc32c  # comes with gcsfs

    sum_ = google_crc32c.Checksum()
    with part.open("ab+") as file:
        file.seek(0)
        while data := file.read(_BLOCK):
            sum_.update(data)
            advance(len(data))
        while (have := file.tell()) < entry.size:
            with reaching(url):
                data = _files().cat_file(url, start=have, end=min(have + _BLOCK, entry.size))
            if not data:
                break
            file.write(data)
            sum_.update(data)
            advance(len(data))
    return base64.b64encode(sum_.digest()).decode()


def crc32c(file: Path) -> str:
    """The CRC-32C of a local file, written as a bucket writes it."""
    import google_crc32c

    sum_ = google_crc32c.Checksum()
    with file.open("rb") as opened:
        while data := opened.read(_BLOCK):
            sum_.update(data)
    return base64.b64encode(sum_.digest()).decode()


def upload(file: Path, url: str) -> None:
    """Write a file; its old content stays until the new one is whole. The bucket's checksum is compared.

    Raises:
        UserError: as `reaching`; no such bucket.
    """
    with existing_bucket(url), reaching(url):
        if file.stat().st_size <= _BLOCK:
            # At once: a run may be writing on.
            _files().pipe_file(url, file.read_bytes(), consistency="md5")
        else:
            _files().put_file(os.fspath(file), url, consistency="md5")


def remove(url: str) -> None:
    """Delete a file that may be gone already.

    Raises:
        UserError: as `reaching`.
    """
    with reaching(url), contextlib.suppress(FileNotFoundError):
        _files().rm_file(url)


@contextlib.contextmanager
def existing_bucket(url: str) -> Iterator[None]:
    """To write where there is no such bucket is an error that a person can mend.

    Raises:
        UserError: naming the bucket.
    """
    try:
        yield
    except FileNotFoundError:
        bucket = SCHEME + url.removeprefix(SCHEME).partition("/")[0]
        raise UserError(
            f"{url}: there is no bucket {bucket}; correct the name, or make it: gcloud storage buckets create {bucket}"
        ) from None


def in_threads(work: Callable[[str], object], names: list[str]) -> None:
    """Do the same for several names, some at the same time; the first failure ends it."""
    with ThreadPoolExecutor(_TRANSFERS) as threads:
        try:
            list(threads.map(work, names))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


# --- one object, written only where it is as it was -------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """An object: its content, its generation, and how many seconds ago, by the bucket's own clock, it was written."""

    content: bytes
    generation: str
    age: float


def read_version(url: str) -> Version | None:
    """None: it is not there.

    Raises:
        UserError: as `reaching`.
    """
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    try:
        with reaching(url):
            headers, answer = _files().call("GET", "b/{}/o/{}", bucket, name)
            facts = json.loads(answer)
            content = _files().cat_file(url)
    except FileNotFoundError:
        return None
    now = email.utils.parsedate_to_datetime(headers["Date"])
    written = datetime.datetime.fromisoformat(facts["updated"])
    return Version(content, str(facts["generation"]), (now - written).total_seconds())


def write_version(url: str, content: bytes, generation: str) -> str:
    """Write an object if its generation is still this one ("0": if it is not there); returns the new generation.

    Raises:
        FileExistsError: it has another.
        UserError: as `reaching`; no such bucket.
    """
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    files = _files()
    with existing_bucket(url), reaching(url):
        _, answer = files.call(
            "POST", f"{files._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o", uploadType="media",
            name=name, ifGenerationMatch=generation, data=content, headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
    return str(json.loads(answer)["generation"])


def remove_version(url: str, generation: str) -> None:
    """Delete an object if its generation is still this one; else leave it.

    Raises:
        UserError: as `reaching`.
    """
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    with reaching(url), contextlib.suppress(FileNotFoundError, FileExistsError):
        _files().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)
