"""What is started again, what is not, and when it is given up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vflax import supervise

# WORKDIR is argv[1]; `run` counts the starts; at(step, state) is what a training run writes.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
workdir = Path(sys.argv[1].partition("=")[2]); workdir.mkdir(exist_ok=True)
count = workdir.parent / "count"
run = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(run))
def at(step, state="running"):
    new = workdir / "new"
    new.write_text(json.dumps({"state": state, "step": step, "reason": ""}))
    new.replace(workdir / "status.json")
"""


def start(tmp_path: Path, body: str, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    file = tmp_path / "command.py"
    file.write_text(PRELUDE + textwrap.dedent(body))
    # JAX sets some of these when it is imported.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    clean["PYTHONPATH"] = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [
            sys.executable, "-m", "vflax.supervise", "--backoff=0.05", *flags, "--", sys.executable, str(file),
            f"--workdir={tmp_path / 'run'}",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean | (env or {}),
    )  # fmt: skip


def supervised(tmp_path: Path, body: str, *flags: str, **kwargs: dict[str, str]) -> tuple[int, int, str, str]:
    """(exit status, how often it was started, its stdout, what the supervisor said)."""
    process = start(tmp_path, body, *flags, **kwargs)
    out, err = process.communicate(timeout=60)
    return process.returncode, int((tmp_path / "count").read_text()), out, err


def test_what_is_done_is_not_started_again(tmp_path: Path):
    assert supervised(tmp_path, "at(3, 'done')")[:2] == (0, 1)


def test_75_after_progress_starts_again_at_once_however_often(tmp_path: Path):
    body = "at(run); sys.exit(0 if run == 9 else 75)"
    status, count, _, said = supervised(tmp_path, body, "--max_restarts=2", "--backoff=30")
    assert (status, count) == (0, 9)
    assert "status 75; step 1 is saved; failures in a row: 0; again in 0.0 s" in said


def test_a_kill_is_started_again(tmp_path: Path):
    body = "at(0); run == 3 or os.kill(os.getpid(), signal.SIGKILL)"
    status, count, _, said = supervised(tmp_path, body)
    assert (status, count) == (0, 3) and "status 137" in said


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(75)", "sys.exit(1)"])
def test_ends_without_progress_are_given_up_after_the_limit_with_the_last_status(tmp_path: Path, ending: str):
    status, count, _, said = supervised(tmp_path, f"at(5); {ending}", "--max_restarts=3")
    assert count == 5, "the first one had made progress"
    assert status == {"sys.exit(75)": 75, "sys.exit(1)": 1}.get(ending, 137)
    assert "4 ends in a row without progress: given up" in said


def test_progress_begins_the_count_anew(tmp_path: Path):
    body = "at(run // 3); sys.exit(0 if run == 12 else 9)"
    assert supervised(tmp_path, body, "--max_restarts=3")[:2] == (0, 12)


def test_a_new_checkpoint_is_progress_where_a_kill_left_status_json_as_it_was(tmp_path: Path):
    body = """
    at(0)
    (workdir / "checkpoints" / str(run)).mkdir(parents=True)
    run == 7 or os.kill(os.getpid(), signal.SIGKILL)
    """
    assert supervised(tmp_path, body, "--max_restarts=1")[:2] == (0, 7)


def test_a_start_that_is_refused_is_not_repeated(tmp_path: Path):
    status, count, _, said = supervised(tmp_path, "sys.exit(1)")
    assert (status, count) == (1, 1) and "the command is wrong" in said


def test_a_start_that_is_refused_after_others_were_not_is_repeated(tmp_path: Path):
    body = "run == 1 and at(0); sys.exit({1: 9, 4: 0}.get(run, 1))"
    assert supervised(tmp_path, body)[:2] == (0, 4)


def test_a_command_line_that_is_wrong_is_not_repeated(tmp_path: Path):
    assert supervised(tmp_path, "at(0); sys.exit(2)")[:2] == (2, 1)


