"""Evaluation pictures that the training data holds too, in another size or quality: found by perceptual hashes.

Two pictures are near copies when their hashes (vflax.images.perceptual_hash, 64 bits) differ in at most `distance`
bits. The search is exact: of two hashes that differ in at most d of 64 bits, cut into d + 1 bands, at least one band
is equal (the pigeonhole principle of Norouzi, Punjani and Fleet's multi-index hashing, arXiv 1307.2982), so only
hashes with an equal band are compared.

What a copy is worth to a model that remembers it depends on the texts:

    same_image      another question about the picture
    same_question   the same question about it, with another answer
    same_answer     the same question with the same answer: the evaluation sample was trained on
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vflax import images
from vflax.data.source import SampleText, Source

# Raise it when what is cached changes meaning.
_VERSION = 1
LEVELS = ("same_image", "same_question", "same_answer")
# More differing bits would need bands of so few that nearly everything is compared with everything.
MAX_DISTANCE = 10
# A picture of one colour, or that changes in one direction only, has at most 8 DCT coefficients that are not 0: all
# such look alike to the hash. Of a picture with detail half of the 64 bits are set, as the median divides them.
_MIN_BITS = 9
_CANDIDATES = 1 << 22  # compared at a time: about 200 MB
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))


@dataclasses.dataclass(frozen=True)
class Traits:
    """What copies of the samples of a source are known by; n samples, m images.

    Attributes:
        hashes: uint64 [m], images.perceptual_hash; 0 for a damaged image.
        owners: int32 [m], the sample of each image, ascending.
        questions: uint64 [n], digest of what the person says.
        answers: uint64 [n], digest of what is answered.
        damaged: int32, samples with an image that cannot be decoded; only looked for where the index has no hashes.
    """

    hashes: np.ndarray
    owners: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    damaged: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """An evaluation image and the nearest of its copies in the training data.

    Attributes:
        sample, image: of the evaluation split, numbers from 0.
        id: of the evaluation sample.
        source: which of the training sources.
        copy, copy_image, copy_id: the same of the training sample.
        distance: differing bits.
        level: one of LEVELS.
    """

    sample: int
    image: int
    id: str
    source: int
    copy: int
    copy_image: int
    copy_id: str
    distance: int
    level: str


@dataclasses.dataclass(frozen=True)
class Copies:
    """What of one evaluation split the training data holds.

    Attributes:
        images: images of the evaluation samples.
        plain: those of them without enough detail to be compared.
        copied: those that have a near copy.
        samples: how many evaluation samples have one, by the worst of LEVELS that holds for any of their images.
        same_text: evaluation samples without images whose question and answer a training sample without images has.
        pairs: one for each copied image, the worst first.
    """

    images: int
    plain: int
    copied: int
    samples: dict[str, int]
    same_text: int
    pairs: list[Pair]

    @property
    def share(self) -> float:
        """Of the evaluation images, those with a near copy in the training data."""
        return self.copied / self.images if self.images else 0.0


def near_pairs(a: np.ndarray, b: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of hashes that differ in at most `distance` bits.

    Args:
        a, b: uint64 [m], [k], each without repetitions; memory and time grow with m.
        distance: 0 to MAX_DISTANCE.

    Returns:
        i, j int64 [p] and bits uint8 [p]: a[i] and b[j] differ in so many bits; sorted by i, then j.
    """
    borders = np.linspace(0, 64, distance + 2).astype(int)
    pairs = []
    for low, high in itertools.pairwise(borders):
        mask = np.uint64((1 << int(high - low)) - 1)
        keys_a, keys_b = (x >> np.uint64(low) & mask for x in (a, b))
        order = np.argsort(keys_b, kind="stable")
        sorted_keys = keys_b[order]
        first, last = (np.searchsorted(sorted_keys, keys_a, side) for side in ("left", "right"))
        for i, place in _ranges(first, last):
            j = order[place]
            near = np.bitwise_count(a[i] ^ b[j]) <= distance
            pairs.append(i[near] * len(b) + j[near])
    i, j = np.divmod(np.unique(np.concatenate(pairs)), len(b)) if pairs else np.zeros((2, 0), np.int64)
    return i, j, np.bitwise_count(a[i] ^ b[j])


