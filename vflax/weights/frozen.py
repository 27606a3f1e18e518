"""The frozen store, WORKDIR/frozen/HASH: weights that do not learn, in the bytes and the dtype they came in.

It holds the frozen parameters' tensors and the carried ones under canonical names, sharded safetensors, and
frozen.json with a digest of each tensor. HASH is a digest of those, so equal content has one place whoever
wrote it. Checkpoints refer to it instead of holding it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vflax import folders
from vflax.errors import UserError
from vflax.models.llava import LlavaConfig
from vflax.models.lora import LoraConfig
from vflax.small_files import read_json
from vflax.weights import names
from vflax.weights.file_source import FileSource, TensorSource
from vflax.weights.load import check
from vflax.weights.safetensors_io import CODES, Index, TensorSpec, and_more, row_blocks, write_shards
from vflax.weights.views import WatchedSource

_STEM, _RECORD = "frozen", "frozen.json"
_SHARD_BYTES = 4 << 30
_HASH_LENGTH = 32


class FrozenSource(FileSource):
    """A frozen store, opened for reading."""

    def __init__(self, folder: Path) -> None:
        """Open WORKDIR/frozen/HASH.

        Raises:
            UserError: when it is not there, incomplete or damaged.
        """
        if not (folder / _RECORD).is_file():
            raise UserError(
                f"{folder / _RECORD}: not there. A run's frozen weights lie in {folder}: copy that folder along with "
                "the rest of WORKDIR"
            )
        super().__init__(folder, (), _STEM)


def save_frozen(
    source: TensorSource,
    config: LlavaConfig,
    frozen_paths: Iterable[str],
    workdir: Path,
    lora: LoraConfig | None = None,
) -> str:
    """Keep what a run does not train. One process calls it; one block of a tensor is held at a time.

    Args:
        source: the starting weights, all of which are checked against the model here.
        config: the model.
        frozen_paths: parameter paths that do not learn.
        workdir: the run's folder.
        lora: the model's adapters.

    Returns:
        HASH, the name of the folder under WORKDIR/frozen. A store with this content that is there is reused.

    Raises:
        UserError: listing all missing, mis-shaped and unexpected tensors.
    """
    check(source, config, lora=lora)
    table = names.table(config, lora)
    frozen = {name for path in frozen_paths for name in table[names.weight_of(path)].names}
    wanted = sorted(frozen | set(names.carried(config)))
    specs = [TensorSpec(name, source.dtype(name), source.shape(name)) for name in wanted]
    store = workdir / "frozen"
    if store.is_dir() and any(store.glob(f"*/{_RECORD}")):
        # A restart before the first checkpoint: reading is cheaper than writing all of it again.
        digest = _hash(specs, {spec.name: _digest(source, spec) for spec in specs})
        if (store / digest / _RECORD).is_file():
            return digest
    hashers: dict[str, Any] = {}

    def read(name: str, index: Index) -> np.ndarray:
        block = np.ascontiguousarray(source.read(name, index))
        hashers.setdefault(name, hashlib.sha256()).update(block.reshape(-1).view(np.uint8).data)
        return block

    with folders.beside(store / "store") as root:
        new = root / "new"
        new.mkdir()
        write_shards(new, _STEM, specs, _SHARD_BYTES, read)
        digests = {name: hasher.hexdigest() for name, hasher in hashers.items()}
        digest = _hash(specs, digests)
        record = {"hash": digest, "tensors": dict(sorted(digests.items()))}
        (new / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if not (store / digest / _RECORD).is_file():
            new.rename(store / digest)
    return digest


def verify_frozen(folder: Path, advance: Callable[[int], None]) -> None:
    """Read a store back and compare it with what was read to write it, by the digests.

    Args:
        folder: WORKDIR/frozen/HASH.
        advance: is told how many bytes were read, for a progress bar.

    Raises:
        UserError: naming each tensor that differs, is missing or should not be there.
    """
    source, wanted = WatchedSource(FrozenSource(folder), advance), read_json(folder / _RECORD)["tensors"]
    specs = _specs(source)
    found = {spec.name: _digest(source, spec) for spec in specs}
    every = sorted(wanted.keys() | found.keys())
    problems = [
        f"{name}: {_difference(name, wanted, found)}" for name in every if wanted.get(name) != found.get(name)
    ]
    if not problems and _hash(specs, found) != folder.name:
        problems = ["names, dtypes, shapes and values together are not those of its name"]
    if problems:
        raise UserError(
            f"{folder}: the written tensors are not those of the model, the disk may be failing:\n  "
            + "\n  ".join(problems[:20] + and_more(problems, 20))
        )


def content_hash(source: TensorSource) -> str:
    """Of all tensors, names and dtypes, as a store of them would be called: the same however the files are cut."""
    specs = _specs(source)
    return _hash(specs, {spec.name: _digest(source, spec) for spec in specs})


def _specs(source: TensorSource) -> list[TensorSpec]:
    return [TensorSpec(name, source.dtype(name), source.shape(name)) for name in sorted(source.names())]


def _difference(name: str, wanted: dict[str, str], found: dict[str, str]) -> str:
    if name not in found:
        return "not written"
    return "its values differ" if name in wanted else "written, but not wanted"


def _digest(source: TensorSource, spec: TensorSpec) -> str:
    hasher = hashlib.sha256()
    for index in row_blocks(spec.shape, spec.dtype.itemsize):
        block = np.ascontiguousarray(source.read(spec.name, index))
        hasher.update(block.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def _hash(specs: list[TensorSpec], digests: dict[str, str]) -> str:
    lines = [[spec.name, CODES[spec.dtype], list(spec.shape), digests[spec.name]] for spec in specs]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:_HASH_LENGTH]
