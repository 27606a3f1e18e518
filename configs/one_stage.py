"""One stage: Vision-Flan and the 1,000 GPT-4-style examples mixed, which the paper sets its two stages against.

    python -m vflax.launch --config=configs/one_stage.py --workdir=runs/one-stage
    python -m vflax.launch --config=configs/one_stage.py:tiny --workdir=runs/one-stage-tiny

Starts where stage 1 does, with stage 1's numbers: [VF] states nothing else of this baseline (MME 1364, LLaVA-Bench
52.7, MM-Vet 36.6). 1,665,261 samples at 128 are 13,010 steps.

"One stage" has another sense, too: no alignment before the instructions, which Prismatic (Karamcheti et al., 2024,
arXiv 2402.07865) finds as good and cheaper. That is 13b-no-align and 7b-no-align: the same run from a CLIP tower and a
Vicuna with a random bridge. Prismatic does so on LLaVA-1.5's mixture and with a decay of 0.1; decay here stays
LLaVA-1.5's. There is no such tiny variant: without stage 0 it has neither a tower nor a decoder that knows anything.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "13b-no-align", "7b-no-align")


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant, VARIANTS)
    config = common.base("one-stage", variant)
    size, _, skips_stage_0 = variant.partition("-")
    if size == "tiny":
        return common.tiny_mixture(config)
    if skips_stage_0:
        common.start_from_parts(config, "clip-vit-large-patch14-336", f"vicuna-{size}-v1.5")  # [VF]
    else:
        common.start_from(config, "runs/stage0", "configs/stage0.py:{size}")
    flan, chat = common.source("data/vision-flan"), common.source("data/llava-instruct-150k")
    chat.count = 1000  # [VF]
    config.data.sources = (flan, chat)
    return config
