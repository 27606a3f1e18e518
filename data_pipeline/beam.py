"""Convert a release as data_pipeline.convert does, on as many machines as Apache Beam is given.

    python -m data_pipeline.beam --format=vision_flan --annotations=gs://bucket/annotation_191-task_1k.json \\
        --images=gs://bucket/images_191task_1k --out=gs://bucket/vision-flan \\
        --runner=DataflowRunner --project=... --region=... --temp_location=gs://bucket/temp

The options are those of data_pipeline.convert, but for --workers; all others go to Beam. The dataset is the same, byte
for byte. One worker reads the release and cuts it into jobs; the samples of a job travel to the worker that makes its
shard, which puts it into a staging folder beside OUT; when the pipeline has ended, the dataset is put together from
there. Killed at any instant, the same command goes on: shards in the staging folder are not made again.

Apache Beam is not a dependency of vflax: it holds back protobuf and Pillow. benchmarks/beam.sh makes an environment
with both. docs/data.md tells how to run this on Dataflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from data_pipeline import manifest, shard
from data_pipeline.convert import Request, finish, parser, source_name, told
from data_pipeline.image_store import ImageReader
from data_pipeline.remote import is_remote, reaching
from data_pipeline.shard import Result, code_version
from data_pipeline.spool import Job
from data_pipeline.work_folder import work_folder
from vflax.errors import UserError
from vflax.folders import NotWritten

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

# Of a job's samples, so many bytes travel in one element: a runner holds some of them in memory.
PART_BYTES = 4 << 20
JOBS_FILE = "jobs.json"


class PipelineFailed(OSError):
    """Not the input's fault: what is finished stays, and the same command goes on with it."""


def convert(request: Request, beam_arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Convert one release to one split, in a Beam pipeline.

    Args:
        request: what to convert.
        beam_arguments: options of Beam, as on a command line.

    Returns:
        What data_pipeline.convert.convert returns.

    Raises:
        UserError: as there; or Beam is not installed or does not know an option, or the pipeline failed: the same call
            goes on with what is finished then.
    """
    target = request.target()
    _check(request, target, beam_arguments)
    options = _beam_options(beam_arguments)
    request.release()  # what is wrong with the annotations is told before machines are started
    with work_folder(target, request.split) as work, _staging(target, request.split, work) as staged:
        with reaching(staged):
            (staged / JOBS_FILE).unlink(missing_ok=True)
        _run(request, staged, options)
        with reaching(staged):
            text = (staged / JOBS_FILE).read_text("utf-8")
        cutting = json.loads(text)
        if "error" in cutting:
            raise UserError(cutting["error"])
        results = [_collect(Job(work / name, *rest), staged) for name, *rest in cutting["jobs"]]
        shards = [result.shard for result in results]
        if is_remote(staged):
            shards = [replace(shard, on_bucket=staged / shard.path.name) for shard in shards]
        report = manifest.split_report(
            cutting["format"],
            cutting["sources"],
            cutting["images"],
            request.split,
            request.options(cutting["format"]),
            results,
        )
        return finish(request, target, report, results, shards, work)


def _check(request: Request, target: epath.Path, beam_arguments: Sequence[str]) -> None:
    if request.shard_size_mb < 1:
        raise UserError(f"--shard_size_mb={request.shard_size_mb}: expected at least 1")
    if is_remote(target) and not os.fspath(target).partition("://")[2].strip("/").count("/"):
        raise UserError(f"--out={request.out}: name a folder on the bucket; beside it shards are staged")
    if "DataflowRunner" not in " ".join(beam_arguments):
        return
    local = {name: getattr(request, name) for name in ("annotations", "images", "out")}
    local = {name: path for name, path in local.items() if path and not is_remote(path)}
    if local:
        named = ", ".join(f"--{name}={path}" for name, path in local.items())
        raise UserError(f"{named}: Dataflow's workers do not see this machine's disk; expected gs://...")


def _beam_options(arguments: Sequence[str]) -> PipelineOptions:
    """
    Raises:
        UserError: Beam is not installed, or no part of it knows one of the options.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"Apache Beam is not installed here ({error}). vflax does not depend on it, because Beam holds back "
            "protobuf and Pillow: it needs an environment of its own. benchmarks/beam.sh makes one and shows the "
            "commands; on one machine python -m data_pipeline.convert does the same without Beam"
        ) from None
    options = PipelineOptions(list(arguments))
    unknown = set(options.get_all_options(retain_unknown_options=True)) - set(options.get_all_options())
    if unknown:
        named = ", ".join(f"--{name}" for name in sorted(unknown))
        raise UserError(f"{named}: neither data_pipeline.beam nor Apache Beam has this option (see --help)")
    return options


@contextlib.contextmanager
def _staging(target: epath.Path, split: str, work: Path) -> Iterator[epath.Path]:
    """Where workers put finished shards: the work folder, or on a bucket one of the same name beside `target`."""
    if not is_remote(target):
        yield epath.Path(work)
        return
    folder = target.parent / f".{target.name}.converting-{split}"
    with reaching(folder):
        was_there = folder.exists()
    try:
        yield folder
    except NotWritten:
        raise
    except UserError:
        if not was_there:
            _remove(folder)
        raise
    except OSError as error:
        raise NotWritten(
            f"{target}: not written: {error}. What is finished is kept in {folder}: the same command goes on with it"
        ) from error
    _remove(folder)


def _remove(folder: epath.Path) -> None:
    with contextlib.suppress(FileNotFoundError), reaching(folder):
        folder.rmtree()


