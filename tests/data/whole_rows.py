"""Samples to a row in one go."""

from __future__ import annotations

from collections.abc import Sequence

from vflax.data.rows import Row, RowFormat, join, prepare
from vflax.data.source import Sample


def assemble(samples: Sequence[Sample], format: RowFormat) -> Row:
    """`prepare` each sample and `join` them."""
    return join([prepare(sample, format) for sample in samples], format)
