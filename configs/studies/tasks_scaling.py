"""More tasks, each with all that it has: does every benchmark rise with their number?

    python -m vflax.study --study=tasks_scaling:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690).
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.studies import common
from vflax.study.grid import Arm, Claim, Run, Study, Trend

_TASKS = {"13b": (10, 20, 50, 100, 187), "7b": (10, 20, 50, 100, 187), "tiny": (8, 16, 34)}


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid; arms are numbers of tasks."""
    common.check_size(variant)
    arms = tuple(Arm(f"{count} tasks", count) for count in _TASKS[variant])
    many = arms[-1].name

    def make(arm: Arm, seed: int) -> Run:
        assert arm.x is not None
        # All of them is stage 1 as it is, which other studies have, too.
        own: dict[str, object] = {} if arm.name == many and variant != "tiny" else {"data.tasks": int(arm.x)}
        if variant == "tiny":
            # Two passes over up to 160 instances of each: with the number of tasks grows what is seen of them.
            own |= {"data.sources[0].cap": 160, "data.budget": 0, "steps": 0, "epochs": 2}
        return common.variation(variant, seed, own)

    every = common.capability(variant)
    source = "[VF], on the number of tasks"
    return Study(
        name="tasks_scaling",
        variant=variant,
        title="more tasks",
        question="So many tasks, drawn by the seed, each with "
        + ("up to 160 instances" if variant == "tiny" else "all its instances")
        + ": what do more of them bring?",
        axis="tasks",
        arms=arms,
        cells=common.grid(arms, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(variant),
        claims=(
            Claim("MME rises with the number of tasks.", source, Trend("mme")),
            Claim(
                "MMBench rises with the number of tasks."
                if every == "mmbench"
                else "What all tasks ask is answered better with their number.",
                source,
                Trend(every),
            ),
            Claim("POPE rises with the number of tasks.", source, Trend("pope")),
        ),
        notes=(
            "With the tasks grows the number of instances, as in the paper: tasks_vs_instances holds that still.",
            *((common.AT_THE_FLOOR, common.ONE_START) if variant == "tiny" else ()),
        ),
    )
