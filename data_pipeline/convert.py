"""Convert a release (annotation JSON + image folder) to a TFDS directory of ArrayRecord shards.

    python -m data_pipeline.convert --format=vision_flan \\
        --annotations=annotation_191-task_1k.json --images=images_191task_1k --out=data/vision-flan

Images are stored as they are, byte for byte, after each has been decoded in full once. A sample that cannot
be used is left out and named, with the reason, in OUT/report.json. Running again gives the same files; a
second split (--split=test) joins the first in the same directory. What is there is replaced only when all
is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import multiprocessing
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.records import Problem, RawSample
from data_pipeline.releases import FORMATS, Release, open_release
from data_pipeline.tfds_writer import Shard, ShardWriter, check_split, staging
from vflax import conversation, images
from vflax.errors import UserError

REPORT_FILE = "report.json"
DEFAULT_SHARD_MB = 256


def convert(
    format: str,
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    workers: int | None = None,
    shard_size_mb: int = DEFAULT_SHARD_MB,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Convert one annotation file to one split of the dataset at `out`.

    Args:
        format: one of data_pipeline.releases.FORMATS.
        annotations: the JSON file.
        images: the folder that the paths in it start from.
        out: the dataset directory; other splits that it holds are kept.
        split: name of the split.
        workers: processes; None for one per core. The result does not depend on it.
        shard_size_mb: size of a shard in MiB, about.
        show_progress: draw a progress bar on stderr.

    Returns:
        The split's report: {format, annotations, annotations_sha256, images, read, written, quarantined,
        reasons {reason: count}, tasks {task: count}, quarantine [{number, id, task, file, reason, detail}]}.

    Raises:
        UserError: an argument is wrong, the file is not of that format, or not one sample survived. Nothing
            is left behind then.
    """
    annotations, image_root, out = Path(annotations), Path(images), Path(out)
    if str(out).startswith("gs:/"):
        raise UserError(
            f"--out={out}: shards are written to a local disk; copy them with `gcloud storage cp -r` then"
        )
    if shard_size_mb < 1 or (workers is not None and workers < 1):
        raise UserError(f"--shard_size_mb={shard_size_mb}, --workers={workers}: expected at least 1 of each")
    check_split(split)
    if not image_root.is_dir():
        raise UserError(
            f"--images={image_root}: there is no such folder. Expected the unpacked image archive"
        )
    release = open_release(annotations, format)
    format = release.format
    samples, problems = _tell_apart(release)
    with staging(out) as stage:
        scratch = stage.scratch / split
        scratch.mkdir()
        jobs = [
            _Job(scratch / f"{i:05d}", part, image_root, annotations.name)
            for i, part in enumerate(_cut(samples, image_root, shard_size_mb << 20))
        ]
        results = _run(jobs, len(samples), workers or os.cpu_count() or 1, show_progress)
        problems += [problem for _, found in results for problem in found]
        report = _report(format, annotations, image_root, [shard for shard, _ in results], problems)
        if not report["written"]:
            raise UserError(_nothing_left(annotations, image_root, report))
        stage.add_split(split, [shard for shard, _ in results])
        splits = (stage.read_json(REPORT_FILE) or {"splits": {}})["splits"] | {split: report}
        stage.write_json(REPORT_FILE, {"splits": dict(sorted(splits.items()))})
        stage.commit(f"Converted from {format} annotations.")
    return report


def _tell_apart(release: Release) -> tuple[list[RawSample], list[Problem]]:
    """The samples and the problems. An id that comes again gets "#2", ..., in vision_flan it is a problem."""
    samples: list[RawSample] = []
    problems: list[Problem] = []
    seen: Counter[str] = Counter()
    for row in release:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        seen[row.id] += 1
        time, files = seen[row.id], ", ".join(row.files)
        if time == 1:
            samples.append(row)
        elif release.format == "vision_flan":
            detail = "an earlier sample has the same id"
            problems.append(Problem(row.number, row.id, row.task, files, "duplicate_id", detail))
        else:
            samples.append(dataclasses.replace(row, id=f"{row.id}#{time}"))
    return samples, problems


# ---------------------------------------------------------------------------------------------------------
# One shard: the unit of work of a process


@dataclasses.dataclass(frozen=True)
class _Job:
    path: Path
    samples: list[RawSample]
    image_root: Path
    source: str


def _cut(samples: Sequence[RawSample], image_root: Path, shard_bytes: int) -> Iterator[list[RawSample]]:
    """Consecutive samples of about shard_bytes, by file size: shards do not depend on the workers."""
    part: list[RawSample] = []
    size = 0
    for sample in samples:
        part.append(sample)
        size += sum(_file_size(image_root / file) for file in sample.files)
        size += len(str(sample.conversations))
        if size >= shard_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # missing, a name that is too long, ...: quarantined when it is read
        return 0


