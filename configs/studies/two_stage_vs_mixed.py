"""Two stages, or the same data mixed in one?

    python -m vflax.study --study=two_stage_vs_mixed:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690).
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.studies import common, gpt4_amount
from vflax.study.grid import Arm, Claim, Difference, Metric, Run, Study

_ARMS = (Arm("stage 1"), Arm("two stages"), Arm("mixed"))
# [VF] MME of VISION-FLAN BASE and CHAT and of the mixture.
_MME = {"stage 1": 1537.8, "two stages": 1490.6, "mixed": 1364.0}
_LLAVA_BENCH = {"stage 1": 38.5, "two stages": 78.3, "mixed": 52.7}
_MMVET = {"two stages": 38.0, "mixed": 36.6}


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid: the end of stage 1, of stage 2, and one stage on both kinds of data."""
    common.check_size(variant)
    tiny = variant == "tiny"

    def make(arm: Arm, seed: int) -> Run:
        if arm.name == "mixed":
            return mixed(variant, seed)
        return gpt4_amount.stage2(variant, seed, 1000 if arm.name == "two stages" else 0)

    label = "[VF] Table 2 and on mixed data"
    return Study(
        name="two_stage_vs_mixed",
        variant=variant,
        title="two stages or one",
        question="1,000 GPT-4-style examples after Vision-Flan, or mixed into it?",
        axis="",
        arms=_ARMS,
        cells=common.grid(_ARMS, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(
            variant,
            Metric("llava_bench", "LLaVA-Bench", ("llava_bench",), paper=_LLAVA_BENCH,
                   paper_label=f"LLaVA-Bench ({label})"),
            *(
                [Metric("words", "words of a long answer, median", ("words_long",), better=""),
                 Metric("hallucination", "mentions of what is not there, %", ("hallucinated",), better="lower")]
                if tiny
                else [Metric("mmvet", "MM-Vet", ("mmvet",), paper=_MMVET, paper_label=f"MM-Vet ({label})")]
            ),
            mme=_MME,
            said=label,
        ),
        claims=(
            Claim("Two stages beat the mixture on MME.", label, Difference("mme", "two stages", "mixed")),
            Claim("... and in answers that people prefer: LLaVA-Bench.", label,
                  Difference("llava_bench", "two stages", "mixed")),
            *(
                [Claim("... and in all tasks together.", label, Difference("accuracy", "two stages", "mixed")),
                 Claim("Stage 2 makes long answers longer than the mixture does.", label,
                       Difference("words", "two stages", "mixed"))]
                if tiny
                else [Claim("... and on MM-Vet.", label, Difference("mmvet", "two stages", "mixed"))]
            ),
        ),
        notes=(
            "Both ways see every sample as often; the mixture in one schedule, at stage 1's rate.",
            common.AT_THE_FLOOR,
            common.ONE_START,
        )
        if tiny
        else (),
    )  # fmt: skip


def mixed(size: str, seed: int) -> Run:
    """One stage on both: samples of stage 1 and the 1,000 of stage 2."""
    if size != "tiny":
        return common.run("one_stage", size, seed, {})
    # As many passes over each sample as in two stages: 5 over Vision-Flan's, 3 over the 1,000.
    return common.run("one_stage", size, seed, {"data.sources[1].weight": 0.6, "epochs": 5})
