"""Thin out a set of captions so that rare concepts stay and frequent ones do not crowd them out.

    python -m data_pipeline.balance --captions=Train_GCC-training.tsv --out=data/cc3m-balanced --plot

What LLaVA did to CC3M (3.3 M captions) to get its 595 K (Liu et al., 2023, arXiv 2304.08485, appendix):

    the noun phrases of each caption are found and counted; a phrase in fewer than --min_count captions is passed over
    phrases are walked from the rarest up, and their captions go into the pool
    a phrase in more than --max_per_phrase captions gives a random choice of so many

OUT holds captions.json (LLaVA's JSON, in the order of the input, for python -m data_pipeline.convert
--format=llava), manifest.json (parameters, extractor, counts, coverage), quarantine.jsonl (records that give no
caption, with the reason; absent where there is none) and, with --plot, coverage.png. The result depends on the file
and the parameters, not on the number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

import vflax
from data_pipeline import noun_phrases
from data_pipeline.caption_files import DEFAULT_IMAGE_NAME, Caption, CaptionFile, write_array
from data_pipeline.noun_phrases import Choice, Extractor
from data_pipeline.records import Problem
from vflax import folders
from vflax.errors import UserError

MANIFEST_FILE, CAPTIONS_FILE = "manifest.json", "captions.json"
QUARANTINE_FILE, PLOT_FILE = "quarantine.jsonl", "coverage.png"
_TOOL = "data_pipeline.balance"
_CHUNK = 2000
_MAX_WORKERS = 16
# Bytes of captions from which processes pay: they take a second to start, with spaCy several.
_POOL_FROM = {"builtin": 16 << 20, "spacy": 1 << 20}


def balance(
    captions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    phrases: str = "auto",
    spacy_model: str | None = None,
    min_count: int = 3,
    max_per_phrase: int = 100,
    seed: int = 0,
    image_name: str = DEFAULT_IMAGE_NAME,
    plot: bool = False,
    workers: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write the balanced part of a caption file to the folder `out`.

    Args:
        captions: the file, see caption_files.
        out: the folder; one that this function wrote is replaced.
        phrases, spacy_model: the extractor, see noun_phrases.choose.
        min_count: a phrase in fewer captions is passed over.
        max_per_phrase: a phrase in more captions gives a random choice of so many.
        seed: of that choice.
        image_name: file name of an image for which the file gives a URL.
        plot: draw the coverage, too.
        workers: processes; None: one per core where the file is large.
        show_progress: draw progress bars on stderr.

    Returns:
        The manifest, see docs/balance.md.

    Raises:
        UserError: an argument is wrong, the file cannot be read, or no caption would be left. Nothing is left behind
            then, and what was at `out` is there still.
    """
    out = Path(out)
    _check(out, min_count, max_per_phrase, workers)
    file = CaptionFile(Path(captions), image_name)
    choice = noun_phrases.choose(phrases, spacy_model)
    digest = _sha256(file.path)
    table = PhraseTable()
    problems: list[Problem] = []
    with _progress(show_progress) as progress:
        bar = progress.add_task(f"finding noun phrases ({choice.name})", total=file.size)
        for found in _extract(file, choice, workers, problems, lambda n: progress.update(bar, completed=n)):
            table.add(found)
        kept = select(table, min_count, max_per_phrase, seed)
        if not kept.any():
            raise UserError(_nothing_left(file, table, problems, min_count))
        manifest = {
            "tool": _TOOL,
            "source": {"file": file.path.name, "form": file.form, "bytes": file.size, "sha256": digest},
            "extractor": {"name": choice.name, "version": choice.version, "model": choice.model},
            "parameters": {
                "min_count": min_count,
                "max_per_phrase": max_per_phrase,
                "seed": seed,
                "image_name": image_name,
            },
            **coverage(table, kept, min_count, max_per_phrase),
            "quarantined": len(problems),
            "reasons": dict(Counter(problem.reason for problem in problems)),
            # The random choice may be another in another numpy.
            "versions": {"vflax": vflax.__version__, "numpy": np.__version__},
        }
        with folders.beside(out) as root:
            new = root / "new"
            new.mkdir()
            bar = progress.add_task("writing captions", total=file.size)
            write_array(
                new / CAPTIONS_FILE, _kept_records(file, kept, lambda n: progress.update(bar, completed=n))
            )
            if _sha256(file.path) != digest:
                raise UserError(f"{file.path}: the file was changed while it was read; start again")
            manifest["captions_sha256"] = _sha256(new / CAPTIONS_FILE)
            if problems:
                lines = (json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems)
                (new / QUARANTINE_FILE).write_text("".join(lines), "utf-8")
            if plot:
                draw(table, kept, min_count, max_per_phrase, new / PLOT_FILE)
            (new / MANIFEST_FILE).write_text(
                json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8"
            )
            folders.swap(new, out)
    return manifest