def _run(request: Request, staged: epath.Path, options: PipelineOptions) -> None:
    """
    Raises:
        PipelineFailed: for whatever reason.
    """
    import apache_beam as beam
    from apache_beam.typehints import KV

    given = {"staged": os.fspath(staged), "code": code_version()}
    try:
        pipeline = beam.Pipeline(options=options)
        _ = (
            pipeline
            | "request" >> beam.Create([request])
            | "read and cut" >> beam.FlatMap(cut, **given).with_output_types(KV[str, Part])
            # Spreads the jobs over the workers as well.
            | "gather" >> beam.GroupByKey()
            | "make shards" >> beam.Map(make, **given)
        )
        result = pipeline.run()
        state = result.wait_until_finish()
    except Exception as error:  # every runner has its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise PipelineFailed(f"the pipeline failed: {reason}") from error
    if state != "DONE":
        raise PipelineFailed(f"the pipeline ended in the state {state}; its log tells why")


def _collect(job: Job, staged: epath.Path) -> Result:
    """The finished shard of a job, its lists beside job.base; of one on a bucket the samples stay there."""
    base = staged / job.base.name
    result = shard.finished(job, base)
    if result is None:
        raise PipelineFailed(f"{base}: the pipeline ended without having made this shard")
    if is_remote(staged):
        for remote, local in zip(shard.files(base)[1:], shard.files(job.base)[1:], strict=True):
            with reaching(remote):
                remote.copy(local, overwrite=True)
    return result


# ---------------------------------------------------------------------------------------------------------
# In the workers


@dataclass(frozen=True)
class Part:
    """A piece of what spool.cut laid down for a job, and what the job's shard needs beside it."""

    digest: str  # of the job, as its rows
    rows: int
    offset: int  # of `samples` in the job's file
    samples: bytes
    reader: ImageReader
    source: str


def cut(request: Request, staged: str, code: str) -> Iterator[tuple[str, Part]]:
    """Read the release; gives (name of the shard, part) of all that is to be made, and lists all jobs in `staged`."""
    _check_code(code)
    listed: list[tuple[str, str, int]] = []
    summary: dict[str, Any]
    try:
        with tempfile.TemporaryDirectory() as folder:
            release = request.release()
            with request.cutting(release, Path(folder)) as (jobs, store):
                reader, source = store.reader.away(), source_name(release)
                for job in jobs:
                    listed.append((job.base.name, job.digest, job.rows))
                    if shard.finished(job, epath.Path(staged) / job.base.name) is None:
                        yield from _parts(job, reader, source)
                    job.samples_path.unlink()
                summary = {
                    "format": release.format,
                    "sources": manifest.sources(release.files),
                    "images": store.report(),
                    "jobs": listed,
                }
    except NotWritten:  # a bucket that does not answer
        raise
    except UserError as error:  # trying again, as a runner would, changes nothing
        summary = {"error": str(error)}
    with reaching(staged):
        (epath.Path(staged) / JOBS_FILE).write_text(json.dumps(summary))


def _parts(job: Job, reader: ImageReader, source: str) -> Iterator[tuple[str, Part]]:
    with open(job.samples_path, "rb") as file:
        offset = 0
        while samples := file.read(PART_BYTES):
            yield job.base.name, Part(job.digest, job.rows, offset, samples, reader, source)
            offset += len(samples)


def make(parts_of_job: tuple[str, Iterable[Part]], staged: str, code: str) -> None:
    """Make one shard; Beam's counters tell how far all are."""
    from apache_beam.metrics import Metrics

    _check_code(code)
    samples, images = (Metrics.counter("vflax", counted) for counted in ("samples", "images"))

    def tick(count: int) -> None:
        samples.inc()
        images.inc(count)

    make_shard(*parts_of_job, epath.Path(staged), tick)


def make_shard(name: str, parts: Iterable[Part], staged: epath.Path, tick: Callable[[int], None]) -> None:
    """Make a shard in a folder of this machine's, and put it into `staged`; tick as of shard.make."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / name
        with open(Job(base, "", 0).samples_path, "wb") as file:
            for part in parts:  # in any order
                file.seek(part.offset)
                file.write(part.samples)
        job = Job(base, part.digest, part.rows)
        if shard.finished(job, staged / name) is not None:
            return  # a runner may start a job twice
        with contextlib.closing(part.reader) as reader:
            shard.make(job, reader, part.source, tick)
        with reaching(staged):
            _put(base, staged / name)


def _put(base: Path, staged: epath.Path) -> None:
    """The record that says that the shard is finished comes last. A file on a bucket appears when it is whole."""
    shard.done_path(staged).unlink(missing_ok=True)
    for source, target in zip(
        [*shard.files(base), shard.done_path(base)],
        [*shard.files(staged), shard.done_path(staged)],
        strict=True,
    ):
        if is_remote(target):
            epath.Path(source).copy(target, overwrite=True)
        else:
            # Of a job that was started twice neither writes into the other's file.
            part = f"{target}.{uuid.uuid4().hex}.part"
            shutil.copyfile(source, part)
            os.replace(part, target)


def _check_code(code: str) -> None:
    if code_version() != code:
        raise RuntimeError(
            "this worker has another version of vflax, Pillow, imagehash, array_record or tensorflow-datasets than the "
            "machine that started the pipeline; give both the same (docs/data.md)"
        )


# ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    options = parser("data_pipeline.beam", __doc__)
    options.allow_abbrev = False  # Beam's options may begin alike
    args, others = options.parse_known_args(argv)
    return told(args.out, args.split, lambda: convert(Request(**vars(args)), others))


if __name__ == "__main__":
    # Workers look the pipeline's functions up by module and name; in __main__ they would not find them.
    from data_pipeline import beam

    sys.exit(beam.main())
