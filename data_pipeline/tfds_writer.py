"""Write samples as a TFDS directory of ArrayRecord shards, without TensorFlow.

A directory holds, beside what TFDS itself reads (dataset_info.json, features.json and the shards):

    contents.json        for each split: samples, sha256 over the samples in their order and over the index, lengths of
                         the shards, num_bytes, tasks with counts
    index/SPLIT.jsonl    for each sample of the split one line {id, task, conversations, images: how many, hashes:
                         of each image vflax.images.perceptual_hash as 16 hex digits, or null where the writer has
                         not decoded it}, so that lengths are measured, mixtures drawn and copies of a picture found
                         without reading the images

The directory as a whole is replaced by a rename: a reader sees the old one or the new one, never a mix. On a bucket,
which has no renames, dataset_info.json is put there last (data_pipeline.publish).

Nothing grows with the number of samples but the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import example_serializer

from data_pipeline import publish
from data_pipeline.remote import is_remote, reaching
from vflax import folders
from vflax.errors import UserError

DATASET_NAME = "vflax"
CONTENTS_FILE = "contents.json"
INDEX_DIR = "index"
DEFAULT_SHARD_BYTES = 256 << 20
_BLOCK = 1 << 20  # bytes that are copied at once
# Groups of one record: larger ones make random reads ten times slower. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def features() -> tfds.features.FeaturesDict:
    """The features of every vflax dataset.

    images is a sequence of encoded files (JPEG, PNG, ...), verbatim: Sequence(Text) is the one form in which
    TFDS carries several images of different sizes without TensorFlow. sizes is int32 [images, 2], (width,
    height) in pixels. conversations is LLaVA's list of {from, value} as JSON.
    """
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "task": text(),
            "conversations": text(),
            "images": tfds.features.Sequence(text()),
            "sizes": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
            "source": text(),
        }
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard that still bears a temporary name.

    Beside it lie PATH.jsonl, its part of the index, and PATH.digests, the sha256 of each sample, 32 bytes each.
    """

    path: Path
    samples: int
    num_bytes: int
    tasks: Mapping[str, int]
    on_bucket: epath.Path | None = None  # where the samples are, if not at `path`: copied from there, unseen

    @property
    def index_path(self) -> Path:
        return self.path.with_name(self.path.name + ".jsonl")

    @property
    def digests_path(self) -> Path:
        return self.path.with_name(self.path.name + ".digests")


