"""Evaluation pictures that the training data holds too, in another size or quality.

Two pictures are near copies when

    their hashes (vflax.images.perceptual_hash, 64 bits) differ in at most `distance` bits, and
    their colours, averaged in 8 x 8 cells, differ by at most _COLOUR in the root mean square.

Hashes alone see rough light and dark, and find drawings, digits and pages of text alike that are not. They are in the
dataset's index, so only the pictures that they find are decoded. Their search is exact: of two hashes that differ in at
most d of 64 bits, cut into d + 1 bands, at least one band is equal (the pigeonhole principle of multi-index hashing,
Norouzi, Punjani and Fleet, arXiv 1307.2982), so only hashes with an equal band are compared.

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
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from vflax import images
from vflax.data import cache
from vflax.data.ahead import in_order
from vflax.data.source import SampleText, Source
from vflax.errors import UserError

# Raise it when what is cached changes meaning.
_VERSION = 1
LEVELS = ("same_image", "same_question", "same_answer")
# More differing bits would need bands of so few that nearly everything is compared with everything.
MAX_DISTANCE = 10
# A picture of one colour, or that changes in one direction only, has at most 8 DCT coefficients that are not 0: all
# such look alike to the hash. Of a picture with detail half of the 64 bits are set, as the median divides them.
_MIN_BITS = 9
# Of 255. Copies of real photographs in half the size, or at a JPEG quality of 20, stay below; see docs/preflight.md.
_COLOUR = 6.0
_CANDIDATES = 1 << 20  # pairs held at a time: about 50 MB
_LOOKS = 1 << 16  # colours compared at a time: about 150 MB
_AHEAD = 1024  # pictures given to the threads before their colours are asked for


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


def near_pairs(
    a: np.ndarray, b: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of hashes that differ in at most `distance` bits, each once, at most _CANDIDATES at a time.

    Args:
        a, b: uint64 [m], [k], each without repetitions.
        distance: 0 to MAX_DISTANCE.

    Yields:
        i, j int64 [p] and bits uint8 [p]: a[i] and b[j] differ in so many bits.
    """
    borders = np.linspace(0, 64, distance + 2).astype(int).tolist()
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in itertools.pairwise(borders)]
    for band, mask in enumerate(masks):
        order = np.argsort(b & mask, kind="stable")
        keys = b[order] & mask
        first, last = (np.searchsorted(keys, a & mask, side) for side in ("left", "right"))
        for i, place in _ranges(first, last):
            j = order[place]
            differ = a[i] ^ b[j]
            new = np.bitwise_count(differ) <= distance
            for earlier in masks[:band]:  # by which the pair was found already
                new &= (differ & earlier) != 0
            yield i[new], j[new], np.bitwise_count(differ[new])


def _ranges(first: np.ndarray, last: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, place) for each i and each place in first[i] .. last[i] - 1, at most _CANDIDATES at a time."""
    counts = last - first
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, _CANDIDATES):
        end = min(begin + _CANDIDATES, total)
        some = slice(np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end) + 1)
        within = np.minimum(ends[some], end) - np.maximum((ends - counts)[some], begin)
        i = np.repeat(np.arange(some.start, some.stop), within)
        yield i, np.arange(begin, end) + (last - ends)[i]


class _Groups:
    """Which rows of a column hold each of some values."""

    def __init__(self, column: np.ndarray, values: np.ndarray) -> None:
        self._order = np.argsort(column, kind="stable")
        ordered = column[self._order]
        self._first, self._last = (np.searchsorted(ordered, values, side) for side in ("left", "right"))

    def rows(self, which: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(k, row) for each row that holds values[which[k]], at most _CANDIDATES at a time."""
        for k, place in _ranges(self._first[which], self._last[which]):
            yield k, self._order[place]


# ---------------------------------------------------------------------------------------------------------
# What samples are known by


def traits(source: Source, caches: Sequence[Path], show_progress: bool = True) -> Traits:
    """Traits of all samples of a source, kept in the first of the folders `caches` that can be written.

    Images are decoded only where the dataset's writer has not: another program's, or one of an earlier version.
    """
    name = f"traits-{_digest(_VERSION, source.fingerprint, source.index_digest)}.npz"

    def read(path: Path) -> Traits | None:
        with np.load(path) as arrays:
            found = Traits(**{field.name: arrays[field.name] for field in dataclasses.fields(Traits)})
        return found if len(found.questions) == len(source) else None

    found = cache.load(caches, name, read)
    if found is None:
        found = _traits(source, show_progress)
        facts = vars(found)
        cache.keep(caches, name, lambda path: np.savez(path, **facts))
    return found


