"""Answers per second: the engine beside transformers' generate, on the same weights and prompts, on this machine.

    python -m benchmarks.generate --out=benchmarks/results/generate.json
    python -m benchmarks.generate --size=7b --out=benchmarks/results/generate_gpu.json         on a GPU of 80 GB

Each prompt has a picture and its own text, so that nothing is known of one from another; answers have a fixed number
of tokens. For each model and number of requests the sides take turns, several rounds; what counts is the median of a
round's ratios. transformers runs as it comes (dynamic cache), and with its static cache and forward pass compiled by
torch. Time to the first token is that of one request, its picture included.

For 7b, in bfloat16, there is also the share of what the memory's bandwidth allows: bytes of the decoder's weights and
of the keys and values that a token's step reads, over the bandwidth at which this GPU sums up 4 GiB, over the step's
time. That is the difference of two answers' times over that of their lengths, with all that the engine does around it.

Needs the test extra. --size=tiny --rounds=1 takes a minute; all but 7b less than ten.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, random_model
from benchmarks.random_model import SIZES
from tests.weights import hub
from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.engine import Engine
from vflax.generate.open import answer_mesh
from vflax.generate.processor import Processor
from vflax.generate.request import Delta, Prompt, Sampling
from vflax.generate.sizes import EngineSettings
from vflax.generate.weights import load_weights
from vflax.models.llava import LlavaConfig
from vflax.weights.export import with_template
from vflax.weights.open import Opened, open_checkpoint

TEXT = 40  # tokens of a prompt beside its picture
NEW = 128  # tokens of an answer
BATCHES = (1, 8, 32)
# Engines by what is told of them; on a CPU other numbers of rows than those of equal bits, on a GPU one for one user.
SMALL: dict[str, dict[str, Any]] = {"vflax": {}, "vflax, any rows": {"row_sizes": "any"}}
_ROOM = {"max_length": 768}
LARGE: dict[str, dict[str, Any]] = {
    "vflax": {**_ROOM, "cache_tokens": 32 * 768}, "vflax, one slot": {**_ROOM, "slots": 1}
}  # fmt: skip
# Times transformers' tokens/s, as it comes: what is to be reached at 1 and 8 requests.
MARKS = {"tiny": {1: 2.0, 8: 1.7}, "100m": {1: 2.0, 8: 2.0}, "7b": {}}
LEAST_SHARE = 0.75


def prompts(config: LlavaConfig, number: int, rng: np.random.Generator) -> list[Prompt]:
    """A picture each, then text."""
    side = config.vision.image_size
    found = []
    for _ in range(number):
        text = rng.integers(10, hub.PIECES, TEXT).astype(np.int32)
        ids = np.concatenate(
            [text[:4], np.full(config.vision.num_tokens, IMAGE_TOKEN_ID, np.int32), text[4:]]
        )
        found.append(Prompt(ids, (rng.integers(0, 256, (side, side, 3)).astype(np.uint8),)))
    return found


class Ours:
    """The engine, asked by as many requests at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, asked: Sequence[Prompt], new: int) -> float:
        left, done = [len(asked)], threading.Event()

        def on_delta(delta: Delta) -> None:
            if delta.finish:
                left[0] -= 1
                if not left[0]:
                    done.set()

        began = time.perf_counter()
        for prompt in asked:
            self.engine.submit(prompt, Sampling(max_tokens=new, ignore_eos=True), on_delta)
        done.wait()
        return time.perf_counter() - began


class Theirs:
    """transformers' generate, with all prompts as one batch."""

    def __init__(self, model: Any, compiled: bool) -> None:
        import torch

        self.torch, self.model = torch, model
        self.options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
        self.forward = model.forward
        if compiled and model.device.type == "cpu":  # on a GPU generate compiles by itself
            self.forward = torch.compile(model.forward)
        self.mean, self.std = np.float32(hub.MEAN), np.float32(hub.STD)

    def __call__(self, asked: Sequence[Prompt], new: int) -> float:
        torch, model = self.torch, self.model
        model.forward = self.forward
        began = time.perf_counter()
        image_id = model.config.image_token_index
        ids = torch.tensor(np.stack([np.where(p.ids < 0, image_id, p.ids) for p in asked]), dtype=torch.long)
        pixels = np.stack([(p.images[0].astype(np.float32) / 255 - self.mean) / self.std for p in asked])
        ids = ids.to(model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)).to(model.device, model.dtype),
                do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **self.options,
            ).cpu()  # fmt: skip
        assert out.shape[1] == ids.shape[1] + new
        return time.perf_counter() - began


Side = Callable[[Sequence[Prompt], int], float]


