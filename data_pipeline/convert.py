"""Convert a release (annotations + images) to a TFDS directory of ArrayRecord shards.

    python -m data_pipeline.convert --format=vision_flan \\
        --annotations=annotation_191-task_1k.json --images=images_191task_1k --out=data/vision-flan

Images are read where they lie (a folder, zip or tar archives, which are not unpacked) and stored as they are,
byte for byte, after each has been decoded in full once. A sample that cannot be used is left out and named, with
the reason, in OUT/quarantine/SPLIT.jsonl; what is odd about the others stands in OUT/findings/SPLIT.jsonl; both are
counted in OUT/manifest.json. docs/data.md lists what happens to which kind of damage.

Killed at any instant, the same command goes on: shards that were finished are not made again. Running again gives
the same files. A second split (--split=test) joins the first in the same directory. What is there is replaced only
when all is written. Memory does not grow with the number of samples. --annotations, --images and --out may lie on a
bucket (gs://...).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from data_pipeline import manifest, pool
from data_pipeline.image_store import ImageStore
from data_pipeline.manifest import MANIFEST_FILE
from data_pipeline.releases import FORMATS, OPTIONS, Release, open_release, scienceqa
from data_pipeline.remote import reaching, to_path
from data_pipeline.shard import Result, code_version
from data_pipeline.spool import Job, SeenIds, cut
from data_pipeline.tfds_writer import Shard, check_split, check_target, staging
from data_pipeline.work_folder import work_folder
from vflax.errors import UserError
from vflax.folders import NotWritten

DEFAULT_SHARD_MB = 256
# Formats whose ids are unique by design; in the others different samples share one.
_UNIQUE_IDS = ("vision_flan",)
# A split that is there is not replaced when a greater share is left out: more likely a disk is not mounted.
MAX_LEFT_OUT = 0.5


def convert(
    format: str,
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    style: str | None = None,
    source_split: str | None = None,
    task_from: str | None = None,
    follow_links: bool = False,
    workers: int | None = None,
    shard_size_mb: int = DEFAULT_SHARD_MB,
    max_left_out: float = MAX_LEFT_OUT,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Convert one release to one split of the dataset at `out`.

    Args:
        format: of the annotations, see data_pipeline.releases.
        annotations: the file with the samples.
        images: the folder that the paths in it start from, or archives (data_pipeline.image_store); None where no
            sample has an image.
        out: the dataset directory; other splits that it holds are kept.
        split: name of the split.
        style, source_split, task_from: of the reader, see data_pipeline.releases.
        follow_links: links may lead out of the image folder.
        workers: processes; None for one per core. The result does not depend on it.
        shard_size_mb: size of a shard in MiB, about.
        max_left_out: the share of samples left out, above which a split that is there already is not replaced.
        show_progress: draw a progress bar on stderr.

    Returns:
        The split's part of the manifest (data_pipeline.manifest), and under "quarantine" the first 20 samples left out:
        [{number, id, task, file, reason, detail}].

    Raises:
        UserError: an argument is wrong, the file is not of that format, or not one sample survived: nothing is left
            behind then, but for what an earlier call had finished. Or the disk is full, images cannot be read, a worker
            was killed, or more than max_left_out would be left out: the same call goes on with what is finished.
    """
    if not 0 <= max_left_out <= 1:
        raise UserError(f"--max_left_out={max_left_out}: expected a share, from 0 to 1")
    if shard_size_mb < 1 or (workers is not None and workers < 1):
        raise UserError(f"--shard_size_mb={shard_size_mb}, --workers={workers}: expected at least 1 of each")
    request = Request(
        format,
        os.fspath(annotations),
        None if images is None else os.fspath(images),
        os.fspath(out),
        split,
        style,
        source_split,
        task_from,
        follow_links,
        shard_size_mb,
        max_left_out,
    )
    target = request.target()
    release = request.release()
    with work_folder(target, split) as work:
        with request.cutting(release, work) as (jobs, store):
            count = workers or os.cpu_count() or 1
            results = pool.run(jobs, count, store.reader, source_name(release), show_progress)
            sources, places = manifest.sources(release.files), store.report()
        report = manifest.split_report(
            release.format, sources, places, split, request.options(release.format), results
        )
        return finish(request, target, report, results, [result.shard for result in results], work)


# ---------------------------------------------------------------------------------------------------------
# What data_pipeline.beam does alike


@dataclass(frozen=True)
class Request:
    """What to convert: arguments of `convert`, paths as text."""

    format: str
    annotations: str
    images: str | None
    out: str
    split: str
    style: str | None
    source_split: str | None
    task_from: str | None
    follow_links: bool
    shard_size_mb: int
    max_left_out: float = MAX_LEFT_OUT

    def target(self) -> epath.Path:
        """Where the dataset will be.

        Raises:
            UserError: that place or the split's name will not do.
        """
        check_split(self.split)
        target = to_path(self.out, "--out")
        check_target(target)
        return target

    def release(self) -> Release:
        """The annotations, opened.

        Raises:
            UserError: see open_release.
        """
        path = to_path(self.annotations, "--annotations")
        with reaching(path):
            release = open_release(path, self.format, **self._reader(self.format))
            options = self._reader(release.format)
            if options != self._reader(self.format):  # auto
                release = open_release(path, release.format, **options)
            return release

    def options(self, format: str) -> dict[str, Any]:
        """As the manifest names them; format: the release's, never auto."""
        chosen = {name: value for name, value in self._reader(format).items() if value is not None}
        return chosen | {"follow_links": self.follow_links, "shard_size_mb": self.shard_size_mb}

    @contextlib.contextmanager
    def cutting(self, release: Release, folder: Path) -> Iterator[tuple[Iterator[Job], ImageStore]]:
        """The release's jobs, spooled in `folder` as they are asked for, and the images that they speak of."""
        store = ImageStore(self.images, folder, self.follow_links)
        ids = SeenIds(folder / "ids.sqlite", number_repeated=release.format not in _UNIQUE_IDS)
        try:
            salt = json.dumps([code_version(), source_name(release)])
            yield cut(release, store, ids, folder, self.shard_size_mb << 20, salt), store
        finally:
            ids.close()
            store.close()

    def _reader(self, format: str) -> dict[str, str | None]:
        """The options of a format's reader. ScienceQA's problems are those of the split that is made, if it has it."""
        same = format == "scienceqa" and self.split in scienceqa.SPLITS
        split = self.source_split or (self.split if same else None)
        return {"style": self.style, "split": split, "task_from": self.task_from}


