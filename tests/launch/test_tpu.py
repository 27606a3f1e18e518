"""launch/tpu.sh against a fake gcloud that checks every argument and really runs what is sent to the workers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

BOOK = ("--accelerator=v4-16", "--poll=0")


def run_flags(desk, name: str = "a") -> tuple[str, ...]:
    return ("--", "--config=configs/stage1.py:7b", f"--workdir={desk.mount}/runs/{name}")


# --- a good day ---


def test_a_slice_is_booked_installed_used_and_deleted(desk):
    desk.scenario(bookings=[["WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"]])
    booked = desk.good("create", "demo", *BOOK)
    for state in (
        "WAITING_FOR_RESOURCES (in the queue",
        "PROVISIONING (the machines",
        "ACTIVE (the machines",
    ):
        assert booked.count(state) == 1, booked  # a line when it changes, not one for each look

    out = desk.good("install", "demo", "--bucket=gs://bk", f"--mount={desk.mount}")
    assert "8 chips on 2 workers, as booked" in out
    assert "[worker 1] chips 4 of 8, TPU v4, Python 3.12.7" in out

    out = desk.good("run", "demo", "--max-restarts=3", *run_flags(desk))
    assert "[worker 0] started" in out and "[worker 1] started" in out
    desk.wait(1, "step 1")
    assert "[worker 0] running" in desk.good("status", "demo")

    log = desk.good("logs", "demo", "--worker=all")
    assert "[worker 0] step 1" in log and "[worker 1] step 1" in log

    assert "[worker 1] stopped, status 75" in desk.good("stop", "demo")
    status = desk.good("status", "demo")
    assert "[worker 1] ended 75" in status and '"state": "preempted"' in status

    out = desk.folder / "results"
    desk.good("fetch", "demo", f"--workdir={desk.mount}/runs/a", f"--out={out}", "--parts=status.json")
    assert json.loads((out / "status.json").read_text())["step"] == 3

    assert "costs nothing any more" in desk.good("delete", "demo", "--yes")
    assert "ABSENT" in desk.good("status", "demo")


def test_the_supervisor_starts_the_launcher_on_all_workers_with_the_flags_as_given(desk):
    desk.installed()
    desk.good("run", "demo", "--max-restarts=3", *run_flags(desk), "--config.note=a b's $HOME")
    first = desk.wait(0, "step 1").splitlines()
    assert "vflax.supervise --max_restarts=3 -- " in first[0]
    assert "-m vflax.launch --distributed --config=configs/stage1.py:7b" in first[0]
    assert first[0].endswith("--config.note=a b's $HOME")


def test_variables_reach_the_run_and_are_not_shown(desk):
    desk.installed()
    words = ("--env=VFLAX_CACHE=/mnt/a b's $HOME", "--env=HF_TOKEN=hf_secret")
    desk.good("run", "demo", *words, *run_flags(desk))
    log = desk.wait(1, "step 1")
    assert "VFLAX_CACHE /mnt/a b's $HOME, HF_TOKEN of 9 characters" in log and "hf_secret" not in log
    plan = desk.good("run", "demo", *words, "--dry-run", *run_flags(desk))
    assert "--env=HF_TOKEN=VALUE" in plan and "hf_secret" not in plan


def test_variables_of_another_multislice_job_do_not_reach_the_run(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    assert "slices none" in desk.wait(0, "step 1")  # the fake's machines have MEGASCALE_NUM_SLICES=3


def test_the_run_outlives_the_connection_in_a_session_of_its_own(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(0, "step 1")
    pid = (desk.home(0) / "vflax/run/pid").read_text().strip()
    session = subprocess.run(["ps", "-o", "sid=", "-p", pid], capture_output=True, text=True).stdout.strip()
    assert session and int(session) != os.getsid(0)


def test_install_brings_python_jax_and_what_reads_bin_files_to_every_worker(desk):
    desk.install()
    for worker in (0, 1):
        home = desk.home(worker)
        assert (home / "vflax/venv/version").read_text() == "3.12\n"
        assert (home / "vflax/src/launch/worker.sh").is_file()
        programs = (home / "programs").read_text()
        assert f"--torch-backend=cpu -e {home}/vflax/src[tpu,torch]" in programs
        assert "--rename-dir-limit=" in programs


def test_install_brings_what_is_committed_and_says_what_stays_behind(desk):
    (desk.root / "note.txt").write_text("not committed")
    desk.booked()
    ended = desk("install", "demo")
    (desk.root / "note.txt").unlink()
    assert ended.status == 0 and "1 changed files are not committed" in ended.error
    assert not (desk.home(0) / "vflax/src/note.txt").exists()


def test_data_of_a_bucket_is_copied_to_the_disk_of_every_worker(desk):
    shards = desk.world / "buckets/bk/data"
    shards.mkdir()
    (shards / "x.array_record").write_text("x")
    desk.booked()
    target = desk.folder / "disk"
    out = desk.good("install", "demo", "--data=gs://bk/data", f"--data-dir={target}")
    assert (target / "x.array_record").is_file()
    assert "[worker 0] copied gs://bk/data" in out and "[worker 1] copied gs://bk/data" in out


def test_an_nfs_share_is_mounted_in_the_buckets_place(desk):
    desk.booked()
    out = desk.good("install", "demo", "--nfs=10.0.0.2:/share", f"--mount={desk.mount}")
    assert f"[worker 1] mounted 10.0.0.2:/share at {desk.mount}" in out
    desk.good("run", "demo", *run_flags(desk))


def test_another_bucket_takes_the_place_of_the_one_that_is_mounted(desk):
    desk.installed()
    (desk.world / "buckets/bk2").mkdir()
    out = desk.good("install", "demo", "--bucket=gs://bk2", f"--mount={desk.mount}")
    assert f"[worker 1] unmounted bk from {desk.mount}" in out
    assert f"[worker 1] mounted bk2 at {desk.mount}" in out


def test_a_mount_that_is_in_use_and_another_one_are_both_named(desk):
    desk.installed()
    desk.scenario(bookings=[["ACTIVE"]], mount_in_use="yes")
    (desk.world / "buckets/bk2").mkdir()
    ended = desk("install", "demo", "--bucket=gs://bk2", f"--mount={desk.mount}")
    assert ended.status == 1 and f"bk is mounted at {desk.mount}, not bk2, and in use" in ended.out
    assert "[worker 0] absent" in desk.good("status", "demo")


def test_a_bucket_may_be_named_with_a_slash_at_its_end(desk):
    desk.booked()
    assert "mounted bk at" in desk.good("install", "demo", "--bucket=gs://bk/", f"--mount={desk.mount}")


def test_a_restarted_worker_mounts_again_before_it_starts(desk):
    desk.installed()
    (desk.home(1) / "mounted").unlink()
    assert "[worker 1] mounted bk" in desk.good("run", "demo", *run_flags(desk))


def test_a_run_that_a_reboot_ended_is_called_gone(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(1, "step 1")
    desk.close()  # nobody is left to write down how it ended
    (desk.home(1) / "vflax/run/status").unlink(missing_ok=True)
    (desk.home(1) / "vflax/run/boot").write_text("another boot")
    assert "[worker 1] gone" in desk.good("status", "demo")


def test_restart_stops_the_run_that_is_going_and_starts_another(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(0, "step 1")
    out = desk.good("run", "demo", "--restart", *run_flags(desk, "b"))
    assert "[worker 0] stopped, status 75" in out and "[worker 0] started" in out
    assert (desk.world / "buckets/bk/runs/b").is_dir()


def test_a_run_that_does_not_stop_is_killed_only_when_asked(desk):
    desk.scenario(bookings=[["ACTIVE"]], run="deaf")
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(1, "step 1")
    assert "still saving after 1 s" in desk("stop", "demo", "--grace=1").out
    assert "[worker 0] running" in desk.good("status", "demo")
    pids = [int((desk.home(worker) / "vflax/run/pid").read_text()) for worker in (0, 1)]
    assert "[worker 0] killed" in desk.good("stop", "demo", "--grace=1", "--kill")
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()  # gone, or not yet collected
    assert "[worker 0] ended 137" in desk.good("status", "demo")


def test_results_come_from_a_bucket_when_the_slice_is_gone(desk):
    workdir = desk.world / "buckets/bk/runs/a"
    (workdir / "export").mkdir(parents=True)
    (workdir / "export/config.json").write_text("{}")
    (workdir / "summary.html").write_text("<p>")
    out = desk.folder / "results"
    ended = desk("fetch", "--workdir=gs://bk/runs/a", f"--out={out}")
    assert ended.status == 0, ended.error
    assert (out / "export/config.json").is_file() and (out / "summary.html").is_file()
    assert "has no metrics.jsonl yet" in ended.error


def test_zone_and_project_on_the_command_line_win(desk):
    desk.good("create", "demo", *BOOK, "--zone=europe-west4-b", "--project", "p2")
    for call in desk.calls():
        if "create" in call:
            assert "--zone=europe-west4-b" in call and "--project=p2" in call


@pytest.mark.parametrize(
    ("accelerator", "flags"),
    [
        ("v5e-16", ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ("v4:4x4x2", ["--type=v4", "--topology=4x4x2", "--runtime-version=tpu-ubuntu2204-base"]),
        ("v5p-16", ["--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"]),
        ("v6e-8", ["--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]),
    ],
)
def test_a_name_of_the_planner_is_booked_as_gcloud_calls_it(desk, accelerator, flags):
    desk.good("create", "demo", f"--accelerator={accelerator}", "--no-wait", "--spot", "--valid-until=6h")
    (call,) = [call for call in desk.calls() if "create" in call]
    assert set([*flags, "--node-id=demo", "--spot", "--valid-until-duration=6h"]) <= set(call)


def test_create_again_waits_for_the_request_that_is_there(desk):
    desk.scenario(bookings=[["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE"]])
    desk.good("create", "demo", *BOOK, "--no-wait")
    assert "is there already" in desk.good("create", "demo", *BOOK)
    assert len([call for call in desk.calls() if "create" in call]) == 1


@pytest.mark.parametrize("command", ["create", "train"])
@pytest.mark.parametrize(
    ("there", "there_as", "asked"),
    [
        ("v4-16", "v4-16", "v4-32"),
        ("v5e-8", "v5litepod-8", "v5e-16"),
        ("v4:2x2x8", "2x2x8", "v4:4x4x2"),
        ("v4:2x2x8", "2x2x8", "v4-64"),
    ],
)
def test_another_slice_of_this_name_is_not_taken_for_the_one_asked_for(desk, command, there, there_as, asked):
    desk.scenario(bookings=[["WAITING_FOR_RESOURCES"]])
    desk.good("create", "demo", f"--accelerator={there}", "--no-wait")
    words = train(desk) if command == "train" else ("create", "demo", *BOOK)
    error = desk.bad(*[f"--accelerator={asked}" if word == BOOK[0] else word for word in words])
    assert f"demo is there, as {there_as} and not as --accelerator={asked}" in error
    assert not any("delete" in call for call in desk.calls())


# --- one command, and preemption ---


def train(desk, *words: str) -> tuple[str, ...]:
    return (
        "train",
        "demo",
        *BOOK,
        "--spot",
        "--bucket=gs://bk",
        f"--mount={desk.mount}",
        *words,
        *run_flags(desk),
    )


def test_train_books_installs_runs_and_deletes(desk):
    desk.scenario(bookings=[["PROVISIONING", "ACTIVE"]], run="finish")
    out = desk.good(*train(desk, "--delete"))
    assert f"done, results in {desk.mount}/runs/a" in out and "costs nothing any more" in out
    assert (desk.world / "buckets/bk/runs/a/export/config.json").is_file()
    assert json.loads((desk.world / "resources.json").read_text()) == {}


def test_train_books_again_what_was_taken_back_and_continues_in_the_same_workdir(desk):
    desk.scenario(
        bookings=[["ACTIVE"], ["WAITING_FOR_RESOURCES", "ACTIVE"]],
        preempt_after={"0": 3}, run="finish second time",
    )  # fmt: skip
    out = desk.good(*train(desk))
    assert "SUSPENDED (Google took the machines back" in out and "booking it again, time 1" in out
    assert (desk.world / "buckets/bk/runs/a/started.0").read_text().count("0") == 2
    assert out.count("installing") == 2
    assert "still costs money: launch/tpu.sh delete demo" in out


def test_train_books_again_when_only_the_machine_says_that_it_was_preempted(desk):
    desk.scenario(bookings=[["ACTIVE"], ["ACTIVE"]], nodes={"0": "PREEMPTED"}, run="finish")
    desk.installed()
    assert "booking it again, time 1" in desk.good(*train(desk))


def test_train_gives_up_after_so_many_preemptions(desk):
    desk.scenario(bookings=[["ACTIVE"]], nodes={str(i): "PREEMPTED" for i in range(9)})
    assert "taken back more than 2 times" in desk.bad(*train(desk, "--max-recreations=2"))


def ran(desk, end: str, *workdir: str) -> None:
    """A slice on which a run has come to that end, on both workers."""
    desk.scenario(bookings=[["ACTIVE"]], run=end)
    desk.installed()
    desk.good("run", "demo", *run_flags(desk, *workdir))
    for worker in (0, 1):
        desk.ended(worker)


def test_train_again_finds_a_run_that_is_done(desk):
    ran(desk, "finish")
    again = desk.good(*train(desk))
    assert "this run had ended before" in again and "installing" not in again


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_how_a_run_in_another_workdir_ended_does_not_keep_train_from_its_own(desk, end):
    ran(desk, end, "before")
    desk.scenario(bookings=[["ACTIVE"]], run="finish")
    out = desk.good(*train(desk, "--delete"))
    assert "this run had ended before" not in out
    assert (desk.world / "buckets/bk/runs/a/export/config.json").is_file()


def test_train_does_not_wait_for_a_run_in_another_workdir_but_names_it(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk, "before"))
    desk.wait(1, "step 1")
    assert f"in use by another run, in {desk.mount}/runs/before" in desk.bad(*train(desk, "--delete"))
    assert "[worker 0] running" in desk.good("status", "demo")


def older(desk) -> None:
    """What is installed is that of another commit."""
    for worker in (0, 1):
        path = desk.home(worker) / "vflax/installed"
        path.write_text(f"--commit=0123456789ab {path.read_text().partition(' ')[2]}")


@pytest.mark.parametrize("flag", ["", "--bucket=gs://bk2", "--python=3.13"])
def test_train_installs_again_what_differs_from_what_is_asked_for(desk, flag):
    desk.scenario(bookings=[["ACTIVE"]], run="finish")
    desk.installed()
    (desk.world / "buckets/bk2").mkdir()
    if not flag:
        older(desk)
    out = desk.good(*train(desk, *[flag][: bool(flag)]))
    assert (
        f"installed without {flag or '--commit='}" in out
        and out.count("installing") == 1
        and "done, results" in out
    )


def test_a_run_that_failed_starts_again_with_the_commit_that_mends_it(desk):
    ran(desk, "fail")
    older(desk)
    desk.scenario(bookings=[["ACTIVE"]], run="finish")
    assert "done, results" in desk.good(*train(desk))


def test_a_run_that_is_done_is_not_run_again_for_a_newer_commit(desk):
    ran(desk, "finish")
    older(desk)
    out = desk.good(*train(desk))
    assert "this run had ended before" in out and "installing" not in out


def test_the_same_workdir_in_another_bucket_is_another_run(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(1, "step 1")
    error = desk.bad(*train(desk, "--bucket=gs://bk2"))
    assert "installed without --bucket=gs://bk2, and a run is going on it" in error


def test_a_run_that_is_going_goes_on_with_the_commit_it_has(desk):
    desk.scenario(bookings=[["ACTIVE"]], preempt_after={"0": 3})
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(1, "step 1")
    older(desk)
    out = desk(*train(desk, "--max-recreations=0")).out
    assert out.count("note: the run that is going was installed without --commit=") == 1
    assert "installing" not in out


def test_train_starts_again_what_was_saved_and_is_to_be_run_again(desk):
    desk.scenario(bookings=[["ACTIVE"]], run="finish second time")
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(1, "step 1")
    desk.good("stop", "demo")
    assert "done, results" in desk.good(*train(desk))


def test_train_ends_with_the_runs_own_words_when_that_fails(desk):
    desk.scenario(bookings=[["ACTIVE"]], run="fail")
    desk.installed()
    ended = desk(*train(desk))
    assert ended.status == 1 and "failed with status 1" in ended.error
    assert "[worker 0] error: no such file" in ended.out
    assert "the slice still costs money" in ended.error


def test_train_does_not_book_again_what_a_person_deleted(desk):
    desk.scenario(bookings=[["ACTIVE"]], preempt_after={"0": 3}, initiator="USER")
    desk.installed()
    assert "deleted by you or your project" in desk.bad(*train(desk))
    assert not any("create" in call for call in desk.calls())


def test_a_request_that_fails_is_an_error_and_not_booked_for_ever(desk):
    desk.scenario(bookings=[["WAITING_FOR_RESOURCES", "FAILED"]], error="Quota limit reached")
    error = desk.bad(*train(desk))
    assert "Quota limit reached" in error and "ask for quota" in error
    assert len([call for call in desk.calls() if "create" in call]) == 1


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Quota 'TPUS' exceeded", "ask for quota"),
        ("Permission denied on resource", "TPU Admin"),
        ("no capacity", "accelerator-types list"),
    ],
)
def test_a_request_that_failed_is_explained(desk, message, remedy):
    desk.scenario(bookings=[["FAILED"]], error=message)
    error = desk.bad("create", "demo", *BOOK)
    assert (
        f"demo is FAILED: not booked: {message}" in error
        and remedy in error
        and "tpu.sh delete demo" in error
    )


def test_a_suspended_slice_is_explained_where_the_machines_are_needed(desk):
    desk.scenario(bookings=[["ACTIVE", "ACTIVE", "SUSPENDED"]])
    desk.good("create", "demo", *BOOK)
    desk("status", "demo")
    for words in (("install", "demo"), ("logs", "demo"), ("create", "demo", *BOOK)):
        error = desk.bad(*words)
        assert "Google took the machines back" in error and "tpu.sh train books it again" in error


def test_a_worker_with_too_few_chips_is_named(desk):
    desk.scenario(bookings=[["ACTIVE"]], chips=(4, 3), all_chips=7)
    desk.booked()
    error = desk.bad("install", "demo")
    assert "worker 1 has 3 chips, not 4" in error and "worker 0" not in error
    assert "v4-16, 8 chips on 2 workers" in error


def test_a_worker_that_never_answers_is_named(desk):
    desk.scenario(bookings=[["ACTIVE"]], chips=(4, ""))
    desk.booked()
    error = desk.bad("install", "demo")
    assert "worker 1 did not answer" in error


def test_workers_that_do_not_see_each_other_are_named(desk):
    desk.scenario(bookings=[["ACTIVE"]], all_chips=4)
    desk.booked()
    error = desk.bad("install", "demo")
    assert "worker 0 sees 4 chips in all, not 8" in error and "worker 1 sees 4" in error


def test_a_folder_that_the_workers_do_not_share_is_refused(desk):
    desk.installed()
    # The fake's workers are one machine; this path is another folder for each of them all the same, under its home.
    own = "/proc/self/cwd/own"
    for worker in (0, 1):
        (desk.home(worker) / "own").mkdir()
    error = desk.bad("run", "demo", "--", "--config=c.py", f"--workdir={own}")
    assert "is not one folder for all workers" in error and "--bucket=gs://B" in error
    assert not (desk.home(0) / "vflax/run/pid").exists()


def test_a_bucket_as_workdir_needs_no_mount_and_status_tells_what_its_mirror_says(desk):
    desk.booked()
    desk.good("install", "demo")
    flags = ("--", "--config=configs/stage1.py:7b", "--workdir=gs://bk/runs/b")
    desk.good("run", "demo", f"--env=VFLAX_CACHE={desk.folder}/disk", *flags)
    desk.wait(0, "step 1")
    mirror = desk.folder / "disk/runs/0/bk/runs/b"
    mirror.mkdir(parents=True)
    (mirror / "status.json").write_text('{"state": "running"}')
    assert 'gs://bk/runs/b: {"state": "running"}' in desk.good("status", "demo")


def test_two_runs_do_not_go_on_one_slice(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(0, "step 1")
    ended = desk("run", "demo", *run_flags(desk, "b"))
    assert ended.status == 1 and "a run is going" in ended.out


def test_install_does_not_pull_the_checkout_from_under_a_run(desk):
    desk.installed()
    desk.good("run", "demo", *run_flags(desk))
    desk.wait(0, "step 1")
    ended = desk("install", "demo")
    assert ended.status == 1 and "a run is going" in ended.out
    assert (desk.home(0) / "vflax/src/launch/worker.sh").is_file()


def test_an_installation_that_fails_on_a_worker_is_an_error(desk):
    desk.scenario(bookings=[["ACTIVE"]], no_network="yes")
    desk.booked()
    ended = desk("install", "demo")
    assert ended.status == 1 and "the installation failed" in ended.error
    assert "[worker 1] python3: no network" in ended.out
    assert "[worker 0] absent" in desk.good("status", "demo")


def test_run_before_install_is_refused(desk):
    desk.booked()
    ended = desk("run", "demo", *run_flags(desk))
    assert ended.status == 1 and "worker 0 cannot make --workdir" in ended.error


def test_what_gcloud_says_is_passed_on(desk):
    (desk.world / "gcloud_broken.json").write_text('"Reauthentication required."')
    for words in (
        ("create", "demo", *BOOK), ("status", "demo"), ("delete", "demo", "--yes"), ("logs", "demo"), train(desk),
    ):  # fmt: skip
        assert "Reauthentication required." in desk.bad(*words)


def test_a_part_that_was_asked_for_must_be_there(desk):
    desk.installed()
    workdir = desk.world / "buckets/bk/runs/a"
    workdir.mkdir(parents=True)
    words = (f"--workdir={desk.mount}/runs/a", f"--out={desk.folder}/o")
    assert "has no export" in desk.bad("fetch", "demo", *words, "--parts=export")
    assert "has none of" in desk.bad("fetch", "demo", *words)
    assert "is not there" in desk.bad(
        "fetch", "demo", f"--workdir={desk.mount}/none", f"--out={desk.folder}/o"
    )
    assert "has no export" in desk.bad(
        "fetch", "--workdir=gs://bk/x", f"--out={desk.folder}/o", "--parts=export"
    )


def test_delete_asks_first(desk):
    desk.booked()
    assert "not deleted" in desk.bad("delete", "demo", input="n\n")
    assert "not deleted" in desk.bad("delete", "demo")
    desk.good("delete", "demo", input="y\n")


BAD = {
    "no command there": ("nothing",),
    "give the NAME": ("create", "--accelerator=v4-16"),
    "one NAME": ("create", "demo", "v4-16", "--accelerator=v4-16"),
    "small letters": ("create", "Demo_1", "--accelerator=v4-16"),
    "give --accelerator": ("create", "demo"),
    "v9-8: v9 is none of": ("create", "demo", "--accelerator=v9-8"),
    "v5e is booked in": ("create", "demo", "--accelerator=v5e-12"),
    "booked with launch/gke.sh": ("create", "demo", "--accelerator=2xv5e-16"),
    "for v4 only": ("create", "demo", "--accelerator=v5p:4x4x2"),
    "not both": ("create", "demo", "--accelerator=v4-16", "--spot", "--reserved"),
    "expected a time": ("create", "demo", "--accelerator=v4-16", "--valid-until=soon"),
    "no option --spott": ("create", "demo", "--accelerator=v4-16", "--spott"),
    "--spot takes no value": ("create", "demo", "--accelerator=v4-16", "--spot=yes"),
    "--accelerator needs a value": ("create", "demo", "--accelerator"),
    "expected a whole number": ("create", "demo", "--accelerator=v4-16", "--poll=soon"),
    "there is no demo": ("install", "demo"),
    "--bucket or --nfs": ("install", "demo", "--bucket=gs://b1", "--nfs=h:/s"),
    "expected gs://NAME, small letters": ("install", "demo", "--bucket=gs://b1/folder"),
    "expected HOST:/SHARE": ("install", "demo", "--nfs=share"),
    "expected gs://BUCKET/FOLDER": ("install", "demo", "--data=/data"),
    "absolute paths": ("install", "demo", "--mount=mnt"),
    "3.11 or newer": ("install", "demo", "--python=3.10"),
    "after a lone --": ("run", "demo"),
    "--config is missing": ("run", "demo", "--", "--workdir=/w"),
    "--workdir is missing": ("run", "demo", "--", "--config=c.py"),
    "give gs://BUCKET/FOLDER, or a folder": ("run", "demo", "--", "--config=c.py", "--workdir=gs://b"),
    "--env=TOKEN: expected NAME=VALUE": ("run", "demo", "--env=TOKEN", "--", "--config=c.py", "--workdir=/w"),
    "an absolute path": ("run", "demo", "--", "--config=c.py", "--workdir=runs/a"),
    "joins the workers itself": ("run", "demo", "--", "--config=c.py", "--workdir=/w", "--distributed"),
    "a number or all": ("logs", "demo", "--worker=first"),
    "give --workdir": ("fetch", "demo", "--out=o"),
    "give --out": ("fetch", "demo", "--workdir=/w"),
    "lost with it": ("train", "demo", "--accelerator=v4-16", "--", "--config=c.py", "--workdir=/w"),
    "must lie under /mnt/vflax": (
        "train", "demo", "--accelerator=v4-16", "--bucket=gs://bk", "--", "--config=c.py", "--workdir=/w",
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_what_to_do(desk, message):
    error = desk.bad(*BAD[message])
    assert message.replace("no command there", "there is no nothing") in error
    assert not any("create" in call or "ssh" in call for call in desk.calls())


def test_a_worker_that_is_not_there_is_refused(desk):
    desk.installed()
    assert "has workers 0 to 1" in desk.bad("logs", "demo", "--worker=2")


def test_a_missing_zone_or_project_is_told(desk):
    desk.config({"project": "p1"})
    assert "no zone: give --zone=" in desk.bad("status", "demo")
    desk.config({"zone": "us-west4-a"})
    assert "no project: give --project=" in desk.bad("status", "demo")


def test_a_missing_gcloud_is_told(desk, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "python3", "git", "sed", "date"):
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    ended = desk("status", "demo", path=str(tools))
    assert ended.status == 1 and "error: gcloud is not on PATH: install the Google Cloud CLI" in ended.error


# --- --dry-run and --help ---


def every_command(desk) -> list[tuple[str, ...]]:
    return [
        ("create", "demo", *BOOK),
        ("install", "demo", "--bucket=gs://bk", "--data=gs://bk/data"),
        ("run", "demo", "--restart", *run_flags(desk)),
        train(desk, "--delete"),
        ("status", "demo"),
        ("logs", "demo", "--worker=all", "--follow"),
        ("fetch", "demo", "--workdir=/w", "--out=o"),
        ("fetch", "--workdir=gs://bk/w", "--out=o"),
        ("stop", "demo", "--kill"),
        ("delete", "demo"),
    ]


def test_dry_run_prints_commands_and_calls_nothing(desk):
    for words in every_command(desk):
        at = words.index("--") if "--" in words else len(words)
        out = desk.good(*words[:at], "--dry-run", *words[at:])
        assert "gcloud " in out, words
        assert "worker.sh" in out or words[0] in ("create", "delete", "fetch", "install"), words
        if "--command=" in out:
            assert "\n    # each worker runs:\n    " in out or "\n    # worker 0 runs:\n    " in out, words
    assert desk.calls() == []
    assert not (desk.folder / "o").exists() and not (desk.folder / "vflax.tar.gz").exists()


def test_what_a_dry_run_prints_is_what_a_run_calls(desk):
    """Pasted into a shell, the printed lines have the same effect as the command that printed them."""
    where = ("--zone=us-west4-a", "--project=p1")
    plan = desk.good("create", "demo", "--accelerator=v4-16", "--no-wait", "--spot", "--dry-run", *where)
    desk.good("create", "demo", "--accelerator=v4-16", "--no-wait", "--spot", *where)
    called = [call for call in desk.calls() if call[1] != "config"]
    printed = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s\\0' gcloud \"$@\"; echo; }}\n{plan}"], capture_output=True, text=True
    ).stdout  # fmt: skip
    assert [line.rstrip("\0").split("\0") for line in printed.splitlines()] == called


def test_what_the_plan_of_an_installation_says_of_a_worker_is_all_that_runs_there(desk):
    """With everything to do that there can be: another bucket is mounted, and uv is not there."""
    desk.installed()
    home = desk.home(0)
    for name in ("programs", ".local/bin/uv"):
        (home / name).unlink()
    (desk.world / "buckets/bk2/data").mkdir(parents=True)
    words = ("install", "demo", "--bucket=gs://bk2", f"--mount={desk.mount}", "--data=gs://bk2/data")
    words += (f"--data-dir={desk.folder}/disk",)
    plan = desk.good(*words, "--dry-run")
    before = len(desk.calls())
    desk.good(*words)

    planned = set()
    for line in plan.splitlines():
        if line.startswith("    ") and not line.strip().startswith("#"):
            line = line.replace("$HOME", str(home)).replace(
                "$(id -u):$(id -g)", f"{os.getuid()}:{os.getgid()}"
            )
            command = [
                word for word in shlex.split(line) if word not in ("env", "PIP_BREAK_SYSTEM_PACKAGES=1")
            ]
            command[0] = Path(command[0]).name
            planned.add(" ".join(command))
            planned.add(" ".join(command).removeprefix("sudo "))  # which starts what follows it
    ran = (home / "programs").read_text().splitlines()
    ran += [" ".join(call) for call in desk.calls()[before:] if "rsync" in call]
    assert {line.split()[0] for line in ran} == {"sudo", "umount", "gcsfuse", "python3", "uv", "gcloud"}
    assert set(ran) <= planned, set(ran) - planned


def test_the_plan_of_a_worker_can_be_made_on_any_machine(desk):
    """It starts no program that changes or asks for something, and leaves nothing behind."""
    for name in ("curl", "sudo", "uv", "findmnt", "mountpoint", "setsid"):
        program = desk.folder / "bin" / name
        program.write_text(f"#!/bin/sh\necho {name} >>{desk.folder}/started\n")
        program.chmod(0o755)
    storage = ("--bucket=gs://b", "--mount=/m", "--data=gs://b/d", "--data-dir=/d")
    kept = sorted(desk.folder.iterdir())
    for words in (
        ("install", "--commit=abc", *storage), ("install", "--commit=abc", "--nfs=h:/s", "--mount=/m"), ("chips",),
        ("mark", "/w", "t"), ("seen", "/w", "t"), ("unmark", "/w", "t"), ("free",), ("status",), ("log", "--follow"),
        ("start", "--workdir=/w", "--", "--config=c", "--dry-run=no"), ("stop", "--kill"), ("have", "/w", "export"),
    ):  # fmt: skip
        at = words.index("--") if "--" in words else len(words)
        ended = desk(*words[:at], "--dry-run", *words[at:], script="worker")
        assert ended.status == 0 and ended.out and not ended.error, (words, ended.out, ended.error)
        assert "[worker" not in ended.out and "error:" not in ended.out
    assert sorted(desk.folder.iterdir()) == kept


def test_the_command_for_the_workers_survives_both_shells(desk):
    plan = desk.good("run", "demo", "--dry-run", *run_flags(desk), "--config.note=a b's $HOME")
    start = next(line for line in plan.splitlines() if "worker.sh start" in line)
    outer = subprocess.run(["bash", "-c", f"printf '%s\\n' {start}"], capture_output=True, text=True).stdout
    inner = next(line for line in outer.splitlines() if line.startswith("--command=")).removeprefix(
        "--command="
    )
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {inner}"], capture_output=True, text=True).stdout
    assert words.splitlines()[-1] == "--config.note=a b's $HOME"


@pytest.mark.parametrize("script", ["tpu", "gke"])
def test_help_names_every_command(desk, script):
    out = desk.good("--help", script=script)
    text = (desk.root / "launch" / f"{script}.sh").read_text()
    commands = [line.split(")")[0].strip() for line in text.splitlines() if line.strip().endswith('"$@" ;;')]
    assert len(commands) >= 8 and "shellcheck" not in out
    for command in commands:
        assert f"launch/{script}.sh {command}" in out
        assert desk.good(command, "--help", script=script) == out