def _traits(source: Source, show_progress: bool) -> Traits:
    hashes, owners = (
        array("Q"),
        array("i"),
    )  # numbers as small as in an array of NumPy's, of which none can grow
    questions, answers = np.zeros(len(source), np.uint64), np.zeros(len(source), np.uint64)
    unknown = array("i")
    for number, text in enumerate(source.texts()):
        questions[number] = _text_digest(text, ("human", "user"))
        answers[number] = _text_digest(text, ("gpt", "assistant"))
        if text.hashes is None and text.num_images:
            unknown.append(number)
        owners.extend([number] * text.num_images)
        hashes.extend(text.hashes if text.hashes is not None else [0] * text.num_images)
    known, places = np.array(hashes, np.uint64), np.array(owners, np.int32)
    damaged = []
    for number, found in _decoded(source, unknown, show_progress):
        first = int(np.searchsorted(places, number))
        known[first : first + len(found)] = [value or 0 for value in found]
        if None in found:
            damaged.append(number)
    return Traits(known, places, questions, answers, np.array(damaged, np.int32))


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

    what = f"looking at the pictures of {source.split} of {source.path.name}"
    with _bar(show_progress) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = in_order(pool, hashes, numbers, _AHEAD)
        yield from progress.track(found, len(numbers), description=what)


def _bar(show: bool) -> Progress:
    return Progress(console=Console(stderr=True), disable=not show, transient=True)


# ---------------------------------------------------------------------------------------------------------
# Copies


@dataclasses.dataclass(frozen=True)
class Side:
    """Samples to compare: those of `source` where `mask`, bool [n], is set, with the traits of all of them."""

    source: Source
    mask: np.ndarray
    traits: Traits


