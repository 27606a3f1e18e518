"""Random access to the samples of a dataset that data_pipeline.convert wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from vflax.data import cache
from vflax.data.mixture import task_codes
from vflax.errors import UserError

_NEEDED = ("id", "task", "conversations", "images")
_REMEDY = "Expected a directory written by `python -m data_pipeline.convert`; write it again"


@dataclasses.dataclass(frozen=True)
class SampleText:
    """A sample without its images.

    conversations is LLaVA's list of {"from", "value"}; hashes are images.perceptual_hash of its images, None where the
    dataset's writer did not decode them.
    """

    id: str
    task: str
    conversations: list[dict[str, Any]]
    num_images: int
    hashes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation with its images, each an encoded file (JPEG, PNG, ...) as bytes."""

    id: str
    task: str
    conversations: list[dict[str, Any]]
    images: list[bytes]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A sample of the release that data_pipeline.convert did not write, and why; task is "" where it has none."""

    id: str
    task: str
    reason: str


def open_source(path: str | os.PathLike[str], split: str, key: str = "") -> Source:
    """Open one split of a dataset directory; `key` is that of the config which names it, for messages.

    Raises:
        UserError: no such directory or split, not a TFDS dataset with vflax's features, or a missing shard.
    """
    root = epath.Path(path)
    where = f"{key}: {root}" if key else str(root)
    if not (root / "dataset_info.json").exists():
        what = "it has no dataset_info.json" if root.exists() else "there is no such directory"
        raise UserError(f"{where}: {what}. {_REMEDY}, or correct the path")
    try:
        builder = tfds.builder_from_directory(root)
    except Exception as error:  # TFDS raises many kinds on a damaged dataset_info.json or features.json
        raise UserError(f"{where}: TFDS cannot read its dataset_info.json ({error}). {_REMEDY}") from error
    missing = [name for name in _NEEDED if name not in builder.info.features]
    if missing:
        found = ", ".join(builder.info.features)
        raise UserError(f"{where}: the features {', '.join(missing)} are missing; it has {found}. {_REMEDY}")
    if split not in builder.info.splits:
        known = ", ".join(sorted(builder.info.splits))
        raise UserError(f"{where}: there is no split {split!r}; it has: {known}")
    lost = [name for name in builder.info.splits[split].filepaths if not epath.Path(name).exists()]
    if lost:
        raise UserError(
            f"{where}: {len(lost)} shards of split {split} are missing, first {lost[0].name}. {_REMEDY}"
        )
    return Source(root, split, builder)


def splits(path: str | os.PathLike[str]) -> list[str]:
    """The splits of a dataset directory; none where it cannot be read."""
    info = epath.Path(path) / "dataset_info.json"
    return [entry["name"] for entry in json.loads(info.read_text())["splits"]] if info.exists() else []


class Source:
    """One split: `len`, `source[i]` -> Sample. Picklable and safe to read from many threads.

    Attributes:
        path: the dataset directory.
        split: its split.
        fingerprint: hex digest of the samples and their order; how they lie in shards makes no difference.
        index_digest: hex digest of the index, which holds what the writer found out about images; None without one.
    """

    def __init__(self, path: epath.Path, split: str, builder: tfds.core.DatasetBuilder) -> None:
        self.path, self.split = path, split
        # No SkipDecoding is needed: images are a sequence of Text, which TFDS hands out as bytes.
        self._records = builder.as_data_source(split)
        contents = path / "contents.json"
        self._entry: dict[str, Any] | None = None
        if contents.exists():
            self._entry = json.loads(contents.read_text())["splits"][split]
        self.fingerprint = self._entry["sha256"] if self._entry else self._metadata_digest()
        self.index_digest: str | None = self._entry["index_sha256"] if self._entry else None
        self._tasks: list[str] | None = None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place from 0 to len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.path} ({self.split})")
        record = self._records[index]
        return Sample(
            id=record["id"].decode(),
            task=record["task"].decode(),
            conversations=json.loads(record["conversations"]),
            images=list(record["images"]),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tasks": None}

    @property
    def tasks(self) -> list[str]:
        """The task of each sample."""
        if self._tasks is None:
            names: dict[str, str] = {}  # one string object per task, not per sample
            self._tasks = [names.setdefault(text.task, text.task) for text in self.texts()]
        return self._tasks

    def load_tasks(self, fallback_cache: str | os.PathLike[str] | None = None) -> None:
        """Fill `tasks`; reading them from all texts takes seconds for a million samples and is done once.

        Kept at PATH/preflight/tasks-FINGERPRINT.npz, where that cannot be written at `fallback_cache`.
        """
        if self._tasks is not None:
            return
        places, file = cache.folders(self.path, fallback_cache), f"tasks-{self.fingerprint[:32]}.npz"
        self._tasks = cache.load(places, file, self._read_tasks)
        if self._tasks is None:
            names, [codes] = task_codes([self.tasks])
            cache.keep(places, file, lambda path: np.savez(path, names=np.array(names, str), codes=codes))

    def _read_tasks(self, path: Path) -> list[str] | None:
        with np.load(path) as arrays:
            names, codes = arrays["names"].tolist(), arrays["codes"].tolist()
        return [names[code] for code in codes] if len(codes) == len(self) else None

    def texts(self) -> Iterator[SampleText]:
        """All samples without their images, in order: from index/SPLIT.jsonl, which is small.

        A dataset that has no index (another writer's) is read record by record instead.

        Raises:
            UserError: the index is not the one that belongs to the shards.
        """
        if self._entry is None:
            for i in range(len(self)):
                sample = self[i]
                yield SampleText(sample.id, sample.task, sample.conversations, len(sample.images))
            return
        index = self.path / "index" / f"{self.split}.jsonl"
        digest = hashlib.sha256()
        if index.exists():
            with index.open("rb") as lines:
                for line in lines:
                    digest.update(line)
                    entry = json.loads(line)
                    yield _sample_text(entry)
        if digest.hexdigest() != self._entry["index_sha256"]:
            raise UserError(
                f"{index} is missing or is not the one of these shards (contents.json). {_REMEDY}"
            )

    def left_out(self) -> list[LeftOut]:
        """The samples of the release that its conversion left out, from manifest.json and the list that it names.

        A dataset without manifest.json (another program's) tells of none.

        Raises:
            UserError: manifest.json or the list is missing or cannot be read.
        """
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            return []
        file = manifest
        try:
            report = json.loads(manifest.read_text())["splits"].get(self.split)
            if not report or not report["quarantined"]:
                return []
            file = self.path / report["quarantine_file"]
            with file.open("r", encoding="utf-8") as lines:
                entries = [json.loads(line) for line in lines]
            return [
                LeftOut(entry["id"] or f"record {entry['number']}", entry["task"], entry["reason"])
                for entry in entries
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: who was left out of split {self.split} cannot be read ({error!r}). {_REMEDY}"
            ) from error

    def _metadata_digest(self) -> str:
        """For a dataset without contents.json: its metadata, which holds the size of each shard."""
        digest = hashlib.sha256(self.split.encode())
        for name in ("dataset_info.json", "features.json"):
            digest.update((self.path / name).read_bytes())
        return digest.hexdigest()


def _sample_text(entry: dict[str, Any]) -> SampleText:
    """A line of the index; one that an earlier version wrote has no hashes."""
    hashes = entry.get("hashes")
    return SampleText(
        entry["id"],
        entry["task"],
        entry["conversations"],
        entry["images"],
        None if hashes is None else tuple(int(value, 16) for value in hashes),
    )
