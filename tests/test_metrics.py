"""metrics.jsonl holds every step once, whatever was killed and continued."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vflax.metrics import MetricsWriter, ProgressLine, read_metrics


def test_a_continued_run_cuts_off_what_came_after_its_checkpoint(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        writer.write(step, {"loss": 1 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')  # a kill in the middle of a line
    writer = MetricsWriter(tmp_path, 3, tensorboard=False)
    writer.write(4, {"loss": 9.0})
    writer.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] == 9.0


def test_floats_keep_every_bit(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(1, {"loss": 0.1 + 0.2})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 0.1 + 0.2


def test_tensorboard_gets_an_event_file(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(1, {"loss": 0.5})
    writer.close()
    assert [p for p in (tmp_path / "tensorboard").iterdir() if p.stat().st_size > 0]


FIGURES = {"loss": 1.5, "tokens_per_s": 1234.0, "images_per_s": 5.0, "mfu": 0.25, "data_wait": 0.01}
SHOWN = ("loss 1.5000", "1,234 tok/s", "5.0 img/s", "MFU 25.0%", "wait 1.0%", "left")


def test_a_log_file_gets_one_plain_line_with_every_figure():
    out = io.StringIO()
    progress = ProgressLine(Console(file=out, width=80), start=0, total=2, seconds=0)
    progress.update(1, FIGURES)
    progress.update(2, FIGURES)
    progress.close()
    first, line = filter(None, out.getvalue().splitlines())
    for part in ("step 2/2", *SHOWN):
        assert part in line
    assert "step 1/2" in first and "left" not in first  # it compiles, and says nothing of the others


def test_a_terminal_of_80_columns_shows_every_figure():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    progress = ProgressLine(console, start=0, total=13_003)
    big = FIGURES | {"tokens_per_s": 1_234_567.0, "images_per_s": 1_234.5}
    progress.update(2, big)
    progress.close()
    screen = Text.from_ansi(out.getvalue()).plain.splitlines()
    last = [line.rstrip() for line in screen if line.strip()][-2:]
    assert all(len(line) <= 80 for line in last)
    for part in ("2/13003", "1,234,567 tok/s", "wait 1.0%", "left"):
        assert part in "".join(last)
