"""Do the tasks that annotators invented help? Stage 1 without them, and without as many others.

    python -m vflax.study --study=novel_tasks:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690). Which tasks are novel: configs/studies/task_groups.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from configs.studies import common, task_groups
from vflax.study.grid import Arm, Claim, Difference, Metric, Run, Study

_ARMS = (Arm("all tasks"), Arm("without novel tasks"), Arm("without as many others"))


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid: all tasks, all but the novel ones, all but as many of the others, drawn by the seed."""
    common.check_size(variant)
    tiny = variant == "tiny"
    kind = "mini" if tiny else "vision_flan"
    novel = task_groups.novel(kind)
    others = sorted({task for tasks in task_groups.groups(kind).values() for task in tasks} - set(novel))

    def make(arm: Arm, seed: int) -> Run:
        if arm.name == "all tasks":
            return common.variation(variant, seed)
        left_out = (
            novel if arm.name == "without novel tasks" else random.Random(seed).sample(others, len(novel))
        )
        return common.variation(variant, seed, common.without(variant, sorted(left_out)))

    source = "[VF], on novel tasks"
    own: tuple[Metric, ...] = ()
    if tiny:
        asked = tuple(f"accuracy/{task}" for task in novel)
        own = (
            Metric("novel", "accuracy on the novel tasks, %", asked),
            Metric("existing", "accuracy on the others, %", ("accuracy/*",), without=asked),
            Metric(
                "novel blind",
                "the same answered to another's picture, %",
                tuple(f"blind/{t}" for t in novel),
                better="",
            ),
        )
    return Study(
        name="novel_tasks",
        variant=variant,
        title="novel tasks held out",
        question="Stage 1 without the tasks that annotators invented on pictures of other data, and without as many "
        "others: do they help where they are not asked, and what does a model make of them that never saw them?",
        axis="",
        arms=_ARMS,
        cells=common.grid(_ARMS, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(variant, *own),
        claims=(
            Claim("Novel tasks help: MME falls without them.", source,
                  Difference("mme", "all tasks", "without novel tasks")),
            Claim("They help more than as many others.", source,
                  Difference("mme", "without as many others", "without novel tasks")),
            *(
                [Claim("... in the miniature: the other tasks are answered worse without them.", source,
                       Difference("existing", "all tasks", "without novel tasks")),
                 Claim("What was never trained on is answered better than blindly (instructions generalise).", source,
                       Difference("novel", "without novel tasks", "without novel tasks", against="novel blind"))]
                if tiny
                else [Claim("... MMBench, too.", source, Difference("mmbench", "all tasks", "without novel tasks"))]
            ),
        ),
        notes=(
            "Which tasks are novel is our own reading: the paper's list is not published as a file.",
            *(
                (
                    "Every arm has as many samples: without some tasks there are more of each other one.",
                    common.AT_THE_FLOOR,
                    common.ONE_START,
                )
                if tiny
                else ()
            ),
        ),
    )  # fmt: skip
