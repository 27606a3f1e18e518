"""gs:// for WORKDIR, data, checkpoints and exports, against a server that speaks Google Cloud Storage's protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests import gcs, small
from tests.data_pipeline.test_convert import Release, entry
from tests.test_kill import losses
from tests.weights import hub, run
from tests.weights.test_export import TRAINED
from vflax import bucket, checkpoint, goodput, lease, mirror, supervise
from vflax.data.source import open_source
from vflax.errors import UserError
from vflax.start import open_start, resolve_path
from vflax.weights import export
from vflax.weights.kinds import WORKDIR
from vflax.weights.open import join, open_checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[gcs.Bucket]:
    with gcs.serving() as served:
        yield served


@pytest.fixture
def here(server: gcs.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[gcs.Bucket]:
    """The bucket, and this process a host that can reach it."""
    gcs.use_here(server, tmp_path / "cache", monkeypatch)
    server.requests.clear()
    yield server
    server.refuse = lambda method, path: None


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A folder of the test's own."""
    return f"gs://vflax/{request.node.name.partition('[')[0]}"


def name_of(url: str) -> str:
    return url.removeprefix("gs://vflax/")


def downloads(served: gcs.Bucket) -> list[str]:
    return [path for method, path in served.requests if method == "GET" and "alt=media" in path]


def another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "other") -> None:
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path / name))
    mirror.fetch.cache_clear()


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_dataset_on_a_bucket_is_copied_whole_and_reads_like_the_original(here, url, tmp_path):
    release = Release(tmp_path / "in", [entry(i) for i in range(4)])
    release.convert()
    here.upload(release.out, name_of(url))
    copy, original = open_source(resolve_path(url), "train"), open_source(release.out, "train")
    assert [copy[i].id for i in range(len(copy))] == [original[i].id for i in range(len(original))]
    assert copy.path.is_relative_to(tmp_path / "cache" / "gs" / "vflax")


def test_only_what_has_changed_is_copied_again(here, url):
    for name in ("a", "b", "sub/c"):
        here.put(f"{name_of(url)}/{name}", name.encode())
    folder = mirror.fetch(url)
    assert len(downloads(here)) == 3
    here.put(f"{name_of(url)}/b", b"B")
    mirror.fetch.cache_clear()
    mirror.fetch(url)
    assert len(downloads(here)) == 4
    assert {p.name: p.read_bytes() for p in folder.rglob("?")} == {"a": b"a", "b": b"B", "c": b"sub/c"}


def test_a_file_that_was_damaged_on_the_disk_is_copied_again(here, url):
    here.put(f"{name_of(url)}/a", b"whole")
    folder = mirror.fetch(url)
    (folder / "a").write_bytes(b"whale")
    mirror.fetch.cache_clear()
    assert (mirror.fetch(url) / "a").read_bytes() == b"whole"


def test_what_went_from_the_bucket_goes_and_what_was_made_beside_it_stays(here, url):
    here.put(f"{name_of(url)}/a", b"a")
    here.put(f"{name_of(url)}/b", b"b")
    folder = mirror.fetch(url)
    (folder / "preflight").mkdir()
    (folder / "preflight" / "found.json").write_text("{}")
    here.delete(f"{name_of(url)}/b")
    mirror.fetch.cache_clear()
    mirror.fetch(url)
    assert not (folder / "b").exists() and (folder / "preflight" / "found.json").exists()


def test_a_copy_that_broke_off_goes_on_where_it_stood(here, url, monkeypatch):
    monkeypatch.setattr(bucket, "_BLOCK", 1000)
    data = os.urandom(4500)
    here.put(f"{name_of(url)}/a", data)
    here.refuse = lambda method, path: 403 if "alt=media" in path and len(downloads(here)) == 4 else None
    with pytest.raises(UserError, match="no permission"):
        mirror.fetch(url)
    here.requests.clear()
    assert (mirror.fetch(url) / "a").read_bytes() == data
    assert len(downloads(here)) == 2  # bytes 3000 to 4500