def find_copies(
    asked: Side,
    training: Sequence[Side],
    distance: int,
    caches: Sequence[Path],
    show_progress: bool = True,
) -> Copies:
    """Look for the images of an evaluation split among those of the training data.

    Args:
        asked: the split and which of its samples are asked.
        training: the splits that are trained on, and which of their samples may be.
        distance: bits in which the hashes of two near copies may differ.
        caches: folders; the result is kept in the first one that can be written, under the fingerprints of both sides.
        show_progress: draw a progress bar on stderr.
    """
    sides = [
        [side.source.fingerprint, side.source.index_digest,
         hashlib.sha256(np.packbits(side.mask).tobytes()).hexdigest()]
        for side in [asked, *training]
    ]  # fmt: skip
    name = f"duplicates-{_digest(_VERSION, sides, distance)}.json"

    def read(path: Path) -> Copies:
        facts = json.loads(path.read_text("utf-8"))
        return Copies(**facts | {"pairs": [Pair(*values) for values in facts["pairs"]]})

    found = cache.load(caches, name, read)
    if found is None:
        found = _find(asked, training, distance, show_progress)
        facts = vars(found) | {"pairs": [dataclasses.astuple(pair) for pair in found.pairs]}
        text = json.dumps(facts, ensure_ascii=False)
        cache.keep(caches, name, lambda path: path.write_text(text, "utf-8"))
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

    def take(self, which: np.ndarray) -> _Images:
        return _Images(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    def detailed(self) -> _Images:
        """Those with enough detail to be compared."""
        return self.take(np.bitwise_count(self.hashes) >= _MIN_BITS)


def _find(asked: Side, training: Sequence[Side], distance: int, show_progress: bool) -> Copies:
    everything, trained = _Images.of([asked]), _Images.of(training).detailed()
    compared = everything.detailed()
    best = _best_pairs(compared, trained, [asked], training, distance, show_progress)
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


def _best_pairs(
    compared: _Images,
    trained: _Images,
    asked: Sequence[Side],
    training: Sequence[Side],
    distance: int,
    show_progress: bool,
) -> list[tuple[int, int, int, int]]:
    """(evaluation image, training image, bits, level) of each evaluation image with a copy: its worst, then nearest.

    One picture in many samples of both sides (a placeholder, a logo) makes more pairs than a memory holds. So they are
    gone through in blocks of _CANDIDATES, and of each evaluation image only the best pair so far is kept: memory is
    that of four blocks, 50 bytes for each image of either side, and below 1 kB more for each image that has a near hash
    on the other side.
    """
    own, others = _near_images(compared.hashes, trained.hashes, distance)
    ours, theirs = compared.take(own), trained.take(others)
    if not len(own):
        return []
    colours = _looks(asked, ours, show_progress)
    pictures = _Pictures(theirs, _looks(training, theirs, show_progress))
    best = np.full(len(own), _NONE)
    for i, picture, bits in _same_looks(ours, colours, pictures, distance):
        for k, j in pictures.images(picture):
            same_question = ours.question[i[k]] == theirs.question[j]
            level = same_question.astype(int) + (same_question & (ours.answer[i[k]] == theirs.answer[j]))
            np.minimum.at(best, i[k], ((len(LEVELS) - 1 - level) << 4 | bits[k]) << 32 | j)
    found = np.flatnonzero(best < _NONE)
    found = found[np.argsort(best[found] >> 32, kind="stable")]
    rank, j = np.divmod(best[found], 1 << 32)
    columns = own[found], others[j], rank & 15, len(LEVELS) - 1 - (rank >> 4)
    return list(zip(*(column.tolist() for column in columns), strict=True))


# A pair as one number, the smaller the better: its level, the worst first, 4 places for its bits, and its training
# image, the first one of equal ones first.
_NONE = np.iinfo(np.int64).max


def _near_images(a: np.ndarray, b: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [p], [q]: the hashes of each side that have a near one on the other, repetitions too; ascending."""
    values, others = np.unique(a), np.unique(b)
    near, near_others = np.zeros(len(values), bool), np.zeros(len(others), bool)
    for v, w, _ in near_pairs(values, others, distance):
        near[v] = near_others[w] = True
    return np.flatnonzero(np.isin(a, values[near])), np.flatnonzero(np.isin(b, others[near_others]))


class _Pictures:
    """The different pictures among some images; of images that show one with the same question and answer the first.

    Attributes:
        hashes: uint64 [p].
        colours: uint8 [p, 192].
    """

    def __init__(self, images: _Images, colours: np.ndarray) -> None:
        both = np.hstack([images.hashes[:, None].view(np.uint8), colours])
        rows = np.ascontiguousarray(both).view(np.dtype((np.void, both.shape[1])))[:, 0]
        _, first, picture = np.unique(rows, return_index=True, return_inverse=True)
        self.hashes, self.colours = images.hashes[first], colours[first]
        columns = (picture, images.question, images.answer)
        order = np.lexsort(columns[::-1])
        other = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
        self._kept = order[np.concatenate([[True], other])]
        self._groups = _Groups(picture[self._kept], np.arange(len(first)))

    def images(self, which: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(k, image) for each image kept that shows the picture which[k], at most _CANDIDATES at a time."""
        for k, row in self._groups.rows(which):
            yield k, self._kept[row]


def _same_looks(
    images: _Images, colours: np.ndarray, pictures: _Pictures, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(image, picture, bits) of near hashes and near colours, at most _CANDIDATES at a time."""
    values, others = np.unique(images.hashes), np.unique(pictures.hashes)
    own, other = _Groups(images.hashes, values), _Groups(pictures.hashes, others)
    for v, w, bits in near_pairs(values, others, distance):
        for k, i in own.rows(v):
            for m, picture in other.rows(w[k]):
                same = _same_colours(colours, i[m], pictures.colours, picture)
                yield i[m][same], picture[same], bits[k][m][same].astype(np.int64)


def _same_colours(a: np.ndarray, i: np.ndarray, b: np.ndarray, j: np.ndarray) -> np.ndarray:
    """bool [p]: whether the colours a[i] and b[j], uint8 [192] each, differ by at most _COLOUR."""
    same = np.zeros(len(i), bool)
    for begin in range(0, len(i), _LOOKS):
        some = slice(begin, begin + _LOOKS)
        difference = a[i[some]].astype(np.int32) - b[j[some]]
        same[some] = (difference**2).mean(axis=1) <= _COLOUR**2
    return same


def _looks(sides: Sequence[Side], chosen: _Images, show_progress: bool) -> np.ndarray:
    """uint8 [m, 192]: the colours of the chosen images, averaged in 8 x 8 cells.

    Raises:
        UserError: one of them was whole when the index was written and is so no longer.
    """

    def look(row: int) -> np.ndarray:
        source, place = sides[chosen.source[row]].source, chosen.place[row]
        sample = source[int(chosen.owner[row])]
        try:
            picture = images.decode(sample.images[place])
        except images.ImageError as error:
            where = f"sample {sample.id!r} of {source.path} (split {source.split}), image {place}"
            raise UserError(f"{where}: {error.reason}; convert the data again") from error
        return np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).reshape(-1)

    count = len(chosen.hashes)
    result = np.zeros((count, 192), np.uint8)
    names = dict.fromkeys(side.source.path.name for side in sides)
    what = f"comparing {count:,} pictures of {', '.join(names)}"
    with _bar(show_progress) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = in_order(pool, look, range(count), _AHEAD)
        for row, colours in progress.track(found, count, description=what):
            result[row] = colours
    return result


def _same_text(asked: Side, training: Sequence[Side]) -> int:
    """Evaluation samples without images of which a training sample without images has question and answer."""

    def texts(side: Side) -> np.ndarray:
        t = side.traits
        bare = side.mask & (np.bincount(t.owners, minlength=len(side.mask)) == 0)
        # An odd number takes different digests to different ones, and question and answer cannot cancel out.
        return (t.questions[bare] * np.uint64(0x9E3779B97F4A7C15)) ^ t.answers[bare]

    return int(np.isin(texts(asked), np.concatenate([texts(side) for side in training])).sum())


def sample_ids(source: Source, numbers: set[int]) -> dict[int, str]:
    """{sample: its id}."""
    if not numbers:
        return {}
    return {number: text.id for number, text in enumerate(source.texts()) if number in numbers}


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
