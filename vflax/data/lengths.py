"""How long each sample is, and which samples cannot be used: measured once, kept in a cache.

What is found is a finding: a short name with the numbers of the samples. Those of conversation.read_llava, and

    truncated            longer than a row; cut on the right, its images and a supervised token are left
    too_long             longer than a row, and cutting would lose an image or the whole answer: dropped
    nothing_supervised   no token to learn from: dropped
    malformed, ...       the kinds of conversation.ConversationError: dropped
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.conversation import ConversationError, Rendered, expand
from vflax.data import cache
from vflax.data.ahead import in_order
from vflax.data.rows import RowFormat, render_sample
from vflax.data.source import SampleText, Source

# Raise it when the arrays or the rules above change meaning.
_VERSION = 3
_CHUNK = 2000
# Starting processes takes seconds; one core measures over a thousand samples in each.
_POOL_FROM = 20_000
_MAX_WORKERS = 16


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What was measured of a source with n samples.

    Attributes:
        tokens: int32 [n], tokens in a row, image tokens included, after truncation; 0 where dropped.
        uncut: int32 [n], tokens before truncation, also where dropped; 0 where the conversation cannot be rendered.
        images: int32 [n]; 0 where dropped.
        supervised: int32 [n], supervised tokens after truncation; 0 where dropped.
        findings: {kind: int32, the numbers of the samples, ascending}.
        dropped_kinds: the findings whose samples are dropped.
    """

    tokens: np.ndarray
    uncut: np.ndarray
    images: np.ndarray
    supervised: np.ndarray
    findings: Mapping[str, np.ndarray]
    dropped_kinds: Sequence[str]

    @property
    def kept(self) -> np.ndarray:
        """bool [n], False where the sample is dropped."""
        return self.tokens > 0


def measure(
    source: Source,
    format: RowFormat,
    *,
    fallback_cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    show_progress: bool = True,
) -> Lengths:
    """Lengths of all samples of a source; images are not read.

    Kept at SOURCE/preflight/lengths-FINGERPRINT.npz, where that cannot be written at `fallback_cache`.

    Args:
        source: the samples.
        format: how they are rendered; slots plays no part.
        fallback_cache: a directory for the result when the dataset is read-only.
        workers: processes; None: one per core for large sources, none for small ones.
        show_progress: draw a progress bar on stderr.
    """
    name = f"lengths-{fingerprint(source, format)}.npz"
    places = cache.folders(source.path, fallback_cache)
    found = cache.load(places, name, lambda path: _load(path, len(source)))
    if found is None:
        found = measured = _measure(source, format, workers, show_progress)
        cache.keep(places, name, lambda path: _save(path, measured))
    return found


