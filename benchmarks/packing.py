"""How full the rows are: the packing plan beside offline best fit, streaming first fit and no packing.

    [VFLAX_SHARED_DATA=DIR] python -m benchmarks.packing --out=benchmarks/results/packing.json

Data sets of SAMPLES one-image samples of 576 image tokens: `lognormal`, texts drawn from a log-normal distribution with
a mean of 128 tokens and a 90th percentile of 210; and, where DIR holds vision-flan-samples/, llava-gpt4/ and
tokenizer/llama2-tokenizer.model, `real`, lengths resampled from real Vision-Flan samples in vicuna_v1, and `captions`,
from real COCO captions in plain, at stage 0's T and S alone. For each T (tokens of a row) and S (images) every packer
gets the same T, S and C (supervised tokens):

    plan        vflax.data.packing, 128 samples per step: used tokens over all rows of an epoch, the last step included
    offline     best fit in decreasing order, over the whole epoch at once
    streaming   first fit into 64 open rows, which are given out when a sample fits into none: what Grain's
                FirstFitPackIterDataset does (it is run on the first 2,000 samples, and must make as many rows)
    one each    a row for each sample

The plan of 1,664,261 samples is made in a process of its own, which tells its seconds and peak memory. Exit status 1
when a plan is more than 0.01 under offline best fit, or the large one takes over 60 s or 1 GB.
"""

from __future__ import annotations

import bisect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from data_pipeline.synthesize.contexts import read_contexts
from vflax.constants import IGNORE_LABEL
from vflax.conversation import expand, read_llava, render
from vflax.data.fill import Capacity
from vflax.data.packing import PackPlan
from vflax.tokenizer import load_tokenizer

IMAGE_TOKENS = 576
SAMPLES = 40_000
BATCH = 128
VISION_FLAN = 1_664_261
OPEN_ROWS = 64
TABLE = [
    (1408, 2), (1536, 2), (2048, 3), (2176, 3), (2304, 3), (2816, 4), (2944, 4), (3072, 4),
    (3456, 5), (3584, 5), (3712, 5), (4096, 5), (4096, 6), (4096, 7), (4224, 6), (4352, 6),
]  # fmt: skip
STAGE_0 = [(2432, 4)]
# A text of mean 128 and 90th percentile 210 has the logarithm's mean and deviation MU and SIGMA: the smaller of the two
# solutions of MU + SIGMA^2 / 2 = log 128 and MU + 1.2816 SIGMA = log 210.
SIGMA = 1.2815516 - (1.2815516**2 - 2 * np.log(210 / 128)) ** 0.5
MU = np.log(128) - SIGMA**2 / 2
Lengths = tuple[np.ndarray, np.ndarray, np.ndarray]


def lognormal(n: int) -> Lengths:
    """(tokens, images, supervised tokens); of a text so many are supervised as of the real ones, a fifth."""
    rng = np.random.default_rng(0)
    text = np.maximum(2, np.rint(rng.lognormal(MU, SIGMA, n)).astype(int))
    supervised = np.minimum(text - 1, rng.geometric(1 / 24, n))
    return IMAGE_TOKENS + text, np.ones(n, int), supervised


def real(n: int, shared: Path) -> Lengths:
    """(tokens, images, supervised tokens) of real samples, drawn with repeats."""
    records = json.loads((shared / "vision-flan-samples" / "annotation.json").read_text("utf-8"))
    return resampled(n, shared, [record["conversations"] for record in records], "vicuna_v1")


