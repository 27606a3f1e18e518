"""Predictions on their way to a file: each is on the disk soon after it was made, and the file is the same bytes
however often the run was killed, and on however many hosts it ran.

    OUT/TASK/run.json            what decides a prediction; a run goes on only with the same
    OUT/TASK/parts/P-N.jsonl     what process P wrote in its N-th start, as it came
    OUT/TASK/infer.json          what it took
    OUT/TASK/predictions.jsonl   all of them, in the benchmark's order; the parts are gone then

Hosts share OUT. A process takes every question whose place in the order is its own number modulo their number, so what
is left to do does not depend on who did what before.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vflax.errors import UserError
from vflax.evaluate.files import Row, json_lines, json_object, need
from vflax.whole_file import replace, writing

# Seconds of work that a power cut may cost; a kill costs what was not answered yet.
_EVERY = 0.5
_KEPT = ("key", "prediction", "finish")


class Journal:
    """The predictions of one task."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], process: int = 0) -> None:
        """Begin, or go on.

        Args:
            folder: OUT/TASK.
            identity: what decides a prediction, as JSON.
            process: of the hosts, this one; the first begins before the others do.

        Raises:
            UserError: what is there was made with another identity, or is damaged, or the disk does not take it.
        """
        self.folder, self.file = folder, folder / "predictions.jsonl"
        self._parts, self._process = folder / "parts", process
        self._check(json.loads(json.dumps(identity)))
        self.found: dict[str, Row] = {row["key"]: row for row in self._rows()}
        self._own: TextIO | None = None
        self._synced = time.monotonic()

    def add(
        self,
        key: str,
        prediction: str | None,
        finish: str,
        *,
        pictures: int = 0,
        tokens: tuple[int, int] = (0, 0),
        seconds: float = 0.0,
    ) -> None:
        """Keep a prediction.

        Args:
            key: of the question.
            prediction: None: there can be none.
            finish: why it ended.
            pictures: of the question.
            tokens: of the prompt and of the answer.
            seconds: since this start began to ask.
        """
        row = {"key": key, "prediction": prediction, "finish": finish}
        with writing(self.folder):
            if self._own is None:
                self._parts.mkdir(exist_ok=True)
                number = 1 + max(
                    (start for process, start in self._starts() if process == self._process), default=-1
                )
                self._own = (self._parts / f"{self._process:05d}-{number:05d}.jsonl").open(
                    "x", encoding="utf-8", errors="backslashreplace", buffering=1
                )
            took = {"pictures": pictures, "tokens": tokens, "seconds": round(seconds, 3)}
            self._own.write(json.dumps({**row, **took}, ensure_ascii=False) + "\n")
        self.found[key] = row
        if time.monotonic() - self._synced > _EVERY:
            self.sync()

    def sync(self) -> None:
        """Returns once all that was added is on the disk."""
        if self._own is not None:
            with writing(self.folder):
                self._own.flush()
                os.fsync(self._own.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        if self._own is not None:
            self._own.close()
            self._own = None

    def finish(self, keys: Sequence[str]) -> list[str]:
        """Write predictions.jsonl and infer.json, where all are there.

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
        starts = self._starts()
        if starts and not (self.file.exists() and len(json_lines(self.file)) == len(keys)):
            rows = ({name: self.found[key][name] for name in _KEPT} for key in keys)
            replace(self.folder / "infer.json", json.dumps(_took(starts), indent=1) + "\n")
            replace(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        shutil.rmtree(self._parts, ignore_errors=True)
        return []

    def _check(self, identity: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if path.exists():
            there = json_object(path)
            other = [key for key in {**there, **identity} if there.get(key) != identity.get(key)]
            if other:
                listed = "; ".join(
                    f"{key} was {there.get(key)!r} and is {identity.get(key)!r}" for key in other
                )
                raise UserError(
                    f"{self.folder}: holds predictions of another run ({listed}). Choose another --out, or delete it"
                )
        elif self.file.exists() or any(self._parts.glob("*.jsonl")):
            raise UserError(
                f"{self.file}: whose predictions are these? There is no run.json beside them. Choose another --out, or "
                "leave infer out of --steps to score them as they are"
            )
        elif self._process:
            raise UserError(
                f"{path}: not there, though process 0 wrote it; --out is one folder that all hosts share"
            )
        else:
            replace(path, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")

    def _rows(self) -> list[Row]:
        """Of the file and of all parts."""
        own = json_lines(self.file) if self.file.exists() else []
        for line, row in enumerate(own, 1):
            need(row, _KEPT, f"{self.file}, line {line}")
        return own + [row for rows in self._starts().values() for row in rows]

    def _starts(self) -> dict[tuple[int, int], list[Row]]:
        """{(process, which start of it): its rows}; a line that a kill cut off is not there."""
        found = {}
        for path in sorted(self._parts.glob("*.jsonl")):
            try:
                process, start = map(int, path.stem.split("-"))
                found[process, start] = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
            except ValueError:
                raise UserError(f"{path}: damaged; delete it, and its predictions are made again") from None
        return found


def _took(starts: Mapping[tuple[int, int], Sequence[Row]]) -> dict[str, Any]:
    """What infer.json says. seconds: of answering, without opening the model, over all starts; hosts work side by side,
    so those of the host that worked longest. Of a start that was killed they count up to its last prediction."""
    rows = [row for own in starts.values() for row in own]
    seconds: Counter[int] = Counter()
    for (process, _), own in starts.items():
        seconds[process] += own[-1]["seconds"] if own else 0
    longest, pictures = max(seconds.values()), sum(row["pictures"] for row in rows)
    return {
        "questions": len(rows),
        "pictures": pictures,
        "seconds": round(longest, 3),
        "pictures_per_second": round(pictures / longest, 3) if longest else None,
        "prompt_tokens": sum(row["tokens"][0] for row in rows),
        "answer_tokens": sum(row["tokens"][1] for row in rows),
        "finish": dict(sorted(Counter(row["finish"] for row in rows).items())),
        "hosts": len(seconds),
        "starts": max(start for _, start in starts) + 1,
    }