def test_half_a_copy_with_other_bytes_is_begun_anew(here, url, monkeypatch):
    monkeypatch.setattr(bucket, "_BLOCK", 2)
    here.put(f"{name_of(url)}/a", b"right")
    here.refuse = lambda method, path: 403 if "alt=media" in path and len(downloads(here)) == 2 else None
    with pytest.raises(UserError, match="no permission"):
        mirror.fetch(url)
    [part] = mirror.cache_root().rglob("*.part")
    part.write_bytes(b"wr")
    assert (mirror.fetch(url) / "a").read_bytes() == b"right"


def test_a_disk_without_room_is_told_before_anything_is_copied(here, url, monkeypatch):
    here.put(f"{name_of(url)}/a", b"a")
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="set VFLAX_CACHE to a folder on a larger disk"):
        mirror.fetch(url)
    assert not downloads(here)


# --- a run's folder ---------------------------------------------------------------------------------------------------


def test_what_a_run_writes_is_on_the_bucket_when_it_is_over_and_there_again_on_another_host(
    here, url, tmp_path, monkeypatch
):
    with mirror.opened(url, 0) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert here.names(name_of(url)) == {"model/config.json", "metrics.jsonl"}
    another_host(tmp_path, monkeypatch)
    with mirror.opened(url, 0) as folder:
        assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
        assert (folder / "model" / "config.json").read_text() == "{}"


def test_a_push_brings_what_has_changed_and_takes_away_what_is_gone(here, url):
    with mirror.opened(url, 0) as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
        mirror.push(folder)
        before = here.generations(name_of(url))
        (folder / "b").unlink()
        with (folder / "a").open("a") as file:
            file.write("a")
        mirror.push(folder)
        assert here.names(name_of(url)) == {"a", ".lock"}
        assert here.get(f"{name_of(url)}/a") == b"aa" and here.generations(name_of(url))["a"] != before["a"]
        before = here.generations(name_of(url))
        mirror.push(folder)
        assert here.generations(name_of(url)) == before


def test_what_a_killed_run_left_on_the_disk_and_not_on_the_bucket_is_not_taken_up(here, url):
    with mirror.opened(url, 0) as folder:
        (folder / "metrics.jsonl").write_text("pushed")
    (folder / "metrics.jsonl").write_text("newer")
    (folder / "model").mkdir()
    (folder / "model" / "lora.json").write_text("{}")
    with mirror.opened(url, 0) as folder:
        assert (folder / "metrics.jsonl").read_text() == "pushed"
        assert not (folder / "model" / "lora.json").exists()


def test_changes_go_to_the_bucket_by_themselves(here, url, monkeypatch):
    monkeypatch.setattr(mirror, "PUSH", 0.05)
    with mirror.opened(url, 0) as folder:
        (folder / "status.json").write_text("{}")
        gcs.wait_for(lambda: "status.json" in here.names(name_of(url)))


def test_a_bucket_that_is_away_for_a_while_costs_a_warning_and_no_run(here, url, monkeypatch, capfd):
    monkeypatch.setattr(mirror, "PUSH", 0.05)
    with mirror.opened(url, 0) as folder:
        here.refuse = lambda method, path: 403 if method == "POST" else None
        (folder / "status.json").write_text("{}")
        err = gcs.wait_for(lambda: capfd.readouterr().err)
        assert err.startswith("warning: ") and "trying again" in err
        here.refuse = lambda method, path: None
        gcs.wait_for(lambda: "status.json" in here.names(name_of(url)))


def test_other_processes_push_their_traces_and_bad_batches_and_nothing_else(here, url):
    with mirror.opened(url, 1) as folder:
        (folder / "profile" / "3").mkdir(parents=True)
        (folder / "profile" / "3" / "trace").write_text("")
        (folder / "bad-batch-4-host1.npz").write_text("")
        (folder / "status.json").write_text("")
    assert here.names(name_of(url)) == {"profile/3/trace", "bad-batch-4-host1.npz"}


def test_processes_of_one_host_have_mirrors_of_their_own(here, url):
    with mirror.opened(url, 0) as first, mirror.opened(url, 1) as second:
        (first / "config.json").write_text("{}")
        mirror.push(first)
        mirror.pull(second)
        assert first != second and (second / "config.json").read_text() == "{}"


