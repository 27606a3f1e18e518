"""What every benchmark says in the same way: its options, its machine, its result."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vflax", "configs", "data_pipeline", "benchmarks")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with --out and this help."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, help="file for the result as JSON, which is printed too")
    return result


def machine() -> str:
    """Cores, architecture and Python of this machine."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def made() -> dict[str, str | None]:
    """What every result says of where it is from: the machine, and the code, as `code` and git have it."""
    return {"machine": machine(), "code": code(), "commit": commit()}


def code(sources: Iterable[str] | None = None) -> str:
    """A hash of sources, and not the commit alone: that changes with every page, and does not change with what is not
    committed.

    Args:
        sources: paths in the project; None: all of its Python, where nobody knows which of it decides a figure.
    """
    if sources is None:
        found = (path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
        sources = (str(path.relative_to(ROOT)) for path in found)
    result = hashlib.sha256()
    for source in sorted(sources):
        result.update(f"{source}\0".encode() + (ROOT / source).read_bytes() + b"\0")
    return result.hexdigest()[:12]


def imported(packages: Sequence[str], *modules: str) -> list[str]:
    """The sources of these packages of the project that this process has imported, as paths in the project; `modules`
    are imported first."""
    for name in modules:
        importlib.import_module(name)
    files = (
        module.__file__
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in packages and getattr(module, "__file__", None)
    )
    return sorted(str(Path(file).resolve().relative_to(ROOT)) for file in files)


def commit() -> str | None:
    """As git describes the checkout; None where it is none."""
    try:
        asked = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def versions(*names: str) -> dict[str, str]:
    """Of the packages of these names."""
    return {name: metadata.version(name) for name in names}


def read(out: Path | None) -> dict[str, Any]:
    """What a run that was cut off has left in --out; empty where there is no such file."""
    return json.loads(out.read_text()) if out is not None and out.is_file() else {}


def save(out: Path | None, result: Mapping[str, Any]) -> None:
    """Write the result as JSON, where a file is named, into a folder that need not exist."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def write(out: Path | None, result: Mapping[str, Any]) -> None:
    """`save` it, and print it."""
    save(out, result)
    print(json.dumps(result, indent=1))


def mark(what: str, found: Any, at_least: Any = None, at_most: Any = None) -> dict[str, Any]:
    """What was to be reached, what was found, and whether that is it; without limits `found` itself says so."""
    limits = {k: v for k, v in (("at_least", at_least), ("at_most", at_most)) if v is not None}
    met = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)
    return {"mark": what, "found": found, **limits, "met": met if limits else bool(found)}


def turns(names: Sequence[str], number: int) -> Iterator[str]:
    """The names in an order that changes from round to round."""
    for i in range(len(names)):
        yield names[(i + number) % len(names)]


def largest_difference(losses: Mapping[str, Sequence[float]]) -> float:
    """Between any side's losses and the first side's, relative; nan where one is no number."""
    first, *others = losses.values()
    found = [abs(a / b - 1) for other in others for a, b in zip(other, first, strict=True)]
    return max(found) if all(x == x for x in found) else float("nan")
