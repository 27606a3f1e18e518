"""From config.data to batches: sources, lengths, mixture, plan and rows put together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vflax.conversation import Position
from vflax.data.lengths import Lengths
from vflax.data.loader import Loader
from vflax.data.mixture import Mixture, SourceSpec, TaskCount, select
from vflax.data.packing import PLAN_VERSION, PackPlan, PlanStats
from vflax.data.preflight import Part, Preflight, examine, few, read_rules, read_specs
from vflax.data.questions import Question, ask, choose
from vflax.data.rows import Row, RowFormat, RowSource
from vflax.data.source import Source, splits
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.tokenizer import Tokenizer

# Of a larger share of empty rows `describe` says how they could be filled.
_EMPTY_ROWS = 0.1


@dataclasses.dataclass(frozen=True)
class _Part:
    """One way through some sources: all that training needs, or all that held-out evaluation needs."""

    sources: list[Source]
    lengths: list[Lengths]
    mixture: Mixture
    plan: PackPlan
    rows: RowSource


class Data:
    """The data of a run: see build_data. Everything about it is fixed before the first step.

    Attributes:
        plan: which samples share a row (vflax.data.packing).
        stats, heldout_stats: fill and means of an epoch; heldout_stats is None where nothing is held out.
        total_steps: optimizer steps of the run.
        rows_per_step: rows of a global step, empty ones included: a multiple of rows_multiple.
        capacity: C, no row of the run has more supervised tokens.
        preflight: what was found before it was planned.
    """

    def __init__(
        self,
        train: _Part,
        heldout: _Part | None,
        asked: Sequence[tuple[Source, Lengths]],
        format: RowFormat,
        specs: Sequence[SourceSpec],
        *,
        preflight: Preflight,
        eval_split: str,
        settings: dict[str, Any],
        threads: int,
        accumulation: int,
        process_index: int,
        process_count: int,
    ) -> None:
        self._train, self._heldout, self._format, self._specs = train, heldout, format, list(specs)
        self._asked, self._eval_split = list(asked), eval_split
        self.preflight = preflight
        self._settings, self._threads, self._accumulation = settings, threads, accumulation
        self._process = {"process_index": process_index, "process_count": process_count}
        self.plan = train.plan
        self.stats: PlanStats = train.plan.stats()
        self.heldout_stats: PlanStats | None = heldout.plan.stats() if heldout else None
        self.total_steps = train.rows.total_steps
        self.rows_per_step = train.rows.rows_per_step
        self.capacity = train.plan.capacity.supervised

    # -- training ---------------------------------------------------------------------------------------

    def loader(self, start: int = 0) -> Loader:
        """This host's batches from step `start` on; close it when done."""
        loader = Loader(
            self._train.rows, threads=self._threads, accumulation=self._accumulation, **self._process
        )
        loader.seek(start)
        return loader

    def epoch_at(self, step: int) -> float:
        """Epochs done after so many steps, e.g. 1.25."""
        if step == 0:
            return 0.0
        # By the step before, so that the end of a run asks for no plan of an epoch that it never enters.
        epoch, local = self.plan.locate(step - 1)
        return epoch + (local + 1) / self.plan.steps_per_epoch(epoch)

    def samples_seen(self, step: int) -> int:
        """Samples that so many steps took, repeats counted."""
        return self.plan.samples_before(step)

    def sample_ids(self, step: int) -> list[list[str]]:
        """Ids of the samples of each row that this host has in the step after `step` others, in its batch's order."""
        rows, hosts, host = self._train.rows, self._process["process_count"], self._process["process_index"]
        micro = rows.rows_per_step // self._accumulation
        part = micro // hosts
        return [
            rows.sample_ids(step * rows.rows_per_step + m * micro + host * part + r)
            for m in range(self._accumulation)
            for r in range(part)
        ]

    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree with to be continued; paths, hosts and threads are no part of it.

        Returns:
            hex digests: samples (which there are and how they are mixed), rendering (tokenizer, template, image
            rules), lengths, plan (seed, batch size, row size, packing).
        """
        chosen = [
            [
                source.fingerprint,
                spec.split,
                spec.weight,
                spec.count,
                spec.cap,
                sorted(spec.include),
                sorted(spec.exclude),
            ]
            for source, spec in zip(self._train.sources, self._specs, strict=True)
        ]
        f = self._format
        rendering = [
            f.tokenizer.fingerprint,
            f.template,
            f.position,
            f.rules.to_dict(),
            f.num_image_tokens,
        ]
        arrays = [
            array for part in self._train.lengths for array in (part.tokens, part.images, part.supervised)
        ]
        return {
            "samples": _digest(json.dumps(chosen).encode()),
            "rendering": _digest(json.dumps(rendering).encode()),
            "lengths": _digest(*(array.tobytes() for array in arrays)),
            "plan": _digest(json.dumps([PLAN_VERSION, self._settings], sort_keys=True).encode()),
        }

    # -- held-out samples -------------------------------------------------------------------------------

    @property
    def has_heldout(self) -> bool:
        """Whether any source has the held-out split."""
        return self._heldout is not None

    @property
    def why_no_heldout(self) -> str:
        """Why no sample is held out, for a message; empty where some are."""
        if self._heldout is not None:
            return ""
        if not self._eval_split:
            return "data.eval_split is empty"
        if there := self.preflight.of("held out"):
            if any(part.used.any() for part in there) and self._train.mixture.drawn_tasks is None:
                why = "config.evaluate.include and exclude leave none of its tasks"
            elif any(part.used.any() for part in there):
                why = "it holds none of the tasks that data.tasks drew"
            elif any(part.chosen.any() for part in there):
                why = "the preflight drops all that include and exclude leave of it"
            else:
                why = "include and exclude leave none of its samples"
            return f"the split data.eval_split={self._eval_split!r} is there, but {why}"
        names = sorted({name for source in self._train.sources for name in splits(source.path)})
        return f"of the splits {', '.join(names)} none is data.eval_split={self._eval_split!r}"

    @property
    def has_questions(self) -> bool:
        """Whether there is anything to ask: held-out samples of the training sources, or of evaluate.sources."""
        return self._heldout is not None or bool(self._asked)

    @property
    def heldout_capacity(self) -> int:
        """C of the held-out rows."""
        return self._need_heldout().plan.capacity.supervised

    def heldout_batches(self) -> Iterator[Row]:
        """This host's part of batches that hold every held-out sample once: {name: numpy [rows, ...]}."""
        loader = Loader(self._need_heldout().rows, threads=self._threads, **self._process)
        try:
            yield from loader
        finally:
            loader.close()

    @property
    def heldout_tasks(self) -> list[str]:
        """Of which samples are held out."""
        part = self._heldout
        if part is None:
            return []
        used = zip(part.sources, part.lengths, strict=True)
        return sorted(
            {task for source, found in used for task in itertools.compress(source.tasks, found.kept)}
        )

    def heldout_batch_tasks(self, batch: int) -> list[list[str]]:
        """For each row of a held-out batch, those of all hosts, the tasks of its samples in their order."""
        rows = self._need_heldout().rows
        return [rows.tasks(batch * rows.rows_per_step + row) for row in range(rows.rows_per_step)]

    def heldout_questions(self, per_task: int) -> list[Question]:
        """At most `per_task` held-out samples of each task as questions, the same ones every time.

        Those of evaluate.sources come after those of the training sources' own held-out split.
        """
        own = [] if self._heldout is None else zip(self._heldout.sources, self._heldout.lengths, strict=True)
        result: list[Question] = []
        with ThreadPoolExecutor(max(1, self._threads)) as pool:
            for source, lengths in [*own, *self._asked]:
                chosen = choose(source.tasks, lengths.kept, per_task, self.plan.seed)
                one = functools.partial(ask, format=self._format, source=str(source.path), split=source.split)
                result += pool.map(lambda i, source=source, one=one: one(source[i]), chosen)
        return result

    def _need_heldout(self) -> _Part:
        if self._heldout is None:
            raise ValueError("no source has a held-out split: ask has_heldout first")
        return self._heldout

    # -- what a person reads ----------------------------------------------------------------------------

    def task_counts(self) -> list[TaskCount]:
        """What an epoch holds of each task of each source, beside what the config asks for."""
        return self._train.mixture.counts()

    def _describe_mixture(self) -> list[str]:
        """How the realised counts differ from those asked for; nothing where each sample comes once."""
        counts = self.task_counts()
        if all(count.samples == count.available == count.asked for count in counts):
            return []
        by_task: dict[str, int] = {}
        for count in counts:
            by_task[count.task] = by_task.get(count.task, 0) + count.samples
        held = sorted(by_task.values())
        lines = [
            f"  an epoch holds {len(held)} tasks with {held[0]:,} to {held[-1]:,} samples each, half of them "
            f"{held[len(held) // 2]:,} or more"
        ]
        for k, (source, spec) in enumerate(zip(self._train.sources, self._specs, strict=True)):
            own = [count for count in counts if count.source == k]
            short = [f"{c.task} {c.samples:,} of {c.asked:,.0f}" for c in own if c.short]
            lines.append(
                f"  {source.path} ({spec.split}): {sum(c.samples for c in own):,} samples an epoch, "
                f"{sum(c.asked for c in own):,.0f} asked for"
                + (f"; {len(short)} tasks have fewer than asked for: {few(short)}" if short else "")
            )
        return lines

    def describe(self) -> str:
        """A few lines: what there is, what the preflight found, what a step holds."""
        stats, asked = self.stats, self.plan.samples
        lines = [f"data: {stats.samples:,} samples an epoch, {self.total_steps:,} steps in all"]
        for part in self.preflight.parts:
            tasks = set(itertools.compress(part.source.tasks, part.used))
            lines.append(
                f"  {part.name}, {part.role}: {int(part.used.sum()):,} of {int(part.chosen.sum()):,} samples, "
                f"{len(tasks)} tasks"
            )
        if self._heldout is not None:
            held = sum(int(lengths.kept.sum()) for lengths in self._heldout.lengths)
            if held < sum(int(part.used.sum()) for part in self.preflight.of("held out")):
                drawn = self._train.mixture.drawn_tasks
                why = "config.evaluate leaves" if drawn is None else f"data.tasks={len(drawn)} drew"
                lines.append(f"  held out: of the tasks that {why}, {held:,} samples")
        if self._heldout is None and self._eval_split:
            lines.append(
                f"  held out: nothing, so no held-out loss and no best checkpoint: {self.why_no_heldout}"
            )
        lines += self._describe_mixture()
        lines += [f"  preflight, {line}" for line in self.preflight.remarks()]
        lines += [
            f"  a step: batch.samples={asked}, planned {stats.samples_per_step:.2f} samples on average "
            f"({stats.samples_per_step / asked - 1:+.1%}), {stats.images_per_step:.1f} images, "
            f"{stats.tokens_per_step:,.0f} tokens",
            *self._describe_rows(),
        ]
        return "\n".join(lines)

    def _describe_rows(self) -> list[str]:
        """The rows of a step, and how full all those are that the devices compute."""
        stats, plan, size = self.stats, self.plan, self.plan.capacity
        rows, computed, multiple = plan.rows_per_step, self.rows_per_step, self._train.rows.rows_multiple
        empty, share = computed - rows, rows / computed
        lines = [
            f"  in {rows} rows of {size.tokens} tokens, {size.images} images and {size.supervised} supervised tokens"
            + (f" (and {empty} empty rows, for the devices)" if empty else "")
            + f"; filled {share * stats.fill:.1%} of the tokens, {share * stats.slot_fill:.1%} of the image slots, "
            f"{share * stats.supervised_fill:.1%} of the supervised; images differ by {stats.images_spread:.1f} from "
            "step to step"
        ]
        if empty > _EMPTY_ROWS * computed:
            whole = max(1, round(rows / multiple)) * multiple
            better = plan.size_for(whole) if plan.packing else None
            if better is not None:
                remedy = f"with data.max_length={better[0]} and data.slots={better[1]} a step is about {whole} rows"
            else:
                remedy = (
                    f"make batch.samples a multiple of {multiple}, or this number smaller with mesh.tensor or "
                    "batch.accumulation"
                )
            lines.append(
                f"  {empty / computed:.0%} of the rows that the devices compute are empty, for these take rows by "
                f"{multiple}: {remedy}"
            )
        return lines