def _ranges(first: np.ndarray, last: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, place) for each i and each place in first[i] .. last[i] - 1, some millions at a time."""
    counts = last - first
    begin, ends = 0, np.cumsum(counts)
    while begin < len(counts):
        done = ends[begin] - counts[begin]
        end = max(begin + 1, int(np.searchsorted(ends, done + _CANDIDATES, "right")))
        some = counts[begin:end]
        i = np.repeat(np.arange(begin, end), some)
        within = np.arange(len(i)) - np.repeat(ends[begin:end] - done - some, some)
        yield i, first[i] + within
        begin = end


# ---------------------------------------------------------------------------------------------------------
# What samples are known by


def traits(source: Source, caches: Sequence[Path], show_progress: bool = True) -> Traits:
    """Traits of all samples of a source, kept in the first of the folders `caches` that can be written.

    Images are decoded only where the dataset's writer has not: another program's, or one of an earlier version.
    """
    name = f"traits-{_digest(_VERSION, source.fingerprint)}.npz"
    for folder in caches:
        try:
            with np.load(folder / name) as arrays:
                cached = Traits(**{field.name: arrays[field.name] for field in dataclasses.fields(Traits)})
        except (OSError, ValueError, KeyError, EOFError):
            continue
        if len(cached.questions) == len(source):
            return cached
    found = _traits(source, show_progress)
    _keep(caches, name, lambda path: np.savez(path, **vars(found)))
    return found


def _traits(source: Source, show_progress: bool) -> Traits:
    hashes: list[int | None] = []
    owners: list[int] = []
    questions, answers = np.zeros(len(source), np.uint64), np.zeros(len(source), np.uint64)
    unknown: list[int] = []
    for number, text in enumerate(source.texts()):
        questions[number] = _text_digest(text, ("human", "user"))
        answers[number] = _text_digest(text, ("gpt", "assistant"))
        if text.hashes is None and text.num_images:
            unknown.append(number)
        owners += [number] * text.num_images
        hashes += text.hashes if text.hashes is not None else [0] * text.num_images
    array, places = np.array(hashes, np.uint64), np.array(owners, np.int32)
    damaged = []
    for number, found in _decoded(source, unknown, show_progress):
        first = int(np.searchsorted(places, number))
        array[first : first + len(found)] = [value or 0 for value in found]
        if None in found:
            damaged.append(number)
    return Traits(array, places, questions, answers, np.array(damaged, np.int32))


def _text_digest(text: SampleText, speakers: tuple[str, ...]) -> int:
    """Of what these say; images, case and white space make no difference."""
    turns = text.conversations if isinstance(text.conversations, list) else []
    said = [
        " ".join(turn["value"].replace("<image>", " ").casefold().split())
        for turn in turns
        if isinstance(turn, dict) and turn.get("from") in speakers and isinstance(turn.get("value"), str)
    ]
    data = json.dumps(said).encode()  # escapes, so that half a UTF-16 pair does no harm
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _decoded(
    source: Source, numbers: Sequence[int], show_progress: bool
) -> Iterator[tuple[int, list[int | None]]]:
    """(sample, hashes of its images, None for one that is damaged)."""

    def hashes(number: int) -> list[int | None]:
        result: list[int | None] = []
        for data in source[number].images:
            try:
                result.append(images.perceptual_hash(images.decode(data)))
            except images.ImageError:
                result.append(None)
        return result

    with (
        Progress(console=Console(stderr=True), disable=not show_progress, transient=True) as progress,
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        task = progress.add_task(f"looking at the pictures of {source.split} of {source.path.name}")
        yield from progress.track(
            zip(numbers, pool.map(hashes, numbers), strict=True), total=len(numbers), task_id=task
        )


# ---------------------------------------------------------------------------------------------------------
# Copies


@dataclasses.dataclass(frozen=True)
class Side:
    """Samples to compare: those of `source` where `mask`, bool [n], is set, with the traits of all of them."""

    source: Source
    mask: np.ndarray
    traits: Traits


def find_copies(asked: Side, training: Sequence[Side], distance: int, caches: Sequence[Path]) -> Copies:
    """Look for the images of an evaluation split among those of the training data.

    Args:
        asked: the split and which of its samples are asked.
        training: the splits that are trained on, and which of their samples may be.
        distance: bits in which the hashes of two near copies may differ.
        caches: folders; the result is kept in the first one that can be written, under the fingerprints of both sides.
    """
    sides = [
        [side.source.fingerprint, hashlib.sha256(np.packbits(side.mask).tobytes()).hexdigest()]
        for side in [asked, *training]
    ]
    name = f"duplicates-{_digest(_VERSION, sides, distance)}.json"
    for folder in caches:
        try:
            facts = json.loads((folder / name).read_text("utf-8"))
            return Copies(**facts | {"pairs": [Pair(*values) for values in facts["pairs"]]})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    found = _find(asked, training, distance)
    facts = vars(found) | {"pairs": [dataclasses.astuple(pair) for pair in found.pairs]}
    _keep(caches, name, lambda path: path.write_text(json.dumps(facts, ensure_ascii=False), "utf-8"))
    return found


@dataclasses.dataclass(frozen=True)
class _Images:
    """The images of chosen samples, of several sources one after the other; all [m] but source and texts."""

    hashes: np.ndarray  # uint64
    source: np.ndarray
    owner: np.ndarray  # sample within its source
    place: np.ndarray  # image within its sample
    question: np.ndarray  # uint64
    answer: np.ndarray  # uint64

    @classmethod
    def of(cls, sides: Sequence[Side]) -> _Images:
        columns = []
        for number, side in enumerate(sides):
            t = side.traits
            place = np.arange(len(t.owners)) - np.searchsorted(t.owners, t.owners)
            chosen = side.mask[t.owners]
            owner = t.owners[chosen]
            columns.append(
                (t.hashes[chosen], np.full(len(owner), number), owner, place[chosen],
                 t.questions[owner], t.answers[owner])
            )  # fmt: skip
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def detailed(self) -> _Images:
        keep = np.bitwise_count(self.hashes) >= _MIN_BITS
        return _Images(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


def _find(asked: Side, training: Sequence[Side], distance: int) -> Copies:
    everything, trained = _Images.of([asked]), _Images.of(training).detailed()
    compared = everything.detailed()
    best = _best_pairs(compared, trained, distance)
    ids = sample_ids(asked.source, {int(compared.owner[i]) for i, *_ in best})
    copy_ids = [
        sample_ids(side.source, {int(trained.owner[j]) for _, j, *_ in best if trained.source[j] == number})
        for number, side in enumerate(training)
    ]
    pairs = [
        Pair(
            sample := int(compared.owner[i]), int(compared.place[i]), ids[sample],
            number := int(trained.source[j]), copy := int(trained.owner[j]), int(trained.place[j]),
            copy_ids[number][copy], int(bits), LEVELS[level],
        )
        for i, j, bits, level in best
    ]  # fmt: skip
    worst: dict[int, int] = {}
    for pair in pairs:
        worst[pair.sample] = max(worst.get(pair.sample, 0), LEVELS.index(pair.level))
    samples = {name: sum(level == k for level in worst.values()) for k, name in enumerate(LEVELS)}
    plain = len(everything.hashes) - len(compared.hashes)
    return Copies(len(everything.hashes), plain, len(pairs), samples, _same_text(asked, training), pairs)


def _best_pairs(compared: _Images, trained: _Images, distance: int) -> list[tuple[int, int, int, int]]:
    """(evaluation image, training image, bits, level) of each evaluation image with a copy: its worst, then nearest."""
    values, inverse = np.unique(compared.hashes, return_inverse=True)
    others = np.unique(trained.hashes)
    v, w, bits = near_pairs(values, others, distance)
    # From hashes to images: each evaluation image with each hash of the training data that is near its own.
    starts = np.searchsorted(v, np.arange(len(values) + 1))
    first, last = starts[inverse], starts[inverse + 1]
    best: dict[int, tuple[int, int, int, int]] = {}
    levels = [_Lookup(trained, level) for level in range(len(LEVELS))]
    for i, place in _ranges(first, last):
        near = others[w[place]]
        level, image = np.zeros(len(i), int), np.zeros(len(i), int)
        for k, lookup in enumerate(levels):
            hit, where = lookup(near, compared.question[i], compared.answer[i])
            level[hit], image[hit] = k, where[hit]
        order = np.lexsort((bits[place], -level, i))
        _, leaders = np.unique(i[order], return_index=True)
        for row in order[leaders].tolist():
            best[int(i[row])] = (int(i[row]), int(image[row]), int(bits[place[row]]), int(level[row]))
    return sorted(best.values(), key=lambda pair: (-pair[3], pair[2], pair[0]))


class _Lookup:
    """Is there a training image of this hash, with these texts as far as `level` compares them, and which?"""

    def __init__(self, trained: _Images, level: int) -> None:
        self._level = level
        keys = self._keys(trained.hashes, trained.question, trained.answer)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def __call__(
        self, hashes: np.ndarray, question: np.ndarray, answer: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """bool [p] and the number of such an image [p], the first one."""
        keys = self._keys(hashes, question, answer)
        place = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return self._sorted[place] == keys, self._order[place]

    def _keys(self, hashes: np.ndarray, question: np.ndarray, answer: np.ndarray) -> np.ndarray:
        keys = hashes.copy()
        for mix, text in list(zip(_MIX, (question, answer), strict=True))[: self._level]:
            keys = (keys ^ text) * mix
            keys ^= keys >> np.uint64(29)
        return keys


def _same_text(asked: Side, training: Sequence[Side]) -> int:
    """Evaluation samples without images of which a training sample without images has question and answer."""

    def texts(side: Side) -> np.ndarray:
        t = side.traits
        bare = side.mask & (np.bincount(t.owners, minlength=len(side.mask)) == 0)
        return (t.questions[bare] * _MIX[0]) ^ t.answers[bare]

    return int(np.isin(texts(asked), np.concatenate([texts(side) for side in training])).sum())


def sample_ids(source: Source, numbers: set[int]) -> dict[int, str]:
    """{sample: its id}."""
    if not numbers:
        return {}
    return {number: text.id for number, text in enumerate(source.texts()) if number in numbers}


# ---------------------------------------------------------------------------------------------------------
# The cache


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _keep(folders: Sequence[Path], name: str, write: Any) -> None:
    """Write a file into the first folder that lets it; it appears when it is whole."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
                write(Path(temporary) / name)
                os.replace(Path(temporary) / name, folder / name)
            return
        except OSError:  # read-only: the next one; without any it is done again next time
            continue
