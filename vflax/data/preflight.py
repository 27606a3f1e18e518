"""What a run's data is, before anything is trained on it: lengths, what is lost, and copies of what is asked.

`examine` is the one way to it. A launch makes a Preflight and obeys it (`check`); data_pipeline.preflight makes the
same and writes it down. Both read and fill the same caches, so neither does the other's work again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vflax.data import duplicates, lengths
from vflax.data.duplicates import Copies, Side
from vflax.data.lengths import Lengths
from vflax.data.mixture import SourceSpec, select
from vflax.data.rows import RowFormat
from vflax.data.source import Source, open_source, splits
from vflax.errors import UserError

Role = Literal["training", "held out", "asked"]
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """A split in one role: trained on, held out of the training sources, or asked besides (config.evaluate.sources).

    Attributes:
        role: that.
        source: the split.
        found: lengths of all its samples.
        chosen: bool [n], whom the task filters let through.
        copies: of what is asked, what the training data holds; None for what is trained on.
        damaged: ids of used samples with an image that cannot be decoded. Looked for where pictures are compared and
            the dataset's writer has not decoded them; data_pipeline.convert has.
    """

    role: Role
    source: Source
    found: Lengths
    chosen: np.ndarray
    copies: Copies | None = None
    damaged: tuple[str, ...] = ()

    @property
    def used(self) -> np.ndarray:
        """bool [n]: chosen, and not dropped."""
        return self.chosen & self.found.kept

    @property
    def lengths(self) -> Lengths:
        """`found`, with what the filters leave out as if it were dropped."""
        tokens, images, supervised = (
            np.where(self.chosen, array, 0)
            for array in (self.found.tokens, self.found.images, self.found.supervised)
        )
        return dataclasses.replace(self.found, tokens=tokens, images=images, supervised=supervised)

    @property
    def name(self) -> str:
        """For a message."""
        return f"{self.source.path} (split {self.source.split})"


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What was found, and what of it is too much.

    Attributes:
        format: how samples are rendered.
        parts: every split of the run in each of its roles, those that are trained on first.
        max_problem_share: config.data.max_problem_share.
        max_duplicate_share: config.data.max_duplicate_share.
        duplicate_distance: config.data.duplicate_distance.
    """

    format: RowFormat
    parts: list[Part]
    max_problem_share: float
    max_duplicate_share: float
    duplicate_distance: int

    def of(self, role: Role) -> list[Part]:
        """The parts in this role."""
        return [part for part in self.parts if part.role == role]

    def problems(self) -> list[str]:
        """What is over a threshold, each a line that says what to do; empty where the data may be used."""
        lines: dict[str, None] = {}  # a split may stand in two roles
        for part in self.parts:
            problem = lengths.problem(part.found, part.source, self.max_problem_share)
            lines.update({problem: None} if problem else {})
        for part in self.parts:
            if part.damaged:
                lines[_damaged(part)] = None
            if part.copies is not None and part.copies.share > self.max_duplicate_share:
                lines[self._duplicated(part, part.copies)] = None
        return list(lines)

    def check(self) -> None:
        """Refuse data of which too much is lost, or too much of what is asked was trained on.

        Raises:
            UserError: naming each such split, its samples and what to do.
        """
        if problems := self.problems():
            raise UserError("\n".join(problems))

    def remarks(self) -> list[str]:
        """Lines about copies, for who launches; findings about conversations stand in pipeline.Data.findings."""
        return [
            f"{part.name}, {part.role}: {part.copies.copied:,} of {part.copies.images:,} images have a near copy in "
            "the training data"
            for part in self.parts
            if part.copies is not None and part.copies.copied
        ]

    def _duplicated(self, part: Part, copies: Copies) -> str:
        shown = _shown(list(dict.fromkeys(pair.id for pair in copies.pairs)))
        worse = f"{copies.samples['same_question']} samples with the same question too"
        worst = f"{copies.samples['same_answer']} with question and answer"
        return (
            f"{part.name}, {part.role}: {copies.copied} of {copies.images} images have a near copy in the training "
            f"data, {copies.share:.1%}, more than data.max_duplicate_share={self.max_duplicate_share} ({worse}, "
            f"{worst}): {shown}. Take these samples out of the training data or out of this split, or raise "
            "data.max_duplicate_share; `python -m data_pipeline.preflight` shows the pairs."
        )


def _damaged(part: Part) -> str:
    return (
        f"{part.name}: {len(part.damaged)} samples have an image that cannot be decoded: {_shown(part.damaged)}. "
        "A run would stop at the first; leave them out, as `python -m data_pipeline.convert` does."
    )


