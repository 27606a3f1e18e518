"""python -m tests.study.touch FILE [STATUS [SECONDS]]: a job that notes that it ran, waits, and ends with a status."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    path, status, seconds = (
        Path(sys.argv[1]),
        int((sys.argv[2:] or ["0"])[0]),
        float((sys.argv[3:] or ["0"])[0]),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    with path.open("a") as file:
        file.write("begun\n")
    time.sleep(seconds)
    if status:
        print("error: it went wrong")
        sys.exit(status)
    with path.open("a") as file:
        file.write("done\n")