def _check(out: Path, min_count: int, max_per_phrase: int, workers: int | None) -> None:
    wrong = [
        f"{name}={value}"
        for name, value in (
            ("--min_count", min_count),
            ("--max_per_phrase", max_per_phrase),
            ("--workers", workers),
        )
        if value is not None and value < 1
    ]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: expected at least 1")
    if out.is_file():
        raise UserError(f"--out={out} is a file; expected a folder, or nothing, to write to")
    if out.is_dir() and any(out.iterdir()) and not _is_own(out / MANIFEST_FILE):
        raise UserError(f"--out={out} holds files that {_TOOL} did not write; name a new folder")


def _is_own(manifest: Path) -> bool:
    try:
        return json.loads(manifest.read_text("utf-8"))["tool"] == _TOOL
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)


def _kept_records(file: CaptionFile, kept: np.ndarray, advance: Any) -> Iterator[dict[str, Any]]:
    found = (caption for caption in file.read(advance) if isinstance(caption, Caption))
    # Not strict: a file that became longer meanwhile is found by its hash.
    return (caption.record for caption, keep in zip(found, kept, strict=False) if keep)


def _nothing_left(file: CaptionFile, table: PhraseTable, problems: Sequence[Problem], min_count: int) -> str:
    if not table.captions:
        first = problems[0].detail if problems else "the file holds no record"
        return f"{file.path}: not one caption in {len(problems)} records. The first: {first}"
    return (
        f"{file.path}: no noun phrase is in {min_count} of its {table.captions} captions, so none would be left; "
        "lower --min_count"
    )


# ---------------------------------------------------------------------------------------------------------
# Phrases of all captions


class PhraseTable:
    """Which caption has which phrases, in 4 bytes a phrase of a caption and 4 a caption, beside the phrases' texts."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._flat = array("I")
        self._lengths = array("I")

    def add(self, phrases: Sequence[str]) -> None:
        """The next caption's phrases, each once."""
        ids = self._ids
        self._flat.extend([ids.setdefault(phrase, len(ids)) for phrase in phrases])
        self._lengths.append(len(phrases))

    @property
    def captions(self) -> int:
        return len(self._lengths)

    @property
    def names(self) -> list[str]:
        """The phrases, by their ids 0, 1, ..."""
        return list(self._ids)

    @property
    def flat(self) -> np.ndarray:
        """uint32 [n]: the phrase ids of the first caption, then those of the second, ..."""
        return np.frombuffer(self._flat, np.uint32) if self._flat else np.zeros(0, np.uint32)

    @property
    def owners(self) -> np.ndarray:
        """uint32 [n]: the caption of each of `flat`."""
        lengths = np.frombuffer(self._lengths, np.uint32) if self._lengths else np.zeros(0, np.uint32)
        return np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths)

    def counts(self, kept: np.ndarray | None = None) -> np.ndarray:
        """int64 [phrases]: in how many captions each is; of those where kept, bool [captions]."""
        flat = self.flat if kept is None else self.flat[kept[self.owners]]
        return np.bincount(flat, minlength=len(self._ids))