def _shown(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else ""
    return ", ".join(ids[:_SHOWN]) + more


def examine(
    config: Any,
    resolve_path: Callable[[str], str | os.PathLike[str]],
    *,
    format: RowFormat,
    evaluate_sources: Sequence[Any] = (),
    cache: Path | None = None,
    show_progress: bool = True,
) -> Preflight:
    """Open every split that config.data and config.evaluate.sources name, measure it and look for copies.

    Of the training samples all count that the task filters let through and that are not dropped, whatever cap, weight
    and budget then draw: what is refused shall not depend on the seed.

    Args:
        config: config.data, with sources, eval_split, max_problem_share, max_duplicate_share, duplicate_distance.
        resolve_path: from the path in a source to a directory.
        format: how samples are rendered.
        evaluate_sources: config.evaluate.sources.
        cache: where results are kept when a dataset directory is read-only.
        show_progress: draw progress bars.

    Raises:
        UserError: a source that cannot be opened, images in it that cannot be decoded, a setting that cannot be. Data
            that is over a threshold does not: see `Preflight.check`.
    """
    if not 0 <= config.duplicate_distance <= duplicates.MAX_DISTANCE:
        raise UserError(
            f"data.duplicate_distance={config.duplicate_distance}: expected 0 to {duplicates.MAX_DISTANCE} bits"
        )
    specs = read_specs(config, resolve_path)
    if not specs:
        raise UserError("data.sources is empty: name at least one dataset directory")
    opened: dict[tuple[str, str], tuple[Source, Lengths]] = {}

    def part(role: Role, path: str, split: str, filters: Sequence[SourceSpec], strict: bool) -> Part:
        if (path, split) not in opened:
            source = open_source(path, split)
            found = lengths.measure(source, format, fallback_cache=cache, show_progress=show_progress)
            opened[path, split] = source, found
        source, found = opened[path, split]
        chosen = np.any([select(spec, source.tasks, strict=strict) for spec in filters], axis=0)
        return Part(role, source, found, chosen)

    # Of the training sources vflax.data.mixture refuses a filter that matches no task.
    training = [part("training", spec.path, spec.split, [spec], False) for spec in specs]
    asked = []
    for path in dict.fromkeys(spec.path for spec in specs if config.eval_split in splits(spec.path)):
        filters = [spec for spec in specs if spec.path == path]
        asked.append(part("held out", path, config.eval_split, filters, False))
    for entry in evaluate_sources:
        own = SourceSpec(os.fspath(resolve_path(entry.path)), entry.split, include=tuple(entry.include),
                         exclude=tuple(entry.exclude))  # fmt: skip
        asked.append(part("asked", own.path, own.split, [own], True))
    parts = training + asked
    if asked:
        parts = _compared(parts, config.duplicate_distance, cache, show_progress)
    return Preflight(
        format, parts, config.max_problem_share, config.max_duplicate_share, config.duplicate_distance
    )


def _compared(parts: Sequence[Part], distance: int, cache: Path | None, show_progress: bool) -> list[Part]:
    """The parts, with copies and damaged."""
    traits = {
        part.source.fingerprint: duplicates.traits(part.source, _caches(part.source, cache), show_progress)
        for part in {part.source.fingerprint: part for part in parts}.values()
    }
    sides = [Side(part.source, part.used, traits[part.source.fingerprint]) for part in parts]
    training = [side for side, part in zip(sides, parts, strict=True) if part.role == "training"]
    result = []
    for part, side in zip(parts, sides, strict=True):
        copies = None
        if part.role != "training":
            caches = _caches(part.source, cache)
            copies = duplicates.find_copies(side, training, distance, caches, show_progress)
        damaged = set(side.traits.damaged[part.used[side.traits.damaged]].tolist())
        ids = duplicates.sample_ids(part.source, damaged)
        result.append(
            dataclasses.replace(part, copies=copies, damaged=tuple(ids[i] for i in sorted(damaged)))
        )
    return result


def read_specs(config: Any, resolve_path: Callable[[str], str | os.PathLike[str]]) -> list[SourceSpec]:
    """config.data.sources, with their directories."""
    return [
        SourceSpec(
            path=os.fspath(resolve_path(entry.path)),
            split=entry.split,
            weight=float(entry.weight),
            cap=entry.cap or None,
            include=tuple(entry.include),
            exclude=tuple(entry.exclude),
            count=entry.count or None,
        )
        for entry in config.sources
    ]


def _caches(source: Source, fallback: Path | None) -> list[Path]:
    return [Path(os.fspath(source.path)) / "preflight", *([fallback] if fallback else [])]
