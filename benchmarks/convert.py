"""Converts a made-up release of Vision-Flan's size: rows per second, peak memory, memory per row.

    python -m benchmarks.convert --work=DIR --out=benchmarks/results/convert.json

Writes a release into DIR that looks like the full one (1,664,261 rows of 187 tasks in one JSON array, texts of about
128 tokens) but shares 50 small pictures, converts its first tenth and then all of it, and measures each conversion:
wall time, and the peaks of resident memory (VmHWM) of the parent process and of every worker, added up. Exit status 1
when they add up to over 1 GB, or grow by more than 64 bytes a row from the tenth to the whole. DIR needs 15 GB; --rows
makes it smaller (what grows a row is then lost in the noise). Linux only.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common

FULL = 1_664_261
TASKS = 187
IMAGES = 50
MAX_TOTAL = 10**9  # bytes, parent and workers together
MAX_PER_ROW = 64  # bytes
_WORDS = (
    "what",
    "shown",
    "picture",
    "object",
    "red",
    "left",
    "answer",
    "describe",
    "category",
    "street",
    "because",
)
_LINES_OF_MEMORY = re.compile(r"VmHWM:\s+(\d+) kB")


def make_images(folder: Path) -> None:
    """Smooth pictures of 64 to 160 pixels a side: 1 to 4 KB as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        size = tuple(int(side) for side in rng.integers(64, 161, 2))
        buffer = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")  # type: ignore[arg-type]
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())


def samples(rows: int) -> Iterator[dict[str, Any]]:
    """As they stand in the real file; the words of a sample are about 128 tokens, as unequal as real ones."""
    draw = random.Random(0)
    for n in range(rows):
        task = f"dataset{n % TASKS % 101}+task{n % TASKS}"
        words = draw.choices(_WORDS, k=max(8, int(draw.lognormvariate(4.5, 0.7))))
        cut = len(words) * 2 // 3
        yield {
            "id": f"vision-flan_{task}+{n}",
            "image": f"{draw.randrange(IMAGES)}.jpg",
            "task_name": task,
            "conversations": [
                {"from": "human", "value": "<image>\n" + " ".join(words[:cut])},
                {"from": "gpt", "value": " ".join(words[cut:])},
            ],
        }


def make_annotations(file: Path, rows: int) -> None:
    with open(file, "w", encoding="utf-8") as out:
        for i, sample in enumerate(samples(rows)):
            out.write(("[" if i == 0 else ",") + "\n" + json.dumps(sample))
        out.write("\n]\n")


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def peak(pid: int) -> int:
    """VmHWM of a process in bytes; 0 when it has ended."""
    try:
        match = _LINES_OF_MEMORY.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) << 10 if match else 0


def convert(work: Path, rows: int, workers: int, shard_size_mb: int) -> dict[str, Any]:
    """Convert `rows` rows and measure it from outside."""
    annotations, out = work / f"annotation-{rows}.json", work / f"out-{rows}"
    make_annotations(annotations, rows)
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "data_pipeline.convert", "--format=vision_flan", f"--annotations={annotations}",
        f"--images={work / 'images'}", f"--out={out}", f"--workers={workers}",
        f"--shard_size_mb={shard_size_mb}",
    ]  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        try:
            tree = [process.pid, *children(process.pid)]
        except OSError:
            continue
        peaks |= {pid: max(peaks.get(pid, 0), peak(pid)) for pid in tree}
        time.sleep(0.2)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    report = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    if report["written"] != rows:
        raise SystemExit(f"{report['written']} of {rows} rows were written: {report['reasons']}")
    return {
        "rows": rows,
        "annotation_bytes": annotations.stat().st_size,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),  # of one picture each
        "peak_bytes_parent": peaks[process.pid],
        "peak_bytes_workers": sorted((v for pid, v in peaks.items() if pid != process.pid), reverse=True)[
            :workers
        ],
        "peak_bytes": sum(peaks.values()),
        "dataset_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the release and the datasets")
    parser.add_argument("--rows", type=int, default=FULL, help="of the whole (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the datasets that were made")
    args = parser.parse_args()
    make_images(args.work / "images")
    results = []
    for rows in (args.rows // 10, args.rows):
        # A smaller release in smaller shards: the tenth, too, has several, and so needs all workers.
        results.append(convert(args.work, rows, args.workers, max(1, 256 * args.rows // FULL)))
        print(json.dumps(results[-1]), file=sys.stderr)
        if not args.keep:
            shutil.rmtree(args.work / f"out-{rows}")
            (args.work / f"annotation-{rows}.json").unlink()
    tenth, whole = results
    per_row = (whole["peak_bytes"] - tenth["peak_bytes"]) / (whole["rows"] - tenth["rows"])
    result = {
        "command": f"python -m benchmarks.convert --rows={args.rows} --workers={args.workers}",
        **common.made(),
        "tenth": tenth,
        "whole": whole,
        "bytes_per_row_above_the_tenth": round(per_row, 1),
    }
    common.write(args.out, result)
    if whole["peak_bytes"] > MAX_TOTAL or per_row > MAX_PER_ROW:
        sys.exit(1)


if __name__ == "__main__":
    main()
