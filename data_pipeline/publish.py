"""Puts a finished dataset on a bucket so that nobody reads half of it.

A bucket has no renames of folders. What every reader opens first, dataset_info.json, comes last, after contents.json
and all that the two speak of. Where files that are there already change, it is taken away before that: until the new
one is there, a reader is told that there is no dataset. A split that only joins disturbs nobody.

A new place is marked before all else by a contents.json without splits: an upload that was killed can go on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from etils import epath

_UPLOADS = 8  # at once
_LAST = ("contents.json", "dataset_info.json")


def upload(new: Path, out: epath.Path, on_bucket: Mapping[str, epath.Path] | None = None) -> None:
    """Copy the files of the folder `new` to `out`, and delete there what a replaced split has no longer.

    on_bucket: of which files `new` holds only the name, and where on a bucket they are: they do not come through here.
    """
    on_bucket = on_bucket or {}

    def copy(name: str) -> None:
        if name in on_bucket:
            _copy_on_bucket(on_bucket[name], out / name)
        else:
            _copy(new, out, name)

    names = sorted(os.path.relpath(path, new) for path in new.rglob("*") if path.is_file())
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    # A split's shards are named DATASET-SPLIT.array_record-I-of-N.
    splits = {name.partition(".array_record-")[0] for name in names if ".array_record-" in name}
    old = {
        name for name in there if ".array_record-" in name and name.partition(".array_record-")[0] in splits
    }
    if _LAST[0] not in there:
        (out / _LAST[0]).write_text('{"splits": {}}\n')
    if old and _LAST[1] in there:
        (out / _LAST[1]).unlink()
    with ThreadPoolExecutor(_UPLOADS) as threads:
        list(threads.map(copy, [name for name in names if name not in _LAST]))
    for name in _LAST:
        _copy(new, out, name)
    for name in sorted(old - set(names)):
        (out / name).unlink()


def _copy(new: Path, out: epath.Path, name: str) -> None:
    epath.Path(new / name).copy(out / name, overwrite=True)


def _copy_on_bucket(source: epath.Path, target: epath.Path) -> None:
    """epath's copy would fetch the bytes and send them again."""
    files, path = fsspec.core.url_to_fs(os.fspath(source))
    files.cp_file(path, fsspec.core.url_to_fs(os.fspath(target))[1])
