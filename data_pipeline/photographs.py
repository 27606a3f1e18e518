"""Photographs and real handwriting for the study of forgetting: CIFAR-10 and MNIST as captions, questions, CF sets.

    python -m data_pipeline.photographs --source=DIR --out=DIR

SOURCE has, at most two folders deep, CIFAR-10 as train.zip and test.zip of CLASS/NNNN.jpg, and MNIST's test set as
t10k-images-idx3-ubyte and its labels, .gz or not. What becomes of them, each picture in one place only:

    OUT/captions    a dataset of stage 0: 600 photographs of each class ("a photograph of a frog"), 6,000 digits
    OUT/questions   one of stage 1, as Vision-Flan asks cinic-10: 200 of each class, 2,000 digits, in our own words
    OUT/cf          what CF asks about (vflax.evaluate --tasks=cf --custom): 100 of each class of CIFAR-10's test, the
                    last 1,000 digits

Digits come from MNIST's test set because that is the part that people have at hand; so no number here is MNIST's.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from data_pipeline import convert
from vflax import folders
from vflax.errors import UserError
from vflax.evaluate import cf_arrays
from vflax.evaluate.labels import CIFAR10

SEED = 3
# Of each class of CIFAR-10: in captions, in questions, of the test images for CF.
PHOTOGRAPHS = (600, 200, 100)
# Of MNIST, in its own order, which is mixed.
DIGITS = (6000, 2000, 1000)
_CAPTION = "Write a short caption for this image."
_OBJECT = (
    "What does this photograph show?",
    "Name the object in the photograph.",
    "Which kind of animal or vehicle do you see? Options: {options}",
)
_NUMBER = (
    "Which digit was written here?",
    "Read the digit.",
    "Which number from 0 to 9 does the picture show?",
)


class _Picture(NamedTuple):
    """label: its class; name: of its file; data: the file."""

    label: str
    name: str
    data: bytes


def write(source: Path, out: Path) -> None:
    """Write all of it into a folder that is not there yet.

    Raises:
        UserError: it is, or the sets are not in `source`, or not whole.
    """
    if out.exists():
        raise UserError(f"--out={out}: is there already; name another folder")
    train, test = _zip(source, "train.zip"), _zip(source, "test.zip")
    digits = list(_digits(source))
    of_captions, of_questions, of_cf = DIGITS
    captions, questions, _ = PHOTOGRAPHS
    with folders.beside(out) as temporary:
        new = temporary / "new"
        seen = _first(train, captions + questions)
        parts = {
            "captions": [("PHOTOGRAPHS+caption", own[:captions]) for own in seen.values()]
            + [("DIGITS+caption", digits[:of_captions])],
            "questions": [("PHOTOGRAPHS+object", own[captions:]) for own in seen.values()]
            + [("DIGITS+number", digits[of_captions : of_captions + of_questions])],
        }
        for name, tasks in parts.items():
            _dataset(temporary / f"release-{name}", new / name, tasks)
        asked = [picture for own in _first(test, PHOTOGRAPHS[2]).values() for picture in own]
        for folder, pictures in (("cifar10", asked), ("mnist", digits[-of_cf:])):
            for picture in pictures:
                file = new / "cf" / folder / picture.label / picture.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture.data)
        folders.swap(new, out)


def _zip(source: Path, name: str) -> Path:
    found = [path for depth in ("", "*/", "*/*/") for path in sorted(source.glob(depth + name))]
    if not found:
        raise UserError(f"--source={source}: no {name} of CIFAR-10 (CLASS/NNNN.jpg) in it, or in its folders")
    return found[0]


def _first(path: Path, count: int) -> dict[str, list[_Picture]]:
    """The first `count` pictures of each class of CIFAR-10, by name."""
    names = defaultdict(list)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                label, _, file = name.rpartition("/")
                if file:
                    names[label.rpartition("/")[2]].append(name)
            few = [label for label in CIFAR10 if len(names[label]) < count]
            if few:
                raise UserError(f"{path}: fewer than {count} images of {', '.join(few)}: not all of CIFAR-10")
            return {
                label: [
                    _Picture(label, f"{label}-{Path(name).name}", archive.read(name))
                    for name in names[label][:count]
                ]
                for label in CIFAR10
            }
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None


def _digits(source: Path) -> Iterator[_Picture]:
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = [f"t10k-{kind}", f"t10k-{kind}.gz"]
        files = [
            p for depth in ("", "*/", "*/*/") for name in names for p in sorted(source.glob(depth + name))
        ]
        if not files:
            raise UserError(f"--source={source}: no MNIST (t10k-{kind}, .gz or not) in it, or in its folders")
        found.append(files[0])
    arrays = cf_arrays.idx(*found)
    if len(arrays.pixels) < sum(DIGITS):
        raise UserError(f"{found[0]}: {len(arrays.pixels):,} images; MNIST's test set has 10,000")
    for number, (pixels, label) in enumerate(zip(arrays.pixels, arrays.labels, strict=True)):
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        yield _Picture(str(label), f"{number:05d}.png", file.getvalue())


def _dataset(release: Path, out: Path, tasks: Sequence[tuple[str, Sequence[_Picture]]]) -> None:
    """The pictures in Vision-Flan's release format, and converted."""
    rng = random.Random(SEED)
    rows: list[dict[str, object]] = []
    (release / "images").mkdir(parents=True)
    for task, pictures in tasks:
        for picture in pictures:
            (release / "images" / picture.name).write_bytes(picture.data)
            human, answer = _words(rng, task, picture.label)
            turns = [{"from": "human", "value": f"{human}\n<image>"}, {"from": "gpt", "value": answer}]
            rows.append(
                {
                    "id": f"{task}+{len(rows)}",
                    "image": picture.name,
                    "task_name": task,
                    "conversations": turns,
                }
            )
    (release / "annotation.json").write_text(json.dumps(rows))
    convert.convert(
        "vision_flan", release / "annotation.json", release / "images", out, split="train", workers=1,
        show_progress=False,
    )  # fmt: skip


def _words(rng: random.Random, task: str, label: str) -> tuple[str, str]:
    """What is asked, and the answer."""
    if task == "DIGITS+caption":
        return _CAPTION, f"a handwritten {label}"
    if task == "DIGITS+number":
        return rng.choice(_NUMBER), label
    if task == "PHOTOGRAPHS+caption":
        return _CAPTION, f"a photograph of {'an' if label[0] in 'aeiou' else 'a'} {label}"
    options = " ".join(
        f"({'abcdefghij'[i]}) {one}" for i, one in enumerate(rng.sample(CIFAR10, len(CIFAR10)))
    )
    return rng.choice(_OBJECT).format(options=options), label


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.photographs", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--source", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    options = parser.parse_args(argv)
    try:
        write(options.source, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