def source_name(release: Release) -> str:
    """What samples bear as their source."""
    return release.files[0].name if len(release.files) == 1 else release.name


def finish(
    request: Request,
    target: epath.Path,
    report: dict[str, Any],
    results: list[Result],
    shards: Sequence[Shard],
    work: Path,
) -> dict[str, Any]:
    """Commit what was made; gives what `convert` gives.

    Raises:
        UserError: not one sample survived.
        NotWritten: too many are left out to replace a split that is there.
    """
    shown = report | {"quarantine": manifest.first_problems(results)}
    if not report["written"]:
        raise UserError(_nothing_left(request.annotations, request.images, shown))
    with staging(target, work) as stage:
        if stage.has_split(request.split) and report["quarantined"] > request.max_left_out * report["read"]:
            raise NotWritten(_too_many(request, shown))
        stage.add_split(request.split, shards)
        manifest.add_to(stage, request.split, report, results)
        stage.commit(f"Converted from {report['format']} annotations.")
    return shown


def _nothing_left(annotations: str, images: str | None, report: dict[str, Any]) -> str:
    if not report["read"]:
        return f"{annotations}: it holds no sample"
    first = report["quarantine"][0]
    return (
        f"{annotations}: not one of {report['read']} samples can be used {report['reasons']}. "
        f"The first: {first['id']} {first['file']}: {first['detail']}. "
        f"Is --images={images or ''} the folder that the paths start from?"
    )


def _too_many(request: Request, report: dict[str, Any]) -> str:
    first = report["quarantine"][0]
    return (
        f"{request.out}: split {request.split!r} is left as it was: {report['quarantined']} of {report['read']} "
        f"samples would be left out {report['reasons']}. The first: {first['id']} {first['file']}: {first['detail']}. "
        "If that is as it should be, --max_left_out=1 replaces the split; what was made is kept for it"
    )


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every conversion: their names are the fields of Request."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, **kw: Any) -> None:
        parser.add_argument(f"--{name}", help=text, **kw)

    known = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    add("format", f"of the annotations (default: %(default)s). {known}", default="auto", metavar="NAME")
    add("annotations", "the file with the samples", required=True, metavar="FILE")
    add(
        "images",
        "the folder that the image paths start from; or a zip or an uncompressed tar, several divided by commas, "
        "a pattern such as 'shards/*.tar', or a folder of archives (by their content: names do not matter). A name is "
        "looked up in an archive as it stands, then below the archive's one top folder. Leave it out for text alone",
        metavar="PATH",
    )
    add("out", "the dataset directory to write or to add a split to", required=True, metavar="DIR")
    add("split", "name of the split (default: %(default)s)", default="train")
    for option in OPTIONS.values():
        text = f"{', '.join(option.formats)}: {option.help}; {', '.join(option.choices)}"
        add(option.flag.removeprefix("--"), f"{text} (default: {option.default})", metavar="NAME")
    add(
        "follow_links",
        "let links lead out of the image folder (for folders made of links)",
        action="store_true",
    )
    add(
        "shard_size_mb", "size of a shard in MiB, about (default: %(default)s)",
        type=int, default=DEFAULT_SHARD_MB, metavar="MB",
    )  # fmt: skip
    add(
        "max_left_out",
        "if more than this share of the samples is left out, a split that is there already is not replaced "
        "(default: %(default)s; 1 replaces it in any case)",
        type=float, default=MAX_LEFT_OUT, metavar="SHARE",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    options = parser("data_pipeline.convert", __doc__)
    text = "processes (default: one per core); the result does not depend on it"
    options.add_argument("--workers", help=text, type=int, metavar="N")
    args = options.parse_args(argv)
    return told(args.out, args.split, lambda: convert(**vars(args)))


def told(out: str, split: str, run: Callable[[], dict[str, Any]]) -> int:
    """Run a conversion, print what came of it, or the error; gives the exit status."""
    try:
        report = run()
    except (UserError, OSError) as error:  # OSError: a bucket that does not answer
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is finished", file=sys.stderr)
        return 130
    out = out.rstrip("/")
    print(f"{out}: {report['written']} samples of {len(report['tasks'])} tasks in split {split}")
    if report["quarantined"]:
        print(
            f"{report['quarantined']} of {report['read']} samples left out, see {out}/{report['quarantine_file']}:"
        )
        for problem in report["quarantine"][:5]:
            print(f"  {problem['reason']}: {problem['id']} {problem['file']}: {problem['detail']}")
        if report["quarantined"] > 5:
            print(f"  ... in all: {report['reasons']}")
    if report["findings"]:
        print(f"odd, but used, see {out}/{report['findings_file']}: {report['findings']}")
    print(f"all counts: {out}/{MANIFEST_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
