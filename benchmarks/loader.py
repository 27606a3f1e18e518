"""Does the host keep up: images per second of a core against Hugging Face, and the training loop without its loader.

    VFLAX_SHARED_DATA=DIR python -m benchmarks.loader --out=benchmarks/results/loader.json

DIR holds vision-flan-samples/ (annotation.json and images/) and tokenizer/llama2-tokenizer.model. First: decode, pad or
crop, and resize to 336 px of every real photo, by vflax.images and by transformers' image processor (which normalises
too; vflax does that on the device) in one thread, turn by turn, in CPU seconds; both must give the same bits once
normalised. Then: the training loop of tests/real_data_config.py:all, turn by turn with its loader and with one cached
batch in its place. Exit status 1 when an image differs or a ratio is beyond LEAST_RATIO or MOST_WAIT. Needs the test
extra.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from benchmarks import common
from data_pipeline.convert import convert
from vflax import images, train
from vflax.config import load_config
from vflax.data.pipeline import Data
from vflax.images import ImageRules
from vflax.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "tests" / "real_data_config.py"
SIZE = 336
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Images per second over those of transformers, and seconds per step over those with a cached batch.
LEAST_RATIO, MOST_WAIT = 1.3, 1.03
WARM = 4  # steps left out at the beginning: compilation, and the first batches


def ours(data: bytes, rules: ImageRules) -> np.ndarray:
    """uint8 [H, W, 3], what a batch holds."""
    return images.preprocess(images.decode(data), rules)


def peer(mode: str) -> Callable[[bytes], np.ndarray]:
    """Bytes -> float32 [3, H, W] by transformers, from Pillow's own decoding."""
    if mode == "pad":
        processor = LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE},
            image_mean=MEAN, image_std=STD,
        )  # fmt: skip
    else:
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=MEAN,
            image_std=STD,
        )

    def process(data: bytes) -> np.ndarray:
        # RGB first, as LLaVA does: by itself transformers lays what is transparent on white.
        return processor(Image.open(BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]

    return process


def decode_speed(files: list[bytes], mode: str, rounds: int) -> dict[str, Any]:
    """Images per CPU second of both, turn by turn, and how many images differ in a bit."""
    rules = ImageRules(mode, SIZE, MEAN, STD)
    theirs = peer(mode)
    different = 0
    for data in files:
        # As the model does on the device, in float32.
        scaled = ours(data, rules).astype(np.float32) / np.float32(255)
        normalised = (scaled - np.float32(MEAN)) / np.float32(STD)
        different += not np.array_equal(normalised.transpose(2, 0, 1), theirs(data))
    seconds: dict[str, list[float]] = {"vflax": [], "transformers": []}
    for _ in range(rounds):
        for name, call in (("vflax", lambda data: ours(data, rules)), ("transformers", theirs)):
            began = time.process_time()
            for data in files:
                call(data)
            seconds[name].append(time.process_time() - began)
    rates = {name: len(files) / statistics.median(found) for name, found in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["vflax"], seconds["transformers"], strict=True)]
    return {
        "mode": mode,
        "images": len(files),
        "images_that_differ": different,
        "images_per_cpu_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


class Cached:
    """One batch, again and again."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self._batch = batch

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def close(self) -> None:
        """Nothing runs."""


@contextlib.contextmanager
def one_cached_batch() -> Iterator[None]:
    """In place of the loader, while the body runs."""
    original = Data.loader

    def loader(self: Data, start: int = 0) -> Any:
        with contextlib.closing(original(self, start)) as real:
            return Cached(next(real))

    Data.loader = loader  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Data.loader = original  # type: ignore[method-assign]


def step_seconds(workdir: Path, data: Path, tokenizer: Path, steps: int, cached: bool) -> list[float]:
    """Seconds of each step of a run of the training loop, the first ones left out."""
    config = load_config(f"{CONFIG}:all")
    config.data.sources[0].path = str(data)
    config.tokenizer = str(tokenizer)
    config.steps, config.export = steps, False
    config.checkpoint.every = 0
    config.evaluate.tasks = ()
    config.checkpoint.best_metric = ""
    config.data.eval_split = ""
    with one_cached_batch() if cached else contextlib.nullcontext():
        train.run_with_start(config, workdir)
    found = {r["step"]: r["seconds"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}
    return [found[step] for step in sorted(found) if step > WARM]


def loop_speed(work: Path, shared: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Median seconds per step with the loader over those with a cached batch, turn by turn."""
    samples = shared / "vision-flan-samples"
    convert("vision_flan", samples / "annotation.json", samples / "images", work / "data")
    tokenizer = shared / "tokenizer" / "llama2-tokenizer.model"
    seconds: dict[str, list[float]] = {"loader": [], "cached": []}
    for i in range(rounds):
        for name in ("cached", "loader"):
            workdir = work / f"{name}{i}"
            found = step_seconds(workdir, work / "data", tokenizer, steps, cached=name == "cached")
            seconds[name].append(statistics.median(found))
    ratios = [a / b for a, b in zip(seconds["loader"], seconds["cached"], strict=True)]
    return {
        "steps": steps,
        "seconds_per_step": {name: [round(s, 4) for s in found] for name, found in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run of the loop")
    args = parser.parse_args()
    shared = Path(os.environ["VFLAX_SHARED_DATA"])
    files = [path.read_bytes() for path in sorted((shared / "vision-flan-samples" / "images").iterdir())]
    with tempfile.TemporaryDirectory() as temporary:
        result = {
            "command": "python -m benchmarks.loader",
            **common.made(),
            "decode": [decode_speed(files, mode, args.rounds) for mode in ("pad", "crop")],
            "loop": loop_speed(Path(temporary), shared, args.steps, args.rounds),
        }
    common.write(args.out, result)
    slow = any(found["ratio"] < LEAST_RATIO or found["images_that_differ"] for found in result["decode"])
    if slow or result["loop"]["ratio"] > MOST_WAIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
