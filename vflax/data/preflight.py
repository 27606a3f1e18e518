"""What a run's data is, before anything is trained on it: lengths, what is lost, and copies of what is asked.

`examine` is the one way to it. A launch makes a Preflight and obeys it (`check`); data_pipeline.preflight makes the
same and writes it down. Both read and fill the same caches, so neither does the other's work again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vflax.data import cache as caches
from vflax.data import duplicates, lengths
from vflax.data.duplicates import Copies, Side
from vflax.data.lengths import Lengths
from vflax.data.mixture import MixtureRules, SourceSpec, check_mixture, check_numbers, select
from vflax.data.rows import RowFormat
from vflax.data.source import LeftOut, Source, open_source, splits
from vflax.errors import UserError

Role = Literal["training", "held out", "asked"]
_SHOWN = 3
# So many images must have a copy before a share of them is too much: of a split of 50 a single one, which chance or a
# logo gives, is 2 %.
LEAST_COPIES = 3
TOO_MANY_IMAGES = "too_many_images"


@dataclasses.dataclass(frozen=True)
class Part:
    """A split in one role: trained on, held out of the training sources, or asked besides (config.evaluate.sources).

    Attributes:
        role: that.
        source: the split.
        found: lengths of all its samples.
        chosen: bool [n], whom the task filters let through.
        slots: images that a row holds.
        left_out: {reason: ids} of what the conversion left out of the release, of tasks that the filters let through or
            that nobody could read.
        copies: of what is asked, what the training data holds; None for what is trained on.
        damaged: ids of used samples with an image that cannot be decoded. Looked for where pictures are compared and
            the dataset's writer has not decoded them; data_pipeline.convert has.
    """

    role: Role
    source: Source
    found: Lengths
    chosen: np.ndarray
    slots: int
    left_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    copies: Copies | None = None
    damaged: tuple[str, ...] = ()

    @property
    def kept(self) -> np.ndarray:
        """bool [n]: not dropped, whether or not it is chosen."""
        return self.found.kept & (self.found.images <= self.slots)

    @property
    def used(self) -> np.ndarray:
        """bool [n]: chosen, and not dropped."""
        return self.chosen & self.kept

    @property
    def lengths(self) -> Lengths:
        """`found`, with all that is not used as if it were dropped."""
        used = self.used
        tokens, images, supervised = (
            np.where(used, array, 0)
            for array in (self.found.tokens, self.found.images, self.found.supervised)
        )
        return dataclasses.replace(self.found, tokens=tokens, images=images, supervised=supervised)

    @property
    def findings(self) -> dict[str, np.ndarray]:
        """{kind: int32, the numbers of the chosen samples}: those of lengths.measure, and TOO_MANY_IMAGES for a sample
        with more images than a row has slots, which is dropped."""
        found = dict(self.found.findings)
        found[TOO_MANY_IMAGES] = np.flatnonzero(self.found.images > self.slots).astype(np.int32)
        chosen = {kind: numbers[self.chosen[numbers]] for kind, numbers in sorted(found.items())}
        return {kind: numbers for kind, numbers in chosen.items() if len(numbers)}

    @property
    def dropped_kinds(self) -> tuple[str, ...]:
        """The findings whose samples are dropped."""
        return (*self.found.dropped_kinds, TOO_MANY_IMAGES)

    @property
    def name(self) -> str:
        """For a message."""
        return f"{self.source.path} (split {self.source.split})"

    def shown(self, numbers: np.ndarray) -> str:
        """The ids of the first of these samples, for a message."""
        return few([self.source[int(number)].id for number in numbers[:_SHOWN]], len(numbers))

    def problem(self, max_share: float) -> str | None:
        """The line that refuses a split when a share over `max_share` of its chosen samples is dropped or truncated, or
        was left out when it was converted."""
        cut = self.found.uncut > self.found.tokens
        away = sum(map(len, self.left_out.values()))
        lost, count = int((self.chosen & (cut | ~self.kept)).sum()) + away, int(self.chosen.sum()) + away
        if lost <= max_share * count:
            return None
        kinds = [
            f"{kind}: {len(numbers)} ({self.shown(numbers)})"
            for kind, numbers in self.findings.items()
            if kind in (*self.dropped_kinds, "truncated")
        ]
        kinds += [f"{reason}: {len(ids)} ({few(ids)})" for reason, ids in self.left_out.items()]
        key = "evaluate.sources" if self.role == "asked" else "data.sources"
        converted = f" or were left out when it was converted ({away})" if away else ""
        mend = f" (quarantine/{self.source.split}.jsonl says why) and convert it again" if away else ""
        return (
            f"{self.name}: {lost} of {count} samples would be dropped or truncated{converted}, {lost / count:.1%}, "
            f"more than data.max_problem_share={max_share}: {'; '.join(kinds)}. Raise data.max_length for the long "
            f"ones or data.slots for those with too many images, mend the data{mend}, leave the worst tasks out with "
            f"{key}[k].exclude, or raise data.max_problem_share."
        )


def few(names: Sequence[str], count: int | None = None) -> str:
    """The first of some names, and how many more there are; `count`: of all of them, where not all are given."""
    count = len(names) if count is None else count
    more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
            problem = part.problem(self.max_problem_share)
            lines.update({problem: None} if problem else {})
        for part in self.parts:
            if part.damaged:
                lines[_damaged(part)] = None
            copies = part.copies
            if copies and copies.share > self.max_duplicate_share and copies.copied >= LEAST_COPIES:
                lines[self._duplicated(part, copies)] = None
        return list(lines)

    def check(self) -> None:
        """Refuse data of which too much is lost, or too much of what is asked was trained on.

        Raises:
            UserError: naming each such split, its samples and what to do.
        """
        if problems := self.problems():
            raise UserError("\n".join(problems))

    def remarks(self) -> list[str]:
        """A line for each finding of each split, and for copies, for who launches."""
        lines = []
        for part in self.parts:
            where = f"{part.name}, {part.role}"
            for kind, numbers in part.findings.items():
                dropped = " (dropped)" if kind in part.dropped_kinds else ""
                lines.append(f"{where}: {len(numbers):,} {kind}{dropped}: {part.shown(numbers)}")
            for reason, ids in part.left_out.items():
                lines.append(f"{where}: {len(ids):,} {reason} (left out when it was converted): {few(ids)}")
            if part.copies is not None and part.copies.copied:
                images = f"{part.copies.copied:,} of {part.copies.images:,} images"
                lines.append(f"{where}: {images} have a near copy in the training data")
        return list(dict.fromkeys(lines))  # of a split that several sources name

    def _duplicated(self, part: Part, copies: Copies) -> str:
        shown = few(list(dict.fromkeys(pair.id for pair in copies.pairs)))
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
        f"{part.name}: {len(part.damaged)} samples have an image that cannot be decoded: {few(part.damaged)}. "
        "A run would stop at the first; leave them out, as `python -m data_pipeline.convert` does."
    )


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

    All that can be told wrong without measuring is refused before anything is measured, which takes minutes.

    Of the training samples all count that the task filters let through and that are not dropped, whatever cap, weight
    and budget then draw: what is refused shall not depend on the seed.

    Args:
        config: config.data, with sources, eval_split, tasks, budget, spread, order, max_problem_share,
            max_duplicate_share, duplicate_distance.
        resolve_path: from the path in a source to a directory.
        format: how samples are rendered.
        evaluate_sources: config.evaluate.sources.
        cache: where results are kept when a dataset directory is read-only.
        show_progress: draw progress bars.

    Raises:
        UserError: a source that cannot be opened, images in it that cannot be decoded, a setting that cannot be, a
            filter that matches no task. Data that is over a threshold does not: see `Preflight.check`.
    """
    if not 0 <= config.duplicate_distance <= duplicates.MAX_DISTANCE:
        raise UserError(
            f"data.duplicate_distance={config.duplicate_distance}: expected 0 to {duplicates.MAX_DISTANCE} bits"
        )
    specs, rules = read_specs(config, resolve_path), read_rules(config)
    if not specs:
        raise UserError("data.sources is empty: name at least one dataset directory")
    for spec in specs:
        check_numbers(spec)
    opened: dict[tuple[str, str], Source] = {}
    left_out: dict[tuple[str, str], list[LeftOut]] = {}
    chosen: list[tuple[Role, Source, np.ndarray, dict[str, list[str]]]] = []

    def choose(role: Role, path: str, split: str, filters: Sequence[SourceSpec], key: str) -> None:
        if (path, split) not in opened:
            opened[path, split] = open_source(path, split, key)
            opened[path, split].load_tasks(cache)
            left_out[path, split] = opened[path, split].left_out()
        source = opened[path, split]
        strict = role != "held out"
        masks = [select(spec, source.tasks, strict=strict, key=key) for spec in filters]
        chosen.append((role, source, np.any(masks, axis=0), _by_reason(left_out[path, split], filters)))

    for k, spec in enumerate(specs):
        choose("training", spec.path, spec.split, [spec], f"data.sources[{k}]")
    check_mixture(specs, [source.tasks for _, source, *_ in chosen], rules)
    for path in dict.fromkeys(spec.path for spec in specs if config.eval_split in splits(spec.path)):
        filters = [spec for spec in specs if spec.path == path]
        choose("held out", path, config.eval_split, filters, "data.sources")
    for k, entry in enumerate(evaluate_sources):
        own = SourceSpec(os.fspath(resolve_path(entry.path)), entry.split, include=tuple(entry.include),
                         exclude=tuple(entry.exclude))  # fmt: skip
        choose("asked", own.path, own.split, [own], f"evaluate.sources[{k}]")

    found = {
        (source.path, source.split): lengths.measure(
            source, format, fallback_cache=cache, show_progress=show_progress
        )
        for source in opened.values()
    }
    parts = [
        Part(role, source, found[source.path, source.split], mask, format.slots, by_reason)
        for role, source, mask, by_reason in chosen
    ]
    if any(part.role != "training" for part in parts):
        parts = _compared(parts, config.duplicate_distance, cache, show_progress)
    return Preflight(
        format, parts, config.max_problem_share, config.max_duplicate_share, config.duplicate_distance
    )