# --- one run at a time ------------------------------------------------------------------------------------------------


def held_elsewhere(url: str) -> lease.Lease:
    """A lease that a process on another host has taken."""
    other = lease.Lease(url)
    other._me["host"] = "elsewhere"
    other.acquire(print)
    return other


def test_a_second_run_is_refused_while_the_first_one_lives(here, url):
    lease.Lease(url).acquire(print)
    with pytest.raises(UserError, match=rf"another process trains in it \(process {os.getpid()} on"):
        lease.Lease(url).acquire(print)


def test_a_second_run_waits_for_a_sign_of_life_from_another_host_and_is_refused(here, url):
    other = held_elsewhere(url)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        threading.Timer(0.2, other.renew).start()

    with pytest.raises(UserError, match=r"another process trains in it \(process \d+ on elsewhere"):
        lease.Lease(url).acquire(say)
    assert "waiting" in said[0]


def test_what_another_host_has_not_renewed_is_taken_over_and_the_old_run_told(here, url, monkeypatch):
    monkeypatch.setattr(lease, "LEASE", 1.0)
    other = held_elsewhere(url)
    mine = lease.Lease(url)
    mine.acquire(lambda _: None)
    other.check()
    other.renew()
    with pytest.raises(UserError, match="another run has taken it over"):
        other.check()
    other.release()
    mine.renew()
    mine.check()


def test_what_a_killed_process_of_this_host_held_is_taken_over_at_once(here, url):
    gone = subprocess.Popen(["true"])
    gone.wait()
    first = lease.Lease(url)
    first._me["pid"] = gone.pid
    first.acquire(print)
    said: list[str] = []
    lease.Lease(url).acquire(said.append)
    assert not said


def test_of_two_that_take_over_at_once_one_gets_it(here, url, monkeypatch):
    monkeypatch.setattr(lease, "LEASE", 0.0)
    held_elsewhere(url)
    found = bucket.read_version(f"{url}/.lock")
    both = [lease.Lease(url), lease.Lease(url)]
    both[0]._write(found.generation)
    with pytest.raises(FileExistsError):
        both[1]._write(found.generation)


