"""On one GPU: stage 1 of LLaVA-1.5-7B at its real widths, vflax beside transformers and torch.

    python -m benchmarks.gpu --out=gpu.json --work=DIR                          as many layers as fit, fp32 masters
    python -m benchmarks.gpu --out=gpu32.json --work=DIR --masters=bfloat16     all 32 where the first did not hold them
    python -m benchmarks.gpu --device=cpu --size=tiny --compute=float32         the same program in small, on a CPU

Bridge and decoder learn, the tower is frozen; bfloat16 compute, each layer recomputed in the backward pass, AdamW
behind a clip, on both sides. torch has scaled_dot_product_attention with its flash kernel, fused AdamW, and with
"compiled" torch.compile; vflax has the step that training runs, with vflax/xla_options.py and the attention that it
chooses there.
Each model is in a process of its own, for a framework does not give memory back.

    ceiling    the rate of a large bfloat16 matrix product in either framework; the better one is what MFU is a share of
    fit        the most decoder layers, then the most samples a step, that all sides have memory for
    parity     losses over 20 steps of the same padded rows; where they differ nothing is timed
    time       in turns: `rows`, the same padded rows on both sides, and `samples`, the same number of samples a step,
               ours packed after vflax's plan, theirs dealt out by length as LLaVA does it, padded to the longest

Tokens are those of samples, images included and padding not; model FLOPs are vflax.flops.train_step_flops of these for
either side. What stands in --out is not done again, so a run that was cut off goes on. Needs jax, flax, optax, numpy,
torch and transformers. Exit status 1 where losses differ or a mark is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import common, content
from benchmarks.content import Content, Rows
from benchmarks.setting import Setting, llava
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.flops import train_step_flops
from vflax.freeze import FROZEN, TRAINABLE
from vflax.models.llava import LlavaConfig
from vflax.weights import names

SIDES = ("vflax", "eager", "compiled")
PARITY = 20
# Of losses, relative: bfloat16 has 8 bits, and each framework rounds in other places.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
MFU_MARK, OVER_MARK = 0.55, 1.3
# Samples of a row of ours: that many Vision-Flan samples share one.
PER_ROW = 4
_ROOT = str(Path(__file__).parent.parent)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is tried: patch, tower and picture of the model, the decoder at so many layers; samples a step; the pool."""

    patch: int
    tower: tuple[int, int, int, int]
    picture: int
    layers: tuple[int, ...]
    decoder: tuple[int, int, int]
    vocabulary: int
    samples: tuple[int, ...]
    product: int

    def model(self, layers: int) -> LlavaConfig:
        return llava(self.patch, self.tower, (layers, *self.decoder), self.vocabulary, self.picture)