class ShardWriter:
    """Writes one shard, its part of the index and its samples' digests (see Shard); `close` gives the Shard."""

    def __init__(self, path: Path) -> None:
        files = Shard(path, 0, 0, {})
        self._path = path
        self._features = features()
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
        self._records = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._index = open(files.index_path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._digests = open(files.digests_path, "wb")  # noqa: SIM115 (closed by close)
        self._samples = 0
        self._tasks: Counter[str] = Counter()
        self.num_bytes = 0

    def __len__(self) -> int:
        return self._samples

    def write(self, example: Mapping[str, Any], hashes: Sequence[int] | None = None) -> None:
        """Append one sample: {id, task, conversations, images, sizes, source}.

        conversations is a list of {from, value}; images a list of encoded files (bytes); sizes a list of
        (width, height). hashes is images.perceptual_hash of each image, None where nobody has decoded them.
        """
        unknown = set(example) ^ set(self._features)
        if unknown:
            raise ValueError(
                f"an example has the keys {sorted(self._features)}; differing: {sorted(unknown)}"
            )
        if len(example["sizes"]) != len(example["images"]):
            raise ValueError(f"sample {example['id']}: one (width, height) per image is expected in sizes")
        conversations = json.dumps(example["conversations"], ensure_ascii=False, separators=(",", ":"))
        record = self._serialize({**example, "conversations": conversations})
        self._records.write(record)
        self.num_bytes += len(record)
        self._digests.write(_digest(example, conversations))
        self._samples += 1
        self._tasks[example["task"]] += 1
        line = {
            "id": example["id"],
            "task": example["task"],
            "conversations": example["conversations"],
            "images": len(example["images"]),
            "hashes": None if hashes is None else [f"{value:016x}" for value in hashes],
        }
        self._index.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _serialize(self, example: Mapping[str, Any]) -> bytes:
        sizes = np.asarray(example["sizes"], np.int32).reshape(-1, 2)
        encoded = self._features.encode_example(
            {**example, "sizes": sizes, "images": list(example["images"])}
        )
        # Deterministic: the fields of a protobuf map have no order of their own, and the same samples
        # shall give the same bytes.
        return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    def close(self) -> Shard:
        """Finish the files.

        Raises:
            OSError: the disk is full, or fails otherwise; it may be told only now.
        """
        self._index.close()
        self._digests.close()
        try:
            self._records.close()
        except RuntimeError as error:  # ArrayRecord's words for it
            full = "No space left" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
        return Shard(self._path, self._samples, self.num_bytes, dict(self._tasks))


def _digest(example: Mapping[str, Any], conversations: str) -> bytes:
    """sha256 over the fields, each with its length, so that no two samples share a byte string."""
    digest = hashlib.sha256()
    texts = [example[key].encode() for key in ("id", "task", "source")] + [conversations.encode()]
    for field in [*texts, *example["images"]]:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def write_dataset(
    out: str | os.PathLike[str],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    description: str = "",
) -> None:
    """Write splits of samples to the directory `out`; splits that it holds already are kept or replaced.

    For writers of one's own; images are not looked at (data_pipeline.convert is the checked way).

    Args:
        out: the directory; created when absent.
        splits: {split name: samples}, a sample being {id: str, task: str, conversations: list of
            {from, value}, images: list of encoded files (bytes), sizes: list of (width, height),
            source: str, where it comes from}.
        shard_bytes: a shard is closed once it holds this many bytes.
        description: one line about the data, for dataset_info.json.

    Raises:
        UserError: `out` exists and is not a vflax dataset, or a split is empty or badly named.
    """
    for split in splits:
        check_split(split)
    with staging(out) as stage:
        for split, examples in splits.items():
            stage.add_split(split, _write_shards(stage.scratch / split, examples, shard_bytes))
        stage.commit(description)


def _write_shards(scratch: Path, examples: Iterable[Mapping[str, Any]], shard_bytes: int) -> list[Shard]:
    scratch.mkdir(parents=True)
    shards: list[Shard] = []
    writer: ShardWriter | None = None
    try:
        for example in examples:
            if writer is None:
                writer = ShardWriter(scratch / f"{len(shards):05d}")
            writer.write(example)
            if writer.num_bytes >= shard_bytes:
                shards.append(writer.close())
                writer = None
    finally:
        if writer is not None:
            shards.append(writer.close())
    return shards


# ---------------------------------------------------------------------------------------------------------
# Putting a directory together and swapping it in


class Stage:
    """A directory in the making: begins with what `out` holds, gains splits, becomes `out`.

    Where `out` is on a bucket it begins with the small files only, and what it gained is uploaded.
    """

    def __init__(self, out: epath.Path, root: Path) -> None:
        self._out = out
        self.new = root / "new"
        self.scratch = root / "scratch"
        self.scratch.mkdir(parents=True)
        self._contents = _copy_existing(out, self.new)
        self._on_bucket: dict[str, epath.Path] = {}

    def has_split(self, split: str) -> bool:
        return split in self._contents

    def add_split(self, split: str, shards: Sequence[Shard]) -> None:
        """Take finished shards, in their order, as the split; a split of that name is replaced.

        The shards' own files stay where they are as well (hard links): who was killed before `commit` has them still.
        """
        check_split(split)
        shards = [shard for shard in shards if shard.samples]
        if not shards:
            raise UserError(f"{self._out}: split {split!r} would hold no sample")
        for old in self.new.glob(f"{DATASET_NAME}-{split}.array_record-*"):
            old.unlink()
        template = _template(self.new, split)
        for i, shard in enumerate(shards):
            name = template.sharded_filepath(shard_index=i, num_shards=len(shards))
            if shard.on_bucket is None:
                _link(os.fspath(shard.path), os.fspath(name))
            else:
                name.touch()
                self._on_bucket[name.name] = shard.on_bucket
        index = self.add_file(f"{INDEX_DIR}/{split}.jsonl", [shard.index_path for shard in shards])
        digest = hashlib.sha256()
        for shard in shards:
            with open(shard.digests_path, "rb") as digests:
                for block in iter(lambda: digests.read(_BLOCK), b""):
                    digest.update(block)
        tasks: Counter[str] = Counter()
        for shard in shards:
            tasks.update(shard.tasks)
        self._contents[split] = {
            "samples": sum(shard.samples for shard in shards),
            # Over the samples, not the files: how they were cut into shards makes no difference.
            "sha256": digest.hexdigest(),
            "index_sha256": index,
            "shard_lengths": [shard.samples for shard in shards],
            "num_bytes": sum(shard.num_bytes for shard in shards),
            "tasks": dict(sorted(tasks.items())),
        }

    def add_file(self, name: str, parts: Sequence[Path]) -> str:
        """Write these files, one after the other, as one file of the directory; gives its sha256."""
        path = self.new / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # not truncated: the old name is a hard link into `out`
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    for block in iter(lambda: source.read(_BLOCK), b""):
                        file.write(block)
                        digest.update(block)
        return digest.hexdigest()

    def commit(self, description: str = "") -> None:
        """Write the metadata and let the new directory take the place of the old."""
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=entry["shard_lengths"],
                num_bytes=entry["num_bytes"],
                filename_template=_template(self.new, split),
            )
            for split, entry in sorted(self._contents.items())
        ]
        _write_json(self.new / CONTENTS_FILE, {"splits": dict(sorted(self._contents.items()))})
        for name in ("dataset_info.json", "features.json"):
            (self.new / name).unlink(missing_ok=True)
        with self._placeholders():
            tfds.folder_dataset.write_metadata(
                data_dir=os.fspath(self.new),
                features=features(),
                split_infos=infos,
                check_data=False,
                description=description or "Samples of conversations with images, written by vflax.",
            )
        if is_remote(self._out):
            with reaching(self._out):
                publish.upload(self.new, self._out, self._on_bucket)
        else:
            folders.swap(self.new, Path(self._out))

    @contextlib.contextmanager
    def _placeholders(self) -> Iterator[None]:
        """Empty files in the place of shards that are on a bucket only: TFDS looks for their names."""
        made = []
        for split, entry in self._contents.items():
            count = len(entry["shard_lengths"])
            for i in range(count):
                name = _template(self.new, split).sharded_filepath(shard_index=i, num_shards=count)
                if not name.exists():
                    name.touch()
                    made.append(name)
        yield
        for name in made:
            name.unlink()

    def write_json(self, name: str, value: Any) -> None:
        """Put a JSON file beside the data, e.g. a report."""
        _write_json(self.new / name, value)

    def read_json(self, name: str) -> Any | None:
        """A JSON file that the directory already holds, or None."""
        path = self.new / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else None


