"""Small benchmarks in the released ones' formats, of pictures that the mini dataset holds out, to try an evaluation on.

    python -m data_pipeline.mini_benchmarks --out=DIR

    DIR/mme/SUBTASK/      existence, count, color and position: two questions on each of 30 pictures
    DIR/pope/             three splits, six questions on each of 30 pictures, and images/
    DIR/mmbench/mini.tsv  multiple choice, every question in all rotations of its options
    DIR/cf/mnist/         handwritten digits of scikit-learn as MNIST's files have them, 28 x 28
    DIR/llava_bench/      24 questions on 8 pictures that ask for long answers, with a judge's rule
    DIR/chat/             for vflax.preference: 20 questions of each kind, from a word to a long answer

They are sets of one's own (vflax.evaluate --custom): the real ones are other questions and many more. No picture stands
in training of any stage of the mini dataset.
"""

from __future__ import annotations

import base64
import csv
import functools
import gzip
import json
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits

from data_pipeline import cached, mini_chat, mini_studio
from data_pipeline.mini.draw import SHAPES
from data_pipeline.mini.scenes import COLOR_NAMES, NUMBERS, PLACES, original_held_out
from data_pipeline.mini_studio import Studio
from vflax.errors import UserError

PICTURES = 30
_ASKED = "Please answer yes or no."
_MNIST_SIDE = 28
_LETTERS = "ABCD"
# MMBench's names for what is asked: category and L2 ability.
_ABILITIES = {
    "shape": ("object_localization", "finegrained_perception (instance-level)"),
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("attribute_comparison", "finegrained_perception (cross-instance)"),
    "place": ("spatial_relationship", "finegrained_perception (cross-instance)"),
}


def ensure(cache: Path | None = None) -> Path:
    """All of them in the cache, drawn now if they are not there; "mini:benchmarks" in a config.

    Args:
        cache: the cache folder; None: $VFLAX_CACHE, or ~/.cache/vflax.

    Raises:
        UserError: the cache cannot be written.
    """
    return cached.made(f"mini-benchmarks-{version()}", write, "5 MB", cache)


@functools.cache
def version() -> str:
    """A short hash of all that decides their bytes."""
    return cached.version(__file__, str(mini_chat.__file__), str(mini_studio.__file__))


def write(out: Path) -> None:
    """Write all of them into a folder that is not there yet.

    Raises:
        UserError: it is.
    """
    if out.exists():
        raise UserError(f"--out={out}: is there already; name another folder")
    _mme(out / "mme")
    _pope(out / "pope")
    _mmbench(out / "mmbench")
    _digits(out / "cf" / "mnist")
    mini_chat.write_bench(out / "llava_bench")
    mini_chat.write_chat(out / "chat")


def _mme(folder: Path) -> None:
    studio = Studio("mme")
    rng = studio.rng

    def other(names: Sequence[str], right: str) -> str:
        return rng.choice([name for name in names if name != right])

    for number in range(PICTURES):
        quad, group, single = (studio.scene(kind) for kind in ("quad", "group", "single"))
        here, count = rng.choice(quad.values["shapes"]), NUMBERS[group.values["count"]]
        gone = rng.choice([shape for shape in SHAPES if shape not in quad.values["shapes"]])
        color, place = single.values["color"], single.values["place"]
        wrong_count, wrong_color, wrong_place = (
            other(NUMBERS[1:7], count), other(COLOR_NAMES, color), other(PLACES, place)
        )  # fmt: skip
        asked = {
            "existence": (quad, f"Is there a {here} in the picture?", f"Is there a {gone} in the picture?"),
            "count": (group, f"Are there {count} objects?", f"Are there {wrong_count} objects?"),
            "color": (single, f"Is the object {color}?", f"Is the object {wrong_color}?"),
            "position": (single, f"Is the object at the {place}?", f"Is the object at the {wrong_place}?"),
        }
        for subtask, (scene, yes, no) in asked.items():
            own = folder / subtask
            own.mkdir(parents=True, exist_ok=True)
            (own / f"{number:04d}.png").write_bytes(studio.png(scene))
            lines = [f"{yes} {_ASKED}\tYes\n", f"{no} {_ASKED}\tNo\n"]
            (own / f"{number:04d}.txt").write_text("".join(lines))