def measure(
    size: str, rounds: int, batches: Sequence[int], compiled: bool, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Tokens per second of all sides, and milliseconds to the first token; `save` is given what there is so far."""
    large, rng = size == "7b", np.random.default_rng(0)
    dtype = "bfloat16" if large else "float32"
    with tempfile.TemporaryDirectory() as name:
        random_model.write(Path(name), size)
        opened = with_template(open_checkpoint(Path(name)), "vicuna_v1")
        config = opened.files.config
        rate = bandwidth() if large else 0.0
        engines = engines_of(opened, LARGE if large else SMALL, max(batches), dtype)
        sides: dict[str, Side] = {side: Ours(engine) for side, engine in engines.items()}
        model = theirs(Path(name), dtype, "cuda" if large else "cpu")
    sides["transformers"] = Theirs(model, compiled=False)
    if compiled:
        sides["transformers, static and compiled"] = Theirs(model, compiled=True)
    found: dict[str, Any] = {
        "tokens": NEW, "row sizes": {side: engine.row_sizes for side, engine in engines.items()}, "requests": {}
    }  # fmt: skip
    if large:
        found["bandwidth"] = {
            side: share(engine, [prompts(config, 1, rng)[0] for _ in range(2 * rounds)], rate)
            for side, engine in engines.items()
        }
        _say(f"{size} {found['bandwidth']}")
        save(found)
    for batch in batches:
        here = [side for side in sides if side not in engines or engines[side].layout.slots >= batch]
        for side in here:  # compile, and fill caches
            sides[side](prompts(config, batch, rng), NEW)
        seconds: dict[str, list[float]] = {side: [] for side in here}
        for number in range(rounds):
            for side in common.turns(here, number):
                seconds[side].append(sides[side](prompts(config, batch, rng), NEW))
        found["requests"][str(batch)] = {
            side: {
                "tokens per second": round(batch * NEW / statistics.median(own), 1),
                "times transformers": ratio(seconds["transformers"], own),
            }
            for side, own in seconds.items()
        }
        _say(f"{size} {batch} {found['requests'][str(batch)]}")
        save(found)
    first: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(3 * rounds + 1):
        for side in common.turns(list(sides), number):
            first[side].append(sides[side](prompts(config, 1, rng), 1))
    found["milliseconds to the first token"] = {
        side: round(1000 * statistics.median(own[1:]), 2) for side, own in first.items()
    }
    for engine in engines.values():
        engine.close()
    return found


def engines_of(
    opened: Opened, kinds: Mapping[str, dict[str, Any]], slots: int, dtype: str
) -> dict[str, Engine]:
    """Engines of the same weights."""
    config, processor = opened.files.config, Processor.of(opened)
    mesh = answer_mesh(config, jax.local_devices())
    weights = load_weights(opened.source, config, mesh, dtype, int8=False)
    return {
        side: Engine(
            processor, config, weights, mesh, dtype, EngineSettings(**{"slots": slots, **kind}), _say
        )
        for side, kind in kinds.items()
    }


def theirs(folder: Path, dtype: str, device: str) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval().to(device)


def share(engine: Engine, asked: Sequence[Prompt], rate: float) -> dict[str, float]:
    """Of the bandwidth, in bytes a second, that a step of one row reaches; half of the prompts get a short answer."""
    run, short = Ours(engine), NEW // 8
    run(asked[:1], NEW)
    seconds = {
        new: statistics.median(run([prompt], new) for prompt in own)
        for new, own in ((NEW, asked[::2]), (short, asked[1::2]))
    }
    step = (seconds[NEW] - seconds[short]) / (NEW - short)
    runner, decoder = engine._runner, engine._runner.config.decoder
    weights = sum(x.nbytes for layer in runner._weights.layers for x in layer.values())
    weights += decoder.vocab_size * decoder.width * 2
    position = len(asked[0].ids) + (NEW + short) // 2
    held = sum(x.nbytes for pool in runner._pools for x in pool if x is not None)
    keys = position * held / (engine.layout.pages * engine.layout.page)
    with jax.set_mesh(runner.mesh):
        began = time.perf_counter()
        for _ in range(8):
            runner.encode(asked[0].images[0], 0)
        jax.block_until_ready(runner._store)
        picture = (time.perf_counter() - began) / 8
        chunk = min(runner.chunk_seconds() for _ in range(4))
    return {
        "milliseconds of a picture": round(1000 * picture, 2),
        "milliseconds of a chunk": round(1000 * chunk, 2),
        "milliseconds of a step": round(1000 * step, 3),
        "gigabytes of weights": round(weights / 1e9, 2),
        "gigabytes of keys and values": round(keys / 1e9, 2),
        "bandwidth in GB/s": round(rate / 1e9, 1),
        "share": round((weights + keys) / rate / step, 3),
    }


def bandwidth() -> float:
    """Bytes per second at which the device sums up 4 GiB; the best of several."""
    large = jnp.ones(2**30, jnp.float32)
    total = jax.jit(jnp.sum)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([total(large) for _ in range(10)])
        times.append((time.perf_counter() - began) / 10)
    return large.nbytes / min(times)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Of the seconds, round by round: the median, the smallest and the largest."""
    found = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    return {
        "median": round(statistics.median(found), 2),
        "least": round(found[0], 2),
        "most": round(found[-1], 2),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; status 1 where a mark is missed."""
    parser = common.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=SIZES, action="append", help="default: tiny and 100m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--no-compile", action="store_true", help="without transformers compiled by torch")
    args = parser.parse_args(argv)
    # torch needs the other half of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.42")
    result: dict[str, Any] = {
        **common.made(),
        "device": jax.devices()[0].device_kind,
        "versions": common.versions("jax", "torch", "transformers"),
        "sizes": {},
        "marks": [],
    }
    for size in args.size or SIZES[:2]:

        def save(found: dict[str, Any], size: str = size) -> None:
            result["sizes"][size] = found
            common.save(args.out, result)

        found = measure(size, args.rounds, args.batches, not args.no_compile, save)
        result["sizes"][size] = found
        for batch, least in MARKS[size].items():
            if str(batch) in found["requests"]:
                times = found["requests"][str(batch)]["vflax"]["times transformers"]["median"]
                result["marks"].append(common.mark(f"{size}, {batch} requests", times, at_least=least))
        if size == "7b":
            reached = found["bandwidth"]["vflax, one slot"]["share"]
            result["marks"].append(common.mark("7b, share of the bandwidth", reached, at_least=LEAST_SHARE))
        common.save(args.out, result)
    common.write(args.out, result)
    return 0 if all(found["met"] for found in result["marks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
