"""Samples to a row in one go, and the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence

from vflax.data.packing import PackPlan
from vflax.data.rows import Row, RowFormat, join, prepare
from vflax.data.source import Sample


def assemble(samples: Sequence[Sample], format: RowFormat) -> Row:
    """`prepare` each sample and `join` them."""
    return join([prepare(sample, format) for sample in samples], format)


def step_rows(plan: PackPlan, step: int) -> list[list[int]]:
    """The rows of a global step: lists of sample numbers, some may be empty."""
    return [plan.row(step, row) for row in range(plan.rows_per_step)]
