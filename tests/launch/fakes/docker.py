"""A docker that builds nothing: checks the arguments, and that a tar with the Dockerfile comes in."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path


def main():
    with (Path(os.environ["FAKE_WORLD"]) / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(["docker", *sys.argv[1:]]) + "\n")
    verb, *words = sys.argv[1:]
    if verb == "build":
        file, tag, context = words
        with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as given:
            names = given.getnames()
        if context != "-" or not tag.startswith("--tag=") or file.removeprefix("--file=") not in names:
            sys.exit("no Dockerfile in the context")
    elif verb != "push" or len(words) != 1:
        sys.exit(f"unknown: {verb} {words}")