def _write_shard(job: _Job, advance: Callable[[], None]) -> tuple[Shard, list[Problem]]:
    writer = ShardWriter(job.path)
    problems: list[Problem] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF data and palettes
        for sample in job.samples:
            example = _example(sample, job.image_root, job.source)
            if isinstance(example, Problem):
                problems.append(example)
            else:
                writer.write(*example)
            advance()
    return writer.close(), problems


def _example(sample: RawSample, image_root: Path, source: str) -> tuple[dict[str, Any], list[int]] | Problem:
    """The example and the perceptual hashes of its images."""

    def problem(reason: str, detail: str, file: str = "") -> Problem:
        return Problem(sample.number, sample.id, sample.task, file, reason, detail)

    try:
        conversation.read_llava(sample.conversations, len(sample.files), "front")
    except UserError as error:
        return problem("broken_conversation", str(error))
    encoded: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    hashes: list[int] = []
    for file in sample.files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            return problem("path_outside", "expected a path inside the image folder", file)
        try:
            data = (image_root / path).read_bytes()
            picture = images.decode(data)
            sizes.append(picture.size)
            hashes.append(images.perceptual_hash(picture))
        except OSError as error:
            return problem("image_missing", error.strerror or str(error), file)
        except images.ImageError as error:
            return problem("image_damaged", error.reason, file)
        encoded.append(data)
    example = {
        "id": sample.id,
        "task": sample.task,
        "conversations": sample.conversations,
        "images": encoded,
        "sizes": sizes,
        "source": source,
    }
    return example, hashes


# ---------------------------------------------------------------------------------------------------------
# All shards, in as many processes as asked for

_done: Any = None  # in a worker: the shared counter of finished samples


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter


def _count_one() -> None:
    with _done.get_lock():
        _done.value += 1


def _run_in_worker(job: _Job) -> tuple[Shard, list[Problem]]:
    return _write_shard(job, _count_one)


def _run(jobs: list[_Job], total: int, workers: int, show: bool) -> list[tuple[Shard, list[Problem]]]:
    """The results in the order of the jobs."""
    columns = (TextColumn("checking images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        bar = progress.add_task("", total=total)
        if min(workers, len(jobs)) <= 1:
            return [_write_shard(job, lambda: progress.advance(bar)) for job in jobs]
        # spawn: the parent may hold threads (JAX's, a test runner's), which a fork would copy in mid-flight.
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        finished = threading.Event()

        def follow() -> None:
            while not finished.wait(0.2):
                progress.update(bar, completed=counter.value)
            progress.update(bar, completed=counter.value)

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(counter,)
        )
        try:
            return list(pool.map(_run_in_worker, jobs))
        finally:
            pool.shutdown(cancel_futures=True)
            finished.set()
            follower.join()


def _report(
    format: str, annotations: Path, image_root: Path, shards: Sequence[Shard], problems: Sequence[Problem]
) -> dict[str, Any]:
    tasks: Counter[str] = Counter()
    for shard in shards:
        tasks.update(shard.tasks)
    written = sum(shard.samples for shard in shards)
    return {
        "format": format,
        "annotations": annotations.name,
        "annotations_sha256": hashlib.sha256(annotations.read_bytes()).hexdigest(),
        "images": image_root.name,
        "read": written + len(problems),
        "written": written,
        "quarantined": len(problems),
        "reasons": dict(Counter(problem.reason for problem in problems).most_common()),
        "tasks": dict(sorted(tasks.items())),
        "quarantine": [dataclasses.asdict(problem) for problem in sorted(problems, key=lambda p: p.number)],
    }


def _nothing_left(annotations: Path, image_root: Path, report: dict[str, Any]) -> str:
    first = report["quarantine"][0]
    return (
        f"{annotations}: not one of {report['read']} samples can be used {report['reasons']}. "
        f"The first: {first['id']} {first['file']}: {first['detail']}. "
        f"Is --images={image_root} the folder that the paths start from?"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, help=f"of the annotations: {', '.join(FORMATS)}")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="the JSON file with the samples")
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="the folder that its image paths start from"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the dataset directory to write or add to"
    )
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--shard_size_mb",
        type=int,
        default=DEFAULT_SHARD_MB,
        metavar="MB",
        help="size of a shard in MiB (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    args = _parser().parse_args(argv)
    try:
        report = convert(
            args.format,
            args.annotations,
            args.images,
            args.out,
            split=args.split,
            workers=args.workers,
            shard_size_mb=args.shard_size_mb,
        )
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {report['written']} samples of {len(report['tasks'])} tasks in split {args.split}")
    if report["quarantined"]:
        print(f"{report['quarantined']} of {report['read']} samples left out, see {args.out}/{REPORT_FILE}:")
        for problem in report["quarantine"][:5]:
            print(f"  {problem['reason']}: {problem['id']} {problem['file']}: {problem['detail']}")
        if report["quarantined"] > 5:
            print(f"  ... in all: {report['reasons']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
