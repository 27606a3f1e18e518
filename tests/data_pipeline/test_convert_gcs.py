"""gs:// for annotations, images and OUT, against a server that speaks Google Cloud Storage's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from data_pipeline import pool, publish, spool, tfds_writer
from data_pipeline.archives import Place
from data_pipeline.image_store import ImageReader, ImageStore
from data_pipeline.releases import open_release
from data_pipeline.remote import Unreachable
from data_pipeline.tfds_writer import check_target
from tests import gcs
from tests.data_pipeline.test_convert import Release, entry, files, png


class Bucket(gcs.Bucket):
    """The bucket, and data_pipeline.convert for it."""

    def convert(self, *arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "data_pipeline.convert", "--format=vision_flan", *arguments]
        result = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
        )
        assert result.returncode == status, result.stderr[-3000:]
        return result.stdout + result.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with gcs.serving(Bucket) as served:
        served.environment["VFLAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
        yield served


@pytest.fixture
def bucket(server: Bucket, request: pytest.FixtureRequest) -> tuple[Bucket, str]:
    """The bucket and a prefix of the test's own."""
    return server, request.node.name.partition("[")[0]


def local(tmp_path: Path) -> Release:
    release = Release(tmp_path / "in", [entry(i) for i in range(6)])
    for i in range(6):
        (release.images / f"img{i}.png").write_bytes(png(i, (500, 300)))
    (release.images / "img4.png").unlink()
    (release.images / "img5.png").write_bytes(png(5)[:-20])
    release.convert(shard_size_mb=1)
    return release


def test_a_release_on_a_bucket_becomes_the_same_dataset_on_a_bucket(tmp_path, bucket):
    server, prefix = bucket
    release = local(tmp_path)
    server.upload(release.annotations.parent, prefix)
    url = f"gs://vflax/{prefix}"
    server.convert(
        f"--annotations={url}/annotation.json", f"--images={url}/images", f"--out={url}/made",
        "--shard_size_mb=1", "--workers=2",
    )  # fmt: skip
    assert files(server.download(f"{prefix}/made", tmp_path / "got")) == files(release.out)
    assert os.listdir(server.environment["VFLAX_CACHE"]) == []


@pytest.mark.slow
def test_an_archive_on_a_bucket_gives_the_same_samples(tmp_path, bucket):
    server, prefix = bucket
    release = local(tmp_path)
    with zipfile.ZipFile(tmp_path / "shard_01", "w") as archive:
        for path in release.images.iterdir():
            archive.write(path, path.name)
    server.put(f"{prefix}/shards/shard_01", (tmp_path / "shard_01").read_bytes())
    out = tmp_path / "out"
    images = f"gs://vflax/{prefix}/shards"
    server.convert(f"--annotations={release.annotations}", f"--images={images}", f"--out={out}")
    contents = [json.loads((path / "contents.json").read_text()) for path in (out, release.out)]
    assert contents[0]["splits"]["train"]["sha256"] == contents[1]["splits"]["train"]["sha256"]


def test_a_second_split_joins_on_a_bucket_and_the_first_is_not_touched(tmp_path, bucket):
    server, prefix = bucket
    release = local(tmp_path)
    server.upload(release.out, prefix)
    before = server.generations(prefix)
    arguments = [f"--annotations={release.annotations}", f"--images={release.images}", "--shard_size_mb=1"]
    server.convert(*arguments, f"--out=gs://vflax/{prefix}", "--split=test")
    after = server.generations(prefix)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"contents.json", "dataset_info.json", "manifest.json", "features.json"}
    release.convert(shard_size_mb=1, split="test")
    assert files(server.download(prefix, tmp_path / "got")) == files(release.out)


@pytest.mark.slow
def test_a_replaced_split_leaves_none_of_its_old_shards_on_a_bucket(tmp_path, bucket):
    server, prefix = bucket
    release = local(tmp_path)
    server.upload(release.out, prefix)
    assert sum("array_record" in name for name in server.generations(prefix)) > 1
    arguments = [f"--annotations={release.annotations}", f"--images={release.images}"]
    server.convert(*arguments, f"--out=gs://vflax/{prefix}")
    release.convert()
    assert files(server.download(prefix, tmp_path / "got")) == files(release.out)