def select(table: PhraseTable, min_count: int, max_per_phrase: int, seed: int) -> np.ndarray:
    """bool [captions]: which captions are in the pool.

    A frequent phrase draws from all its captions, whether they are in the pool already or not, and by itself: its
    choice depends on the seed, its text and its captions only.
    """
    counts, owners = table.counts(), table.owners
    by_phrase = owners[np.argsort(table.flat, kind="stable")]
    ends = np.cumsum(counts)
    names = table.names
    walk = sorted(np.flatnonzero(counts >= min_count).tolist(), key=lambda i: (counts[i], names[i]))
    kept = np.zeros(table.captions, bool)
    for i in walk:
        captions = by_phrase[ends[i] - counts[i] : ends[i]]
        if len(captions) > max_per_phrase:
            key = hashlib.sha256(f"{seed} {names[i]}".encode()).digest()
            random = np.random.default_rng(int.from_bytes(key, "little"))
            captions = random.choice(captions, max_per_phrase, replace=False, shuffle=False)
        kept[captions] = True
    return kept


# ---------------------------------------------------------------------------------------------------------
# Finding them, in as many processes as asked for

_extractor: Extractor  # in a worker process


def _start_worker(choice: Choice) -> None:
    global _extractor
    _extractor = choice.load()


def _extract_in_worker(captions: list[str]) -> list[list[str]]:
    return _extractor(captions)


def _extract(
    file: CaptionFile, choice: Choice, workers: int | None, problems: list[Problem], advance: Any
) -> Iterator[list[str]]:
    """The phrases of each caption in the file's order; what gives no caption goes to `problems`."""
    if workers is None:
        workers = min(os.cpu_count() or 1, _MAX_WORKERS) if file.size >= _POOL_FROM[choice.name] else 1

    def texts() -> Iterator[str]:
        for caption in file.read(advance):
            if isinstance(caption, Problem):
                problems.append(caption)
            else:
                yield caption.text

    found = texts()
    chunks = iter(lambda: list(itertools.islice(found, _CHUNK)), [])
    if workers <= 1:
        extractor = choice.load()
        for chunk in chunks:
            yield from extractor(chunk)
        return
    # spawn: this process may hold threads, which a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (choice,)) as pool:
        pending: deque[Future[list[list[str]]]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_extract_in_worker, chunk))
            if len(pending) > 2 * workers:  # not the whole file at once
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


# ---------------------------------------------------------------------------------------------------------
# What became of the phrases


def coverage(table: PhraseTable, kept: np.ndarray, min_count: int, max_per_phrase: int) -> dict[str, Any]:
    """The manifest's counts {captions, phrases, bins}; a bin is a range of how many captions a phrase is in."""
    before, after = table.counts(), table.counts(kept)
    flat, owners = table.flat, table.owners
    counted = before >= min_count
    has_counted = np.zeros(table.captions, bool)
    has_counted[owners[counted[flat]]] = True
    bins = []
    for low, high in itertools.pairwise(_edges(min_count, int(before.max(initial=0)))):
        inside = (before >= low) & (before < high)
        holders = np.zeros(table.captions, bool)
        holders[owners[inside[flat]]] = True
        bins.append(
            {
                "from": low,
                "to": high - 1,
                "phrases": int(inside.sum()),
                "covered_after": int((inside & (after > 0)).sum()),
                "captions_before": int(holders.sum()),
                "captions_after": int((holders & kept).sum()),
                "share_before": round(float(holders.sum() / table.captions), 4),
                "share_after": round(float((holders & kept).sum() / kept.sum()), 4),
            }
        )
    return {
        "captions": {
            "read": table.captions,
            "kept": int(kept.sum()),
            "without_counted_phrase": int((~has_counted).sum()),
        },
        "phrases": {
            "found": len(before),
            "counted": int(counted.sum()),
            "counted_covered_after": int((counted & (after > 0)).sum()),
            "over_max_per_phrase": int((before > max_per_phrase).sum()),
        },
        "bins": bins,
    }


