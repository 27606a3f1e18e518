"""What every benchmark says in the same way: its options, its machine, its result."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with --out and this help."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, help="file for the result as JSON, which is printed too")
    return result


def machine() -> str:
    """Cores, architecture and Python of this machine."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def write(out: Path | None, result: Mapping[str, Any]) -> None:
    """Print the result as JSON and write it, where a file is named, into a folder that need not exist."""
    text = json.dumps(result, indent=1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)
