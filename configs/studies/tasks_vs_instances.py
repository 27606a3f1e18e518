"""More tasks or more instances of each? A fixed number of instances spread over few tasks and over many.

    python -m vflax.study --study=tasks_vs_instances:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690).
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.studies import common
from vflax.study.grid import Arm, Claim, Difference, Run, Study, Trend

_TASKS = {"13b": (10, 20, 50, 100, 187), "7b": (10, 20, 50, 100, 187), "tiny": (8, 16, 34)}
# [VF] 100,000. At the tiny size eight tasks have that many for nearly every seed.
_BUDGET = {"13b": 100_000, "7b": 100_000, "tiny": 1200}


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid; arms are numbers of tasks."""
    common.check_size(variant)
    budget = _BUDGET[variant]
    arms = tuple(Arm(f"{count} tasks", count) for count in _TASKS[variant])
    few, many = arms[0].name, arms[-1].name

    def make(arm: Arm, seed: int) -> Run:
        assert arm.x is not None
        changes = {"data.tasks": int(arm.x), "data.budget": budget, "data.spread": "tasks"}
        return common.variation(variant, seed, changes)

    every = common.capability(variant)
    return Study(
        name="tasks_vs_instances",
        variant=variant,
        title="more tasks or more instances of each",
        question=f"{budget:,} instances of few tasks or of many, drawn by the seed, as many of each: which is better?",
        axis="tasks",
        arms=arms,
        cells=common.grid(arms, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(
            variant, mme={few: 723.9, many: 1314.3}, said="[VF] Table 3: 10 and 187 tasks, 100,000 instances"
        ),
        claims=(
            Claim(
                "Many tasks beat few with as many instances: MME.",
                "[VF] Table 3",
                Difference("mme", many, few),
            ),
            Claim("The more tasks, the better, in all that is asked.", "[VF] Table 3", Trend(every)),
        ),
        notes=(
            "Each seed draws other tasks: the spread over seeds is that of the choice of tasks, too.",
            "What is asked is the same for every arm: few tasks cannot teach all of it, and that is the question.",
            *((common.AT_THE_FLOOR, common.ONE_START) if variant == "tiny" else ()),
        ),
    )
