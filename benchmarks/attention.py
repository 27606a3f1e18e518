"""Attention on a CPU: blocks beside the reference, forward and backward, by tokens of a row.

    python -m benchmarks.attention --out=benchmarks/results/attention.json

Two rows of packed samples of 270 tokens, four heads of 64, float32; both in turns, medians. From which length on
attention="auto" takes blocks (vflax/models/attention.py) is read off this.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from vflax.models.attention import attention

LENGTHS = (256, 384, 512, 768, 1024, 2048, 4096)
ROWS, HEADS, HEAD_DIM, SAMPLE = 2, 4, 64, 270
ROUNDS = 15


def main() -> None:
    args = common.parser(__doc__).parse_args()
    result = {
        **common.made(),
        "versions": common.versions("jax"),
        "lengths": {length: measure(length) for length in LENGTHS},
    }
    common.write(args.out, result)


def measure(length: int) -> dict[str, Any]:
    """Milliseconds of output and gradients by backend, their ratio, and the largest difference."""
    keys = jax.random.split(jax.random.key(0), 4)
    given = [jax.random.normal(key, (ROWS, length, HEADS, HEAD_DIM)) for key in keys]
    # The second row's samples end elsewhere.
    starts = jnp.array([0, SAMPLE // 3])[:, None]
    segments = (jnp.arange(length) + starts) // SAMPLE + 1
    runs = {backend: both_ways(backend, segments) for backend in ("blockwise", "reference")}
    results = {name: run(*given) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name in common.turns(list(runs), number):
            began = time.perf_counter()
            jax.block_until_ready(runs[name](*given))
            times[name].append(1e3 * (time.perf_counter() - began))
    pairs = zip(results["blockwise"], results["reference"], strict=True)
    return {
        **{f"{name}_ms": round(statistics.median(found), 2) for name, found in times.items()},
        "reference_over_blockwise": round(
            statistics.median(r / b for b, r in zip(times["blockwise"], times["reference"], strict=True)), 2
        ),
        "largest_difference": float(f"{max(float(jnp.abs(a - b).max()) for a, b in pairs):.1e}"),
    }


def both_ways(backend: str, segments: jax.Array) -> Any:
    """A compiled function of q, k, v and the gradient of the output: (output, gradients of q, k and v)."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        own = {"q_segments": segments, "kv_segments": segments}
        out, backward = jax.vjp(lambda *x: attention(*x, **own, causal=True, backend=backend), q, k, v)
        return out, *backward(grad)

    return jax.jit(run)


if __name__ == "__main__":
    main()
