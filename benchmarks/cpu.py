"""On a CPU, vflax beside transformers and torch, eager and with torch.compile: steps, samples, start and dispatch.

    [VFLAX_SHARED_DATA=DIR] python -m benchmarks.cpu --out=benchmarks/results/cpu.json
    python -m benchmarks.cpu --only=step,samples,start,dispatch                            some of the cases

A small LLaVA (vocabulary 32,000) in float32, the tower frozen, AdamW (fused in torch) behind a clip, all cores for
both. Texts have lengths drawn from those of the real Vision-Flan samples under DIR, else from benchmarks/content.py.
Before a case is timed both sides must have the same losses. All that is compared is timed in turns.

    step       the same padded rows on both sides: the median step, and the ratio's median and range over the rounds
    samples    real samples per second: ours packed after vflax's plan; theirs dealt out by length as LLaVA does it,
               padded to the longest of the batch. What each part of ours gives is told by switching it off: the loss on
               all positions in place of the supervised ones ("head"), one sample a row in place of packed ones
               ("packing"); "compiler" is the rest of the factor
    start      seconds from the start of the process to the end of the first step: vflax.launch on the tiny stage 1,
               without and with its compile cache, and a script that makes a model of that size in torch and steps once
    dispatch   host time of a step: the call that starts it on a batch that is on the device

Exit status 1 where losses differ or a mark is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common, content
from benchmarks.content import Content, Lengths, Rows
from benchmarks.ours import Ours
from benchmarks.setting import Setting, llava
from vflax.models.llava import LlavaConfig

# Steps with equal losses before a step is timed, and before samples are.
PARITY, SAMPLES_PARITY, TOLERANCE = 6, 2, 1e-4
# Layers, width, heads, width of the MLP, of the tower and the decoder.
TOWER = (4, 256, 4, 1024)
SIZES = {"small": (4, 256, 4, 704), "wider": (6, 512, 8, 1376)}
# Pixels of a patch's side: image tokens of a picture of 336 pixels.
PATCHES = {28: 144, 14: 576}
STEP_BATCH = {"small": 8, "wider": 4}
# At 576 image tokens four of the sampler's eight batches do; batch i has the i-th longest sample.
SOME = (1, 3, 4, 6)
# Samples of a step: rows that it is packed into.
BATCHES = {8: 2, 16: 4}
POOL = 512
CASES = ("step", "samples", "start", "dispatch")
STEP_MARKS = {"eager": 2.2, "compiled": 1.9}
SAMPLES_MARK = 2.5
DISPATCH_MS = 1.0


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", default=",".join(CASES), help="some of the cases, with commas between")
    parser.add_argument("--rounds", type=int, default=5, help="of the step")
    parser.add_argument(
        "--passes", type=int, default=3, help="over the samples at 144 image tokens; one at 576"
    )
    parser.add_argument(
        "--compiled-samples", action="store_true", help="samples with torch.compile, too (slow)"
    )
    parser.add_argument("--torch-first-step", type=int, metavar="V", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_first_step:
        torch_first_step(args.torch_first_step)
        args.out.touch()
        return
    lengths = find_lengths()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.cpu",
        **common.made(),
        "versions": common.versions("jax", "flax", "torch", "transformers"),
        "lengths": lengths.statistics(),
    }
    began = time.perf_counter()
    for case in args.only.split(","):
        if case == "step":
            result["step"] = {name: step(lengths, name, args.rounds) for name in SIZES}
        elif case == "samples":
            result["samples"] = [
                samples(lengths, patch, batch, args.passes, compiled=args.compiled_samples)
                if patch == 28
                else samples(lengths, patch, batch, 1, split=False, chosen=SOME)
                for patch in PATCHES
                for batch in BATCHES
            ]
        elif case == "start":
            result["start"] = start()
        elif case == "dispatch":
            result["dispatch"] = dispatch(lengths)
        else:
            parser.error(f"--only={case}: expected some of {', '.join(CASES)}")
    result["minutes"] = round((time.perf_counter() - began) / 60, 1)
    result["marks"] = marks(result)
    common.write(args.out, result)
    if not all(mark["met"] for mark in result["marks"]):
        sys.exit(1)


def find_lengths() -> Lengths:
    """Of the real samples, where they are at hand."""
    if "VFLAX_SHARED_DATA" not in os.environ:
        return content.lognormal(POOL)
    from vflax.constants import IGNORE_LABEL
    from vflax.conversation import expand, read_llava, render
    from vflax.tokenizer import load_tokenizer

    shared = Path(os.environ["VFLAX_SHARED_DATA"])
    tokenizer = load_tokenizer(shared / "tokenizer" / "llama2-tokenizer.model")
    found = []
    for record in json.loads((shared / "vision-flan-samples" / "annotation.json").read_text("utf-8")):
        conversation, _ = read_llava(record["conversations"], 1, "front", "")
        _, labels = expand(render(conversation, "vicuna_v1", tokenizer), 0)
        words = sum(len(turn["value"].split()) for turn in record["conversations"])
        found.append((len(labels), int((labels != IGNORE_LABEL).sum()), words))
    return Lengths(*np.array(found).T)


# --- (a) a step ---------------------------------------------------------------------------------------------


class Runner:
    """One side, with its state: `run(rows)` is a whole step and gives the loss."""

    def __init__(self, side: Any, capacity: int = 0) -> None:
        self.side, self.capacity = side, capacity
        if isinstance(side, Ours):
            self._state, self._frozen = side.start()

    def put(self, rows: Rows) -> Any:
        return self.side.put(rows)

    def run(self, batch: Any, capacity: int = 0) -> float:
        if not isinstance(self.side, Ours):
            return float(self.side.step(batch))
        step = self.side.step(capacity or self.capacity, self._state, self._frozen, batch)
        self._state, metrics = step(self._state, self._frozen, batch)
        return float(jax.block_until_ready(metrics)["loss"])


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def step(
    lengths: Lengths,
    size: str,
    rounds: int,
    batch: int = 0,
    model: LlavaConfig | None = None,
    compiled: bool = True,
) -> dict[str, Any]:
    """Steps of the same padded rows, in turns."""
    from benchmarks.theirs import Theirs

    use_all_cores()
    model, batch = model or llava(28, TOWER, SIZES[size]), batch or STEP_BATCH[size]
    made = Content.of(lengths.drawn(max(POOL, batch * content.DEVICES), 0), model)
    grouped = content.length_grouped(made.lengths.words, batch, 0)[3:5]  # not those with the longest samples
    length = max(int(made.tokens[numbers].max()) for numbers in grouped)
    batches = [made.rows([[n] for n in numbers], length, 1) for numbers in grouped]
    setting = Setting()
    sides = {
        "vflax": Runner(Ours(model, setting), content.capacity_of(batches)),
        "eager": Runner(Theirs(model, setting)),
    }
    if compiled:
        sides["compiled"] = Runner(Theirs(model, setting, compiled=True))
    ready = {name: [side.put(rows) for rows in batches] for name, side in sides.items()}
    losses = {name: [side.run(ready[name][i % 2]) for i in range(PARITY)] for name, side in sides.items()}
    difference = largest_difference(losses)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in common.turns(list(sides), number):
            side = sides[name]
            rows_ = ready[name][number % 2]
            times[name].append(timed(lambda side=side, rows=rows_: side.run(rows)))
    result = {
        "rows": batch,
        "tokens_of_a_row": length,
        "supervised_capacity": sides["vflax"].capacity,
        "parameters": sum(p.numel() for p in sides["eager"].side.net.parameters()),
        "steps_of_parity": PARITY,
        "largest_relative_difference_of_losses": difference,
        "seconds": {name: [round(t, 4) for t in values] for name, values in times.items()},
        "median": {name: round(statistics.median(values), 4) for name, values in times.items()},
    }
    over = [name for name in sides if name != "vflax"]
    for name in over:
        result[f"over_{name}"] = spread([t / o for t, o in zip(times[name], times["vflax"], strict=True)])
    print(
        f"step, {size}: {result['median']}, {[result[f'over_{n}'] for n in over]}",
        flush=True,
    )
    return result


def use_all_cores() -> None:
    """Of torch; XLA does so by itself."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)