def build_data(
    config: Any,
    resolve_path: Callable[[str], str | os.PathLike[str]],
    *,
    tokenizer: Tokenizer,
    template: str,
    position: Position,
    rules: ImageRules,
    num_image_tokens: int,
    samples: int,
    rows_multiple: int,
    seed: int,
    epochs: int,
    steps: int,
    evaluate_sources: Sequence[Any] = (),
    evaluate_tasks: tuple[Sequence[str], Sequence[str]] = ((), ()),
    cache: Path | None = None,
    accumulation: int = 1,
    process_index: int | None = None,
    process_count: int | None = None,
    show_progress: bool = True,
    preflight: Preflight | None = None,
) -> Data:
    """Open the sources, measure them, draw the mixture and plan the rows.

    Args:
        config: config.data, with sources (path, split, weight, count, cap, include, exclude), eval_split, order,
            tasks, budget, spread, packing, max_length, slots, supervised, max_problem_share, max_duplicate_share,
            duplicate_distance, threads. 0 for a count, a cap, tasks or a budget is none.
        resolve_path: from the path in a source to a directory.
        tokenizer, template, position, rules, num_image_tokens: how a sample is rendered (rows.RowFormat).
        samples: batch.samples, per optimizer step over all hosts.
        rows_multiple: of which the rows of a step must be a multiple: devices along the batch axes, times
            accumulation.
        seed: of every draw and permutation.
        epochs: length of the run where steps is 0.
        steps: length of the run, or 0.
        evaluate_sources: config.evaluate.sources (path, split, include, exclude), more samples to ask; they are no
            part of the held-out loss.
        evaluate_tasks: config.evaluate.include and exclude, for the held-out split.
        cache: where what the preflight finds is kept when a dataset directory is read-only.
        accumulation: micro-batches per step; held-out batches are as large as one of them.
        process_index, process_count: which host this is; None asks JAX.
        show_progress: draw progress bars.
        preflight: of the same data and format, to plan with whatever it found; None: it is made here, and obeyed.

    Raises:
        UserError: the data cannot be used as asked; each message says what to do.
    """
    if process_index is None or process_count is None:
        import jax  # only here: the rest of vflax.data runs without it

        process_index, process_count = jax.process_index(), jax.process_count()
    if rows_multiple % (process_count * accumulation):
        raise UserError(
            f"mesh: {rows_multiple} rows (devices along data and fsdp, times batch.accumulation) do not divide "
            f"among {process_count} processes and {accumulation} accumulation steps. Give data times fsdp a "
            "multiple of the number of processes"
        )
    format = RowFormat(
        tokenizer, template, position, rules, num_image_tokens, config.max_length, config.slots
    )
    specs = read_specs(config, resolve_path)
    if preflight is None:
        preflight = examine(
            config, resolve_path, format=format, evaluate_sources=evaluate_sources, cache=cache,
            show_progress=show_progress,
        )  # fmt: skip
        preflight.check()

    sources = [part.source for part in preflight.of("training")]
    lengths = [part.found for part in preflight.of("training")]
    mixture = Mixture(
        specs,
        [source.tasks for source in sources],
        [part.kept for part in preflight.of("training")],
        rules=read_rules(config),
        seed=seed,
    )
    plan = PackPlan(
        np.concatenate([found.tokens for found in lengths]),
        np.concatenate([found.images for found in lengths]),
        np.concatenate([found.supervised for found in lengths]),
        samples=samples,
        max_length=config.max_length,
        slots=config.slots,
        supervised_capacity=config.supervised,
        packing=config.packing,
        seed=seed,
        epoch_samples=mixture.epoch,
        pool=mixture.pool,
    )
    total_steps = plan.total_steps(steps=steps) if steps else plan.total_steps(epochs=epochs)
    if total_steps < 1:
        raise UserError(f"steps={steps}, epochs={epochs}: expected at least one step or one epoch")
    rows = RowSource(sources, mixture, plan, format, total_steps=total_steps, rows_multiple=rows_multiple)
    settings = {
        "seed": seed,
        "samples": samples,
        "max_length": config.max_length,
        "slots": config.slots,
        "supervised": config.supervised,
        "packing": bool(config.packing),
        "order": config.order,
        "tasks": config.tasks,
        "budget": config.budget,
        "spread": config.spread,
    }
    return Data(
        _Part(sources, lengths, mixture, plan, rows),
        _heldout(
            _filtered(preflight.of("held out"), mixture.drawn_tasks, evaluate_tasks),
            plan,
            format,
            accumulation,
            rows_multiple // accumulation,
        ),
        [(part.source, part.lengths) for part in preflight.of("asked") if part.used.any()],
        format,
        specs,
        preflight=preflight,
        eval_split=config.eval_split,
        settings=settings,
        threads=config.threads,
        accumulation=accumulation,
        process_index=process_index,
        process_count=process_count,
    )


