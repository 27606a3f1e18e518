"""XLA options by platform, each with its reason: one table for all that computes with a model's weights (training step,
evaluation, answers), in a run as in the planner and the benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Option(NamedTuple):
    """value: as jax.stages.Lowered.compile takes it; reason: why it is not left at XLA's default."""

    value: str
    reason: str


OPTIONS: dict[str, dict[str, Option]] = {
    "tpu": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": Option(
            "1000000",
            "on 16 chips XLA turns an all-gather of weights and its product into a loop over slices of the weights, "
            "whose estimated cycles are more than twice those of gather and product one after the other, in a step as "
            "where an evaluation reads prompts; weights split along tensor, as for single answers, have no such loop",
        ),
    },
    # Empty: vflax has not been measured on a GPU, and without that no option has a reason.
    "gpu": {},
    # Empty: none has been looked for; CPUs run the tests and models small enough for XLA's defaults.
    "cpu": {},
}


def compiler_options(platform: str) -> dict[str, str]:
    """{option: value} for jax.jit(..., compiler_options=...) on "tpu", "gpu" or "cpu"."""
    return {name: option.value for name, option in OPTIONS[platform].items()}
