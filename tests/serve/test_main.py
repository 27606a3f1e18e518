"""The command line: it says where it is served when it is, and what is wrong; SIGTERM ends it gracefully."""

from __future__ import annotations

import builtins
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.running import asks, until
from vflax.serve import log
from vflax.serve.__main__ import main

ROOT = Path(__file__).parents[2]
# In place of the engine: the fake one, which opens when a file is there.
ENGINE = """
import pathlib, sys, time, types

from vflax.errors import UserError

def add_engine_flags(parser):
    parser.add_argument("--model")
    parser.add_argument("--wait-for")
    parser.add_argument("--pace", type=float, default=0)

def open_engine(args):
    if args.model == "none":
        raise UserError("--model=none: there is no such model")
    if args.model == "broken":
        raise RuntimeError("the weights are on fire")
    while args.wait_for and not pathlib.Path(args.wait_for).exists():
        time.sleep(0.01)
    from tests.generate.fake_engine import FakeEngine
    from tests.serve.running import processor

    tiny = processor(pathlib.Path(args.model))
    return FakeEngine(tiny, pace=args.pace), tiny

engine = types.ModuleType("vflax.generate.open")
engine.add_engine_flags, engine.open_engine = add_engine_flags, open_engine
sys.modules["vflax.generate.open"] = engine
"""
START = ENGINE + "\nfrom vflax.serve.__main__ import main\nsys.exit(main())\n"


@contextmanager
def command(*flags: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", START, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tiny is served at http://127.0.0.1:"), line
    return line.split()[-1]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def status(url: str) -> int:
    """Of a GET; 0 where nobody listens."""
    try:
        return httpx.get(url).status_code
    except httpx.ConnectError:
        return 0


def test_it_is_503_until_its_model_is_there_and_again_when_told_to_end_while_what_runs_ends(
    tmp_path: Path,
) -> None:
    port, go = free_port(), tmp_path / "go"
    with command(f"--model={tmp_path}", f"--port={port}", f"--wait-for={go}", "--pace=0.1") as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: status(f"{url}/health") == 503)
        assert status(f"{url}/v1/models") == 503
        go.touch()
        assert url_of(process) == url and status(f"{url}/health") == 200
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/chat/completions", json={"messages": asks()}, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: "vflax_running 1.0" in httpx.get(f"{url}/metrics").text)
        process.terminate()
        until(lambda: status(f"{url}/health") == 503)
        thread.join(60)
        assert answers[0].json()["choices"][0]["message"]["content"] == "It is a red circle."
        assert process.wait(60) == 0 and status(url) == 0


def test_ctrl_c_before_the_model_is_there_ends_it(tmp_path: Path) -> None:
    port = free_port()
    with command(f"--model={tmp_path}", f"--port={port}", f"--wait-for={tmp_path / 'never'}") as process:
        until(lambda: status(f"http://127.0.0.1:{port}/health") == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine, for a command in this process, whose log goes nowhere."""
    monkeypatch.setattr(log, "write_to", lambda stream: None)
    monkeypatch.setitem(sys.modules, "vflax.generate.open", sys)  # put back afterwards
    exec(ENGINE, {})


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_model_that_is_not_there_is_an_error(engine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model=none: there is no such model" in refused(["--model=none", "--port=0"], capsys)


def test_what_breaks_while_the_model_is_loaded_is_not_hidden(engine: None) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        main(["--model=broken", "--port=0"])


def test_a_port_in_use_is_an_error_before_the_model_is_read(
    engine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port={port}" in refused(["--model=broken", f"--port={port}"], capsys)
    assert "--port=70000" in refused(["--model=broken", "--port=70000"], capsys)


def test_a_limit_out_of_its_range_is_an_error(engine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-queue=-1" in refused(["--model=none", "--max-queue=-1"], capsys)


def test_a_missing_package_names_the_extra_that_brings_it(
    engine: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kw: Any) -> Any:
        if name == "fastapi":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'vflax[serve]'" in refused(["--model=none"], capsys)
