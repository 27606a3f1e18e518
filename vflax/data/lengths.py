"""How long each sample is, and which samples cannot be used: measured once, kept in a cache.

What is found is a finding: a short name with the ids of the samples. Those of conversation.read_llava, and

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
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.conversation import ConversationError, expand
from vflax.data.rows import RowFormat, render_sample
from vflax.data.source import SampleText, Source

# Raise it when the arrays or the rules above change meaning.
_VERSION = 2
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
        findings: {kind: ids of the samples}.
        dropped_kinds: the findings whose samples are dropped.
    """

    tokens: np.ndarray
    uncut: np.ndarray
    images: np.ndarray
    supervised: np.ndarray
    findings: Mapping[str, list[str]]
    dropped_kinds: Sequence[str]

    @property
    def kept(self) -> np.ndarray:
        """bool [n], False where the sample is dropped."""
        return self.tokens > 0

    @property
    def problems(self) -> dict[str, list[str]]:
        """The findings by which something to learn from is lost: samples dropped or truncated."""
        kinds = (*self.dropped_kinds, "truncated")
        return {kind: ids for kind, ids in self.findings.items() if kind in kinds}


def problem(lengths: Lengths, source: Source, max_share: float) -> str | None:
    """The line that refuses a source of which a share over `max_share` is dropped or truncated, else None."""
    count = sum(len(ids) for ids in lengths.problems.values())
    if count <= max_share * len(source):
        return None
    kinds = "; ".join(
        f"{kind}: {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
        for kind, ids in lengths.problems.items()
    )
    return (
        f"{source.path} (split {source.split}): {count} of {len(source)} samples would be dropped or "
        f"truncated, {count / len(source):.1%}, more than data.max_problem_share={max_share}: {kinds}. "
        "Raise data.max_length for the long ones, mend the data, or raise data.max_problem_share."
    )


def measure(
    source: Source,
    format: RowFormat,
    *,
    fallback_cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    show_progress: bool = True,
) -> Lengths:
    """Lengths of all samples of a source; images are not read.

    Kept at SOURCE/preflight/FINGERPRINT.{json,npy}, where that cannot be written at `fallback_cache`.

    Args:
        source: the samples.
        format: how they are rendered; slots plays no part.
        fallback_cache: a directory for the result when the dataset is read-only.
        workers: processes; None: one per core for large sources, none for small ones.
        show_progress: draw a progress bar on stderr.
    """
    name = fingerprint(source, format)
    folders = [Path(f) for f in (os.fspath(source.path) + "/preflight", fallback_cache) if f is not None]
    for folder in folders:
        cached = _load(folder, name, len(source))
        if cached is not None:
            return cached
    lengths = _measure(source, format, workers, show_progress)
    for folder in folders:
        try:
            _save(folder, name, lengths)
            break
        except OSError:  # read-only: the next place; without any it is measured again next time
            continue
    return lengths


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


def _measure_one(text: SampleText, format: RowFormat) -> _Measured:
    try:
        rendered, findings = render_sample(text.conversations, text.num_images, format, text.id)
    except ConversationError as error:
        return (0, 0, 0, 0), [], error.kind
    length = len(rendered.ids) + text.num_images * (format.num_image_tokens - 1)
    supervised = int(np.count_nonzero(rendered.supervised))
    if not supervised:
        return (0, length, 0, 0), findings, "nothing_supervised"
    if length <= format.max_length:
        return (length, length, text.num_images, supervised), findings, None
    ids, labels = expand(rendered, format.num_image_tokens)
    supervised = int(np.count_nonzero(labels[: format.max_length] != IGNORE_LABEL))
    if not supervised or (ids[format.max_length :] == IMAGE_TOKEN_ID).any():
        return (0, length, 0, 0), findings, "too_long"
    return (format.max_length, length, text.num_images, supervised), [*findings, "truncated"], None


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
    findings: dict[str, list[str]] = {}
    dropped: set[str] = set()
    done = 0
    with Progress(console=Console(stderr=True), disable=not show_progress, transient=True) as progress:
        bar = progress.add_task(f"measuring {source.split} of {source.path.name}", total=len(source))
        for texts, measured in _run(source, format, workers):
            for text, (numbers, kinds, reason) in zip(texts, measured, strict=True):
                arrays[done] = numbers
                done += 1
                dropped.update([reason] if reason else [])
                for kind in [*kinds, *([reason] if reason else [])]:
                    findings.setdefault(kind, []).append(text.id)
            progress.update(bar, completed=done)
    tokens, uncut, images, supervised = arrays.T.copy()
    return Lengths(tokens, uncut, images, supervised, dict(sorted(findings.items())), sorted(dropped))


def _run(
    source: Source, format: RowFormat, workers: int
) -> Iterator[tuple[list[SampleText], list[_Measured]]]:
    if workers <= 1:
        for texts in _chunks(source):
            yield texts, _measure_chunk(texts, format)
        return
    context = multiprocessing.get_context("spawn")  # this process may hold threads, which a fork would break
    with ProcessPoolExecutor(workers, context, _start_worker, (format,)) as pool:
        pending: deque[tuple[list[SampleText], Future[list[_Measured]]]] = deque()
        for texts in _chunks(source):
            pending.append((texts, pool.submit(_measure_in_worker, texts)))
            if len(pending) > 2 * workers:  # not the whole dataset's text at once
                texts, future = pending.popleft()
                yield texts, future.result()
        for texts, future in pending:
            yield texts, future.result()


# ---------------------------------------------------------------------------------------------------------
# The cache


def _load(folder: Path, name: str, count: int) -> Lengths | None:
    """A whole cache entry, or None; a damaged one is measured again."""
    try:
        arrays = np.load(folder / f"{name}.npy")
        facts = json.loads((folder / f"{name}.json").read_text("utf-8"))
        findings, dropped = facts["findings"], facts["dropped_kinds"]
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if arrays.shape != (4, count):
        return None
    return Lengths(arrays[0], arrays[1], arrays[2], arrays[3], findings, dropped)


def _save(folder: Path, name: str, lengths: Lengths) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = np.stack([lengths.tokens, lengths.uncut, lengths.images, lengths.supervised])
    facts: dict[str, Any] = {
        "samples": len(lengths.tokens),
        "kept": int(lengths.kept.sum()),
        "tokens": int(lengths.tokens.sum()),
        "images": int(lengths.images.sum()),
        "supervised_tokens": int(lengths.supervised.sum()),
        "counts": {kind: len(ids) for kind, ids in lengths.findings.items()},
        "dropped_kinds": list(lengths.dropped_kinds),
        "findings": lengths.findings,
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
        np.save(Path(temporary) / "lengths.npy", arrays)
        (Path(temporary) / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), "utf-8")
        os.replace(Path(temporary) / "lengths.npy", folder / f"{name}.npy")
        os.replace(Path(temporary) / "facts.json", folder / f"{name}.json")
