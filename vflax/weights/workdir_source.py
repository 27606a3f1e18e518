"""A training run as a source: trained leaves from its Orbax checkpoint, the rest from its frozen store."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from vflax.bucket import TENSORSTORE_CONTEXT, is_url, reaching
from vflax.errors import UserError
from vflax.mirror import remote
from vflax.weights import names
from vflax.weights.finite import check_finite
from vflax.weights.frozen import FrozenSource
from vflax.weights.names import Entry, Index
from vflax.workdir import read_config, read_frozen, read_lora, read_source_dtypes

# Chunks of a checkpoint that stay on the host once read: all leaves of a stack of layers that are stored as one (see
# vflax/checkpoint.py), so that whoever goes through the layers reads each once.
_KEPT_BYTES = 128 << 20


class WorkdirSource:
    """All tensors of WORKDIR at a step. Of trained leaves, too, no more is read than is asked for, in whole chunks.

    Chunks stay on the host up to _KEPT_BYTES, and those that hold the next rows of a tensor beside them, so whoever
    reads a tensor in blocks of rows has each chunk read once.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        """Open the checkpoint; nothing is read but its description.

        Args:
            workdir: holds model/, checkpoints/STEP/params and frozen/HASH.
            step: of a complete checkpoint.

        Raises:
            UserError: for files that are missing, and parameters that are in neither store.
        """
        self.workdir, self.step = workdir, step
        self.config = read_config(workdir)
        table = names.table(self.config, read_lora(workdir))
        self._source_dtypes = {name: np.dtype(dtype) for name, dtype in read_source_dtypes(workdir).items()}
        self._frozen = FrozenSource(workdir / "frozen" / read_frozen(workdir))
        self._leaves = _Leaves(remote(workdir / "checkpoints" / str(step) / "params"))
        self._trained: dict[str, tuple[Entry, int | None]] = {}
        stored, frozen = self._leaves.paths(), set(self._frozen.names())
        problems, rows = [], 0
        for path, entry in table.items():
            if path in stored:
                shape = self._leaves.shape(path)
                if shape != entry.param_shape:
                    problems.append(f"{path} is {list(shape)}, the config asks for {list(entry.param_shape)}")
                else:
                    rows = max(rows, self._leaves.row_bytes(entry))
                numbers = [None] if entry.layers is None else range(entry.layers)
                self._trained |= {name: (entry, i) for name, i in zip(entry.names, numbers, strict=True)}
            elif not set(entry.names) <= frozen:
                problems.append(f"{path} is neither in the checkpoint nor among the frozen weights")
        problems += [f"{path} is no parameter of the model" for path in stored - set(table)]
        every = (*self._trained, *self._frozen.names())
        problems += [
            f"{name} has no entry in model/source_dtypes.json"
            for name in every
            if name not in self._source_dtypes
        ]
        if problems:
            raise UserError(f"{workdir}, step {step}, does not hold together:\n  " + "\n  ".join(problems))
        self._leaves.keep(_KEPT_BYTES + rows)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the tensors that this run trains."""
        return frozenset(self._trained)

    def names(self) -> tuple[str, ...]:
        return (*self._trained, *(name for name in self._frozen.names() if name not in self._trained))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._trained:
            return self._trained[name][0].tensor_shape
        return self._frozen.shape(name)

    def dtype(self, name: str) -> np.dtype:
        if name in self._trained:
            return self._leaves.dtype(self._trained[name][0].path)
        return self._frozen.dtype(name)

    def source_dtype(self, name: str) -> np.dtype:
        return self._source_dtypes[name]

    def where(self, name: str) -> str:
        return str(self._leaves.folder) if name in self._trained else self._frozen.where(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        if name not in self._trained:
            return self._frozen.read(name, index)
        entry, layer = self._trained[name]
        inner = None if index is None else entry.param_index(index)
        param = check_finite(
            self._leaves.read(entry.path, layer, inner), entry.path, str(self._leaves.folder)
        )
        return np.ascontiguousarray(entry.to_tensor(param))


class _Leaves:
    """The arrays of a checkpoint's params item, opened through tensorstore, in which Orbax writes them."""

    def __init__(self, folder: Path | epath.Path) -> None:
        self.folder = folder
        self._stored: dict[str, str] = {}
        self.keep(0)
        try:
            with reaching(folder):
                if not folder.is_dir() and (folder.parent / "record").is_dir():
                    return  # an imported model: all of it is in the frozen store
                metadata = json.loads((folder / "_METADATA").read_text())
            self._driver = "zarr3" if metadata["use_zarr3"] else "zarr"
            keys = [entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()]
            self._stored = {key.replace(".", "/"): key for key in keys}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder / '_METADATA'}: cannot be read ({error}); is there a complete checkpoint?"
            ) from None
        except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(
                f"{folder / '_METADATA'}: not Orbax's use_zarr3 and tree_metadata ({error!r}); take another --step"
            ) from None

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes of chunks, those that were used last."""
        self._context = tensorstore.Context(
            {"cache_pool": {"total_bytes_limit": nbytes}, **TENSORSTORE_CONTEXT}
        )
        self._open: dict[str, Any] = {}

    def paths(self) -> set[str]:
        """Parameter paths of the leaves."""
        return set(self._stored)

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(self._array(path).shape)

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self._array(path).dtype.numpy_dtype)

    def chunk(self, path: str) -> tuple[int, ...]:
        """Shape of the parts that a leaf is stored in."""
        return tuple(self._array(path).chunk_layout.read_chunk.shape)

    def row_bytes(self, entry: Entry) -> int:
        """Bytes of the chunks that together hold a row of a tensor."""
        sizes = [
            part if axis in entry.row_axes else -(-whole // part) * part
            for axis, (whole, part) in enumerate(zip(entry.param_shape, self.chunk(entry.path), strict=True))
        ]
        return math.prod(sizes) * self.dtype(entry.path).itemsize

    def read(self, path: str, layer: int | None, index: Index | None) -> np.ndarray:
        """A leaf, or a part of it; with `layer`, of that layer of a stacked leaf."""
        array = self._array(path)
        if layer is not None:
            array = array[layer]
        with reaching(self.folder):
            return np.asarray((array if index is None else array[index]).read().result())

    def _array(self, path: str) -> Any:
        if path not in self._open:
            store = {
                "driver": "ocdbt",
                "base": f"{self.folder if is_url(self.folder) else f'file://{self.folder.absolute()}'}/",
                "path": f"{self._stored[path]}/",
            }
            # A checkpoint that is complete does not change: what is kept need not be compared with the files.
            fresh = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
            spec = {"driver": self._driver, "kvstore": store, **fresh}
            try:
                self._open[path] = tensorstore.open(
                    spec, context=self._context, read=True, open=True
                ).result()
            except ValueError as error:  # whatever is wrong: it knows no other
                said = str(error).splitlines()[0][:200]
                raise UserError(
                    f"{self.folder}: {path} cannot be opened ({said}); take another --step"
                ) from None
        return self._open[path]