def _pope(folder: Path) -> None:
    """Absent things: any (random), those in most pictures (popular), those that most often go with what is there
    (adversarial), as in POPE."""
    studio = Studio("pope")
    scenes = [studio.scene("quad") for _ in range(PICTURES)]
    often = Counter(shape for scene in scenes for shape in scene.values["shapes"])
    together = Counter(
        (one, other) for scene in scenes for one in scene.values["shapes"] for other in scene.values["shapes"]
    )
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {"random": [], "popular": [], "adversarial": []}
    for number, scene in enumerate(scenes):
        name, here = f"{number:04d}.png", scene.values["shapes"]
        (folder / "images" / name).write_bytes(studio.png(scene))
        gone = [shape for shape in SHAPES if shape not in here]
        with_here = Counter({shape: sum(together[shape, one] for one in here) for shape in gone})
        absent = {
            "random": studio.rng.sample(gone, 3),
            "popular": [shape for shape, _ in often.most_common() if shape in gone][:3],
            "adversarial": [shape for shape, _ in with_here.most_common(3)],
        }
        present = studio.rng.sample(here, 3)
        for split, own in lines.items():
            for yes, no in zip(present, absent[split], strict=True):
                for thing, label in ((yes, "yes"), (no, "no")):
                    row = {
                        "question_id": len(own) + 1, "image": name, "text": f"Is there a {thing} in the picture?",
                        "label": label,
                    }  # fmt: skip
                    own.append(json.dumps(row) + "\n")
    for split, own in lines.items():
        (folder / f"coco_pope_{split}.json").write_text("".join(own))


def _mmbench(folder: Path) -> None:
    studio = Studio("mmbench")
    rng = studio.rng
    folder.mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for _ in range(PICTURES):
        single, group = studio.scene("single"), studio.scene("group")
        asked = {
            "shape": (single, "What shape is this?", single.values["shape"], SHAPES),
            "color": (single, "What color is the object?", single.values["color"], COLOR_NAMES),
            "count": (group, "How many objects are there?", NUMBERS[group.values["count"]], NUMBERS[1:7]),
            "place": (single, "Where is the object?", single.values["place"], PLACES),
        }
        for kind, (scene, question, right, names) in asked.items():
            options = [right, *rng.sample([name for name in names if name != right], 3)]
            rng.shuffle(options)
            category, ability = _ABILITIES[kind]
            picture = base64.b64encode(studio.png(scene)).decode()
            first = len(rows) // 4
            for turn in range(4):
                turned = options[turn:] + options[:turn]
                rows.append(
                    {
                        "index": first + turn * 1_000_000, "question": question, "hint": "",
                        **dict(zip(_LETTERS, turned, strict=True)), "answer": _LETTERS[turned.index(right)],
                        "category": category, "image": picture if turn == 0 else first, "l2-category": ability,
                        "split": "dev",
                    }
                )  # fmt: skip
    rows.sort(key=lambda row: int(str(row["index"])))
    with (folder / "mini.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def _digits(folder: Path) -> None:
    digits = load_digits()
    held = [index for index in range(len(digits.target)) if original_held_out(index)]
    ink = np.minimum(digits.images[held] * 16, 255).astype(np.uint8)
    pictures = [
        np.asarray(PIL.Image.fromarray(one).resize((_MNIST_SIDE, _MNIST_SIDE), PIL.Image.Resampling.BICUBIC))
        for one in ink
    ]
    folder.mkdir(parents=True)
    shape = (len(held), _MNIST_SIDE, _MNIST_SIDE)
    for name, magic, sizes, data in (
        ("t10k-images-idx3-ubyte.gz", 0x0803, shape, np.stack(pictures)),
        ("t10k-labels-idx1-ubyte.gz", 0x0801, shape[:1], digits.target[held].astype(np.uint8)),
    ):
        header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
        (folder / name).write_bytes(gzip.compress(header + data.tobytes(), mtime=0))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    return cached.write_command("data_pipeline.mini_benchmarks", str(__doc__), write, argv)


if __name__ == "__main__":
    sys.exit(main())