def test_a_run_that_was_taken_over_pushes_nothing_more(here, url):
    with pytest.raises(UserError, match="another run has taken it over"), mirror.opened(url, 0) as folder:
        here.put(f"{name_of(url)}/.lock", b'{"token": "of another"}')
        mirror._OPEN[folder]._lease.renew()
        (folder / "status.json").write_text("{}")
    assert "status.json" not in here.names(name_of(url))


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(here: gcs.Bucket, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run on the bucket with checkpoints at 3 and 7, and `tmp_path/"local"` with the same; this is another host."""
    tensors = hub.tensors_of(hub.CONFIG)
    hub.write_clip(tmp_path / "clip", hub.CONFIG, tensors, "vision_model.")
    hub.write_decoder(tmp_path / "llama", hub.CONFIG, tensors)
    source = join(hub.CONFIG, tmp_path / "clip", tmp_path / "llama", None, 0)
    run.write(tmp_path / "local", source, hub.CONFIG, TRAINED, "vicuna_v1", (3, 7))
    with mirror.opened(f"{url}/run", 0) as folder:
        run.write(folder, source, hub.CONFIG, TRAINED, "vicuna_v1", (3, 7))
    another_host(tmp_path, monkeypatch)
    return f"{url}/run"


def test_a_run_on_a_bucket_is_exported_to_a_bucket_with_the_tensors_of_a_local_one(
    here, model, url, tmp_path, capsys
):
    assert export.main([f"--model={model}", f"--out={url}/out"]) == 0
    assert f"{url}/out: " in capsys.readouterr().out
    got = here.download(f"{name_of(url)}/out", tmp_path / "got")
    found, expected = open_checkpoint(got).source, open_checkpoint(tmp_path / "local").source
    assert set(found.names()) == set(expected.names())
    for name in expected.names():
        tensor = expected.read(name)  # an export has rows for <image> and <pad> beside the vocabulary's
        np.testing.assert_array_equal(found.read(name)[: len(tensor)], tensor, name)
    assert json.loads((got / "export.json").read_text())["source"] == model
    assert not any((mirror.cache_root() / "out").iterdir())


def write_export(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in (*names, "export.json"):
        (folder / name).write_text("new")


def test_the_file_that_says_that_an_export_is_whole_comes_last_and_nothing_of_an_older_one_stays(here, url):
    for name in ("export.json", "model-00001-of-00002", "model-00002-of-00002"):
        here.put(f"{name_of(url)}/{name}", b"old")
    here.requests.clear()
    with mirror.writing(url, "export.json", replace=True) as folder:
        write_export(folder, "model-00001-of-00001")
    assert here.names(name_of(url)) == {"export.json", "model-00001-of-00001"}
    changes = [(method, "export.json" in path) for method, path in here.requests if method != "GET"]
    assert changes[0] == ("DELETE", True)
    generations = here.generations(name_of(url))
    assert max(generations, key=generations.get) == "export.json"


@pytest.mark.parametrize("replace", [False, True])
def test_other_things_on_a_bucket_are_refused_and_left_alone(here, url, replace):
    here.put(f"{name_of(url)}/thesis.txt", b"years of work")
    with (
        pytest.raises(UserError, match="is there already"),
        mirror.writing(url, "export.json", replace) as folder,
    ):
        write_export(folder)
    assert here.names(name_of(url)) == {"thesis.txt"}


def test_an_export_that_fails_leaves_the_bucket_as_it_was(here, url):
    with pytest.raises(UserError, match="of no use"), mirror.writing(url, "export.json", False) as folder:
        write_export(folder)
        raise UserError("of no use")
    assert not here.names(name_of(url)) and not any((mirror.cache_root() / "out").iterdir())


def test_a_run_starts_from_one_on_a_bucket(model):
    config = small.config(init__checkpoint=model)
    config.model.vision, config.model.decoder, config.tokenizer = {}, {}, ""
    start = open_start(config)
    assert (start.origin.kind, start.origin.checkpoint, start.origin.step) == (WORKDIR, model, 7)


def test_a_checkpoint_that_a_kill_has_cut_short_is_not_taken_for_one(here, model):
    assert checkpoint.find_step(mirror.fetch(model), "latest") == 7
    assert supervise.saved_step(supervise.find_workdir([f"--workdir={model}"])) == 7
    here.delete(f"{name_of(model)}/checkpoints/7/commit_success.txt")
    assert checkpoint.find_step(mirror.fetch(model), "latest") == 3
    assert supervise.saved_step(supervise.find_workdir([f"--workdir={model}"])) == 3


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_without_gcsfs_the_extra_is_named(monkeypatch, url):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    bucket.limit.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'vflax\[gcs\]'"):
        mirror.fetch(url)


@pytest.mark.parametrize("wrong", ["gs://", "gs://vflax", "gs://vflax/", "gs:///a", "gs://vflax//a"])
def test_a_path_that_names_no_folder_is_refused(here, wrong):
    with pytest.raises(UserError, match="expected gs://BUCKET/FOLDER"), mirror.opened(wrong, 0):
        pass


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(403, "roles/storage.objectUser"), (401, "gcloud auth application-default login")],
)
def test_a_bucket_that_lets_nobody_in_is_told_with_what_to_do(here, url, status, remedy):
    here.refuse = lambda method, path: status
    with pytest.raises(UserError) as error, mirror.opened(url, 0):
        pass
    assert url in str(error.value) and remedy in str(error.value)


def test_a_folder_that_is_not_there_is_told_by_its_name(here, url):
    with pytest.raises(UserError, match=f"{url}: not there"):
        mirror.fetch(url)


def test_a_bucket_that_never_answers_is_given_up_after_its_time_limit(url, tmp_path, monkeypatch):
    gcs.give_up_soon(monkeypatch)
    with gcs.silent() as silent:
        gcs.use_here(silent, tmp_path / "cache", monkeypatch)
        with (
            pytest.raises(bucket.Unreachable, match=f"{url}.* the bucket does not answer"),
            mirror.opened(url, 0),
        ):
            pass


def test_tensorstore_gives_a_bucket_that_never_answers_up_too():
    """In a process of its own: TensorStore reads its limits once, when it is loaded."""
    program = """
import vflax
import tensorstore
retries = {"gcs_request_retries": {"max_retries": 1}}
store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "vflax"}, context=tensorstore.Context(retries)).result()
store.read("a").result()
"""
    with gcs.silent() as silent:
        env = small.environment() | silent.environment
        env["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "2"  # less than vflax sets; the rest is vflax's
        env.pop("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", None)
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "Operation too slow" in result.stderr


def test_whatever_loads_vflax_gives_tensorstore_its_time_limit():
    assert os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == "30"
    assert os.environ["TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS"] == "30"


def test_goodput_of_a_run_on_a_bucket_is_told(here, url, capsys):
    lines = [
        {"event": "start", "time": 0.0, "step": 0},
        {"event": "end", "time": 2.0, "step": 1, "state": "done"},
    ]
    lines[1]["seconds"] = {"step": 2.0}
    here.put(f"{name_of(url)}/goodput.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    assert goodput.main([url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"]["step"] == 2.0


def test_the_launcher_tells_a_bucket_that_is_not_there_in_one_line(server, tmp_path):
    command = small.command(tmp_path, "gs://nowhere/runs/a")
    env = gcs.environment(server, tmp_path / "cache")
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "error: gs://nowhere/runs/a/.lock: there is no bucket gs://nowhere"
    )


# --- the whole of it --------------------------------------------------------------------------------------------------

FLAGS = ("--config.steps=8", "--config.checkpoint.every=3")


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on_on_another_host_has_the_losses_of_a_local_one(server, tmp_path):
    local = small.launch(tmp_path, tmp_path / "local", *FLAGS)
    assert local.returncode == 0, local.stderr[-3000:]
    command = small.command(tmp_path, "gs://vflax/runs/killed", *FLAGS, "--config.export=True")
    env = gcs.environment(server, gcs.host(tmp_path / "first"))
    begun = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved = "checkpoints/3/commit_success.txt"
    gcs.wait_for(lambda: saved in server.names("runs/killed") or begun.poll() is not None, 120)
    assert begun.poll() is None
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert "summary.json" not in server.names("runs/killed")

    env = gcs.environment(server, gcs.host(tmp_path / "second"))
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continuing from step " in again.stdout
    got = server.download("runs/killed", tmp_path / "got")
    assert losses(got) == losses(tmp_path / "local")
    assert json.loads((got / "status.json").read_text()) == {"state": "done", "step": 8, "reason": ""}
    assert json.loads((got / "summary.json").read_text())["export"] == "gs://vflax/runs/killed/export"
    assert (got / "export" / "export.json").is_file()
    assert {p.name for p in (got / "checkpoints").iterdir()} >= {"8"}
    assert ".lock" not in server.names("runs/killed")


@pytest.mark.slow
def test_hosts_without_a_common_disk_train_and_go_on_in_one_run_on_a_bucket(server, tmp_path):
    """Two processes, each with a $VFLAX_CACHE of its own: nothing but the bucket is common to them."""
    flags = (
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.steps=6",
        "--config.checkpoint.every=2",
    )

    def pair(*more: str) -> list[str]:
        places = [f"--coordinator=localhost:{small.free_port()}", "--num_processes=2"]
        command = small.command(tmp_path, "gs://vflax/runs/pair", *flags, *more, *places)
        both = [
            subprocess.Popen(
                [*command, f"--process_id={i}"],
                env=gcs.environment(server, gcs.host(tmp_path / f"host{i}")),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for i in range(2)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=600)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        return outputs

    pair()
    assert not (tmp_path / "host0" / "runs" / "1").exists() and (tmp_path / "host1" / "runs" / "1").exists()
    again = pair("--config.steps=8")
    assert "continuing from step 6 in gs://vflax/runs/pair" in again[0]
    got = server.download("runs/pair", tmp_path / "got")
    assert [step for step, _ in losses(got)] == list(range(1, 9))
