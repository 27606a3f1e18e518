"""Cuts the stream of a release's samples into jobs, each the content of one shard, and lays them down in files.

What is cut does not depend on how many workers there are. Nothing is held per sample: the ids that were seen are in a
SQLite file, the samples of a job in BASE.samples, one JSON line each:

    {"sample": {number, id, task, files, conversations}, "images": an Entry or a Missing for each file}
    {"problem": {...}}     what the reader could not make a sample of, or a repeated id

A job's digest covers these lines, and with them every image's size and time of change or checksum, and `salt`: what
else decides the shard's bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.archives import Entry
from data_pipeline.image_store import ImageStore, Missing
from data_pipeline.records import Problem, RawSample

# Images are looked up for so many samples at once.
_BATCH = 256
# A shard of text alone ends here at the latest: what a worker holds of one is bounded.
MAX_SHARD_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class Job:
    """The content of one shard.

    base: the path that its files' names begin with: BASE.samples, and what data_pipeline.shard makes of it.
    digest: of all that decides the shard's bytes.
    rows: entries of the release, problems included.
    """

    base: Path
    digest: str
    rows: int

    @property
    def samples_path(self) -> Path:
        return self.base.with_name(self.base.name + ".samples")


class SeenIds:
    """Which ids came already, in a file.

    Args:
        file: made anew.
        number_repeated: a repeated id gets "#2", "#3", ... (LLaVA's releases repeat ids of different samples); else
            the sample is a Problem "duplicate_id".
    """

    def __init__(self, file: Path, number_repeated: bool) -> None:
        self._number = number_repeated
        file.unlink(missing_ok=True)
        self._db = sqlite3.connect(file, isolation_level=None)
        # The file is of no use to a later run: no journal, and one transaction that never ends.
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16000;"
        )
        self._db.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def tell_apart(self, sample: RawSample) -> RawSample | Problem:
        """The sample, with an id that no earlier one has; or why it is left out."""
        times = self._count(sample.id)
        if times == 1:
            return sample
        if not self._number:
            file = ", ".join(sample.files)
            detail = "an earlier entry has the same id (it counts, even where it is left out itself)"
            return Problem(sample.number, sample.id, sample.task, file, "duplicate_id", detail)
        while self._count(name := f"{sample.id}#{times}") > 1:
            times += 1
        return dataclasses.replace(sample, id=name, repeated=sample.id)

    def _count(self, id: str) -> int:
        """How often this id came, this time included."""
        key = hashlib.blake2b(id.encode(), digest_size=16).digest()
        insert = (
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET times = times + 1 RETURNING times"
        )
        return self._db.execute(insert, (key,)).fetchone()[0]

    def close(self) -> None:
        self._db.close()


def cut(
    release: Iterable[RawSample | Problem],
    store: ImageStore,
    ids: SeenIds,
    folder: Path,
    shard_bytes: int,
    salt: str,
) -> Iterator[Job]:
    """Jobs of consecutive samples of about shard_bytes (files of images, texts), each spooled in `folder`."""
    writer = _JobWriter(folder / "00000", salt)
    count = 1
    told = (ids.tell_apart(row) if isinstance(row, RawSample) else row for row in release)
    while batch := list(itertools.islice(told, _BATCH)):
        names = [file for row in batch if isinstance(row, RawSample) for file in row.files]
        found = iter(store.find(names))
        for row in batch:
            images = list(itertools.islice(found, len(row.files))) if isinstance(row, RawSample) else []
            writer.add(row, images)
            if writer.bytes >= shard_bytes or writer.rows >= MAX_SHARD_ROWS:
                yield writer.close()
                writer = _JobWriter(folder / f"{count:05d}", salt)
                count += 1
    last = writer.close()
    if last.rows:
        yield last
    else:
        last.samples_path.unlink()


def read(job: Job) -> Iterator[tuple[RawSample, list[Entry | Missing]] | Problem]:
    """What `cut` laid down for a job."""
    with open(job.samples_path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "problem" in row:
                yield Problem(**row["problem"])
                continue
            sample = RawSample(**row["sample"] | {"files": tuple(row["sample"]["files"])})
            # An Entry has more values than the two of a Missing.
            yield (
                sample,
                [Missing(*values) if len(values) == 2 else Entry(*values) for values in row["images"]],
            )


class _JobWriter:
    def __init__(self, base: Path, salt: str) -> None:
        self._base = base
        self._digest = hashlib.sha256(salt.encode())
        self._file = open(Job(base, "", 0).samples_path, "wb")  # noqa: SIM115 (closed by close)
        self.bytes = self.rows = 0

    def add(self, row: RawSample | Problem, images: list[Entry | Missing]) -> None:
        value: dict[str, Any]
        if isinstance(row, Problem):
            value = {"problem": row.__dict__}
        else:
            value = {"sample": row.__dict__, "images": images}
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._digest.update(line)
        self.bytes += len(line) + sum(image.size for image in images if isinstance(image, Entry))
        self.rows += 1

    def close(self) -> Job:
        self._file.close()
        return Job(self._base, self._digest.hexdigest(), self.rows)
