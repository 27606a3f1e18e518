"""What does instruction tuning teach: the bridge, the decoder, or both?

    python -m vflax.study --study=tuned_modules:tiny --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690).
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.studies import common
from vflax.study.grid import Arm, Claim, Difference, Run, Study

_LEARNS = {
    "bridge": ("bridge",),
    "decoder": ("decoder",),
    "bridge and decoder": ("bridge", "decoder"),
    "bridge, decoder and tower": ("bridge", "decoder", "vision"),
}
_PARTS = ("vision", "bridge", "decoder")


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid; arms are the parts that learn."""
    common.check_size(variant)
    arms = tuple(Arm(name) for name in _LEARNS)
    both = "bridge and decoder"

    def make(arm: Arm, seed: int) -> Run:
        if arm.name == both:
            return common.variation(variant, seed)  # what stage 1 is
        learns = _LEARNS[arm.name]
        rules = tuple((f"{part}/.*", "trainable" if part in learns else "frozen") for part in _PARTS)
        return common.variation(variant, seed, {"freeze": rules})

    every = common.capability(variant)
    source = "[VF], on tuned modules"
    return Study(
        name="tuned_modules",
        variant=variant,
        title="what learns in stage 1",
        question="Stage 1 with the bridge learning, the decoder, both, and the tower with them: what does each bring?",
        axis="",
        arms=arms,
        cells=common.grid(arms, common.seeds_of(variant, seeds), make),
        metrics=common.benchmarks(variant),
        claims=(
            Claim("The bridge alone learns little.", source, Difference(every, "decoder", "bridge")),
            Claim("... on MME, too.", source, Difference("mme", "decoder", "bridge")),
            Claim("The decoder alone does nearly as well as both.", source,
                  common.nearly(every, "decoder", both)),
            Claim("Both together are best.", source, Difference(every, both, "decoder")),
        ),
        notes=(
            "The tiny stage 0 trains all three parts together on captions, there being nothing pretrained to align.",
            common.AT_THE_FLOOR,
            common.ONE_START,
        )
        if variant == "tiny"
        else ("The paper has no arm in which the tower learns.",),
    )  # fmt: skip
