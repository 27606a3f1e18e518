"""Predictions on their way to a file: each is on the disk soon after it was made, and the file is the same bytes
however often the run was killed, and on however many hosts it ran.

    OUT/TASK/run.json            what decides a prediction; a run goes on only with the same
    OUT/TASK/parts/P-N.jsonl     what process P wrote in its N-th start, as it came
    OUT/TASK/predictions.jsonl   all of them, in the benchmark's order; the parts are gone then

Hosts share OUT. A process takes every question whose place in the order is its own number modulo their number, so what
is left to do does not depend on who did what before.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vflax.errors import UserError
from vflax.evaluate.files import json_lines, json_value

# Seconds of work that a kill may cost.
_EVERY = 0.5


class Journal:
    """The predictions of one task."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], process: int = 0) -> None:
        """Begin, or go on.

        Args:
            folder: OUT/TASK.
            identity: what decides a prediction, as JSON.
            process: of the hosts, this one.

        Raises:
            UserError: what is there was made with another identity, or is damaged.
        """
        self.folder, self.file = folder, folder / "predictions.jsonl"
        self._parts = folder / "parts"
        self._check(json.loads(json.dumps(identity)))
        self.found: dict[str, dict[str, Any]] = {row["key"]: row for row in self._rows()}
        self._own: TextIO | None = None
        self._process, self._synced = process, time.monotonic()

    def add(self, key: str, prediction: str | None, finish: str) -> None:
        """A prediction and why it ended; None: there can be none."""
        row = {"key": key, "prediction": prediction, "finish": finish}
        if self._own is None:
            self._parts.mkdir(exist_ok=True)
            count = len(list(self._parts.glob(f"{self._process:05d}-*.jsonl")))
            self._own = (self._parts / f"{self._process:05d}-{count:05d}.jsonl").open("x", encoding="utf-8")
        self._own.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.found[key] = row
        if time.monotonic() - self._synced > _EVERY:
            self.sync()

    def sync(self) -> None:
        """Returns once all that was added is on the disk."""
        if self._own is not None:
            self._own.flush()
            os.fsync(self._own.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        if self._own is not None:
            self._own.close()
            self._own = None

    def finish(self, keys: Sequence[str]) -> list[str]:
        """Write predictions.jsonl, where all are there.

        Args:
            keys: of all questions, in the benchmark's order.

        Returns:
            keys that are missing; then nothing was written.
        """
        self.close()
        self.found |= {row["key"]: row for row in self._rows()}
        missing = [key for key in keys if key not in self.found]
        if missing:
            return missing
        temporary = self.file.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            for key in keys:
                file.write(json.dumps(self.found[key], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.file)
        shutil.rmtree(self._parts, ignore_errors=True)
        return []

    def _check(self, identity: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if path.exists():
            there = json_value(path)
            other = [key for key in {**there, **identity} if there.get(key) != identity.get(key)]
            if other:
                listed = "; ".join(
                    f"{key} was {there.get(key)!r} and is {identity.get(key)!r}" for key in other
                )
                raise UserError(
                    f"{self.folder}: holds predictions of another run ({listed}). Choose another --out, or delete it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".run.{os.getpid()}")
        temporary.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    def _rows(self) -> list[dict[str, Any]]:
        """Of the file, or of all parts; a line that a kill cut off is not there."""
        if self.file.exists():
            return json_lines(self.file)
        found = []
        for path in sorted(self._parts.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    found.append(json.loads(line))
                except ValueError:
                    raise UserError(
                        f"{path}: damaged; delete it, and its predictions are made again"
                    ) from None
        return found
