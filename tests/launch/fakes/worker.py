"""The programs of a TPU VM that need the network, a TPU or root. Which one this is, its file name says."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

WORLD, HOME = Path(os.environ["FAKE_WORLD"]), Path(os.environ["HOME"])
WORKER = int(os.environ["FAKE_WORKER"])
SCENARIO = json.loads((WORLD / "scenario.json").read_text())
NAME, ARGUMENTS = Path(sys.argv[0]).name, sys.argv[1:]


def wrong(message):
    print(f"{NAME}: {message}: {' '.join(ARGUMENTS)}", file=sys.stderr)
    sys.exit(2)


def inside(path):
    """Nothing outside the test's own folder is touched."""
    if not Path(path).resolve().is_relative_to(WORLD.parent):
        wrong("outside of the sandbox")
    return Path(path)


def record():
    with (HOME / "programs.jsonl").open("a") as f:
        f.write(json.dumps([NAME, *ARGUMENTS]) + "\n")


def python3():
    """The image's Python 3.10: it can fetch uv."""
    if ARGUMENTS != ["-m", "pip", "install", "-q", "--user", "uv"]:
        wrong("Python 3.10 is too old for this")
    if SCENARIO.get("no_network"):
        wrong("no network")
    program(HOME / ".local/bin/uv")


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((WORLD / "worker_bin" / "gcsfuse").read_text())
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def uv():
    record()
    if ARGUMENTS[:5] == ["venv", "-q", "--allow-existing", "--python", ARGUMENTS[4]]:
        program(Path(ARGUMENTS[5]) / "bin" / "python")
        (Path(ARGUMENTS[5]) / "version").write_text(ARGUMENTS[4])
        return
    if ARGUMENTS[:3] != ["pip", "install", "-q"] or ARGUMENTS[3] != "--python" or ARGUMENTS[5] != "-e":
        wrong("unknown")
    source = Path(ARGUMENTS[6].removesuffix("[tpu]"))
    if not ARGUMENTS[6].endswith("[tpu]") or not (source / "pyproject.toml").is_file():
        wrong("no project with the tpu extra there")


def gcsfuse():
    record()
    known = (
        "--implicit-dirs",
        "--metadata-cache-ttl-secs=",
        "--metadata-cache-negative-ttl-secs=",
        "--rename-dir-limit=",
    )
    for word in ARGUMENTS[:-2]:
        if not word.startswith(known):
            wrong(f"unknown flag {word}")
    bucket = WORLD / "buckets" / ARGUMENTS[-2]
    if not bucket.is_dir():
        wrong("no such bucket")
    mount_at(bucket, inside(ARGUMENTS[-1]))


def mount():
    record()
    if ARGUMENTS[:4] != ["-t", "nfs", "-o", "hard"]:
        wrong("unknown")
    share = WORLD / "buckets" / "share"
    share.mkdir(parents=True, exist_ok=True)
    mount_at(share, inside(ARGUMENTS[5]))


def mount_at(what, where):
    """All workers of the test are one machine, so that the second one finds the link there."""
    (HOME / "mounted").write_text(str(where))
    with (WORLD / "mounting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not where.is_symlink():
            where.rmdir()
            where.symlink_to(what)


def python():
    """The Python of the virtual environment."""
    if ARGUMENTS == ["--version"]:
        print("Python 3.12.7")
    elif ARGUMENTS[0].endswith("/launch/check_devices.py"):
        chips = SCENARIO.get("chips", [4] * SCENARIO["workers"])
        if chips[WORKER] is None:
            sys.exit(124)
        print(f"chips {chips[WORKER]} of {SCENARIO.get('all_chips', sum(c or 0 for c in chips))}, "
              "TPU v4, Python 3.12.7, jax 0.8.2")  # fmt: skip
    elif ARGUMENTS[:2] == ["-m", "vflax.supervise"]:
        supervise()
    else:
        wrong("unknown")


def supervise():
    """A run in small: says what it was called with, counts steps, saves when it is told to stop."""
    at = ARGUMENTS.index("--")
    own, command = ARGUMENTS[2:at], ARGUMENTS[at + 1 :]
    if any(not word.startswith("--max_restarts=") for word in own):
        wrong("unknown flag")
    if command[1:4] != ["-m", "vflax.launch", "--distributed"] or not Path("pyproject.toml").is_file():
        wrong("not the launcher, or not where the checkout is")
    print("slices", os.environ.get("MEGASCALE_NUM_SLICES", "none"), flush=True)
    workdir = Path(next(w for w in command if w.startswith("--workdir=")).removeprefix("--workdir="))
    workdir.mkdir(parents=True, exist_ok=True)
    first = WORKER == 0
    steps = workdir / "steps"
    mode = SCENARIO.get("run", "wait")

    def tell(state):
        if first:
            (workdir / "status.json").write_text(
                json.dumps({"state": state, "step": 3, "reason": ""}, indent=1)
            )

    def end(*_):
        if mode == "deaf":
            return
        tell("preempted")
        print("saved", flush=True)
        os._exit(75)

    signal.signal(signal.SIGTERM, end)
    with steps.open("a") as f:
        f.write(f"started on {WORKER}\n")
    again = steps.read_text().count(f"started on {WORKER}") > 1
    print("step 1", flush=True)
    tell("running")
    if mode == "finish" or (mode == "finish second time" and again):
        (workdir / "export").mkdir(exist_ok=True)
        (workdir / "export" / "config.json").write_text("{}")
        tell("done")
        return
    if mode == "fail":
        print("error: no such file", flush=True)
        sys.exit(1)
    while True:
        time.sleep(0.05)


def main():
    {"python3": python3, "uv": uv, "gcsfuse": gcsfuse, "mount": mount, "mount.nfs": mount, "python": python}[
        NAME
    ]()
