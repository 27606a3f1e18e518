"""Pages of the cache: none is lost, none has two owners, and what begins alike has the same key."""

from __future__ import annotations

import numpy as np

from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.pages import Pages, Store, chunk_keys, picture_hash


def test_pages_are_neither_lost_nor_given_twice_whatever_happens() -> None:
    rng = np.random.default_rng(0)
    pages = Pages(40)
    own: list[list[int]] = []
    held: list[bytes] = []
    published: dict[bytes, tuple[int, ...]] = {}
    for _ in range(5000):
        what = rng.integers(5)
        key = bytes([rng.integers(12)])
        if what == 0 and (taken := pages.take(int(rng.integers(1, 8)))) is not None:
            own.append(taken)
        elif what == 1 and own:
            pages.give(own.pop(int(rng.integers(len(own)))))
        elif what == 2 and own:
            chunk = own.pop(int(rng.integers(len(own))))
            if pages.publish(key, chunk):
                published[key] = tuple(chunk)
                held.append(key)
            else:
                pages.give(chunk)
        elif what == 3 and (found := pages.hold(key)) is not None:
            assert found == published[key]
            held.append(key)
        elif what == 4 and held:
            pages.let_go(held.pop(int(rng.integers(len(held)))))
        taken_pages = [page for chunk in own for page in chunk]
        in_use = taken_pages + [page for key in set(held) for page in published[key]]
        assert len(in_use) == len(set(in_use)) and 0 not in in_use and max(in_use, default=1) < 40
        assert pages.available == 39 - len(in_use)


def test_the_chunk_that_was_used_longest_ago_makes_room_first() -> None:
    pages = Pages(5)
    for key in (b"a", b"b"):
        taken = pages.take(2)
        assert taken is not None and pages.publish(key, taken)
        pages.let_go(key)
    assert pages.hold(b"a") is not None
    pages.let_go(b"a")
    assert pages.take(2) is not None
    assert pages.hold(b"b") is None and pages.hold(b"a") is not None


def test_a_chunk_that_somebody_holds_is_never_taken_away() -> None:
    pages = Pages(5)
    taken = pages.take(3)
    assert taken is not None and pages.publish(b"a", taken)
    assert pages.take(2) is None and pages.available == 1
    pages.let_go(b"a")
    assert pages.available == 4 and pages.cached == 3


def test_keys_tell_prompts_apart_by_their_beginning_and_by_their_pictures() -> None:
    text = np.arange(40, dtype=np.int32)
    image = np.full(6, IMAGE_TOKEN_ID, np.int32)
    ids = np.concatenate([text[:5], image, text[5:]])

    def keys(ids: np.ndarray, *pictures: bytes) -> list[bytes]:
        return chunk_keys(ids, pictures, 6, 8, len(ids) - 1)

    one = keys(ids, b"1")
    assert len(one) == (len(ids) - 1) // 8 and len(set(one)) == len(one)
    assert keys(np.append(ids, 7).astype(np.int32), b"1")[: len(one)] == one
    other = keys(ids, b"2")
    assert not set(one) & set(other)  # the picture begins in the first chunk
    changed = ids.copy()
    changed[20] += 1
    assert [a == b for a, b in zip(one, keys(changed, b"1"), strict=True)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    two = np.concatenate([image, image, text])
    assert keys(two, b"1", b"2") != keys(two, b"2", b"1")
    assert keys(two, b"1", b"2")[1:] != keys(two, b"1", b"1")[1:]


def test_a_store_keeps_what_is_needed_and_forgets_the_oldest_first() -> None:
    store = Store(2)
    assert store.hold(b"a") == (0, False) and store.hold(b"b") == (1, False)
    assert store.hold(b"c") is None
    store.let_go(b"b")
    store.let_go(b"a")
    assert store.hold(b"b") == (1, True)
    assert store.hold(b"c") == (0, False)
    assert store.hold(b"a") is None


def test_a_picture_is_known_by_its_pixels() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    copy = np.asfortranarray(picture.copy())
    assert picture_hash(picture) == picture_hash(copy)
    copy[0, 0, 0] ^= 1
    assert picture_hash(picture) != picture_hash(copy)
