"""The command line: exit status, signals, wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests import small
from vflax import config_flag
from vflax.metrics import read_metrics

# Launches one command line after the other, each in a process of its own that has imported everything already.
LAUNCHES = """
import json, os, runpy, sys, warnings
import vflax.train
warnings.simplefilter("ignore")  # runpy on modules that are imported already
for line in sys.stdin:
    args, out, err = json.loads(line)
    if (child := os.fork()) == 0:
        for name, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["vflax/launch.py", *args]
        try:
            runpy.run_module("vflax.launch", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def launches() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHES], env=small.environment(), text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield process


Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(launches: subprocess.Popen[str], tmp_path: Path) -> Launch:
    def launch(*args: str) -> subprocess.CompletedProcess[str]:
        assert launches.stdin and launches.stdout
        out, err = tmp_path / "out", tmp_path / "err"
        print(json.dumps([args, str(out), str(err)]), file=launches.stdin, flush=True)
        status = int(launches.stdout.readline())
        return subprocess.CompletedProcess(args, status, out.read_text(), err.read_text())

    return launch


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_and_the_run_continues(tmp_path: Path):
    workdir = tmp_path / "run"
    flags = ("--config.steps=400", "--config.checkpoint.every=0")
    process = small.launch_until_it_steps(tmp_path, workdir, *flags)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    status = json.loads((workdir / "status.json").read_text())
    assert status["state"] == "preempted" and 0 < status["step"] < 400
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(status["step"])]
    assert "run the same command again" in out

    again = small.launch(tmp_path, workdir, "--config.steps=400", "--config.checkpoint.every=0")
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"continuing from step {status['step']}" in again.stdout
    steps = [r["step"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 401))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--config=configs/stage1.py:tiny", "--workdir=x", "--config.batch.sampels=3"],
            ["sampels", 'Did you mean "samples"'],
        ),
        (["--config=configs/stage1.py:tiny", "--workdir=x", "--config.steps=many"], ["config.steps", "many"]),
        (["--config=configs/stage7.py", "--workdir=x"], ["configs/stage7.py", "configs/stage1.py"]),
        (["--config=configs/stage1.py:huge", "--workdir=x"], ["huge", "tiny"]),
        (["--config=configs/stage1.py:tiny"], ["--workdir", "--help"]),
        (["--config=configs/stage1.py:tiny", "--workdr=x"], ["workdr", "workdir"]),
        (["--config=configs/stage1.py:tiny", "--workdir=s3://b/run"], ["s3://b/run", "gs://BUCKET/FOLDER"]),
        (
            ["--config=configs/stage1.py:tiny", "--workdir=gs://b"],
            ["--workdir=gs://b: ", "gs://BUCKET/FOLDER"],
        ),
        (
            ["--config=configs/stage1.py:tiny", "--workdir=x", "--config.data.sources[1].path=y"],
            ["--config.data.sources[1].path=y", "no such entry"],
        ),
        (
            ["--config", "configs/stage1.py:tiny", "--workdir=WORKDIR", "--config.batch.accumulation=0"],
            ["config.batch.accumulation=0: at least 1"],
        ),
        (
            ["--config=configs/stage1.py:tiny", "--workdir=pyproject.toml"],
            ["pyproject.toml", "cannot be written"],
        ),
        (
            ["--config=configs/stage1.py:tiny", "--workdir=WORKDIR", "--config.dtype=bf16"],
            ["config.dtype='bf16'", "bfloat16"],
        ),
        (
            ["--config=configs/stage1.py:tiny", "--workdir=WORKDIR", "--config.data.sources=data/x"],
            ["--config.data.sources[0].path=DIR"],
        ),
        (
            ["--config=configs/stage1.py:tiny", "--workdir=WORKDIR", "--config.init.checkpoint=s3://b/run"],
            ["s3://b/run", "gs://BUCKET/FOLDER"],
        ),
        (
            ["--config=configs/stage1.py", "--workdir=WORKDIR"],
            ["config.init.checkpoint=runs/stage0", "WORKDIR"],
        ),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_status_1(
    args: list[str], words: list[str], run: Launch, tmp_path: Path
):
    result = run(*[a.replace("WORKDIR", str(tmp_path / "run")) for a in args])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


def test_an_error_right_after_a_save_does_not_lose_the_save(tmp_path: Path):
    flags = ("--config.optimizer.lr=1e30", "--config.optimizer.clip=0.0", "--config.checkpoint.every=1")
    result = small.launch(tmp_path, tmp_path / "run", *flags)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the loss is")
    assert "Traceback" not in result.stderr, result.stderr
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept and all(name.isdigit() for name in kept), kept


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path: Path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with FileLock(workdir / ".lock"):
        result = small.launch(tmp_path, workdir)
    assert result.returncode == 1 and "another process trains in it" in result.stderr
    assert not (workdir / "status.json").exists()


def test_help_names_flags_and_config_keys(run: Launch):
    result = run("--help")
    assert result.returncode == 0
    words = " ".join(result.stdout.split())
    for text in ("--workdir", "--config.optimizer.lr=2e-05", "--config.batch.samples=128", "75 saved"):
        assert text in words


@pytest.mark.parametrize(
    "flag", [["--config=configs/stage0.py:tiny"], ["--config", "configs/stage0.py:tiny"]]
)
def test_help_with_a_config_shows_the_values_of_that_one(flag: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        config_flag.parser("usage", [])(["launch", *flag, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "with the values of configs/stage0.py:tiny" in shown and "--config.template='plain'" in shown