def _filtered(
    parts: Sequence[Part], drawn: Collection[str] | None, evaluated: tuple[Sequence[str], Sequence[str]]
) -> list[Part]:
    """Only tasks that data.tasks drew, and of these those that config.evaluate's include and exclude leave."""
    if not parts:
        return []
    tasks = [task for part in parts for task in part.source.tasks]
    spec = SourceSpec(
        "the held-out data", parts[0].source.split, include=tuple(evaluated[0]), exclude=tuple(evaluated[1])
    )
    mask = select(spec, tasks, key="config.evaluate")
    if drawn is not None:
        mask &= np.array([task in drawn for task in tasks], bool)
    masks = np.split(mask, np.cumsum([len(part.source.tasks) for part in parts])[:-1])
    return [
        dataclasses.replace(part, chosen=part.chosen & own) for part, own in zip(parts, masks, strict=True)
    ]


def _heldout(
    parts: Sequence[Part], train: PackPlan, format: RowFormat, accumulation: int, rows_multiple: int
) -> _Part | None:
    """The held-out split of each source that has it, each sample once."""
    parts = [part for part in parts if part.used.any()]
    sources, lengths = [part.source for part in parts], [part.lengths for part in parts]
    if not sources:
        return None
    mixture = Mixture(
        [SourceSpec(str(source.path), source.split) for source in sources],
        [source.tasks for source in sources],
        [found.kept for found in lengths],
        seed=train.seed,
    )
    plan = PackPlan(
        np.concatenate([found.tokens for found in lengths]),
        np.concatenate([found.images for found in lengths]),
        np.concatenate([found.supervised for found in lengths]),
        samples=max(1, train.samples // accumulation),
        max_length=train.capacity.tokens,
        slots=train.capacity.images,
        packing=train.packing,
        seed=train.seed,
        epoch_samples=mixture.epoch,
    )
    rows = RowSource(
        sources, mixture, plan, format, total_steps=plan.total_steps(epochs=1), rows_multiple=rows_multiple
    )
    return _Part(sources, lengths, mixture, plan, rows)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]