@pytest.mark.slow
def test_other_things_on_a_bucket_are_refused_and_left_alone(tmp_path, bucket):
    server, prefix = bucket
    release = local(tmp_path)
    server.put(f"{prefix}/thesis.txt", b"years of work")
    arguments = [f"--annotations={release.annotations}", f"--images={release.images}"]
    error = server.convert(*arguments, f"--out=gs://vflax/{prefix}", status=1)
    assert "holds files, but no contents.json" in error.splitlines()[-1]
    assert list(server.generations(prefix)) == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["annotations", "images"])
def test_what_is_not_on_the_bucket_is_said_in_one_line(tmp_path, bucket, option):
    server, prefix = bucket
    release = Release(tmp_path, [entry(0)])
    options = {
        "annotations": str(release.annotations),
        "images": str(release.images),
        "out": str(release.out),
    }
    options[option] = f"gs://vflax/{prefix}/none"
    error = server.convert(*(f"--{name}={value}" for name, value in options.items()), status=1).splitlines()[
        -1
    ]
    assert error.startswith("error: ") and f"gs://vflax/{prefix}/none" in error
    assert not release.out.exists()


class _Hasty(ImageReader):
    """Has the process that it is sent to give a bucket up soon."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        gcs.give_up_soon(pytest.MonkeyPatch())


def test_a_worker_gives_a_bucket_that_never_answers_up_after_its_time_limit(tmp_path, monkeypatch):
    """A worker is a new process: nothing that its parent has set holds in it."""
    release = Release(tmp_path / "in", [entry(0), entry(1)])
    store, ids = ImageStore(release.images, tmp_path), spool.SeenIds(tmp_path / "ids", False)
    jobs = spool.cut(open_release(release.annotations, "vision_flan"), store, ids, tmp_path, 1, "")
    reader = _Hasty([Place("folder", "gs://vflax/images", "images")])
    with gcs.silent() as silent:
        gcs.use_here(silent, tmp_path / "cache", monkeypatch)
        with pytest.raises(Unreachable, match=r"gs://vflax/images/img\d\.png: .* does not answer \(.*imeout"):
            pool.run(jobs, 2, reader, "release", show_progress=False)


@pytest.mark.parametrize("replaced", [False, True])
def test_the_file_that_readers_open_first_goes_first_where_shards_change_and_comes_last(
    tmp_path, monkeypatch, replaced
):
    """publish.upload on any path that epath knows: here a local folder, to see the order."""
    new, out = tmp_path / "new", tmp_path / "out"
    shard = "vflax-train.array_record-00000-of-00001"
    for folder in (new, out):
        folder.mkdir()
        for name in ("contents.json", "dataset_info.json", "features.json"):
            (folder / name).write_text(folder.name)
    (new / shard).write_text("new")
    (out / (shard if replaced else shard.replace("train", "test"))).write_text("out")
    copied = []
    copy = publish._copy

    def recording(new: Path, out: epath.Path, name: str) -> None:
        assert (out / "dataset_info.json").exists() is not replaced
        copied.append(name)
        copy(new, out, name)

    monkeypatch.setattr(publish, "_copy", recording)
    publish.upload(new, epath.Path(out))
    assert copied[-2:] == ["contents.json", "dataset_info.json"]
    assert set(copied) == {path.name for path in new.iterdir()}


def test_a_first_upload_that_broke_off_goes_on(tmp_path, monkeypatch):
    release = Release(tmp_path / "in", [entry(0), entry(1)])
    release.convert()
    out = epath.Path(tmp_path / "bucket")
    out.mkdir()
    left = [2]
    copy = publish._copy

    def breaking(new: Path, out: epath.Path, name: str) -> None:
        if not left[0]:
            raise ConnectionResetError
        left[0] -= 1
        copy(new, out, name)

    (out / "index").mkdir()
    (out / "findings").mkdir()
    (out / "quarantine").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(publish, "_copy", breaking)
        patch.setattr(publish, "_UPLOADS", 1)
        with pytest.raises(ConnectionResetError):
            publish.upload(release.out, out)
    assert not (out / "dataset_info.json").exists()
    check_target(out)
    assert tfds_writer._copy_existing(out, tmp_path / "new") == {}
    publish.upload(release.out, out)
    assert files(Path(out)) == files(release.out)
