"""data_pipeline/beam.py: what convert makes, made by a Beam pipeline.

The pipeline itself runs where BEAM_PYTHON names a Python that has Apache Beam (benchmarks/beam.sh makes one).
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from etils import epath

from data_pipeline import beam, convert, shard
from data_pipeline.archives import Entry, Place
from data_pipeline.image_store import ImageReader, ImageStore
from data_pipeline.remote import Unreachable
from data_pipeline.spool import Job
from tests import gcs
from tests.data_pipeline.test_convert import Release, entry, files, png
from tests.data_pipeline.test_convert_gcs import Bucket, bucket, server  # noqa: F401 (fixtures)
from tests.data_pipeline.test_convert_resume import release_of_many_shards
from vflax.images import ImageError

PYTHON = os.environ.get("BEAM_PYTHON", "")
needs_beam = pytest.mark.skipif(not PYTHON, reason="BEAM_PYTHON names no Python that has Apache Beam")
ROOT = Path(__file__).parents[2]
LOCAL_RUNNER = ("--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")


def arguments(release: Release, out: Path | str, *more: str) -> list[str]:
    return [
        "--format=vision_flan", f"--annotations={release.annotations}", f"--images={release.images}", f"--out={out}",
        "--shard_size_mb=1", *more,
    ]  # fmt: skip


def run(*command: str, status: int = 0, **environment: str) -> str:
    """Run Python with Beam in it; gives what it printed."""
    result = subprocess.run(
        [PYTHON, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert result.returncode == status, result.stderr[-3000:]
    return result.stdout + result.stderr


def faulty(root: Path) -> Release:
    """6 shards, with a sample left out of each of the first two and one with a finding."""
    release = release_of_many_shards(root, 6)
    entries = json.loads(release.annotations.read_text())
    entries[0:0] = [entry(90, image="none.png"), entry(91, image=None)]
    entries.insert(4, entry(1))  # an id that came already
    release.annotations.write_text(json.dumps(entries))
    return release


# ---------------------------------------------------------------------------------------------------------
# With Beam


@needs_beam
def test_the_pipeline_makes_the_same_files_as_convert(tmp_path):
    release = faulty(tmp_path)
    run("-m", "data_pipeline.convert", *arguments(release, tmp_path / "one"))
    printed = run("-m", "data_pipeline.beam", *arguments(release, tmp_path / "two"), *LOCAL_RUNNER)
    assert len(list((tmp_path / "one").glob("*.array_record-*"))) == 6
    assert files(tmp_path / "two") == files(tmp_path / "one")
    modes = [{p.stat().st_mode for p in (tmp_path / out).glob("*.array_record-*")} for out in ("one", "two")]
    assert modes[0] == modes[1]
    assert f"{tmp_path}/two: 7 samples of 2 tasks in split train" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["annotation.json", "images", "one", "two"]


@needs_beam
def test_after_a_kill_only_the_shard_that_is_not_there_is_made_again(tmp_path):
    release = faulty(tmp_path)
    killed = "import os\nfrom data_pipeline import beam\nbeam.finish = lambda *_: os._exit(9)\nbeam.main()"
    given = [*arguments(release, tmp_path / "out"), *LOCAL_RUNNER]
    run("-c", f"import sys\nsys.argv[1:] = {given!r}\n{killed}", status=9)
    work = tmp_path / ".out.converting-train"
    bases = [done.with_suffix("") for done in sorted(work.glob("*.done"))]
    assert len(bases) == 6
    before = {base.name: base.stat().st_ino for base in bases}
    (work / "00003").unlink()
    run("-m", "data_pipeline.beam", *given)
    after = [path.stat().st_ino for path in sorted((tmp_path / "out").glob("*.array_record-*"))]
    # The shards that were finished before are the very same files, under their last names.
    assert [i for i, name in enumerate(sorted(before)) if before[name] != after[i]] == [3]
    run("-m", "data_pipeline.convert", *arguments(release, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not work.exists()


@needs_beam
def test_a_release_that_turns_out_to_be_cut_off_is_told_in_one_line_and_leaves_nothing(tmp_path):
    release = Release(tmp_path / "in", [entry(0)])
    whole = json.dumps([entry(0, id=f"s{i}") for i in range(1200)])
    release.annotations.write_text(whole[:-200])
    (tmp_path / "here").mkdir()
    given = [*arguments(release, tmp_path / "here/out"), *LOCAL_RUNNER]
    last = run("-m", "data_pipeline.beam", *given, status=1).splitlines()[-1]
    assert last.startswith(f"error: {release.annotations}"), last
    assert list((tmp_path / "here").iterdir()) == []


@needs_beam
def test_an_option_that_neither_knows_is_refused(tmp_path):
    release = Release(tmp_path, [entry(0)])
    given = arguments(release, tmp_path / "out", "--runner=DirectRunner", "--workers=4", "--num_werkers=3")
    last = run("-m", "data_pipeline.beam", *given, status=1).splitlines()[-1]
    assert last.startswith("error: --num_werkers, --workers: neither"), last


@needs_beam
def test_a_worker_of_another_version_makes_nothing(tmp_path):
    release = Release(tmp_path, [entry(0)])
    other = "from data_pipeline import beam\nbeam.code_version = lambda: 'another'\nsys.exit(beam.main())"
    given = [*arguments(release, tmp_path / "out"), *LOCAL_RUNNER]
    printed = run("-c", f"import sys\nsys.argv[1:] = {given!r}\n{other}", status=1)
    assert printed.splitlines()[-1].startswith("error: ")
    assert "this worker has another version of vflax" in printed.splitlines()[-1]
    assert "the same command goes on" in printed.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@needs_beam
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_on_a_bucket_the_pipeline_makes_the_same_files_too(tmp_path, bucket, form):  # noqa: F811
    served, prefix = bucket
    prefix += form
    release = faulty(tmp_path / "in")
    if form == "zip":
        with zipfile.ZipFile(release.images.with_suffix(".zip"), "w") as archive:
            for path in release.images.iterdir():
                archive.write(path, path.name)
        shutil.rmtree(release.images)
        release.images = release.images.with_suffix(".zip")
    run("-m", "data_pipeline.convert", *arguments(release, tmp_path / "local"))
    served.upload(release.annotations.parent, prefix)
    url = f"gs://vflax/{prefix}"
    given = [
        "--format=vision_flan", f"--annotations={url}/annotation.json", f"--images={url}/{release.images.name}",
        f"--out={url}/made", "--shard_size_mb=1",
    ]  # fmt: skip
    run("-m", "data_pipeline.beam", *given, *LOCAL_RUNNER, **_only_changed(served))
    assert files(served.download(f"{prefix}/made", tmp_path / "got")) == files(tmp_path / "local")
    assert not [name for name in served.generations(prefix) if ".converting" in name]
    assert os.listdir(served.environment["VFLAX_CACHE"]) == []


def _only_changed(served: Bucket) -> dict[str, str]:
    return {name: value for name, value in served.environment.items() if os.environ.get(name) != value}


# ---------------------------------------------------------------------------------------------------------
# Without


def test_without_beam_the_error_names_the_script_that_installs_it_and_why_it_is_apart(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setitem(sys.modules, "apache_beam.options", None)
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    release = Release(tmp_path / "in", [entry(0)])
    assert beam.main(arguments(release, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Apache Beam is not installed here")
    assert "benchmarks/beam.sh" in error and "holds back protobuf and Pillow" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard_size_mb=0"], "--shard_size_mb=0: expected at least 1"),
        (["--split=Train"], "split 'Train': expected a lower-case letter"),
        (["--runner=DataflowRunner"], "Dataflow's workers do not see this machine's disk; expected gs://"),
        (["--runner", "DataflowRunner"], "Dataflow's workers do not see this machine's disk; expected gs://"),
    ],
)
def test_a_wrong_argument_is_told_before_beam_is_asked_for(tmp_path, capsys, more, message):
    release = Release(tmp_path / "in", [entry(0)])
    assert beam.main([*arguments(release, tmp_path / "out"), *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bucket_itself_is_no_place_for_a_dataset(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_pipeline.convert.check_target", lambda out: None)  # it would ask the bucket
    release = Release(tmp_path / "in", [entry(0)])
    assert beam.main(arguments(release, "gs://bucket/")) == 1
    assert "error: --out=gs://bucket/: name a folder on the bucket" in capsys.readouterr().err


def request(release: Release, out: Path) -> convert.Request:
    images = os.fspath(release.images)
    return convert.Request(
        "vision_flan", os.fspath(release.annotations), images, os.fspath(out), "train", None, None, None, False, 1
    )  # fmt: skip


def test_a_job_in_many_parts_in_any_order_gives_the_same_shard(tmp_path, monkeypatch):
    release = Release(tmp_path / "in", [entry(i) for i in range(20)])
    release.convert(shard_size_mb=1)
    monkeypatch.setattr(beam, "PART_BYTES", 100)
    staged = tmp_path / "staged"
    staged.mkdir()
    parts = list(beam.cut(request(release, release.out), os.fspath(staged), shard.code_version()))
    assert len(parts) > 20 and {name for name, _ in parts} == {"00000"}
    assert max(len(part.samples) for _, part in parts) == 100
    random.Random(0).shuffle(parts)
    ticks: list[int] = []
    beam.make_shard("00000", [part for _, part in parts], epath.Path(staged), ticks.append)
    assert ticks == [1] * 20
    [made] = release.out.glob("*.array_record-*")
    assert (staged / "00000").read_bytes() == made.read_bytes()
    [job] = json.loads((staged / beam.JOBS_FILE).read_text())["jobs"]
    assert shard.finished(Job(staged / "00000", *job[1:])) is not None
    # Started again, as runners do: nothing is made, nothing is left.
    before = files(staged)
    beam.make_shard("00000", [part for _, part in parts], epath.Path(staged), ticks.append)
    assert len(ticks) == 20 and files(staged) == before


def test_a_finished_shard_sends_no_part(tmp_path):
    release = Release(tmp_path / "in", [entry(0)])
    cut = (request(release, release.out), os.fspath(tmp_path), shard.code_version())
    beam.make_shard("00000", [part for _, part in beam.cut(*cut)], epath.Path(tmp_path), lambda _: None)
    assert list(beam.cut(*cut)) == []
    (release.images / "img0.png").write_bytes(png(7))
    assert len(list(beam.cut(*cut))) == 1


def test_a_bucket_that_does_not_answer_is_not_taken_for_a_fault_of_the_release(tmp_path, monkeypatch):
    """For that the staged shards would be thrown away."""
    release = Release(tmp_path / "in", [entry(0)])

    def silent(self: convert.Request) -> None:
        raise Unreachable("gs://bucket: the bucket does not answer")

    monkeypatch.setattr(convert.Request, "release", silent)
    with pytest.raises(Unreachable):
        list(beam.cut(request(release, release.out), os.fspath(tmp_path), shard.code_version()))
    assert not (tmp_path / beam.JOBS_FILE).exists()


def test_a_beam_worker_gives_a_bucket_that_never_answers_up_after_its_time_limit(tmp_path, monkeypatch):
    release = Release(tmp_path / "in", [entry(0)])
    [(name, part)] = beam.cut(request(release, release.out), os.fspath(tmp_path), shard.code_version())
    away = replace(part, reader=ImageReader([Place("tar", "gs://vflax/images.tar", "images.tar")]))
    gcs.give_up_soon(monkeypatch)
    with gcs.silent() as silent:
        gcs.use_here(silent, tmp_path / "cache", monkeypatch)
        with pytest.raises(Unreachable, match=r"gs://vflax/images\.tar: .* does not answer \(.*imeout"):
            beam.make_shard(name, [away], epath.Path(tmp_path), lambda _: None)


def archive_of(path: Path, kind: str, members: dict[str, bytes], extra: bytes = b"") -> None:
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                info = zipfile.ZipInfo(name)
                info.extra = extra
                archive.writestr(info, data)
        return
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def away(local: Path, kind: str) -> ImageReader:
    """A reader of a copy on another file system that only fsspec knows."""
    url = f"memory://{local.name}"
    fsspec.filesystem("memory").pipe_file(f"/{local.name}", local.read_bytes())
    return ImageReader([Place(kind, os.fspath(local), local.name, url)]).away()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("extra", [b"", b"\x99\x99\xb8\x0b" + bytes(3000)], ids=["short", "long header"])
def test_a_member_of_an_archive_on_a_bucket_is_read_without_the_rest(tmp_path, kind, extra):
    members = {"a.png": png(1), "empty": b"", "b.png": png(2)}
    archive_of(tmp_path / "images", kind, members, extra)
    store = ImageStore(tmp_path / "images", tmp_path)
    reader = away(tmp_path / "images", kind)
    (tmp_path / "images").unlink()
    for name, found in zip(members, store.find(list(members)), strict=True):
        assert isinstance(found, Entry)
        assert reader.read(found) == members[name]
    store.close()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_of_an_archive_on_a_bucket_that_was_cut_since_is_damaged(tmp_path, kind):
    archive_of(tmp_path / "images", kind, {"a.png": png(1)})
    store = ImageStore(tmp_path / "images", tmp_path)
    [found] = store.find(["a.png"])
    store.close()
    assert isinstance(found, Entry)
    os.truncate(tmp_path / "images", found.offset + 200)
    with pytest.raises(ImageError, match=f"{kind} archive"):
        away(tmp_path / "images", kind).read(found)