@contextlib.contextmanager
def staging(out: str | os.PathLike[str], scratch: Path | None = None) -> Iterator[Stage]:
    """A Stage that is removed, whatever happens; `out` changes only by Stage.commit.

    It lies beside `out`, where `out` is local; else in the folder `scratch`.
    """
    if not is_remote(out):
        local = Path(os.path.realpath(out))
        check_target(epath.Path(local))
        with folders.beside(local) as root:
            yield Stage(epath.Path(local), root)
        return
    target = epath.Path(out)
    check_target(target)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        yield Stage(target, Path(temporary))


def check_split(split: str) -> None:
    """Refuse a split name that TFDS or the file names would not bear.

    Raises:
        UserError: it does not consist of lower-case letters, digits and _.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
        raise UserError(f"split {split!r}: expected a lower-case letter, then letters, digits or _")


def check_target(out: epath.Path) -> None:
    """Refuse to write over something that is not a vflax dataset.

    Raises:
        UserError: `out` is a file, a directory with other things in it, or the root of a mounted disk.
    """
    with reaching(out):
        if not out.exists():
            return
        is_folder = out.is_dir()
        is_other = is_folder and any(out.iterdir()) and not (out / CONTENTS_FILE).exists()
    if not is_remote(out) and os.path.ismount(os.path.realpath(out)):
        raise UserError(f"{out} is where a disk is mounted, which cannot be renamed; name a folder below it")
    if not is_folder:
        raise UserError(f"{out} is a file; expected a directory, or nothing, to write the dataset to")
    if is_other:
        raise UserError(
            f"{out} holds files, but no {CONTENTS_FILE}: it was not written by vflax. "
            "Name a new directory, or one that an earlier conversion wrote (its other splits are kept)."
        )


def _copy_existing(out: epath.Path, new: Path) -> dict[str, Any]:
    """Hard links to all that `out` holds (a copy costs 36 GB for Vision-Flan); gives its splits.

    Of a directory on a bucket only JSON files are fetched: the others stay there as they are.
    """
    with reaching(out):
        if not (out / CONTENTS_FILE).exists():
            new.mkdir()
            return {}
        if is_remote(out):
            new.mkdir()
            for path in out.glob("*.json"):
                path.copy(new / path.name)
        else:
            shutil.copytree(out, new, copy_function=_link)
    return json.loads((new / CONTENTS_FILE).read_text("utf-8"))["splits"]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _template(directory: Path, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=os.fspath(directory),
        dataset_name=DATASET_NAME,
        split=split,
        filetype_suffix="array_record",
    )


def _write_json(path: Path, value: Any) -> None:
    path.unlink(missing_ok=True)  # the old name may be a hard link into the directory that is being replaced
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
