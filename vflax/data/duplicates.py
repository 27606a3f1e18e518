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
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from vflax import images
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
_CANDIDATES = 1 << 22  # hashes compared at a time: about 200 MB
_LOOKS = 1 << 18  # colours compared at a time: 200 MB


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

    what = f"looking at the pictures of {source.split} of {source.path.name}"
    with _bar(show_progress) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = zip(numbers, pool.map(hashes, numbers), strict=True)
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
    found = _find(asked, training, distance, show_progress)
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
    """(evaluation image, training image, bits, level) of each evaluation image with a copy: its worst, then nearest."""
    i, j = _alike(compared.hashes, trained.hashes, distance)
    own, own_row = np.unique(i, return_inverse=True)
    others, other_row = np.unique(j, return_inverse=True)
    own_looks = _looks(asked, compared.take(own), show_progress)
    other_looks = _looks(training, trained.take(others), show_progress)
    copies = np.zeros(len(i), bool)
    for begin in range(0, len(i), _LOOKS):
        some = slice(begin, begin + _LOOKS)
        difference = own_looks[own_row[some]] - other_looks[other_row[some]]
        copies[some] = np.sqrt((difference**2).mean(axis=1)) <= _COLOUR
    i, j = i[copies], j[copies]
    bits = np.bitwise_count(compared.hashes[i] ^ trained.hashes[j])
    same_question = compared.question[i] == trained.question[j]
    level = same_question.astype(int) + (same_question & (compared.answer[i] == trained.answer[j]))
    order = np.lexsort((j, bits, -level, i))
    _, first = np.unique(i[order], return_index=True)
    best = order[first]
    best = best[np.lexsort((i[best], bits[best], -level[best]))]
    return list(zip(*(x[best].tolist() for x in (i, j, bits, level)), strict=True))


def _alike(a: np.ndarray, b: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """i, j int64 [p]: all pairs in which a[i] and b[j], which may hold repetitions, differ in at most so many bits."""
    values, number = np.unique(a, return_inverse=True)
    order = np.argsort(b, kind="stable")
    ordered = b[order]
    others = np.unique(ordered)
    v, w, _ = near_pairs(values, others, distance)
    # From each of a to the hashes near its own, and from these to the places in b where they are.
    begins = np.searchsorted(v, np.arange(len(values) + 1))
    first, last = (np.searchsorted(ordered, others, side) for side in ("left", "right"))
    found = []
    for i, place in _ranges(begins[number], begins[number + 1]):
        near = w[place]
        found += [(i[k], order[where]) for k, where in _ranges(first[near], last[near])]
    i, j = (np.concatenate(column) for column in zip(*found, strict=True)) if found else np.zeros((2, 0), int)
    return i, j


def _looks(sides: Sequence[Side], chosen: _Images, show_progress: bool) -> np.ndarray:
    """float32 [m, 192]: the colours of the chosen images, averaged in 8 x 8 cells.

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
        return np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float32).reshape(-1)

    count = len(chosen.hashes)
    result = np.zeros((count, 192), np.float32)
    what = f"comparing {count:,} pictures" + (f" of {sides[0].source.path.name}" if count else "")
    with _bar(show_progress) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for row, colours in enumerate(progress.track(pool.map(look, range(count)), count, description=what)):
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
