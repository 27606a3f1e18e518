"""What a step of a run holds: read off its data where that is here, else assumed, and said to be."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from vflax.data.packing import SUPERVISED_UNIT
from vflax.errors import UserError
from vflax.models.llava import LlavaConfig

# Text tokens of a sample by stage: means of real captions, of Vision-Flan, of LLaVA's GPT-4 data and others (configs/).
TEXT_TOKENS = {0: 32, 1: 128, 2: 200, "llava-v1": 200, "llava-1.5": 260, "scienceqa": 330}
_OTHER_TEXT = 128
# Of these text tokens so many are an answer.
_ANSWER_SHARE = 1 / 3
# Supervised tokens that a row has room for, as a share of its tokens.
_CAPACITY_SHARE = 1 / 4
# Samples of the releases that the recipes name, by the last part of data.sources[].path.
RELEASES = {
    "vision-flan": 1_664_261, "llava-pretrain": 558_128, "llava-instruct-150k": 157_712, "llava-cc3m-595k": 595_375,
    "llava-v1.5-mix665k": 665_298, "scienceqa": 12_726,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """An optimizer step and how many there are.

    Attributes:
        samples: of a step.
        per_row: samples that a full row holds.
        planned: rows of a step that hold samples.
        rows: of a step that the chips compute, empty ones included: a multiple of the shards times accumulation.
        accumulation: micro-batches of a step.
        capacity: the most supervised tokens of a row.
        tokens, supervised, images, context: of a step, as vflax.flops.train_step_flops wants them.
        steps: of the run; None where nobody knows.
        measured: whether all this was read off the data.
        said: lines for a person: what it is, and what was assumed.
    """

    samples: float
    per_row: float
    planned: int
    rows: int
    accumulation: int
    capacity: int
    tokens: float
    supervised: float
    images: float
    context: float
    steps: int | None
    measured: bool
    said: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Given:
    """What the command line says of the data, each None where it says nothing.

    Attributes:
        rows_per_chip: rows that a chip computes at a time; they replace those of batch.samples.
        samples_per_row: that packing reaches.
        samples: of an epoch.
        supervised: tokens of these that a row has room for.
    """

    rows_per_chip: int | None = None
    samples_per_row: float | None = None
    samples: int | None = None
    supervised: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"--{field.name.replace('_', '-')}={value}: more than 0"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None and value <= 0
        ]
        if wrong:
            raise UserError("; ".join(wrong))


def find_workload(config: ConfigDict, model: LlavaConfig, shards: int, given: Given) -> Workload:
    """A step of the run on so many shards of the batch.

    The packing plan decides where the data and the weights' tokenizer are on this machine; it is the plan that launch
    would make. What the command line says takes the place of its part of that, and of nothing else.

    Raises:
        UserError: the data is refused, or max_length is more than the model can take.
    """
    _check_length(config, model)
    if _data_is_here(config):
        found = _measured(config, model, shards)
    else:
        found = _assumed(config, model, shards, given.samples)
    return _replaced(found, config, shards, given)


def on(work: Workload, shards: int, accumulation: int, rows_per_chip: int | None = None) -> Workload:
    """The same work on another mesh.

    Args:
        work: a step.
        shards: of the batch.
        accumulation: micro-batches.
        rows_per_chip: of a micro-batch, which makes another batch of it; None: as many as hold the same samples.
    """
    multiple = shards * accumulation
    if rows_per_chip is None:
        return dataclasses.replace(work, rows=_up_to(work.planned, multiple), accumulation=accumulation)
    rows = rows_per_chip * multiple
    times = rows * work.per_row / work.samples
    return dataclasses.replace(
        work, samples=work.samples * times, planned=rows, rows=rows, accumulation=accumulation,
        tokens=work.tokens * times, supervised=work.supervised * times, images=work.images * times,
        context=work.context * times, steps=math.ceil(work.steps / times) if work.steps else None,
    )  # fmt: skip


def _check_length(config: ConfigDict, model: LlavaConfig) -> None:
    longest, most = config.data.max_length, model.decoder.max_positions
    image = model.vision.num_tokens
    if not config.data.packing and longest > most:
        raise UserError(
            f"config.data.max_length={longest} is more than the {most} positions that the decoder knows"
        )
    if config.data.slots and longest <= image:
        raise UserError(
            f"config.data.max_length={longest} has no room for an image, which takes {image} tokens"
        )


def _data_is_here(config: ConfigDict) -> bool:
    from vflax.known_models import is_readable
    from vflax.start import resolve_path

    def here(path: str) -> bool:
        return path.startswith("mini:") or resolve_path(path).exists()

    return is_readable(config) and all(here(source.path) for source in config.data.sources)


def _measured(config: ConfigDict, model: LlavaConfig, shards: int) -> Workload:
    from vflax.data.pipeline import build_data
    from vflax.start import image_rules, outline, resolve_path

    _, tokenizer = outline(config)
    accumulation = config.batch.accumulation
    data = build_data(
        config.data, resolve_path, tokenizer=tokenizer, template=config.template, position=config.image.position,
        rules=image_rules(config, model), num_image_tokens=model.vision.num_tokens, samples=config.batch.samples,
        rows_multiple=shards * accumulation, seed=config.seed, epochs=config.epochs, steps=config.steps,
        accumulation=accumulation, process_index=0, process_count=1,
    )  # fmt: skip
    stats = data.stats
    learned = stats.supervised_fill * data.plan.rows_per_step * data.capacity
    return Workload(
        stats.samples_per_step, stats.samples_per_step / data.plan.rows_per_step, data.plan.rows_per_step,
        data.rows_per_step, accumulation, data.capacity, stats.tokens_per_step, learned, stats.images_per_step,
        _context(stats.tokens_per_step, stats.samples_per_step), data.total_steps, True,
        (
            f"the data's own packing plan: {stats.samples_per_step:.1f} samples a step in {data.rows_per_step} rows of "
            f"{config.data.max_length} tokens, {stats.fill:.1%} full, {data.capacity} supervised at most",
        ),
    )  # fmt: skip


def _assumed(config: ConfigDict, model: LlavaConfig, shards: int, epoch: int | None) -> Workload:
    length, slots, image = config.data.max_length, config.data.slots, model.vision.num_tokens
    accumulation = config.batch.accumulation
    text = TEXT_TOKENS.get(config.stage, _OTHER_TEXT)
    mean = (image if slots else 0) + text
    per_row = max(1.0, min(slots or math.inf, length / mean)) if config.data.packing else 1.0
    mean = min(mean, length / per_row)
    capacity = min(config.data.supervised or _up_to(length * _CAPACITY_SHARE, SUPERVISED_UNIT), length)
    samples, multiple = float(config.batch.samples), shards * accumulation
    planned = max(1, round(samples / per_row))
    said = [
        f"assumed, for the data or the weights' tokenizer is not here: a sample has {image if slots else 0} image and "
        f"{text} text tokens, a third of them an answer; {per_row:.2f} samples to a row of {length} tokens "
        f"({per_row * mean / length:.1%} full), room for {capacity} supervised tokens in it"
    ]
    if epoch is None and not config.steps:
        epoch, note = _epoch_samples(config)
        said += [note] if note else []
    tokens = samples * mean
    return Workload(
        samples, per_row, planned, _up_to(planned, multiple), accumulation, capacity, tokens,
        samples * text * _ANSWER_SHARE, samples if slots else 0.0, _context(tokens, samples),
        _steps(config, epoch, samples), False, tuple(said),
    )  # fmt: skip


def _replaced(work: Workload, config: ConfigDict, shards: int, given: Given) -> Workload:
    """The work, but for what the command line says of it."""
    length, said = config.data.max_length, []
    if given.samples_per_row is not None:
        per_row = given.samples_per_row
        planned = max(1, round(work.samples / per_row))
        mean = min(work.tokens / work.samples, length / per_row)
        tokens = work.samples * mean
        work = dataclasses.replace(
            work, per_row=per_row, planned=planned, rows=_up_to(planned, shards * work.accumulation), tokens=tokens,
            context=_context(tokens, work.samples),
        )  # fmt: skip
        said.append(f"{per_row:.2f} samples to a row of {length} tokens ({per_row * mean / length:.1%} full)")
    if given.supervised is not None:
        work = dataclasses.replace(work, capacity=min(given.supervised, length))
        said.append(f"room for {work.capacity} supervised tokens in a row")
    if given.samples is not None:
        said.append(f"{given.samples:,} samples in an epoch")
        work = dataclasses.replace(work, steps=_steps(config, given.samples, work.samples))
    if given.rows_per_chip is not None:
        more = on(work, shards, work.accumulation, given.rows_per_chip)
        work = dataclasses.replace(more, steps=config.steps or more.steps)
        said.append(
            f"{given.rows_per_chip} rows per chip are {work.samples:.0f} samples a step (config.batch.samples is "
            f"{config.batch.samples})"
        )
    if not said:
        return work
    line = "as the command line says, in place of that: " + ", ".join(said)
    return dataclasses.replace(work, measured=False, said=(*work.said, line))


def _steps(config: ConfigDict, epoch: int | None, samples: float) -> int | None:
    """Of the run, from the samples of an epoch and of a step."""
    return config.steps or (math.ceil(config.epochs * epoch / samples) if epoch else None)


def _epoch_samples(config: ConfigDict) -> tuple[int | None, str]:
    """(samples of an epoch or None, where they are from)."""
    if config.data.budget:
        return config.data.budget, ""
    names = [Path(source.path).name for source in config.data.sources]
    if all(name in RELEASES for name in names):
        total = sum(
            source.count or RELEASES[name] for name, source in zip(names, config.data.sources, strict=True)
        )
        return total, f"an epoch of {' and '.join(names)} is taken as the {total:,} samples of the release"
    return None, "how many samples an epoch has is not known: give --samples for the hours of the run"


def _context(tokens: float, samples: float) -> float:
    """Tokens that each position attends to, summed, were all samples of mean length."""
    return tokens * (tokens / max(samples, 1e-9) + 1) / 2


def _up_to(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit
