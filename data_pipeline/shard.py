"""Makes one shard of one job, in a worker: images are read, samples judged, what is good is written.

Of a finished shard there are, beside the files of tfds_writer.Shard:

    BASE.quarantine    the samples left out, one JSON line (records.Problem) each
    BASE.findings      what is odd about those in it, one JSON line (records.Finding) each
    BASE.done          the record that says it is finished, written last: {digest of the job, counts, sizes of files}

A shard without that record, or with one of another digest, does not count and is made again.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

import vflax.conversation
import vflax.images
from data_pipeline import archives, hygiene, image_store, records, spool, tfds_writer
from data_pipeline.archives import Entry
from data_pipeline.image_store import ImageReader, Missing
from data_pipeline.records import Finding, Problem, RawSample
from data_pipeline.remote import Unreachable, reaching
from data_pipeline.spool import Job
from data_pipeline.tfds_writer import Shard, ShardWriter

# Images of a bucket that a worker fetches at once.
_AHEAD = 16
_SUFFIXES = (".jsonl", ".digests", ".quarantine", ".findings")
AnyPath = TypeVar("AnyPath", Path, epath.Path)


@dataclass(frozen=True)
class Result:
    """What is known of a finished shard: a record of fixed size, whatever it holds."""

    base: Path
    digest: str
    rows: int
    samples: int
    num_bytes: int
    tasks: dict[str, int]
    reasons: dict[str, int]
    findings: dict[str, int]

    @property
    def shard(self) -> Shard:
        return Shard(self.base, self.samples, self.num_bytes, self.tasks)

    @property
    def quarantine_path(self) -> Path:
        return self.base.with_name(self.base.name + ".quarantine")

    @property
    def findings_path(self) -> Path:
        return self.base.with_name(self.base.name + ".findings")


@functools.cache
def code_version() -> str:
    """A hash of what decides the bytes of a shard beside its job: the modules that make it, versions of libraries."""
    digest = hashlib.sha256()
    for file in code_files():
        digest.update(file.read_bytes())
    for package in ("pillow", "imagehash", "array_record", "tensorflow-datasets"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


def code_files() -> list[Path]:
    """The source of the modules that decide the bytes of a shard, given the samples."""
    modules = (archives, hygiene, image_store, records, spool, tfds_writer, vflax.conversation, vflax.images)
    return [Path(__file__), *(Path(str(module.__file__)) for module in modules)]


def finished(job: Job, base: epath.Path | None = None) -> Result | None:
    """The shard of this job, if an earlier run finished it and its files are there.

    base: the path that its files' names begin with, where they lie elsewhere than the job's (on a bucket).

    Raises:
        Unreachable: the bucket does not answer.
    """
    place = base or epath.Path(job.base)
    try:
        with reaching(place):
            content = done_path(place).read_bytes()
            there = [path.stat().length for path in files(place)]
        record = json.loads(content)
        if record["digest"] != job.digest or record.pop("files") != there:
            return None
        return Result(base=job.base, **record)
    except Unreachable:  # a ValueError, as every UserError is
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make(job: Job, reader: ImageReader, source: str, tick: Callable[[int], None]) -> Result:
    """Make the shard of a job.

    Args:
        job: its samples are deleted in the end.
        reader: of the images.
        source: the release, for the examples.
        tick: called after each entry of the release with the number of its images.
    """
    done_path(job.base).unlink(missing_ok=True)
    blank = Result(job.base, job.digest, job.rows, 0, 0, {}, {}, {})
    reasons: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    writer = ShardWriter(job.base)
    try:
        with (
            warnings.catch_warnings(),
            open(blank.quarantine_path, "w", encoding="utf-8") as quarantine,
            open(blank.findings_path, "w", encoding="utf-8") as findings,
        ):
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF data and palettes
            for row, images, fetches in _with_images(spool.read(job), reader):
                checked = row if isinstance(row, Problem) else hygiene.check(row, fetches, source)
                if isinstance(checked, Problem):
                    quarantine.write(_line(checked))
                    reasons[checked.reason] += 1
                else:
                    writer.write(checked.example, checked.hashes)
                    for finding in [*checked.findings, *_doubts(row, images)]:
                        findings.write(_line(finding))
                        kinds[finding.kind] += 1
                tick(len(images))
    finally:
        shard = writer.close()
    result = Result(
        job.base,
        job.digest,
        job.rows,
        shard.samples,
        shard.num_bytes,
        dict(shard.tasks),
        dict(reasons),
        dict(kinds),
    )
    _finish(result)
    job.samples_path.unlink()
    return result


def _doubts(sample: RawSample | Problem, images: list[Entry | Missing]) -> list[Finding]:
    """Findings of a repeated id, and of images that lie in two archives."""
    assert isinstance(sample, RawSample)
    about = (sample.number, sample.id, sample.task)
    detail = f"an earlier entry has the id {sample.repeated!r}; here it is {sample.id!r}"
    found = [Finding(*about, "", "repeated_id", detail)] if sample.repeated else []
    return found + [
        Finding(
            *about, file, "in_two_archives",
            f"{image.other} holds other bytes under this name; the first archive counts",
        )
        for file, image in zip(sample.files, images, strict=True)
        if isinstance(image, Entry) and image.other
    ]  # fmt: skip


_Row = tuple[RawSample | Problem, list[Entry | Missing], list[hygiene.Fetch]]


def _with_images(
    rows: Iterator[tuple[RawSample, list[Entry | Missing]] | Problem], reader: ImageReader
) -> Iterator[_Row]:
    """Each row with what gives its images' bytes. On a bucket they are fetched some rows ahead."""
    if not reader.is_remote:
        for row in rows:
            sample, images = (row, []) if isinstance(row, Problem) else row
            yield (
                sample,
                images,
                [_fetch(image, lambda e: functools.partial(reader.read, e)) for image in images],
            )
        return
    with ThreadPoolExecutor(_AHEAD) as threads:
        under_way: collections.deque[_Row] = collections.deque()
        for row in rows:
            sample, images = (row, []) if isinstance(row, Problem) else row
            fetches = [_fetch(image, lambda e: _result(threads.submit(reader.read, e))) for image in images]
            under_way.append((sample, images, fetches))
            if len(under_way) > _AHEAD:
                yield under_way.popleft()
        yield from under_way


def _fetch(image: Entry | Missing, start: Callable[[Entry], Callable[[], bytes]]) -> hygiene.Fetch:
    return image if isinstance(image, Missing) else start(image)


def _result(future: Future[bytes]) -> Callable[[], bytes]:
    return future.result


def _line(value: Problem | Finding) -> str:
    return json.dumps(value.__dict__, ensure_ascii=False) + "\n"


def done_path(base: AnyPath) -> AnyPath:
    """The record that says that the shard is finished."""
    return base.with_name(base.name + ".done")


def files(base: AnyPath) -> list[AnyPath]:
    """The files of a shard without that record; the first holds the samples."""
    return [base, *(base.with_name(base.name + suffix) for suffix in _SUFFIXES)]


def _finish(result: Result) -> None:
    """First the files are on the disk, then the record that says so."""
    for path in files(result.base):
        _sync(path)
    sizes = [path.stat().st_size for path in files(result.base)]
    record: dict[str, Any] = {**result.__dict__, "files": sizes}
    del record["base"]
    done = done_path(result.base)
    part = done.with_name(done.name + ".part")
    part.write_text(json.dumps(record), encoding="utf-8")
    _sync(part)
    os.replace(part, done)
    _sync(done.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
