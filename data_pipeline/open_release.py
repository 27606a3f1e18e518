"""The release formats behind one interface (until data_pipeline.releases)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from data_pipeline import vision_flan
from data_pipeline.records import Problem, RawSample


class Release:
    def __init__(self, annotations: str | os.PathLike[str], format: str) -> None:
        self._path = epath.Path(annotations)
        self.format, self.files, self.name = format, [self._path], self._path.name

    def __iter__(self) -> Iterator[RawSample | Problem]:
        samples, problems = vision_flan.read_annotations(self._path, self.format)
        rows: list[RawSample | Problem] = [*samples, *problems]
        return iter(sorted(rows, key=lambda row: row.number))


def open_release(annotations: str | os.PathLike[str], format: str, **options: Any) -> Release:
    return Release(annotations, format)
