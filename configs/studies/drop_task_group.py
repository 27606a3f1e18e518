"""What does each kind of task bring? Stage 1 without generation, without question answering, without classification.

    python -m vflax.study --study=drop_task_group:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690). Which task is of which kind: configs/studies/task_groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.studies import common, task_groups
from vflax.study.grid import Arm, Claim, Difference, Metric, Run, Study

# Without question answering there are 3,440 left.
_TINY_SAMPLES = 3000
_GROUPS = ("generation", "question answering", "classification")


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid: all tasks, and all but each group."""
    common.check_size(variant)
    tiny = variant == "tiny"
    groups = task_groups.groups("mini" if tiny else "vision_flan")
    arms = (Arm("all tasks"), *(Arm(f"without {group}") for group in _GROUPS))

    def make(arm: Arm, seed: int) -> Run:
        samples = {"data.budget": _TINY_SAMPLES} if tiny else {}
        if arm.name == "all tasks":
            return common.variation(variant, seed, samples)
        group = arm.name.removeprefix("without ").replace(" ", "_")
        return common.variation(variant, seed, samples | common.without(variant, groups[group]))

    source = "[VF], on groups of tasks"
    own = [Metric("llava_bench", "LLaVA-Bench", ("llava_bench",))]
    if tiny:
        own += [
            Metric(f"accuracy {group}", f"accuracy, {group}, %",
                   tuple(f"accuracy/{task}" for task in groups[group.replace(" ", "_")]))
            for group in _GROUPS[1:]
        ]  # fmt: skip
        own.append(
            Metric("words", "words where a sentence is asked for, median", ("words/GENERATION+*",), better="")
        )
    return Study(
        name="drop_task_group",
        variant=variant,
        title="without a kind of task",
        question="Stage 1 without all tasks of a kind"
        + (", on as many samples of the others" if tiny else "")
        + ": what is lost?",
        axis="",
        arms=arms,
        cells=common.grid(arms, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(variant, *own),
        claims=(
            Claim("Without generation LLaVA-Bench falls.", source,
                  Difference("llava_bench", "all tasks", "without generation")),
            *(
                [Claim("... in the miniature: answers in sentences are no longer given.", source,
                       Difference("words", "all tasks", "without generation", 1.0))]
                if tiny else []
            ),
            Claim("Without question answering MME falls.", source,
                  Difference("mme", "all tasks", "without question answering")),
            Claim("Without classification MME falls.", source,
                  Difference("mme", "all tasks", "without classification")),
        ),
        notes=(
            "Which task is of which kind is our own reading: the paper's list is not published as a file.",
            *((common.AT_THE_FLOOR, common.ONE_START) if tiny else ()),
        ),
    )  # fmt: skip
