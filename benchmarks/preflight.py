"""What a preflight costs, and what it finds.

    VFLAX_SHARED_DATA=DIR python -m benchmarks.preflight --out=benchmarks/results/preflight.json

DIR holds vision-flan-samples/ (annotation.json and images/) and tokenizer/llama2-tokenizer.model. Measured are

    tokenising   text-only samples a second on one core, by processor time: vflax.data.lengths, and beside it the way of
                 LLaVA's trainer with transformers' fast LlamaTokenizer, in turns in the same process
    preflight    seconds of python -m data_pipeline.preflight on the built-in data of stage 1, first and once more
    search       seconds of comparing the hashes of 1,660,000 pictures with those of 10,000, some of them copies
    copies       share of copies of real pictures that are found, and how many different ones are taken for copies

Exit status 1 when two ways disagree on a sample's tokens, a planted copy is not found or ours tokenises fewer than
3,000 samples a second. Needs the test extra.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common
from data_pipeline import mini
from data_pipeline.tfds_writer import write_dataset
from vflax import images
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.data import lengths
from vflax.data.duplicates import Side, find_copies, near_pairs, traits
from vflax.data.rows import RowFormat
from vflax.data.source import SampleText, open_source
from vflax.images import ImageRules
from vflax.templates import TEMPLATES
from vflax.tokenizer import load_tokenizer

LEAST = 3000  # samples a second
ROUNDS, REPEATS = 7, 5
TRAINED, ASKED, PLANTED, DISTANCE = 1_660_000, 10_000, 200, 4


class Peer:
    """LLaVA's preprocess_v1, written from its description: render to a string, tokenise, tokenise again for the labels.

    The string is cut at `<image>`; the lengths of each round and of its question are those of the same texts tokenised
    alone. Ids and labels with one place for each image.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaTokenizer

        self._tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)

    def _ids(self, text: str) -> list[int]:
        first, *others = [self._tokenizer(chunk).input_ids for chunk in text.split("<image>")]
        for chunk in others:
            first += [IMAGE_TOKEN_ID, *chunk[1:]]
        return first

    def __call__(self, conversations: list[dict[str, str]], has_image: bool) -> tuple[list[int], list[int]]:
        texts = [turn["value"] for turn in conversations]
        if has_image:
            texts = [
                ("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text else text
                for text in texts
            ]
        text = TEMPLATES["vicuna_v1"].system + " "
        for i, turn in enumerate(texts):
            text += f"ASSISTANT: {turn}</s>" if i % 2 else f"USER: {turn} "
        ids = self._ids(text)
        labels, done = [IGNORE_LABEL], 1
        for part in text.split("</s>"):
            if not part:
                break
            question = part.split("ASSISTANT: ")[0] + "ASSISTANT: "
            # BOS stands for the </s> of the round; a space at the end is a token of its own.
            whole, asked = len(self._ids(part)), len(self._ids(question)) - 2
            labels += [IGNORE_LABEL] * asked + ids[done + asked : done + whole]
            done += whole
        return ids, labels


def tokenising(shared: Path, folder: Path) -> dict[str, Any]:
    """Samples a second, ours and the peer's, and on how many samples they count the same tokens."""
    shutil.copy(shared / "tokenizer" / "llama2-tokenizer.model", folder / "tokenizer.model")
    # Images cost no tokenising; with 1 token each both count the same.
    rules = ImageRules("pad", 336, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    format = RowFormat(load_tokenizer(folder), "vicuna_v1", "front", rules, 1, 2048, 3)
    entries = json.loads((shared / "vision-flan-samples" / "annotation.json").read_text())
    peer = Peer(folder)
    result: dict[str, Any] = {}
    for kind, has_image in (("text_only", False), ("with_image", True)):
        texts = [SampleText(e["id"], e["task_name"], _turns(e, has_image), int(has_image)) for e in entries]

        def ours(texts: list[SampleText] = texts) -> list[tuple[int, int]]:
            measured = lengths._measure_chunk(texts, format)
            return [(tokens, supervised) for (tokens, _, _, supervised), _, _ in measured]

        def theirs(texts: list[SampleText] = texts, image: bool = has_image) -> list[tuple[int, int]]:
            both = [peer(text.conversations, image) for text in texts]
            return [(len(ids), sum(label != IGNORE_LABEL for label in labels)) for ids, labels in both]

        same = sum(a == b for a, b in zip(ours(), theirs(), strict=True))
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for name, run in (("ours", ours), ("theirs", theirs)):
                seconds[name].append(_processor_seconds(run) / len(texts))
        rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
        result[kind] = {
            "samples": len(texts),
            "same_tokens_and_supervised_tokens": same,
            "vflax_per_second": round(rates["ours"]),
            "transformers_and_llava_per_second": round(rates["theirs"]),
            "times": round(rates["ours"] / rates["theirs"], 1),
        }
    return result


def _turns(entry: dict[str, Any], has_image: bool) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = entry["conversations"]
    if has_image:
        return turns
    return [{**turn, "value": turn["value"].replace("<image>", "").strip()} for turn in turns]


def _processor_seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    for _ in range(REPEATS):
        run()
    return (time.process_time() - began) / REPEATS


def whole_preflight(folder: Path) -> dict[str, Any]:
    """Seconds of the command on a copy of the built-in data of stage 1, and with what that left in the caches."""
    data = mini.ensure()
    shutil.copytree(data.stage1, folder / "stage1", ignore=shutil.ignore_patterns("preflight"))
    command = [
        sys.executable, "-m", "data_pipeline.preflight", "--config=configs/stage1.py:tiny", f"--out={folder / 'out'}",
        f"--config.data.sources[0].path={folder / 'stage1'}",
    ]  # fmt: skip
    result: dict[str, Any] = {}
    for name in ("first", "again"):
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        facts = json.loads((folder / "out" / "preflight.json").read_text())
        result[name] = {"command": round(time.monotonic() - began, 1), **facts["seconds"]}
    result["samples"] = sum(split["samples"] for split in facts["splits"])
    return result


def search() -> dict[str, Any]:
    """Seconds to find planted copies among random hashes, and what is found."""
    rng = np.random.default_rng(0)
    trained = np.unique(rng.integers(0, 2**64, TRAINED, dtype=np.uint64))
    asked = rng.integers(0, 2**64, ASKED, dtype=np.uint64)
    for i in range(PLANTED):
        flips = rng.choice(64, DISTANCE, replace=False).astype(np.uint64)
        asked[i] = trained[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips)
    asked = np.unique(asked)
    began = time.monotonic()
    found = sum(len(i) for i, _, _ in near_pairs(asked, trained, DISTANCE))
    return {
        "trained": len(trained), "asked": len(asked), "distance": DISTANCE, "planted": PLANTED,
        "found": found, "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip


def copies(shared: Path, folder: Path) -> dict[str, Any]:
    """Shares of copies of real pictures that are found, by what was done to them."""
    pictures = []
    for path in sorted((shared / "vision-flan-samples" / "images").iterdir()):
        try:
            pictures.append(images.decode(path.read_bytes()))
        except images.ImageError:
            continue
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "JPEG at quality 50": lambda p: _jpeg(p, 50),
        "JPEG at quality 20": lambda p: _jpeg(p, 20),
        "half the size": lambda p: p.resize((max(1, p.width // 2), max(1, p.height // 2))),
        "squeezed to 336 x 336": lambda p: p.resize((336, 336)),
        "224 x 224, JPEG at quality 60": lambda p: _jpeg(p.resize((224, 224)), 60),
        "2 % cut from each side": lambda p: p.crop((p.width // 50, p.height // 50, p.width - p.width // 50,
                                                    p.height - p.height // 50)),
    }  # fmt: skip
    result: dict[str, Any] = {"pictures": len(pictures)}
    for name, change in changes.items():
        found = _copies(folder / "d", pictures, [change(picture) for picture in pictures])
        right = sum(pair.sample == pair.copy for pair in found.pairs)
        result[name] = {
            "found": round(right / (len(pictures) - found.plain), 4),
            "other_pictures_taken_for_copies": len(found.pairs) - right,
        }
    half = len(pictures) // 2
    apart = _copies(folder / "d", pictures[:half], pictures[half:])
    result["different pictures taken for copies"] = apart.copied
    return result


def _copies(folder: Path, trained: list[Image.Image], asked: list[Image.Image]) -> Any:
    write_dataset(folder, {"train": map(_sample, trained), "test": map(_sample, asked)})
    sources = [open_source(folder, split) for split in ("train", "test")]
    sides = [Side(s, np.ones(len(s), bool), traits(s, [], show_progress=False)) for s in sources]
    return find_copies(sides[1], sides[:1], DISTANCE, [], show_progress=False)


def _sample(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    return {"id": "", "task": "", "conversations": turns, "images": [buffer.getvalue()], "sizes": [picture.size],
            "source": ""}  # fmt: skip


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def main() -> None:
    args = common.parser(__doc__).parse_args()
    shared = Path(os.environ["VFLAX_SHARED_DATA"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result = {
            "command": "python -m benchmarks.preflight",
            **common.made(),
            "tokenising": tokenising(shared, folder),
            "preflight": whole_preflight(folder),
            "search": search(),
            "copies": copies(shared, folder),
        }
    common.write(args.out, result)
    measured = result["tokenising"].values()
    if (
        any(kind["same_tokens_and_supervised_tokens"] != kind["samples"] for kind in measured)
        or any(kind["vflax_per_second"] < LEAST for kind in measured)
        or result["search"]["found"] < PLANTED
    ):
        sys.exit(1)


if __name__ == "__main__":
    main()