def largest_difference(losses: dict[str, list[float]]) -> float:
    """Between any side's losses and the first side's, relative; ends the process where it is too large."""
    found = common.largest_difference(losses)
    if not found <= TOLERANCE:
        sys.exit(f"the losses differ by {found:.1e}, so a comparison of speed means nothing: {losses}")
    return float(f"{found:.1e}")


def spread(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    }


# --- (b) samples --------------------------------------------------------------------------------------------


def samples(
    lengths: Lengths,
    patch: int,
    batch: int,
    passes: int,
    model: LlavaConfig | None = None,
    compiled: bool = False,
    split: bool = True,
    chosen: Sequence[int] = range(content.DEVICES),
) -> dict[str, Any]:
    """Real samples per second, over those `chosen` of the eight batches that LLaVA's sampler makes of a run of samples;
    with `split` ours is timed without its parts, too."""
    from benchmarks.theirs import Theirs

    use_all_cores()
    model = model or llava(patch, TOWER, SIZES["small"])
    made = Content.of(lengths.drawn(POOL, 1), model)
    setting = Setting()
    grouped = [content.length_grouped(made.lengths.words, batch, 0)[i] for i in chosen]
    plan = made.plan(batch, BATCHES[batch])
    stats = plan.stats()
    packed = [made.packed(plan, i) for i in range(len(grouped))]
    alone = [made.padded(numbers, multiple=32) for numbers in grouped]
    ours, theirs = Runner(Ours(model, setting)), {"eager": Runner(Theirs(model, setting))}
    if compiled:
        theirs["compiled"] = Runner(Theirs(model, setting, compiled=True))
    packed_ready = [ours.put(rows) for rows, _ in packed]
    alone_ready = [ours.put(rows) for rows in alone]
    padded_ready = [theirs["eager"].put(made.padded(numbers)) for numbers in grouped]
    one_capacity = content.capacity_of(alone)
    one_a_row = lambda i: ours.run(alone_ready[i], one_capacity)  # noqa: E731
    length = plan.capacity.tokens
    # name -> (what runs batch i, samples in it)
    work: dict[str, tuple[Callable[[int], Any], Callable[[int], int]]] = {
        "vflax": (lambda i: ours.run(packed_ready[i], plan.capacity.supervised), lambda i: packed[i][1]),
    }
    if split:
        everywhere = [ours.put(content.all_supervised(rows)) for rows, _ in packed]
        work["all_positions"] = (lambda i: ours.run(everywhere[i], length)), lambda i: packed[i][1]
        work["one_a_row"] = one_a_row, lambda i: len(grouped[i])
    for name, side in theirs.items():
        work[name] = (lambda i, side=side: side.run(padded_ready[i])), lambda i: len(grouped[i])
    few = range(min(SAMPLES_PARITY, len(grouped)))
    losses = {"vflax": [one_a_row(i) for i in few]} | {n: [work[n][0](i) for i in few] for n in theirs}
    difference = largest_difference(losses)
    for name, (run, _) in work.items():  # compile
        shapes = {rows["ids"].shape: i for i, rows in enumerate(alone)} if name == "one_a_row" else {"": 0}
        for i in range(len(grouped)) if name == "compiled" else shapes.values():
            run(i)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in grouped] for name in work}
    for number in range(passes):
        for i in range(len(grouped)):
            for name in common.turns(list(work), number + i):
                run = work[name][0]
                seconds[name][i].append(timed(lambda run=run, i=i: run(i)))
    rate = {
        name: sum(count(i) for i in range(len(grouped))) / sum(map(statistics.median, seconds[name]))
        for name, (_, count) in work.items()
    }
    each_pass = [
        {
            name: sum(work[name][1](i) for i in range(len(grouped))) / sum(s[p] for s in seconds[name])
            for name in work
        }
        for p in range(passes)
    ]
    total = rate["vflax"] / rate["eager"]
    result = {
        "image_tokens": model.vision.num_tokens,
        "samples_of_a_step": batch,
        "largest_relative_difference_of_losses": difference,
        "ours": {
            "rows": plan.rows_per_step, "tokens_of_a_row": length, "images_of_a_row": plan.capacity.images,
            "supervised_capacity": plan.capacity.supervised, "fill": round(stats.fill, 3),
            "samples_per_step": round(stats.samples_per_step, 2),
        },
        "theirs": {"fill": round(fill_of([made.padded(numbers) for numbers in grouped]), 3)},
        "samples_per_second": {name: round(value, 3) for name, value in rate.items()},
        "over": {
            name: {"median": round(rate["vflax"] / rate[name], 3)}
            | {k: round(f(p["vflax"] / p[name] for p in each_pass), 3) for k, f in (("least", min), ("most", max))}
            for name in theirs
        },
        "seconds": {name: [[round(t, 4) for t in times] for times in values] for name, values in seconds.items()},
    }  # fmt: skip
    if split:
        head, packing = rate["vflax"] / rate["all_positions"], rate["vflax"] / rate["one_a_row"]
        factors = {"head": head, "packing": packing, "compiler": total / head / packing}
        result["factors"] = {name: round(value, 3) for name, value in factors.items()}
    print(
        f"samples, {model.vision.num_tokens} image tokens, {batch} a step: {result['samples_per_second']}, "
        f"over {result['over']}, {result.get('factors', '')}", flush=True,
    )  # fmt: skip
    return result


