"""Who has which page of the key-value cache, and which pages are kept for prompts that begin alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from vflax.constants import IMAGE_TOKEN_ID

Key = bytes
"""SHA-256 of a chunk and of all before it: ids, and the pictures' contents."""


class Pages:
    """The pages of one shard. Page 0 is nobody's and is never given away.

    A chunk is a run of pages that prefill writes at once. Once written it may be published under its key; then others
    take it instead of writing their own. When nobody holds it any more it stays, until its pages are needed: the one
    that was used longest ago goes first.
    """

    def __init__(self, number: int) -> None:
        self._free = list(range(number - 1, 0, -1))
        self._holders: dict[Key, int] = {}
        self._chunks: dict[Key, tuple[int, ...]] = {}
        self._idle: OrderedDict[Key, None] = OrderedDict()  # published, held by nobody; oldest use first

    @property
    def available(self) -> int:
        """Pages that `take` can give, those of idle chunks included."""
        return len(self._free) + self.cached

    @property
    def cached(self) -> int:
        """Pages of published chunks that nobody holds."""
        return sum(len(self._chunks[key]) for key in self._idle)

    def take(self, number: int) -> list[int] | None:
        """So many pages for the caller alone; None, and nothing happens, where there are not enough."""
        if number > self.available:
            return None
        while len(self._free) < number:
            key, _ = self._idle.popitem(last=False)
            self._free += self._chunks.pop(key)
        taken = self._free[len(self._free) - number :]
        del self._free[len(self._free) - number :]
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Take back pages that `take` gave."""
        self._free += pages

    def hold(self, key: Key) -> tuple[int, ...] | None:
        """The pages of a published chunk, kept until the caller lets go of it; None where there is none."""
        if key not in self._chunks:
            return None
        self._idle.pop(key, None)
        self._holders[key] = self._holders.get(key, 0) + 1
        return self._chunks[key]

    def publish(self, key: Key, pages: Sequence[int]) -> bool:
        """Make pages that the caller has a chunk for all, which the caller holds; False, and nothing happens, where
        there is one already."""
        if key in self._chunks:
            return False
        self._chunks[key] = tuple(pages)
        self._holders[key] = 1
        return True

    def let_go(self, key: Key) -> None:
        """End of a `hold` or `publish`."""
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._idle[key] = None

    def known(self, keys: Sequence[Key]) -> int:
        """How many of these chunks, from the first on, are published."""
        return next((n for n, key in enumerate(keys) if key not in self._chunks), len(keys))


class Store:
    """Places for the features of pictures, by content. One that somebody needs stays; of the others the one that was
    used longest ago goes first."""

    def __init__(self, places: int) -> None:
        self._free = list(range(places - 1, -1, -1))
        self._places: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()

    def hold(self, picture: bytes) -> tuple[int, bool] | None:
        """A place for a picture, kept until the caller lets go, and whether its features are there already; None where
        all places are held."""
        if picture in self._places:
            self._idle.pop(picture, None)
            self._holders[picture] = self._holders.get(picture, 0) + 1
            return self._places[picture], True
        if not self._free and self._idle:
            oldest, _ = self._idle.popitem(last=False)
            self._free.append(self._places.pop(oldest))
        if not self._free:
            return None
        self._places[picture] = self._free.pop()
        self._holders[picture] = 1
        return self._places[picture], False

    def let_go(self, picture: bytes) -> None:
        """End of a `hold`."""
        self._holders[picture] -= 1
        if not self._holders[picture]:
            del self._holders[picture]
            self._idle[picture] = None


def picture_hash(image: np.ndarray) -> bytes:
    """SHA-256 of a preprocessed picture, uint8 [size, size, 3]."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def chunk_keys(
    ids: np.ndarray, pictures: Sequence[bytes], image_tokens: int, chunk: int, length: int
) -> list[Key]:
    """Keys of the whole chunks of a prompt's first `length` tokens.

    Args:
        ids: int32 [n]; every picture stands as `image_tokens` times IMAGE_TOKEN_ID.
        pictures: hashes, in order of appearance.
        image_tokens: N.
        chunk: tokens of a chunk.
        length: at most n.
    """
    # A picture's hash goes into the chunk where it begins; all later keys follow from that one.
    begins = np.flatnonzero(ids == IMAGE_TOKEN_ID)[::image_tokens]
    keys, before, number = [], b"", 0
    for start in range(0, length - chunk + 1, chunk):
        digest = hashlib.sha256(before)
        digest.update(np.ascontiguousarray(ids[start : start + chunk], np.int32).tobytes())
        while number < len(begins) and begins[number] < start + chunk:
            digest.update(pictures[number])
            number += 1
        before = digest.digest()
        keys.append(before)
    return keys