@pytest.mark.parametrize(("command", "expected"), [("no-such-program-here", 127), ("/", 126)])
def test_a_program_that_is_not_there_is_said(command: str, expected: int):
    result = subprocess.run(
        [sys.executable, "-m", "vflax.supervise", "--", command], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == expected and command in result.stderr


def test_without_a_workdir_every_end_counts(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "vflax.supervise", "--max_restarts=2", "--backoff=0", "--", "sh", "-c",
         f"echo x >> {tmp_path}/count; exit 75"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 75 and len((tmp_path / "count").read_text().split()) == 3
    assert "no --workdir=DIR" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_which_is_not_started_again(tmp_path: Path, number: signal.Signals):
    body = f"""
    signal.signal({int(number)}, lambda *_: (at(4, "preempted"), os._exit(75)))
    at(0)
    print("ready", flush=True)
    time.sleep(60)
    """
    process = start(tmp_path, body)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and (tmp_path / "count").read_text() == "1"
    assert "told to stop; the command ended with status 75" in said
    assert supervise.saved_step(tmp_path / "run") == 4


def test_a_signal_ends_the_wait_before_a_new_start(tmp_path: Path):
    process = start(tmp_path, "at(0); sys.exit(9)", "--backoff=300")
    assert process.stderr is not None
    while "again in" not in (line := process.stderr.readline()):
        assert line
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 9 and time.monotonic() - began < 20
    assert (tmp_path / "count").read_text() == "1"


def test_every_event_is_one_line_with_its_time(tmp_path: Path):
    *_, said = supervised(tmp_path, "at(run); sys.exit(75 if run == 1 else 0)")
    assert len(said.splitlines()) == 4, said
    assert all(re.match(r"supervise \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in said.splitlines())


PLACES = {
    "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.9", "TPU_WORKER_HOSTNAMES": "gone",
    "TPU_WORKER_ID": "4", "TPU_VISIBLE_CHIPS": "0",
}  # fmt: skip
SHOW = "at(1); print(sorted(n for n in os.environ if n.startswith(('MEGASCALE', 'TPU_'))))"


def test_variables_of_a_place_among_hosts_are_left_out_and_named(tmp_path: Path):
    *_, out, said = supervised(tmp_path, SHOW, env=PLACES)
    assert "['TPU_VISIBLE_CHIPS']" in out
    assert "MEGASCALE_NUM_SLICES=3" in said and "TPU_WORKER_ID=4" in said


@pytest.mark.parametrize("keep", ["--keep_variables", "kubernetes"])
def test_they_stay_in_kubernetes_and_where_the_user_says_so(tmp_path: Path, keep: str):
    env = PLACES | ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"} if keep == "kubernetes" else {})
    flags = [keep] if keep.startswith("--") else []
    *_, out, said = supervised(tmp_path, SHOW, *flags, env=env)
    assert all(name in out for name in PLACES) and "left out" not in said


def test_waits_double_up_to_ten_minutes_and_differ(tmp_path: Path):
    supervisor = supervise.Supervisor(["true"], {}, 5, 10.0)
    for failures, longest in ((1, 10), (2, 20), (4, 80), (30, 600)):
        waits = {supervisor._wait(failures) for _ in range(50)}
        assert longest / 2 <= min(waits) and max(waits) <= longest and len(waits) > 40


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["p", "--workdir=a/b"], Path("a/b")), (["p", "--workdir", "a"], Path("a")), (["-workdir=a"], Path("a")),
        (["p", "--workdir"], None), (["p", "--workdirs=a"], None),
    ],
)  # fmt: skip
def test_the_workdir_is_found_in_the_command(command: list[str], expected: Path | None):
    assert supervise.find_workdir(command) == expected


@pytest.mark.parametrize("flags", [["--max_restarts=-1"], ["--backoff=-1"], ["--backoff=soon"], []])
def test_a_wrong_flag_or_no_command_is_refused(flags: list[str]):
    result = subprocess.run(
        [sys.executable, "-m", "vflax.supervise", *flags, *(["--", "true"] if flags else [])],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and "error:" in result.stderr


def test_it_starts_without_jax():
    code = "import sys, vflax.supervise; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
