"""Sources seen through a change: other names, another dtype, a padded vocabulary; read in blocks, as exports are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from vflax.errors import UserError
from vflax.weights.file_source import TensorSource
from vflax.weights.names import EMBEDDING, LM_HEAD, Index
from vflax.weights.safetensors_io import row_blocks


class _View:
    """A source that is another one, but for what a subclass says."""

    def __init__(self, base: TensorSource) -> None:
        self._base = base

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def source_dtype(self, name: str) -> np.dtype:
        return self._base.source_dtype(name)

    def where(self, name: str) -> str:
        return self._base.where(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._base.read(name, index)


def nbytes(source: TensorSource) -> int:
    """Bytes of all tensors, as they are read."""
    return sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names())


class CastSource(_View):
    """A source whose tensors are read in other dtypes."""

    def __init__(self, base: TensorSource, dtypes: Mapping[str, np.dtype]) -> None:
        """Wrap `base`; dtypes: {name: dtype to read it in}, for every name that is to be visible."""
        super().__init__(base)
        self._dtypes = dict(dtypes)

    def names(self) -> tuple[str, ...]:
        return tuple(self._dtypes)

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[name]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """As TensorSource.read.

        Raises:
            UserError: when a finite number is too large for the dtype.
        """
        tensor, dtype = self._base.read(name, index), self._dtypes[name]
        if tensor.dtype == dtype:
            return tensor
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype)
        if not np.array_equal(np.isfinite(cast), np.isfinite(tensor)):
            largest = np.abs(tensor[np.isfinite(tensor)]).max()
            raise UserError(
                f"{name} in {self.where(name)} holds {largest:g}, too large for {dtype.name}; write it in bfloat16 or "
                "float32 (--dtype)"
            )
        return cast


class RenamedSource(_View):
    """A source under other names, all of it or a part."""

    def __init__(self, base: TensorSource, names: Mapping[str, str]) -> None:
        """Wrap `base`; names: {new: old}, for every tensor that is to be visible."""
        super().__init__(base)
        self._old = dict(names)

    def names(self) -> tuple[str, ...]:
        return tuple(self._old)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(self._old[name])

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(self._old[name])

    def source_dtype(self, name: str) -> np.dtype:
        return self._base.source_dtype(self._old[name])

    def where(self, name: str) -> str:
        return self._base.where(self._old[name])

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._base.read(self._old[name], index)


class WatchedSource(_View):
    """A source that tells how many bytes were read of it, for a progress bar."""

    def __init__(self, base: TensorSource, advance: Callable[[int], None]) -> None:
        super().__init__(base)
        self._advance = advance

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._base.read(name, index)
        self._advance(tensor.nbytes)
        return tensor


class PaddedVocabularySource(_View):
    """A source whose token embedding and output head have more rows.

    The new rows are the mean of the old ones, so a logit of an id that never occurred in training is an
    average one.
    """

    def __init__(self, base: TensorSource, vocab_size: int) -> None:
        """Wrap `base`; vocab_size: rows wanted, at least as many as there are."""
        super().__init__(base)
        self._vocab_size = vocab_size
        self._means: dict[str, np.ndarray] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._base.shape(name)
        return (self._vocab_size, *shape[1:]) if name in (EMBEDDING, LM_HEAD) else shape

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        if self.shape(name) == self._base.shape(name):
            return self._base.read(name, index)
        old, (rows, *rest) = self._base.shape(name)[0], index or tuple(slice(0, n) for n in self.shape(name))
        first, last, _ = rows.indices(self._vocab_size)
        kept = self._base.read(name, (slice(min(first, old), min(last, old)), *rest))
        added = np.broadcast_to(
            self._mean_row(name)[*rest], (max(last, old) - max(first, old), kept.shape[1])
        )
        return np.concatenate([kept, added])

    def _mean_row(self, name: str) -> np.ndarray:
        """What every new row is: read once, block by block."""
        if name not in self._means:
            shape, dtype = self._base.shape(name), self.dtype(name)
            total = np.zeros(shape[1:], np.float64)
            for index in row_blocks(shape, dtype.itemsize):
                total += self._base.read(name, index).sum(axis=0, dtype=np.float64)
            self._means[name] = (total / shape[0]).astype(dtype)
        return self._means[name]