def _by_reason(entries: Sequence[LeftOut], filters: Sequence[SourceSpec]) -> dict[str, list[str]]:
    """{reason: ids} of those that one of the filters would let through, had they been written, the commonest reason
    first. Where not even the task could be read, it may have been any."""
    masks = [select(spec, [entry.task for entry in entries], strict=False) for spec in filters]
    found: dict[str, list[str]] = {}
    for entry, passes in zip(entries, np.any(masks, axis=0), strict=True):
        if passes or not entry.task:
            found.setdefault(entry.reason, []).append(entry.id)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _compared(parts: Sequence[Part], distance: int, cache: Path | None, show_progress: bool) -> list[Part]:
    """The parts, with copies and damaged."""
    traits = {
        part.source.fingerprint: duplicates.traits(
            part.source, caches.folders(part.source.path, cache), show_progress
        )
        for part in {part.source.fingerprint: part for part in parts}.values()
    }
    sides = [Side(part.source, part.used, traits[part.source.fingerprint]) for part in parts]
    training = [side for side, part in zip(sides, parts, strict=True) if part.role == "training"]
    result = []
    for part, side in zip(parts, sides, strict=True):
        copies = None
        if part.role != "training":
            places = caches.folders(part.source.path, cache)
            copies = duplicates.find_copies(side, training, distance, places, show_progress)
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
            strict=entry.strict,
        )
        for entry in config.sources
    ]


def check_sources(config: Any, resolve_path: Callable[[str], str | os.PathLike[str]]) -> None:
    """Refuse, before anything that takes long, sources that cannot be opened. config: config.data.

    Raises:
        UserError: no such directory or split, or it is damaged.
    """
    for k, spec in enumerate(read_specs(config, resolve_path)):
        open_source(spec.path, spec.split, f"data.sources[{k}]")


def read_rules(config: Any) -> MixtureRules:
    """What config.data says of all sources together."""
    return MixtureRules(config.tasks or None, config.budget or None, config.spread, config.order)