def fingerprint(source: Source, format: RowFormat) -> str:
    """Hex digest of all that decides the lengths: data, tokenizer, template, image rules, the renderer."""
    facts = [
        _VERSION,
        source.fingerprint,
        format.tokenizer.fingerprint,
        format.template,
        format.position,
        format.rules.to_dict(),
        format.num_image_tokens,
        format.max_length,
        [_code_digest(module) for module in ("vflax.conversation", "vflax.templates", "vflax.tokenizer")],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _code_digest(module: str) -> str:
    """A renderer that changed must not meet lengths of before."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Measuring

# (tokens, uncut, images, supervised), findings, why it is dropped
_Measured = tuple[tuple[int, int, int, int], list[str], str | None]


def judge(rendered: Rendered, length: int, format: RowFormat, limit: int) -> tuple[int, str | None]:
    """What a row of `limit` tokens keeps of a sample.

    Args:
        rendered: the sample.
        length: its tokens, those of its images included.
        format: how many tokens an image becomes.
        limit: tokens in a row.

    Returns:
        (supervised tokens that are kept, None or why not all of them are): "truncated"; or, with none kept,
        "nothing_supervised" or "too_long".
    """
    supervised = int(np.count_nonzero(rendered.supervised))
    if not supervised:
        return 0, "nothing_supervised"
    if length <= limit:
        return supervised, None
    ids, labels = expand(rendered, format.num_image_tokens)
    supervised = int(np.count_nonzero(labels[:limit] != IGNORE_LABEL))
    if not supervised or (ids[limit:] == IMAGE_TOKEN_ID).any():
        return 0, "too_long"
    return supervised, "truncated"


def _measure_one(text: SampleText, format: RowFormat) -> _Measured:
    try:
        rendered, findings = render_sample(text.conversations, text.num_images, format, text.id)
    except ConversationError as error:
        return (0, 0, 0, 0), [], error.kind
    length = len(rendered.ids) + text.num_images * (format.num_image_tokens - 1)
    supervised, verdict = judge(rendered, length, format, format.max_length)
    if not supervised:
        return (0, length, 0, 0), findings, verdict
    kept = (min(length, format.max_length), length, text.num_images, supervised)
    return kept, [*findings, *([verdict] if verdict else [])], None


def _measure_chunk(texts: Sequence[SampleText], format: RowFormat) -> list[_Measured]:
    return [_measure_one(text, format) for text in texts]


_format: RowFormat  # in a worker process


def _start_worker(format: RowFormat) -> None:
    global _format
    _format = format


def _measure_in_worker(texts: Sequence[SampleText]) -> list[_Measured]:
    return _measure_chunk(texts, _format)


def _chunks(source: Source) -> Iterator[list[SampleText]]:
    texts = source.texts()
    while chunk := list(itertools.islice(texts, _CHUNK)):
        yield chunk


def _measure(source: Source, format: RowFormat, workers: int | None, show_progress: bool) -> Lengths:
    if workers is None:
        workers = min(os.cpu_count() or 1, _MAX_WORKERS) if len(source) >= _POOL_FROM else 1
    arrays = np.zeros((len(source), 4), np.int32)
    findings: dict[str, array[int]] = {}
    dropped: set[str] = set()
    done = 0
    with Progress(console=Console(stderr=True), disable=not show_progress, transient=True) as progress:
        bar = progress.add_task(f"measuring {source.split} of {source.path.name}", total=len(source))
        for measured in _run(source, format, workers):
            for numbers, kinds, reason in measured:
                arrays[done] = numbers
                dropped.update([reason] if reason else [])
                for kind in [*kinds, *([reason] if reason else [])]:
                    findings.setdefault(kind, array("i")).append(done)
                done += 1
            progress.update(bar, completed=done)
    tokens, uncut, images, supervised = arrays.T.copy()
    by_kind = {kind: np.array(numbers, np.int32) for kind, numbers in sorted(findings.items())}
    return Lengths(tokens, uncut, images, supervised, by_kind, sorted(dropped))


def _run(source: Source, format: RowFormat, workers: int) -> Iterator[list[_Measured]]:
    if workers <= 1:
        for texts in _chunks(source):
            yield _measure_chunk(texts, format)
        return
    context = multiprocessing.get_context("spawn")  # this process may hold threads, which a fork would break
    with ProcessPoolExecutor(workers, context, _start_worker, (format,)) as pool:
        # Not the whole dataset's text at once.
        for _, measured in in_order(pool, _measure_in_worker, _chunks(source), 2 * workers + 1):
            yield measured


# ---------------------------------------------------------------------------------------------------------
# The cache: the four arrays as one, the kinds that are dropped, and each finding under its name

_FINDING = "finding."


def _load(path: Path, count: int) -> Lengths | None:
    with np.load(path) as arrays:
        tokens, uncut, images, supervised = arrays["lengths"]
        findings = {
            name.removeprefix(_FINDING): arrays[name] for name in arrays.files if name.startswith(_FINDING)
        }
        found = Lengths(tokens, uncut, images, supervised, findings, arrays["dropped_kinds"].tolist())
    return found if len(tokens) == count else None


def _save(path: Path, lengths: Lengths) -> None:
    arrays = np.stack([lengths.tokens, lengths.uncut, lengths.images, lengths.supervised])
    findings: dict[str, Any] = {_FINDING + kind: numbers for kind, numbers in lengths.findings.items()}
    np.savez(path, lengths=arrays, dropped_kinds=np.array(lengths.dropped_kinds, str), **findings)
