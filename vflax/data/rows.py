"""Samples to rows: what the device gets.

A row holds the samples that the plan put together, one after the other, padded at the end:

    ids        int32 [T]           token ids, an image as N consecutive IMAGE_TOKEN_ID; 0 in the padding
    labels     int32 [T]           ids where supervised, else IGNORE_LABEL; not shifted
    segments   int32 [T]           1 for the first sample, 2 for the second, ...; 0 in the padding
    positions  int32 [T]           0, 1, ... beginning anew with each sample
    images     uint8 [S, H, W, 3]  in the order of their places in the row; zeros in the unused slots
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vflax import images
from vflax.constants import IGNORE_LABEL
from vflax.conversation import Position, Rendered, expand, read_llava, render
from vflax.data.mixture import Mixture
from vflax.data.packing import PackPlan
from vflax.data.source import Sample, Source
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.tokenizer import Tokenizer

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """All that decides what a sample looks like in a row.

    Attributes:
        tokenizer: of the decoder.
        template: name of the conversation template.
        position: where images go in their turn: "front", "inline" or "auto".
        rules: image preprocessing.
        num_image_tokens: N, how many tokens an image becomes.
        max_length: T, tokens per row.
        slots: S, images per row.
    """

    tokenizer: Tokenizer
    template: str
    position: Position
    rules: ImageRules
    num_image_tokens: int
    max_length: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of a sample, uncut: ids and labels int32 [n], and what was odd about its conversation."""

    ids: np.ndarray
    labels: np.ndarray
    findings: list[str]


def render_sample(
    conversations: list[dict[str, Any]], num_images: int, format: RowFormat, name: str
) -> tuple[Rendered, list[str]]:
    """Read and render a conversation: one IMAGE_TOKEN_ID for each image, and what was odd about it.

    Raises:
        conversation.ConversationError: it cannot be read or rendered.
    """
    read, findings = read_llava(conversations, num_images, format.position, name)
    return render(read, format.template, format.tokenizer), findings


def encode(conversations: list[dict[str, Any]], num_images: int, format: RowFormat, name: str) -> Encoded:
    """Read, render and expand a conversation.

    Raises:
        conversation.ConversationError: it cannot be read or rendered.
    """
    rendered, findings = render_sample(conversations, num_images, format, name)
    ids, labels = expand(rendered, format.num_image_tokens)
    return Encoded(ids, labels, findings)


def decode_images(sample: Sample, rules: ImageRules) -> np.ndarray:
    """The sample's images as uint8 [k, size, size, 3].

    Raises:
        UserError: an image cannot be decoded.
    """
    result = np.zeros((len(sample.images), rules.size, rules.size, 3), np.uint8)
    for k, data in enumerate(sample.images):
        try:
            result[k] = images.preprocess(images.decode(data), rules)
        except images.ImageError as error:
            raise UserError(f"image {k}: {error.reason}; convert the data again") from error
    return result


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A sample ready for its row: ids, labels int32 [n] with n <= max_length; images uint8 [k, H, W, 3]."""

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray


def prepare(sample: Sample, format: RowFormat) -> Prepared:
    """Encode a sample, cut it on the right where it is longer than a row, and preprocess its images.

    Only text is ever cut: lengths.measure drops what would lose an image or its last supervised token.
    """
    encoded = encode(sample.conversations, len(sample.images), format, sample.id)
    length = format.max_length
    return Prepared(encoded.ids[:length], encoded.labels[:length], decode_images(sample, format.rules))


def join(samples: Sequence[Prepared], format: RowFormat) -> Row:
    """The row that holds these samples, in their order; no samples give an empty row."""
    length, size = format.max_length, format.rules.size
    row: Row = {
        "ids": np.zeros(length, np.int32),
        "labels": np.full(length, IGNORE_LABEL, np.int32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "images": np.zeros((format.slots, size, size, 3), np.uint8),
    }
    start = slot = 0
    for segment, sample in enumerate(samples, start=1):
        end, next_slot = start + len(sample.ids), slot + len(sample.images)
        if end > length or next_slot > format.slots:
            raise ValueError(
                f"a row of {length} tokens and {format.slots} images was given {end} and {next_slot}"
            )
        row["ids"][start:end] = sample.ids
        row["labels"][start:end] = sample.labels
        row["segments"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
        row["images"][slot:next_slot] = sample.images
        start, slot = end, next_slot
    return row


class RowSource:
    """Every row of a run: `len`, `rows[i]` -> Row. A pure function of i; for many threads.

    Row i is row i % rows_per_step of step i // rows_per_step. The plan's rows of a step are followed by empty
    ones, up to a multiple of rows_multiple: the mesh may change and every step still has the same samples.

    Args:
        sources: where the samples are.
        mixture: which sample number is which sample of which source.
        plan: which samples share a row.
        format: what a row looks like.
        total_steps: steps of the run.
        rows_multiple: of which the rows of a step must be a multiple: devices along the batch axes, times
            accumulation steps.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        plan: PackPlan,
        format: RowFormat,
        *,
        total_steps: int,
        rows_multiple: int = 1,
    ) -> None:
        self._sources, self._mixture, self._plan, self._format = list(sources), mixture, plan, format
        self.total_steps, self.rows_multiple = total_steps, rows_multiple
        self.rows_per_step = -(-plan.rows_per_step // rows_multiple) * rows_multiple

    def __len__(self) -> int:
        return self.total_steps * self.rows_per_step

    def __getitem__(self, index: int) -> Row:
        """Row `index` of the run.

        Raises:
            UserError: a sample cannot be read, or is not what the lengths say; the message names it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        step, row = divmod(index, self.rows_per_step)
        if row >= self._plan.rows_per_step:
            return join([], self._format)
        return join([self._prepare(number) for number in self._plan.row(step, row)], self._format)

    def sample_ids(self, index: int) -> list[str]:
        """Ids of the samples of row `index`, in their order."""
        return [self._sources[k][i].id for k, i in self._places(index)]

    def tasks(self, index: int) -> list[str]:
        """Tasks of the samples of row `index`, in their order."""
        return [self._sources[k].tasks[i] for k, i in self._places(index)]

    def _places(self, index: int) -> list[tuple[int, int]]:
        """Of the samples of row `index`: the source, and which of its samples."""
        step, row = divmod(index, self.rows_per_step)
        if row >= self._plan.rows_per_step:
            return []
        return [self._mixture.locate(number) for number in self._plan.row(step, row)]

    def _prepare(self, number: int) -> Prepared:
        k, index = self._mixture.locate(number)
        source = self._sources[k]
        sample_id = "?"
        try:
            sample = source[index]
            sample_id = sample.id
            prepared = prepare(sample, self._format)
        except Exception as error:
            # In a worker thread: without this nobody could tell which sample it was.
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(
                f"sample {sample_id!r} (number {index} of {source.path}, split {source.split}): {kind}{error}"
            ) from error
        planned = self._plan.length(number)
        if (len(prepared.ids), len(prepared.images)) != planned:
            raise UserError(
                f"sample {sample_id!r} of {source.path}: {len(prepared.ids)} tokens and "
                f"{len(prepared.images)} images, but the preflight counted {planned[0]} and {planned[1]}. "
                f"Delete {source.path}/preflight, and where that is read-only WORKDIR/preflight, and start again"
            )
        return prepared