def _edges(min_count: int, largest: int) -> list[int]:
    """1, min_count, the next power of ten, ..., one over the largest."""
    powers = (10**k for k in range(1, 20))
    inner = [
        min_count,
        *itertools.takewhile(lambda edge: edge <= largest, (p for p in powers if p > min_count)),
    ]
    return sorted({1, *(edge for edge in inner if edge <= largest), largest + 1})


def draw(table: PhraseTable, kept: np.ndarray, min_count: int, max_per_phrase: int, path: Path) -> None:
    """Draw in how many captions each phrase is, before and after, the most frequent first, to a PNG."""
    from matplotlib.figure import Figure

    before, after = table.counts(), table.counts(kept)
    order = np.argsort(-before, kind="stable")
    order = order[before[order] >= min_count]
    rank = np.arange(1, len(order) + 1)
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.step(rank, before[order], where="mid", color="#c44e52", label=f"before: {table.captions:,} captions")
    dots = max(0.5, min(5.0, 2000 / len(order)))
    axes.plot(rank, after[order], ".", color="#4c72b0", markersize=dots, alpha=0.6)
    axes.plot([], [], ".", color="#4c72b0", markersize=6, label=f"after: {int(kept.sum()):,} captions")
    axes.axhline(max_per_phrase, color="0.5", linestyle="--", linewidth=1)
    axes.annotate(
        f"max_per_phrase {max_per_phrase}",
        (1, max_per_phrase),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="0.35",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"noun phrases in at least {min_count} captions, the most frequent first",
        ylabel="captions with the phrase",
        ylim=(0.8, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------
# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--captions", required=True, metavar="FILE", help="JSON array, JSON lines or TSV, plain or gzipped")
    add("--out", required=True, metavar="DIR", help="the folder to write")
    add(
        "--phrases",
        default="auto",
        help=f"the extractor: {', '.join(noun_phrases.KINDS)} (default: %(default)s)",
    )
    add(
        "--spacy_model",
        metavar="NAME",
        help=f"a spaCy pipeline, installed or a folder (default: {noun_phrases.DEFAULT_SPACY_MODEL})",
    )
    add(
        "--min_count", type=int, default=3, metavar="N", help="pass over rarer phrases (default: %(default)s)"
    )
    add(
        "--max_per_phrase",
        type=int,
        default=100,
        metavar="N",
        help="captions that a frequent phrase gives (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the random choice (default: %(default)s)")
    add(
        "--image_name",
        default=DEFAULT_IMAGE_NAME,
        metavar="PATTERN",
        help="file name of the image where the file gives a URL (default: %(default)s)",
    )
    add("--plot", action="store_true", help=f"draw the coverage before and after: OUT/{PLOT_FILE}")
    add("--workers", type=int, metavar="N", help="processes (default: one per core for large files)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    args = vars(_parser().parse_args(argv))
    try:
        manifest = balance(**args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        return 130
    captions, phrases = manifest["captions"], manifest["phrases"]
    extractor = manifest["extractor"]
    print(f"{args['out']}: {captions['kept']} of {captions['read']} captions kept")
    print(
        f"{phrases['found']} phrases ({extractor['name']} {extractor['version']} {extractor['model']}".rstrip()
        + f"), {phrases['counted']} in at least {args['min_count']} captions, "
        f"{phrases['over_max_per_phrase']} in more than {args['max_per_phrase']}; of those counted "
        f"{phrases['counted_covered_after']} of {phrases['counted']} are in the captions kept"
    )
    if manifest["quarantined"]:
        print(f"{manifest['quarantined']} records give no caption, see {args['out']}/{QUARANTINE_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
