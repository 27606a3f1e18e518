"""data_pipeline/convert.py: killed at any instant, the same command goes on; what is not whole does not count."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from filelock import FileLock
from PIL import Image

from data_pipeline import pool, shard
from data_pipeline.convert import convert, main
from data_pipeline.image_store import ImageReader, ImageStore
from data_pipeline.remote import Unreachable, reaching
from data_pipeline.spool import Job
from data_pipeline.tfds_writer import ShardWriter
from tests.data_pipeline.test_convert import Release, entry, files
from vflax import folders
from vflax.errors import UserError
from vflax.folders import NotWritten

EXAMPLE = {"id": "a", "task": "t", "conversations": [], "source": "test"}
SHARDS = 8
MANY = 30  # so many that a kill meets some of them undone


def picture(seed: int) -> bytes:
    """Just over 1 MiB: with --shard_size_mb=1 a shard each."""
    pixels = np.random.default_rng(seed).integers(0, 256, (520, 700, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def release_of_many_shards(root: Path, count: int = SHARDS) -> Release:
    release = Release(root, [entry(i) for i in range(count)])
    for i in range(count):
        (release.images / f"img{i}.png").write_bytes(picture(i))
    return release


def finished(work: Path) -> dict[str, tuple[int, int]]:
    """{shard: (inode, time of the last change)} of those that bear the record of a finished one."""
    found = {}
    for done in work.glob("*.done"):
        status = done.with_suffix("").stat()
        found[done.stem] = (status.st_ino, status.st_mtime_ns)
    return found


def command(release: Release, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "data_pipeline.convert", "--format=vision_flan", f"--annotations={release.annotations}",
        f"--images={release.images}", f"--out={out}", "--workers=2", "--shard_size_mb=1",
    ]  # fmt: skip


def kill_in_the_middle(release: Release, out: Path, work: Path) -> dict[str, tuple[int, int]]:
    process = subprocess.Popen(command(release, out), start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(finished(work)) < 3:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return finished(work)


def test_after_kill_9_of_all_processes_only_unfinished_shards_are_made_again(tmp_path):
    release = release_of_many_shards(tmp_path / "in", MANY)
    work = tmp_path / ".out.converting-train"
    before = kill_in_the_middle(release, tmp_path / "out", work)
    out = tmp_path / "out"
    assert 3 <= len(before) < MANY
    assert not out.exists()

    made: list[str] = []
    make = shard.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.shard, "make", lambda job, *rest: made.append(job.base.name) or make(job, *rest))
        convert(
            "vision_flan", release.annotations, release.images, out,
            workers=1, shard_size_mb=1, show_progress=False,
        )  # fmt: skip
    assert len(made) == MANY - len(before)
    assert not set(made) & set(before)
    # The files of the shards that were finished before are the very same ones, under their last names.
    after = {(p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*.array_record-*")}
    assert set(before.values()) <= after
    release.convert(out=tmp_path / "whole", shard_size_mb=1)
    assert files(out) == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    """Else they would write on beside the next conversion."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    release = release_of_many_shards(tmp_path, MANY)
    process = subprocess.Popen(command(release, tmp_path / "out"), stderr=subprocess.DEVNULL)
    work = tmp_path / ".out.converting-train"
    while process.poll() is None and not finished(work):
        time.sleep(0.01)
    children = [
        int(pid)
        for task in Path(f"/proc/{process.pid}/task").glob("*/children")
        for pid in task.read_text().split()
    ]
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while (left := [pid for pid in children if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert finished(work)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Stopped(Exception):
    pass


def stop_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """The conversion breaks once it has made so many shards, in a way that is nobody's input."""
    make = shard.make
    left = [count]

    def stopping(*args):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return make(*args)

    patch.setattr(pool.shard, "make", stopping)


def convert_and_count(release: Release, monkeypatch, **kw) -> int:
    """How many shards were made."""
    made = []
    make = shard.make
    with monkeypatch.context() as patch:
        patch.setattr(pool.shard, "make", lambda *args: made.append(1) or make(*args))
        release.convert(shard_size_mb=1, **kw)
    return len(made)


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> Release:
    """A release whose conversion has 5 finished shards."""
    release = release_of_many_shards(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped):
            release.convert(shard_size_mb=1)
    assert len(finished(tmp_path / ".out.converting-train")) == 5
    return release


def test_a_stopped_conversion_goes_on(stopped, monkeypatch):
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5


def test_another_writer_at_the_same_place_does_not_take_the_work_for_abandoned(stopped, monkeypatch):
    with folders.beside(stopped.out):
        pass
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5


def test_a_changed_image_is_converted_again_and_no_other(stopped, monkeypatch):
    (stopped.images / "img1.png").write_bytes(picture(99))
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5 + 1
    assert stopped.read()["s1"]["images"] == [picture(99)]


def test_a_changed_text_is_converted_again_and_no_other(stopped, monkeypatch):
    entries = json.loads(stopped.annotations.read_text())
    entries[2]["conversations"][1]["value"] = "Another answer."
    stopped.annotations.write_text(json.dumps(entries))
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5 + 1
    assert b"Another answer." in stopped.read()["s2"]["conversations"]


def test_shards_of_another_version_of_the_code_are_made_again(stopped, monkeypatch):
    monkeypatch.setattr("data_pipeline.convert.code_version", lambda: "another")
    assert convert_and_count(stopped, monkeypatch) == SHARDS


@pytest.mark.parametrize("suffix", ["", ".jsonl", ".digests", ".quarantine", ".findings"])
def test_a_shard_that_lacks_a_file_or_a_byte_is_made_again(stopped, monkeypatch, suffix):
    file = stopped.out.parent / f".out.converting-train/00003{suffix}"
    if file.stat().st_size:
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5 + 1


def test_a_record_that_is_no_json_does_not_count(stopped, monkeypatch):
    (stopped.out.parent / ".out.converting-train/00003.done").write_text("{")
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5 + 1


def test_a_conversion_that_was_killed_after_the_swap_gives_the_same_files(stopped, monkeypatch):
    work = stopped.out.parent / ".out.converting-train"
    stopped.convert(shard_size_mb=1, out=stopped.out.parent / "whole")
    rmtree = shutil.rmtree

    def killed(path, *args, **kw):
        if Path(path) == work:
            raise KeyboardInterrupt
        rmtree(path, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.work_folder.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            stopped.convert(shard_size_mb=1)
    assert work.is_dir()
    assert convert_and_count(stopped, monkeypatch) == 0
    assert files(stopped.out) == files(stopped.out.parent / "whole")
    assert not work.exists()


def test_two_conversions_to_one_place_do_not_meet(tmp_path, capsys):
    release = Release(tmp_path, [entry(0)])
    arguments = [f"--annotations={release.annotations}", f"--images={release.images}", f"--out={release.out}"]
    with FileLock(tmp_path / ".out.converting.lock"):
        assert main(["--format=vision_flan", *arguments]) == 1
    assert "another conversion is writing there" in capsys.readouterr().err
    assert main(["--format=vision_flan", *arguments]) == 0
    assert not (tmp_path / ".out.converting.lock").exists()


def test_a_full_disk_keeps_what_is_finished_and_says_so(tmp_path, monkeypatch):
    release = release_of_many_shards(tmp_path)
    make = shard.make

    def full(job, *rest):
        if job.base.name == "00004":
            raise OSError(28, "No space left on device")
        return make(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pool.shard, "make", full)
        with pytest.raises(UserError, match=r"no space left on the disk.*\.out\.converting-train.*goes on"):
            release.convert(shard_size_mb=1)
    assert convert_and_count(release, monkeypatch) == SHARDS - 4


def test_a_bucket_that_does_not_answer_makes_no_image_missing(tmp_path, monkeypatch):
    path = epath.Path("gs://bucket/a.png")
    with pytest.raises(FileNotFoundError), reaching(path):
        raise FileNotFoundError
    release = release_of_many_shards(tmp_path)
    make = shard.make

    def unreachable(job, *rest):
        if job.base.name == "00004":
            with reaching(path):
                raise ConnectionResetError("reset by peer")
        return make(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pool.shard, "make", unreachable)
        with pytest.raises(
            Unreachable, match=r"gs://bucket/a\.png: the bucket does not answer \(reset by peer\)"
        ):
            release.convert(shard_size_mb=1)
    assert convert_and_count(release, monkeypatch) == SHARDS - 4


def test_a_mistake_in_the_second_command_does_not_cost_what_the_first_one_finished(stopped, monkeypatch):
    with pytest.raises(UserError, match=r"no such folder or archive.*is kept in .*\.out\.converting-train"):
        convert("vision_flan", stopped.annotations, stopped.images / "typo", stopped.out, show_progress=False)
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 5


def test_an_error_of_the_disk_while_images_are_read_ends_the_conversion_and_leaves_none_out(
    stopped, monkeypatch, capsys
):
    read = ImageReader.read

    def failing(self, entry):
        if entry.name == "img7.png":
            raise OSError(errno.EIO, "Input/output error")
        return read(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "read", failing)
        with pytest.raises(NotWritten, match=r"img7\.png: cannot be read \(Input/output error\)"):
            stopped.convert(shard_size_mb=1, workers=1)
    assert convert_and_count(stopped, monkeypatch) == SHARDS - 7


def test_a_split_is_not_replaced_by_one_that_lacks_most_of_its_samples_unless_told_so(tmp_path, capsys):
    """As when a folder was not filled."""
    release = Release(tmp_path, [entry(0), *(entry(i, image=None) for i in (1, 2)), entry(3), entry(4)])
    assert release.convert()["written"] == 5
    before = files(release.out)
    for path in release.images.iterdir():
        path.rename(path.with_name("other-" + path.name))
    arguments = [f"--annotations={release.annotations}", f"--images={release.images}", f"--out={release.out}"]
    assert main(["--format=vision_flan", *arguments]) == 1
    error = capsys.readouterr().err
    assert "split 'train' is left as it was: 3 of 5 samples would be left out" in error
    assert files(release.out) == before
    assert main(["--format=vision_flan", *arguments, "--max_left_out=1"]) == 0
    assert json.loads((release.out / "manifest.json").read_text())["splits"]["train"]["written"] == 2
    assert main(["--format=vision_flan", *arguments, "--max_left_out=2"]) == 1


def test_a_link_as_out_stays_a_link_and_what_it_points_to_is_replaced(tmp_path):
    release = Release(tmp_path / "in", [entry(0)])
    (tmp_path / "big/vf").mkdir(parents=True)
    out = tmp_path / "vf"
    out.symlink_to(tmp_path / "big/vf")
    for split in ("train", "test"):
        release.convert(out=out, split=split)
    assert out.is_symlink()
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == ["vf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "in", "vf"]
    assert {"vflax-train.array_record-00000-of-00001", "vflax-test.array_record-00000-of-00001"} <= {
        path.name for path in out.iterdir()
    }


def test_a_mount_point_as_out_is_refused_at_once(tmp_path, monkeypatch):
    release = Release(tmp_path, [entry(0)])
    release.out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == release.out)
    with pytest.raises(UserError, match=r"where a disk is mounted.*name a folder below it"):
        release.convert()


def test_whether_a_shard_is_finished_is_not_guessed_when_the_bucket_does_not_answer(tmp_path, monkeypatch):
    def silent(path):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(shard, "done_path", silent)
    with pytest.raises(Unreachable):
        shard.finished(Job(tmp_path / "00000", "", 1), epath.Path("gs://bucket/00000"))


def test_an_error_with_several_workers_does_not_wait_for_the_others(tmp_path, monkeypatch):
    """Their shards do not count; a worker may be a minute in one."""
    monkeypatch.setattr(pool, "_run_in_worker", _slow)
    store = ImageStore(None, tmp_path)
    jobs = [Job(tmp_path / f"{i:05d}", "", 1) for i in range(3)]

    def cut():
        yield from jobs
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.run(cut(), 2, store.reader, "release", show_progress=False)
    assert time.monotonic() - began < 30


def _slow(job):
    time.sleep(60)


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    release = release_of_many_shards(tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool.shard, "make", interrupted)
    arguments = [f"--annotations={release.annotations}", f"--images={release.images}", f"--out={release.out}"]
    assert main(["--format=vision_flan", "--workers=1", *arguments]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / ".out.converting-train").is_dir()


def test_a_disk_that_is_full_when_a_shard_is_closed_is_no_finished_shard(tmp_path):
    """ArrayRecord tells it only then, in an error of its own."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "shard").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "shard")
    writer.write({**EXAMPLE, "images": [bytes(1000)], "sizes": [(1, 1)]})
    with pytest.raises(OSError) as error:
        writer.close()
    assert error.value.errno == errno.ENOSPC


def test_a_killed_worker_is_told_and_what_is_finished_stays(tmp_path):
    release = release_of_many_shards(tmp_path)
    program = f"""
import os, signal, sys
from data_pipeline.convert import main
if __name__ == "__main__":
    import threading, time, multiprocessing, glob
    def kill():
        while not glob.glob({str(tmp_path / ".out.converting-train/*.done")!r}):
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    threading.Thread(target=kill, daemon=True).start()
    sys.exit(main(["--format=vision_flan", "--annotations={release.annotations}", "--images={release.images}",
                   "--out={release.out}", "--workers=2", "--shard_size_mb=1"]))
"""
    file = tmp_path / "program.py"
    file.write_text(program)
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "a worker process was killed" in result.stderr.splitlines()[-1]
    assert finished(tmp_path / ".out.converting-train")


def test_the_bar_counts_what_is_to_do_and_tells_what_was_finished_before():
    with pool.Bar(show=False) as bar:
        bar.read(Job(Path("00000"), "", rows=5), finished=True)
        bar.read(Job(Path("00001"), "", rows=3), finished=False)
        [task] = bar._progress.tasks
        assert task.total is None  # not known before the release is read to its end: no time left is made up
        bar.all_read()
        bar.tick(2)
        assert (task.completed, task.total) == (1, 3)
        assert "5 samples were finished before" in task.description
        assert task.fields["rate"].endswith(" images/s")
