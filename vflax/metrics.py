"""What a run says while it runs: metrics.jsonl, TensorBoard, and the progress line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from tensorboardX import SummaryWriter


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics.jsonl; a last line cut off by a kill is left out."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class MetricsWriter:
    """Writes one JSON object per record to WORKDIR/metrics.jsonl and the numbers in it to TensorBoard.

    A continued run cuts off what was written after the checkpoint it continues from, so that every step
    stands in the file once.
    """

    def __init__(self, workdir: Path, start_step: int, tensorboard: bool):
        path = workdir / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= start_step]
        temporary = path.with_name(".metrics.jsonl.part")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)
        self._board = (
            SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1) if tensorboard else None
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append {"step": step, **values}; floats keep every bit."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class _Bar(Progress):
    """The bar with what is known of the last step on a line of its own: both fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


class ProgressLine:
    """A live bar on a terminal; elsewhere a line every `seconds`, so that a log file stays readable."""

    def __init__(self, console: Console, start: int, total: int, seconds: float = 15.0):
        self._console = console
        self._total = total
        self._seconds = seconds
        self._last = -math.inf
        self._first: tuple[int, float] | None = None
        self._bar = _Bar(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=36), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, refresh_per_second=4,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total, completed=start, text="compiling")
        self._bar.start()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show the figures of the last step: loss, lr, tokens_per_s, images_per_s, mfu, data_wait (share)."""
        text = (
            f"loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tok/s  {values['images_per_s']:,.1f} img/s  "
            f"MFU {values['mfu']:.1%}  wait {values['data_wait']:.1%}"
        )
        self._bar.update(self._task, completed=step, text=text)
        now = time.perf_counter()
        if self._first is None:  # which compiles, and says nothing of the others
            self._first = (step, now)
        if not self._console.is_terminal and (now - self._last > self._seconds or step == self._total):
            self._last = now
            line = f"step {step}/{self._total}  {text}"
            first, since = self._first
            if step > first:
                line += f"  left {(now - since) / (step - first) * (self._total - step) / 60:.1f} min"
            self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()
