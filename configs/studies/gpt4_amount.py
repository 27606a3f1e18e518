"""How much GPT-4 data does stage 2 need, and what does more of it cost?

    python -m vflax.study --study=gpt4_amount:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690).
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.studies import common
from vflax.study.grid import Arm, Claim, Difference, Metric, Run, Study, Trend

# [VF] up to all of LLaVA-Instruct.
_AMOUNTS = {"13b": (0, 1000, 10_000, 50_000, 157_712), "tiny": (0, 30, 100, 300, 1000)}
_AMOUNTS["7b"] = _AMOUNTS["13b"]


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid; arms are numbers of examples, 0 is the end of stage 1."""
    common.check_size(variant)
    tiny = variant == "tiny"
    arms = tuple(Arm(f"{count:,} examples", count) for count in _AMOUNTS[variant])
    none, most = arms[0].name, arms[-1].name
    enough = arms[3 if tiny else 1].name

    def make(arm: Arm, seed: int) -> Run:
        return stage2(variant, seed, int(arm.x or 0))

    # Of held-out questions for long answers; at full size, where an arm has all of LLaVA-Instruct, of LLaVA-Bench's.
    words, invented = (
        ("words_long", "hallucinated") if tiny else ("llava_bench/words", "llava_bench/hallucinated")
    )
    source = "[VF], on the amount of GPT-4 data"
    return Study(
        name="gpt4_amount",
        variant=variant,
        title="how much GPT-4 data",
        question="Stage 2 from the end of stage 1 with so many examples of long answers, one pass over them"
        + (" (the miniature: three)" if tiny else "")
        + ": what do answers gain, and what is lost?",
        axis="examples of stage 2",
        arms=arms,
        cells=common.grid(arms, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(
            variant,
            Metric("yes", "POPE: share of yes, %", ("pope/yes_ratio",), better=""),
            Metric("llava_bench", "LLaVA-Bench", ("llava_bench",)),
            Metric("words", "words of a long answer, median", (words,), better=""),
            Metric("hallucination", "mentions of what is not there, %", (invented,), better="lower"),
        ),
        claims=(
            Claim("A little GPT-4 data is enough for answers that people prefer.", source,
                  Difference("llava_bench", enough, none)),
            Claim("... and for long answers where they are asked for.", source, Difference("words", enough, none, 5.0)),
            Claim("More GPT-4 data raises hallucination.", source, Trend("hallucination")),
            Claim("More GPT-4 data lowers MME (in the paper it falls or stays).", source, Trend("mme", -1)),
            *(
                [Claim("... in the miniature: all tasks are answered worse with more of it.", source,
                       Trend("accuracy", -1))]
                if tiny else []
            ),
            Claim("More GPT-4 data raises the share of yes.", source, Trend("yes")),
            Claim("More GPT-4 data costs truth where things are not there: POPE.", source,
                  Difference("pope", none, most)),
        ),
        notes=(
            "The long answers are written by rules, every sentence true. What GPT-4's own errors teach, and its "
            "habit of saying yes, is not in them: the miniature can show only what length and form do.",
            common.AT_THE_FLOOR,
            common.ONE_START,
        )
        if tiny
        else (),
    )  # fmt: skip


def stage2(size: str, seed: int, count: int) -> Run:
    """Stage 2 with so many examples, one pass over them (tiny: three); of none, the end of stage 1."""
    start = common.base(size, seed)
    if not count:
        return start
    once = {"data.budget": count, "steps": 0, "epochs": 1}
    if size == "tiny":
        # As many samples a step as the paper's batch of 8: a hundred examples are then more than a few steps.
        once |= {"epochs": 3, "batch.samples": 8}
    return common.run("stage2", size, seed, once, start)
