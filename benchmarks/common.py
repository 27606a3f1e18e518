"""What every benchmark says in the same way: its options, its machine, its result."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
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
