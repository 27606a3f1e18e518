"""`python -m vflax.serve` in a process of its own, with a small random model, watched from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import jax

from tests.generate import small_engine
from tests.serve.running import until
from tests.weights import hub

ROOT = Path(__file__).parents[2]


def write_model(folder: Path) -> None:
    """The model of tests.generate.small_engine as a directory of Hugging Face's."""
    hub.write_tokenizer(folder)
    source = small_engine.Source(hub.CONFIG)
    hub.write_llava(folder, hub.CONFIG, {name: source.read(name) for name in source.names()})


class ServerProcess:
    """A server, which listens from `with` on, or from `start` and `wait`.

    Args:
        model: a directory, see `write_model`.
        log: a file for what it writes to stderr.
        flags: of vflax.serve; without --port it takes any that is free.
        cache: where it keeps what is compiled; None: a folder that all tests share.
    """

    def __init__(self, model: Path, log: Path, *flags: str, cache: Path | None = None) -> None:
        self._command = [
            sys.executable, "-m", "vflax.serve", f"--model={model}", "--template=vicuna_v1", "--port=0",
            "--cache-tokens=4096", "--pictures=8", *flags,
        ]  # fmt: skip
        shared = Path(tempfile.gettempdir()) / f"vflax-test-servers-{os.getuid()}-{jax.__version__}"
        self._log, self._cache = log, cache or shared
        self._out: IO[bytes] | None = None
        self.process: subprocess.Popen[str]
        self.url = ""

    def __enter__(self) -> ServerProcess:
        self.start()
        self.wait()
        return self

    def start(self) -> None:
        environment = {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "VFLAX_CACHE": str(self._cache),
            # Else glibc now keeps and now gives back freed pictures, and memory goes up and down by more than a leak.
            "MALLOC_MMAP_THRESHOLD_": "200000",
        }  # fmt: skip
        self._out = self._log.open("ab")
        self.process = subprocess.Popen(
            self._command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=self._out, text=True
        )

    def wait(self) -> None:
        """Until it takes requests."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " is served at " not in line:
            self.kill()
            raise AssertionError(f"it did not start: {self._log.read_text()[-3000:]}")
        self.url = line.split()[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        """With SIGKILL; of no effect on one that has ended."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdout, self._out):
            if file is not None:
                file.close()

    def end(self) -> int:
        """With SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def numbers(self) -> dict[str, float]:
        """What /metrics tells, by name with its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def idle(self) -> bool:
        """Whether no slot and no page is held, and nothing waits."""
        numbers = self.numbers()
        return not any(numbers[f"vflax_{name}"] for name in ("running", "waiting", "pages_used"))

    def wait_until_idle(self) -> None:
        until(self.idle, 120)

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def complaints(self) -> list[str]:
        """Lines of the log that tell of something broken. It holds JSON, and what was said before it began."""
        found = []
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:
                if re.search("Traceback|Exception|exception", line):
                    found.append(line)
                continue
            if entry["level"] in ("error", "critical") or "traceback" in entry:
                found.append(line)
        return found