def fill_of(batches: Sequence[Rows]) -> float:
    """Tokens over positions."""
    return sum(int((b["segments"] > 0).sum()) for b in batches) / sum(b["segments"].size for b in batches)


# --- (c) start ----------------------------------------------------------------------------------------------

# The tiny stage 1 with random weights, so that no stage 0 has to run first.
_TINY = """
from ml_collections import ConfigDict

from configs import common
from vflax.config import load_config


def get_config():
    config = load_config("configs/stage1.py:tiny")
    config.init.checkpoint = config.init.make = ""
    config.tokenizer = "mini:tokenizer"
    config.model.vision = ConfigDict(common.TINY_VISION)
    config.model.decoder = ConfigDict(common.TINY_DECODER)
    config.steps = 1
    config.evaluate.tasks = ("loss",)
    config.export = False
    return config
"""
_ROOT = str(Path(__file__).parent.parent)


def start(rounds: int = 3) -> dict[str, Any]:
    """Seconds to the end of the first step, of each round. The data and its preflight are there before."""
    from vflax.metrics import read_metrics
    from vflax.start import cache_root, resolve_path
    from vflax.tokenizer import load_tokenizer

    vocabulary = load_tokenizer(resolve_path("mini:tokenizer")).vocab_size
    resolve_path("mini:stage1")
    found: dict[str, list[float]] = {"cold": [], "warm": [], "torch": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = folder / "tiny.py"
        config.write_text(_TINY)

        def launch(name: str, cache: Path) -> float:
            workdir = folder / name
            command = [sys.executable, "-m", "vflax.launch", f"--config={config}", f"--workdir={workdir}"]

            def is_done() -> bool:
                return any("loss" in line for line in read_metrics(workdir / "metrics.jsonl"))

            return _until(command, is_done, {"VFLAX_CACHE": str(cache)})

        def fresh_cache(name: str) -> Path:
            """A cache with all but the compiled programs."""
            cache = folder / name
            cache.mkdir()
            for entry in cache_root().iterdir():
                if entry.name != "xla":
                    (cache / entry.name).symlink_to(entry)
            return cache

        launch("first", fresh_cache("first-cache"))  # pages and byte code are read from memory from now on
        for number in range(rounds):
            cache = fresh_cache(f"cache{number}")
            found["cold"].append(launch(f"cold{number}", cache))
            found["warm"].append(launch(f"warm{number}", cache))
            done = folder / f"torch{number}"
            command = [
                sys.executable,
                "-m",
                "benchmarks.cpu",
                f"--torch-first-step={vocabulary}",
                f"--out={done}",
            ]
            found["torch"].append(_until(command, done.exists, {}))
    result = {
        name: {"seconds": round(statistics.median(t), 2), "all": [round(x, 2) for x in t]}
        for name, t in found.items()
    }
    print(f"start: {result}", flush=True)
    return result


def _until(command: Sequence[str], is_done: Callable[[], bool], variables: dict[str, str]) -> float:
    """Seconds from the start of a process until something is done, which ends it."""
    environment = os.environ | {"PYTHONPATH": _ROOT, "JAX_PLATFORMS": "cpu"} | variables
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not is_done():
            if process.poll() not in (None, 0):
                assert process.stderr is not None
                sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-3000:]}")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.communicate()