def captions(n: int, shared: Path) -> Lengths:
    """The same of real captions."""
    contexts = read_contexts(shared / "llava-gpt4" / "caps_boxes_coco2014_val_80.jsonl")
    turns = [
        [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        for context in contexts
        for caption in context.captions
    ]
    return resampled(n, shared, turns, "plain")


def resampled(n: int, shared: Path, conversations: list[list[dict[str, str]]], template: str) -> Lengths:
    """Lengths of conversations about one image each, drawn with repeats."""
    tokenizer = load_tokenizer(shared / "tokenizer" / "llama2-tokenizer.model")
    measured = []
    for turns in conversations:
        conversation, _ = read_llava(turns, 1, "front", "")
        ids, labels = expand(render(conversation, template, tokenizer), IMAGE_TOKENS)
        measured.append((len(ids), int((labels != IGNORE_LABEL).sum())))
    tokens, supervised = np.array(measured)[np.random.default_rng(0).integers(0, len(measured), n)].T
    return tokens, np.ones(n, int), supervised


def offline_best_fit(lengths: Lengths, capacity: Capacity) -> int:
    """Rows of best fit in decreasing order: each sample into the row with the least room of those that have enough."""
    tokens, images, supervised = lengths
    n = len(tokens)
    order = np.argsort(-tokens, kind="stable")
    left: list[int] = []  # of each row: supervised tokens that it can still take
    # [f]: the rows with f free slots as numbers room * n + row, ascending
    rooms: list[list[int]] = [[] for _ in range(capacity.images + 1)]
    for length, count, learned in np.stack([tokens, images, supervised], axis=1)[order].tolist():
        best: tuple[int, int, int] | None = None
        for free in range(count, capacity.images + 1):
            at = bisect.bisect_left(rooms[free], length * n)
            while at < len(rooms[free]) and left[rooms[free][at] % n] < learned:
                at += 1
            if at < len(rooms[free]) and (best is None or rooms[free][at] < best[0]):
                best = rooms[free][at], free, at
        if best is None:
            left.append(capacity.supervised)
            room, row, free = capacity.tokens, len(left) - 1, capacity.images
        else:
            (room, row), free = divmod(best[0], n), best[1]
            del rooms[free][best[2]]
        left[row] -= learned
        bisect.insort(rooms[free - count], (room - length) * n + row)
    return len(left)


def streaming_first_fit(lengths: Lengths, capacity: Capacity) -> int:
    """Rows of first fit into open rows, all of which are given out when a sample fits into none."""
    full = np.array([capacity.tokens, capacity.images, capacity.supervised])
    used = np.zeros((OPEN_ROWS, 3), int)
    rows = 0
    for sample in np.stack(lengths, axis=1):
        fits = (used + sample <= full).all(axis=1)
        row = int(np.argmax(fits))
        if not fits[row]:
            rows += OPEN_ROWS
            used[:], row = 0, 0
        used[row] += sample
    return rows + int((used[:, 0] > 0).sum())


def grain_first_fit(lengths: Lengths, capacity: Capacity) -> int:
    """Rows that Grain's packer makes."""
    import grain
    from grain.experimental import FirstFitPackIterDataset

    source = [
        {"tokens": np.ones(t, np.int8), "images": np.ones(i, np.int8), "supervised": np.ones(s, np.int8)}
        for t, i, s in zip(*lengths, strict=True)
    ]
    packed = FirstFitPackIterDataset(
        grain.MapDataset.source(source).to_iter_dataset(),
        length_struct={
            "tokens": capacity.tokens,
            "images": capacity.images,
            "supervised": capacity.supervised,
        },
        num_packing_bins=OPEN_ROWS,
    )
    return sum(1 for _ in packed)


def compare(lengths: Lengths, length: int, slots: int) -> dict[str, Any]:
    """One line of the table."""
    began = time.monotonic()
    plan = PackPlan(*lengths, samples=BATCH, max_length=length, slots=slots, packing=True, seed=0)
    stats = plan.stats()
    seconds = time.monotonic() - began
    total = int(lengths[0].sum())
    first = tuple(values[:2000] for values in lengths)
    assert streaming_first_fit(first, plan.capacity) == grain_first_fit(first, plan.capacity)

    def fill(rows: int) -> float:
        return round(total / (rows * length), 4)

    return {
        "T": length,
        "S": slots,
        "C": plan.capacity.supervised,
        "rows_per_step": plan.rows_per_step,
        "samples_per_step": round(stats.samples_per_step, 2),
        "plan": round(stats.fill, 4),
        "offline": fill(offline_best_fit(lengths, plan.capacity)),
        "streaming": fill(streaming_first_fit(lengths, plan.capacity)),
        "one_each": fill(len(lengths[0])),
        "no_row_can_be_fuller": round(min(1.0, total / len(lengths[0]) * slots / length), 4),
        "plan_seconds": round(seconds, 2),
    }


def peak_mb() -> int:
    """The high-water mark of this process's resident set."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def plan_vision_flan() -> dict[str, Any]:
    """Seconds and peak memory of a plan as large as Vision-Flan, in this process."""
    lengths = lognormal(VISION_FLAN)
    before = peak_mb()
    began = time.monotonic()
    plan = PackPlan(*lengths, samples=BATCH, max_length=2944, slots=4, packing=True, seed=0)
    seconds = time.monotonic() - began
    stats = plan.stats()
    return {
        "samples": VISION_FLAN,
        "steps": stats.steps,
        "fill": round(stats.fill, 4),
        "images_per_step": round(stats.images_per_step, 2),
        "images_spread": round(stats.images_spread, 2),
        "seconds": round(seconds, 1),
        "peak_rss_mb": peak_mb(),
        "of_these_before_the_plan_mb": before,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="only the large plan, printed as JSON")
    args = parser.parse_args()
    if args.large:
        print(json.dumps(plan_vision_flan()))
        return
    sets = {"lognormal": (lognormal(SAMPLES), TABLE)}
    if "VFLAX_SHARED_DATA" in os.environ:
        shared = Path(os.environ["VFLAX_SHARED_DATA"])
        sets["real"] = real(SAMPLES, shared), TABLE
        sets["captions"] = captions(SAMPLES, shared), STAGE_0
    result: dict[str, Any] = {
        "command": "python -m benchmarks.packing",
        **common.made(),
        "samples": SAMPLES,
        "samples_per_step": BATCH,
    }
    bad = []
    for name, (lengths, table) in sets.items():
        text = lengths[0] - IMAGE_TOKENS
        print(f"{name}: texts of {text.mean():.1f} tokens, 90th percentile {np.percentile(text, 90):.0f}")
        print("   T  S   C  rows    plan offline streaming one each   bound")
        lines = []
        for length, slots in table:
            kept = lengths[0] <= length  # lengths.measure cuts the others
            line = compare(tuple(values[kept] for values in lengths), length, slots)
            print(
                f"{length:5}{slots:3}{line['C']:5}{line['rows_per_step']:5}{line['plan']:9}{line['offline']:8}"
                f"{line['streaming']:9}{line['one_each']:9}{line['no_row_can_be_fuller']:9}",
                flush=True,
            )
            if line["plan"] < line["offline"] - 0.01:
                bad.append(f"{name} T={length} S={slots}: {line['plan']} against {line['offline']}")
            lines.append(line)
        result[name] = {
            "text_mean": round(float(text.mean()), 1),
            "text_p90": float(np.percentile(text, 90)),
            "table": lines,
        }
    command = [sys.executable, "-m", "benchmarks.packing", "--large"]
    result["vision_flan"] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    print(result["vision_flan"])
    if result["vision_flan"]["seconds"] > 60 or result["vision_flan"]["peak_rss_mb"] > 1000:
        bad.append(f"the large plan: {result['vision_flan']}")
    common.write(args.out, result)
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
