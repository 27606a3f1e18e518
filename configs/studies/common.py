"""What studies share: their launches' config, and how cells are made of arms and seeds.

    python -m vflax.launch --config=configs/studies/common.py:stage1-tiny --workdir=...      one cell by hand

A cell is trained as the recipe of its stage says. But nothing is exported, checkpoints are kept by age alone, and at
its end every cell is asked the same questions, whatever it was trained on: the benchmarks that need no judge, and at
the tiny size every task of the built-in data. Variants: stage0-, stage1-, stage2- and one_stage- with 13b, 7b, tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import common, one_stage, stage0, stage1, stage2
from vflax.errors import UserError
from vflax.study.grid import Arm, Cell, Metric, NoWorse, Run

SIZES = ("13b", "7b", "tiny")
_STAGES = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "one_stage": one_stage}
PATH = "configs/studies/common.py"
# Hugging Face's default seed, which LLaVA has, and the next ones.
SEEDS = {"13b": (42,), "7b": (42,), "tiny": (42, 43, 44)}
# What is to be read in data/: docs/data.md has the commands.
FLAN, GPT4 = "data/vision-flan", "data/llava-instruct-150k"
# A tiny cell sees 25,600 samples, half of what configs/stage1.py:tiny sees: nothing is learned to the end, and there is
# room above every arm. What stage 2 starts from, and is held against, is trained as long as the recipe says.
TINY_SAMPLES, TINY_STEPS = 4000, 800
# What to know of every tiny study: of all, and of those that ask MME and POPE.
ONE_START = (
    "All seeds start from one and the same tiny stage 0. Intervals are of what is trained here, given that start: "
    "another one may move all arms by more."
)
AT_THE_FLOOR = (
    "One of the 34 tasks is answered with yes or no (GRID+presence), and from this start no tiny model has learned it: "
    "in the formats of MME and POPE they do no better than one same answer to everything. A claim on these then cannot "
    "be decided; what the models can do is told by the accuracy."
)


def get_config(variant: str = "stage1-7b") -> ConfigDict:
    """A stage at a size, as a study trains and asks it."""
    stage, _, size = variant.partition("-")
    common.check_variant(variant, tuple(f"{stage}-{size}" for stage in _STAGES for size in SIZES))
    config = _STAGES[stage].get_config(size)
    config.variant = variant
    config.export = False
    config.checkpoint.best_metric, config.checkpoint.keep = "", 1
    config.data.eval_split = ""
    config.evaluate.every = 0
    if size == "tiny":
        config.checkpoint.every = 1000
        config.evaluate.tasks = ("accuracy", "mme", "pope")
        config.evaluate.data, config.evaluate.custom = "mini:benchmarks", True
        # All tasks of stage 1 and the long answers of stage 2, of which no picture is in any training data.
        config.evaluate.sources = (
            common.questions("mini:stage1", "test"),
            common.questions("mini:stage2", "test"),
        )
        config.evaluate.samples_per_task = 25
        config.evaluate.max_new_tokens = 120
        config.data.max_duplicate_share = (
            1.0  # of questions that have near copies; docs/mini_dataset.md has how many
        )
    else:
        config.evaluate.tasks = ("mme", "pope", "mmbench", "mmmu")
        config.evaluate.data = "benchmarks"
        config.evaluate.sources = ()
    return config


def check_size(variant: str, *more: str) -> None:
    """Refuse a variant that studies do not have; `more`: what this one has beside the sizes."""
    if variant not in SIZES:
        raise UserError(f"the study has no variant {variant!r}; it has: {', '.join((*SIZES, *more))}")


def seeds_of(variant: str, seeds: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(seeds) if seeds else SEEDS[variant]


def run(stage: str, size: str, seed: int, changes: Mapping[str, Any], start: Run | None = None) -> Run:
    """A launch of `get_config`."""
    return Run(f"{PATH}:{stage}-{size}", {"seed": seed, **changes}, start)


def base(size: str, seed: int) -> Run:
    """VISION-FLAN BASE as the recipe makes it: from it stage 2 starts."""
    return run("stage1", size, seed, {})


def variation(size: str, seed: int, changes: Mapping[str, Any] | None = None) -> Run:
    """Stage 1 with `changes`; at the tiny size on fewer samples, as many for every variation: all cost the same."""
    own = {"data.budget": TINY_SAMPLES, "steps": TINY_STEPS} if size == "tiny" else {}
    return run("stage1", size, seed, own | dict(changes or {}))


def without(size: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Changes of stage 1 that leave tasks out. Of Vision-Flan's, whose releases differ, those that the data has."""
    return {"data.sources[0].exclude": tuple(tasks)} | (
        {} if size == "tiny" else {"data.sources[0].strict": False}
    )


def grid(arms: Sequence[Arm], seeds: Sequence[int], make: Callable[[Arm, int], Run]) -> tuple[Cell, ...]:
    """A cell for each arm and seed, seeds outermost: after the first of them there is something to look at."""
    return tuple(Cell(arm.name, seed, make(arm, seed)) for seed in seeds for arm in arms)


def benchmarks(
    size: str, *more: Metric, mme: Mapping[str, float] | None = None, said: str = ""
) -> tuple[Metric, ...]:
    """The metrics of every study: MME, POPE, at full size MMBench and MMMU, at the tiny size accuracy over all tasks.

    A tiny model is asked no MMBench: nothing teaches it to answer with a letter, every arm would stand at the floor.
    Of POPE it is the accuracy there, since F1 is 66.7 for one that always says yes.

    Args:
        size: of the study.
        more: metrics of its own.
        mme: {arm: the paper's MME}.
        said: where that stands in the paper.
    """
    label = f"MME ({said})" if said else ""
    if size == "tiny":
        return (
            Metric("accuracy", "accuracy over all 31 short tasks, %", ("accuracy",)),
            # Always yes: half of the questions of each subtask, and no picture with both.
            Metric(
                "mme", "MME format, points of 800", ("mme",), floor=200, paper=mme or {}, paper_label=label
            ),
            Metric("pope", "POPE format, accuracy in %", ("pope/accuracy",), floor=50),
            Metric("neither", "MME format: neither yes nor no, %", ("mme/unparsed",), better=""),
            *more,
        )
    return (
        Metric("mme", "MME, points of 2,000", ("mme",), floor=500, paper=mme or {}, paper_label=label),
        Metric("mmbench", "MMBench, %", ("mmbench",)),
        Metric("mmmu", "MMMU, %", ("mmmu",)),
        Metric("pope", "POPE, F1 in %", ("pope",)),
        *more,
    )


def capability(size: str) -> str:
    """The metric that stands for all that a model can do."""
    return "accuracy" if size == "tiny" else "mmbench"


def nearly(metric: str, arm: str, other: str) -> NoWorse:
    """ "Nearly as good": at most 5 points of percent worse, which is chosen here for all studies before any is run."""
    return NoWorse(metric, arm, other, 5.0)