def torch_first_step(vocabulary: int) -> None:
    """A model of the tiny stage 1's size, a batch of as many samples, one step; all in torch."""
    from benchmarks.theirs import Theirs
    from configs.common import TINY_DECODER as DECODER
    from configs.common import TINY_VISION as VISION
    from configs.stage1 import get_config

    use_all_cores()
    samples = get_config("tiny").batch.samples
    parts = [
        tuple(int(part[key]) for key in ("num_layers", "width", "num_heads", "mlp_dim"))
        for part in (VISION, DECODER)
    ]
    model = llava(int(VISION["patch_size"]), *parts, vocabulary=vocabulary, size=int(VISION["image_size"]))
    text = np.full(samples, 24)
    made = Content.of(Lengths(text, text // 3, text), model)
    side = Theirs(model, Setting())
    float(side.step(side.put(made.padded(range(samples)))))


# --- (d) dispatch -------------------------------------------------------------------------------------------


def dispatch(lengths: Lengths, steps: int = 30, model: LlavaConfig | None = None) -> dict[str, Any]:
    """Milliseconds of the host for a step, the devices idle before; the step itself goes on behind it."""
    model = model or llava(28, TOWER, SIZES["small"])
    made = Content.of(lengths.drawn(64, 2), model)
    rows = made.padded(range(2))
    side = Ours(model, Setting())
    state, frozen = side.start()
    batch = side.put(rows)
    run = side.step(content.capacity_of([rows]), state, frozen, batch)
    host, whole = [], []
    for _ in range(steps):
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, _metrics = run(state, frozen, batch)
        host.append(1e3 * (time.perf_counter() - began))
        jax.block_until_ready(state)
        whole.append(1e3 * (time.perf_counter() - began))
    result = {
        "host_ms": spread(host[2:]),
        "step_ms": spread(whole[2:]),
        "leaves": len(jax.tree.leaves((state, frozen, batch))),
    }
    print(f"dispatch: {result}", flush=True)
    return result


def marks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached by the cases that were run, what was found, and whether that is it."""
    found = []
    if "step" in result:
        for name in ("eager", "compiled"):
            median = result["step"]["small"][f"over_{name}"]["median"]
            found.append(common.mark(f"step over {name}", median, at_least=STEP_MARKS[name]))
    for line in result.get("samples", ()):
        if line["image_tokens"] == 144:
            what = f"samples a second over eager, 144 image tokens, {line['samples_of_a_step']} a step"
            found.append(common.mark(what, line["over"]["eager"]["median"], at_least=SAMPLES_MARK))
    if "dispatch" in result:
        median = result["dispatch"]["host_ms"]["median"]
        found.append(common.mark("host ms of a step", median, at_most=DISPATCH_MS))
    return found


if __name__ == "__main__":
    main()
