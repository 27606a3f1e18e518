"""Draw a training set of a given size and mix from files in LLaVA's form.

    python -m data_pipeline.synthesize.draw --count=1000 --out=stage2.json \\
        conversation.json detail.json complex.json

--count=N draws N samples from all files together: each file has its share by size, and by chance, as in Vision-Flan's
stage 2, which took 1,000 of LLaVA's samples. --count=conversation=500,detail=200,complex=300 draws so many of each
file, by its name without .json. A file of the released data does as well as one made here.

The draw depends on the seed and the samples only. The samples are written in the order of the files.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from data_pipeline.records import Problem
from data_pipeline.releases import json_stream, open_release
from data_pipeline.synthesize.output import write_array
from vflax.errors import UserError


def draw(files: Sequence[Path], count: int | Mapping[str, int], seed: int = 0) -> list[dict[str, Any]]:
    """Samples of the files: `count` of them all, or so many of each by the file's stem.

    Raises:
        UserError: a file cannot be read or holds broken samples, two have the same stem, or there are too few samples.
    """
    samples: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        if path.stem in samples:
            raise UserError(f"{path}: there is another file named {path.stem}; rename one")
        samples[path.stem] = _read(path)
    if isinstance(count, int):
        everything = [sample for part in samples.values() for sample in part]
        return _some(everything, count, f"{seed}", "all files together")
    unknown = [name for name in count if name not in samples]
    if unknown or not count:
        raise UserError(f"--count: {', '.join(unknown) or 'nothing'}: expected of {', '.join(samples)}")
    parts = [_some(part, count.get(name, 0), f"{seed}/{name}", name) for name, part in samples.items()]
    return [sample for part in parts for sample in part]


def _some(samples: list[dict[str, Any]], count: int, seed: str, name: str) -> list[dict[str, Any]]:
    if not 0 <= count <= len(samples):
        raise UserError(f"--count={count} of {name}: there are {len(samples)} samples")
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), count))]


def _read(path: Path) -> list[dict[str, Any]]:
    for row in open_release(path, "llava"):
        if isinstance(row, Problem):
            raise UserError(f"{path}: sample {row.number} is broken: {row.detail}")
    file = epath.Path(path)
    return list(json_stream.read_rows(file, json_stream.find_layout(file)))


def read_counts(text: str, names: Sequence[str] = ()) -> dict[str, int] | int:
    """`NAME=N,...`, or `N`, which is N for each of `names` where there are any.

    Raises:
        UserError: it is neither.
    """
    try:
        if "=" not in text:
            return {name: int(text) for name in names} if names else int(text)
        return {name: int(number) for name, number in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise UserError(f"--count={text}: expected a number, or e.g. conversation=40,detail=20") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.synthesize.draw",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON in LLaVA's form")
    parser.add_argument(
        "--count", default="1000", metavar="N|NAME=N,...", help="samples (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        samples = draw(args.files, read_counts(args.count), args.seed)
        write_array(args.out, samples)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(samples)} samples of {', '.join(path.name for path in args.files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
