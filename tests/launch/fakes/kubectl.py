"""A kubectl without a cluster: checks the arguments, keeps what was applied in $FAKE_WORLD/applied.yaml."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

WORLD = Path(os.environ["FAKE_WORLD"])
# Flags with a value end in "=".
FLAGS = {
    "apply": {"--filename="},
    "get": {"--selector=", "--output="},
    "logs": {"--selector=", "--container=", "--prefix", "--max-log-requests=", "--tail=", "--follow"},
    "delete": set(),
}


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def main():
    with (WORLD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(["kubectl", *sys.argv[1:]]) + "\n")
    wide = [word for word in sys.argv[1:] if word.startswith(("--namespace=", "--context="))]
    verb, *words = [word for word in sys.argv[1:] if word not in wide]
    if verb not in FLAGS:
        fail(f"unknown command {verb}")
    if not any(word.startswith("--namespace=") for word in wide):
        fail("no namespace")
    given = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            if name + equals not in FLAGS[verb]:
                fail(f"unknown flag: {word}")
            given[name] = value
    operands = [word for word in words if not word.startswith("--")]
    applied = WORLD / "applied.yaml"
    if verb == "apply":
        applied.write_text(Path(given["--filename"]).read_text())
        print("jobset.jobset.x-k8s.io/run created")
    elif verb == "logs":
        if operands or not given["--selector"].startswith("jobset.sigs.k8s.io/jobset-name="):
            fail("logs needs a selector here")
        print("[pod/run-slice-0-0-abcde/vflax] step 1")
    elif operands[0] == "pods":
        print("run-slice-0-0-abcde 1/1 Running")
    elif operands[0] == "jobset" and len(operands) == 2:
        if not applied.exists():
            fail(f'jobsets.jobset.x-k8s.io "{operands[1]}" not found')
        if verb == "delete":
            applied.unlink()
        print(f"jobset {operands[1]}")
    else:
        fail(f"unknown resource {operands}")
