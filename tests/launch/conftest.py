"""A desk with a fake gcloud, kubectl and docker on PATH, and the fake world that they act on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKES = Path(__file__).resolve().parent / "fakes"
WORKER_PROGRAMS = (
    "curl",
    "sudo",
    "python3",
    "gcsfuse",
    "mount",
    "mount.nfs",
    "mountpoint",
    "umount",
    "findmnt",
)


class Desk:
    """Where a user sits.

    root: the checkout whose scripts are called.
    world: what the fakes keep, see fakes/gcloud.py.
    mount: where the scripts are told to mount the shared folder, in place of /mnt/vflax.
    """

    def __init__(self, folder: Path, root: Path, template: Desk | None = None) -> None:
        self.template = template
        self.root, self.folder, self.world = root, folder, folder / "world"
        (self.world / "worker_bin").mkdir(parents=True)
        (folder / "bin").mkdir()
        (self.world / "buckets" / "bk").mkdir(parents=True)
        shutil.copy(FAKES / "gcloud_flags.json", self.world)
        for name in ("gcloud", "kubectl", "docker"):
            _program(folder / "bin" / name, name)
        _program(self.world / "worker_bin" / "gcloud", "gcloud")
        for name in WORKER_PROGRAMS:
            shutil.copy(FAKES / "worker.sh", self.world / "worker_bin" / name)
        self.config({"zone": "us-west4-a", "project": "p1"})
        self.scenario(bookings=[["ACTIVE"]])
        self.mount = folder / "mnt"
        self.mount.symlink_to(self.world / "buckets" / "bk")

    def scenario(
        self,
        *,
        chips: tuple[int | str, ...] = (4, 4),
        all_chips: int = 8,
        run: str = "wait",
        no_network: str = "",
        mount_in_use: str = "",
        **values: object,
    ) -> None:
        """What the world does; a v4-16, 8 chips on two workers, unless said otherwise. See the fakes for the keys."""
        (self.world / "scenario.json").write_text(json.dumps({"workers": len(chips)} | values))
        (self.world / "scenario.sh").write_text(
            f"chips=({' '.join(str(c) if c != '' else chr(39) * 2 for c in chips)})\n"
            f"all_chips={all_chips}\nrun={run!r}\nno_network={no_network}\nmount_in_use={mount_in_use}\n"
        )

    def config(self, values: dict[str, str]) -> None:
        (self.world / "config.json").write_text(json.dumps(values))

    def environment(self, path: str = "") -> dict[str, str]:
        """What a script finds: the fakes come first on PATH."""
        return {
            "PATH": path or f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.folder), "FAKE_WORLD": str(self.world), "LANG": "C.UTF-8", "TMPDIR": str(self.folder),
        }  # fmt: skip

    def __call__(self, *words: str, script: str = "tpu", input: str = "", path: str = "") -> Ended:
        ended = subprocess.run(
            [str(self.root / "launch" / f"{script}.sh"), *words],
            env=self.environment(path), input=input, capture_output=True, text=True, timeout=60, cwd=self.folder,
        )  # fmt: skip
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def good(self, *words: str, script: str = "tpu", input: str = "") -> str:
        """What a command prints that must succeed."""
        ended = self(*words, script=script, input=input)
        assert ended.status == 0, ended.out + ended.error
        return ended.out

    def bad(self, *words: str, script: str = "tpu", input: str = "") -> str:
        """The error of a command that must fail with status 1."""
        ended = self(*words, script=script, input=input)
        assert ended.status == 1, (ended.status, ended.out, ended.error)
        assert "error: " in ended.error, ended.error
        assert "unbound variable" not in ended.error and "command not found" not in ended.error
        return ended.error

    def calls(self) -> list[list[str]]:
        """The command lines that reached the fakes."""
        path = self.world / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def home(self, worker: int, name: str = "demo") -> Path:
        return self.world / "workers" / name / str(worker)

    def booked(self) -> None:
        """A slice that is booked: demo, a v4-16."""
        assert self.template is not None
        for name in ("resources.json", "booked"):
            shutil.copy(self.template.world / name, self.world)

    def install(self) -> None:
        """Book the slice demo and install on it, with the bucket bk mounted."""
        self.good("create", "demo", "--accelerator=v4-16", "--poll=0")
        self.good("install", "demo", "--bucket=gs://bk", f"--mount={self.mount}")

    def installed(self) -> None:
        """The same as `install`, copied from a desk where that was done: it takes seconds."""
        self.booked()
        assert self.template is not None
        shutil.copytree(self.template.world / "workers", self.world / "workers")
        for name in ("mounted", "vflax/storage", "vflax/installed"):
            for path in self.world.glob(f"workers/*/*/{name}"):
                path.write_text(path.read_text().replace(str(self.template.mount), str(self.mount)))

    def wait(self, worker: int, text: str) -> str:
        """The log of a worker, once the text is in it."""
        path = self.home(worker) / "vflax" / "run" / "log"
        for _ in range(400):
            if path.exists() and text in path.read_text():
                return path.read_text()
            time.sleep(0.02)
        raise AssertionError(
            f"worker {worker} never said {text!r}: {path.read_text() if path.exists() else ''}"
        )

    def ended(self, worker: int) -> None:
        """Wait until the run of a worker has ended by itself."""
        for _ in range(400):
            if (self.home(worker) / "vflax" / "run" / "status").exists():
                return
            time.sleep(0.02)
        raise AssertionError(f"the run of worker {worker} goes on")

    def close(self) -> None:
        """End the runs that a test left going, each by its own process group."""
        for pid in self.world.glob("workers/*/*/vflax/run/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                group = os.getpgid(int(pid.read_text()))
                assert group != os.getpgrp(), "a run in the group of the tests would end these"
                os.killpg(group, signal.SIGKILL)


class Ended:
    """How a command ended."""

    def __init__(self, status: int, out: str, error: str) -> None:
        self.status, self.out, self.error = status, out, error


def _program(path: Path, module: str) -> None:
    # -S: these scripts start often, and need no packages. Imported, they are compiled once.
    path.write_text(
        f"#!{sys.executable} -S\nimport sys; sys.path[0] = {str(FAKES)!r}; import {module}; {module}.main()\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small git checkout with the scripts as they lie here: committed or not."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "vflax").mkdir()
    for name in ("__init__.py", "constants.py", "errors.py", "slices.py"):
        shutil.copy(ROOT / "vflax" / name, root / "vflax")
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root)
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    return root


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Desk:
    """A desk with an installed slice, to be copied."""
    found = Desk(tmp_path_factory.mktemp("template"), checkout)
    found.install()
    return found


@pytest.fixture
def desk(tmp_path: Path, checkout: Path, template: Desk):
    """A `Desk` in a folder of its own."""
    found = Desk(tmp_path, checkout, template)
    yield found
    found.close()