SIZES = {
    "7b": Size(
        14, (24, 1024, 16, 4096), 336, (32, 28, 24, 20, 16, 12, 8, 4), (4096, 32, 11008), 32000, (32, 16, 8, 4), 8192
    ),
    "tiny": Size(28, (2, 32, 2, 64), 56, (2,), (32, 2, 64), 512, (4,), 256),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process of its own does: see the functions of the same names below."""

    name: str
    side: str
    size: str
    device: str
    compute: str
    masters: str
    layers: int = 0
    samples: int = 0
    steps: int = 0

    @property
    def model(self) -> LlavaConfig:
        return SIZES[self.size].model(self.layers)

    @property
    def setting(self) -> Setting:
        return Setting(compute=self.compute, masters=self.masters, remat="full", lr=2e-5)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", default="7b", choices=SIZES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--compute", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--masters", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--sides", default=",".join(SIDES), help="vflax and some of torch's, with commas between"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side that are timed")
    parser.add_argument("--steps", type=int, default=8, help="that a process times, twice: rows and samples")
    parser.add_argument(
        "--work", type=Path, help="where compiled programs are kept (default: a temporary folder)"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(do(Task(**json.loads(args.task)))))
        return
    result = common.read(args.out)
    with tempfile.TemporaryDirectory() as temporary:
        compare(args, args.work or Path(temporary), result)
    if not all(mark["met"] for mark in result["marks"]):
        sys.exit(1)


def compare(args: argparse.Namespace, work: Path, result: dict[str, Any]) -> None:
    """All of it, step by step; what has been found is in `result`, and in --out, at once."""
    sides = args.sides.split(",")
    size = SIZES[args.size]

    def run(name: str, side: str, layers: int = 0, samples: int = 0, steps: int = 0) -> dict[str, Any]:
        task = Task(name, side, args.size, args.device, args.compute, args.masters, layers, samples, steps)
        began = time.perf_counter()
        found = apart(task, work)
        print(f"{name} {side} {layers} {samples}: {found} ({time.perf_counter() - began:.0f} s)",
              file=sys.stderr, flush=True)  # fmt: skip
        return found

    given = {k: getattr(args, k) for k in ("size", "device", "compute", "masters")}
    if result.setdefault("given", given) != given:
        sys.exit(f"{args.out} is of other options: {result['given']}")
    known = common.versions("jax", "flax", "torch", "transformers")
    made = common.made()
    if result.get("code", made["code"]) != made["code"]:
        sys.exit(f"{args.out} is of other code ({result['code']}, {result['commit']}): name another --out")
    result |= {"command": "python -m benchmarks.gpu", **made, "versions": known}
    if "ceiling" not in result:
        result["ceiling"] = {side: run("ceiling", side) for side in ("vflax", "eager")}
        common.save(args.out, result)
    if "fit" not in result:
        result["fit"] = fit(run, sides, size, max(PARITY, args.steps))
        common.save(args.out, result)
    layers, samples = result["fit"]["layers"], result["fit"]["samples"]
    if "parity" not in result:
        least = min(size.samples)
        losses = {side: run("parity", side, layers, least, PARITY)["losses"] for side in sides}
        result["parity"] = {
            "largest_relative_difference": common.largest_difference(losses),
            "losses": losses,
        }
        common.save(args.out, result)
    if not result["parity"]["largest_relative_difference"] <= TOLERANCE[args.compute]:
        sys.exit(f"the losses differ, so a comparison of speed means nothing: {result['parity']}")
    times: dict[str, list[Any]] = result.setdefault("time", {side: [] for side in sides})
    for number in range(args.rounds):
        for side in common.turns(sides, number):
            if len(times[side]) <= number:
                # A process for each, so that its peak memory is its own.
                times[side].append({what: run(what, side, layers, samples, args.steps) for what in TIMED})
                common.save(args.out, result)
    result["figures"] = figures(result, size.model(layers))
    result["marks"] = marks(result)
    for what, lines in result["figures"].items():
        for side, line in lines.items():
            print(f"{what:8} {side:9} {line}")
    common.write(args.out, result)


def fit(run: Callable[..., dict[str, Any]], sides: Sequence[str], size: Size, steps: int) -> dict[str, Any]:
    """The most layers that all sides hold with the fewest samples, then the most samples with these layers.

    Rows are as long as the longest of so many steps.
    """
    tried: dict[str, Any] = {}

    def all_fit(layers: int, samples: int) -> bool:
        for side in sides:
            tried[f"{side} {layers} {samples}"] = found = run("fit", side, layers, samples, steps)
            if not found["fits"]:
                return False
        return True

    least = min(size.samples)
    layers = next((n for n in size.layers if all_fit(n, least)), 0)
    if not layers:
        sys.exit(f"not even {size.layers[-1]} layers fit: {tried}")
    samples = next(n for n in size.samples if n == least or all_fit(layers, n))
    return {"layers": layers, "samples": samples, "tried": tried}


# --- figures ------------------------------------------------------------------------------------------------


def figures(result: dict[str, Any], model: LlavaConfig) -> dict[str, Any]:
    """{"rows" | "samples": {side: tokens a second, MFU, peak memory, the ratio to vflax}}, medians over rounds."""
    ceiling = max(found["flops_per_second"] for found in result["ceiling"].values())
    lines: dict[str, Any] = {}
    for what in TIMED:
        lines[what] = {}
        for side, rounds in result["time"].items():
            rates = [found[what]["tokens"] / found[what]["seconds"] for found in rounds]
            mfu = [flops(model, found[what]) / found[what]["seconds"] / ceiling for found in rounds]
            lines[what][side] = {
                "tokens_per_second": round(statistics.median(rates), 1),
                "least": round(min(rates), 1),
                "most": round(max(rates), 1),
                "mfu": round(statistics.median(mfu), 4),
                "peak_gib": max(found[what]["peak_gib"] or 0.0 for found in rounds) or None,
            }
        ours = lines[what]["vflax"]["tokens_per_second"]
        for side in result["time"]:
            lines[what][side]["vflax_is_faster"] = round(ours / lines[what][side]["tokens_per_second"], 3)
    return lines


def flops(model: LlavaConfig, counted: dict[str, Any]) -> float:
    """Model FLOPs of what was timed."""
    shapes = {path: SimpleNamespace(shape=entry.param_shape) for path, entry in names.table(model).items()}
    verdict = {path: FROZEN if path.startswith("vision/") else TRAINABLE for path in shapes}
    what = {name: counted[name] for name in ("tokens", "supervised", "context", "images")}
    return train_step_flops(model, shapes, verdict, **what)


def count(batches: Sequence[Rows]) -> dict[str, int]:
    """What train_step_flops wants to know of these batches."""
    return {
        "tokens": sum(int((b["segments"] > 0).sum()) for b in batches),
        "supervised": sum(int((b["labels"] != IGNORE_LABEL).sum()) for b in batches),
        "context": sum(int(((b["positions"] + 1) * (b["segments"] > 0)).sum()) for b in batches),
        # Images are told by their tokens: a row of ours may have slots that are empty.
        "image_tokens": sum(int((b["ids"] == IMAGE_TOKEN_ID).sum()) for b in batches),
    }


def marks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, what was found, and whether that is it."""
    samples = result["figures"]["samples"]
    torch = min(line["vflax_is_faster"] for side, line in samples.items() if side != "vflax")
    return [
        common.mark("MFU of vflax", samples["vflax"]["mfu"], at_least=MFU_MARK),
        common.mark("over the better torch", torch, at_least=OVER_MARK),
    ]


# --- in a process of its own --------------------------------------------------------------------------------


def apart(task: Task, work: Path) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")])),
        "JAX_COMPILATION_CACHE_DIR": str(work / "xla"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    if task.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "benchmarks.gpu", f"--task={json.dumps(dataclasses.asdict(task))}"]
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        text = done.stderr
        if task.name == "fit" and is_memory(text):
            return {"fits": False, "reason": " ".join(text.split())[-300:]}
        raise SystemExit(f"{task} failed:\n{done.stdout[-2000:]}\n{text[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def is_memory(text: str) -> bool:
    """Whether an error says that the device's memory was too small."""
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def do(task: Task) -> dict[str, Any]:
    """In the process of its own."""
    if task.name == "ceiling":
        return ceiling(task)
    side = Vflax(task) if task.side == "vflax" else Torch(task)
    if task.name == "parity":
        return {"losses": side.losses(padded(task, task.steps))}
    if task.name == "fit":
        side.losses(padded(task, task.steps)[:2])
        side.losses([max(own(task, task.steps), key=lambda rows: rows["ids"].size)])
        return {"fits": True, "peak_gib": side.peak_gib()}
    return timed(side, TIMED[task.name](task, task.steps))


def timed(side: Any, batches: list[Rows]) -> dict[str, Any]:
    """Seconds of a pass over the batches, after one that compiles; and what was in it."""
    ready = [side.put(rows) for rows in batches]
    side.run_all(ready)
    began = time.perf_counter()
    side.run_all(ready)
    seconds = time.perf_counter() - began
    counted = count(batches)
    images = counted.pop("image_tokens") // side.task.model.vision.num_tokens
    return {
        **counted,
        "images": images,
        "steps": len(batches),
        "seconds": seconds,
        "peak_gib": side.peak_gib(),
    }


def made(task: Task) -> Content:
    return Content.of(content.lognormal(max(512, task.samples * content.DEVICES)), task.model)


def grouped(task: Task, steps: int) -> list[np.ndarray]:
    """Batches as LLaVA's sampler makes them."""
    words = made(task).lengths.words
    batches: list[np.ndarray] = []
    for seed in range(steps):
        batches += content.length_grouped(words, task.samples, seed)
        if len(batches) >= steps:
            break
    return batches[:steps]


def padded(task: Task, steps: int) -> list[Rows]:
    """The same rows for both sides, all of one length."""
    source, batches = made(task), grouped(task, steps)
    longest = max(int(source.tokens[numbers].max()) for numbers in batches)
    return [source.rows([[n] for n in numbers], -(-longest // 64) * 64, 1) for numbers in batches]


def own(task: Task, steps: int) -> list[Rows]:
    """What a side makes of so many samples a step: packed rows, or rows padded to the batch's longest."""
    source = made(task)
    if task.side != "vflax":
        return [source.padded(numbers) for numbers in grouped(task, steps)]
    plan = source.plan(task.samples, max(1, task.samples // PER_ROW))
    return [source.packed(plan, step)[0] for step in range(steps)]


TIMED = {"rows": padded, "samples": own}


class Vflax:
    """Our side; JAX is imported here and nowhere else."""

    def __init__(self, task: Task) -> None:
        import jax

        from benchmarks.ours import Ours

        self.task, self._jax = task, jax
        self._side = Ours(task.model, task.setting)
        self._state, self._frozen = self._side.start()

    def put(self, rows: Rows) -> Any:
        return self._side.put(rows), content.capacity_of([rows])

    def losses(self, batches: list[Rows]) -> list[float]:
        return [float(x) for x in self.run_all([self.put(rows) for rows in batches])]

    def run_all(self, ready: list[Any]) -> list[Any]:
        """A step on each batch, none waiting for the host; their losses when all are done."""
        capacity = max(capacity for _, capacity in ready)
        losses = []
        for batch, _ in ready:
            step = self._side.step(capacity, self._state, self._frozen, batch)
            self._state, metrics = step(self._state, self._frozen, batch)
            losses.append(metrics["loss"])
        return self._jax.block_until_ready((losses, self._state))[0]

    def peak_gib(self) -> float | None:
        stats = self._jax.local_devices()[0].memory_stats()
        return round(stats["peak_bytes_in_use"] / 2**30, 2) if stats else None


class Torch:
    """Their side; torch is imported here and nowhere else."""

    def __init__(self, task: Task) -> None:
        import torch

        from benchmarks.theirs import Theirs

        torch.backends.cuda.matmul.allow_tf32 = True
        self.task, self._torch = task, torch
        self._side = Theirs(task.model, task.setting, task.device, compiled=task.side == "compiled")

    def put(self, rows: Rows) -> Any:
        return self._side.put(rows)

    def losses(self, batches: list[Rows]) -> list[float]:
        return [float(x) for x in self.run_all([self.put(rows) for rows in batches])]

    def run_all(self, ready: list[Any]) -> list[Any]:
        losses = [self._side.step(batch) for batch in ready]
        if self.task.device == "cuda":
            self._torch.cuda.synchronize()
        return losses

    def peak_gib(self) -> float | None:
        if self.task.device != "cuda":
            return None
        return round(self._torch.cuda.max_memory_allocated() / 2**30, 2)


def ceiling(task: Task, repeats: int = 30) -> dict[str, Any]:
    """FLOP/s of products of large matrices of random numbers in the compute dtype."""
    n = SIZES[task.size].product
    if task.side == "vflax":
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (n, n), jnp.dtype(task.compute)) for key in keys)
        product = jax.jit(lambda a, b: a @ b)
        multiply, wait = (lambda: product(a, b)), jax.block_until_ready
        name = jax.devices()[0].device_kind
    else:
        import torch

        a, b = (torch.randn(n, n, device=task.device).to(getattr(torch, task.compute)) for _ in range(2))
        multiply = lambda: a @ b  # noqa: E731
        wait = (lambda _: torch.cuda.synchronize()) if task.device == "cuda" else (lambda _: None)
        name = torch.cuda.get_device_name() if task.device == "cuda" else "cpu"
    wait([multiply() for _ in range(5)])
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        wait([multiply() for _ in range(repeats)])
        rates.append(2.0 * n**3 * repeats / (time.perf_counter() - began))
    return {"device": name, "flops_per_second": statistics.median(rates), "all": rates}


if __name__ == "__main__":
    main()
