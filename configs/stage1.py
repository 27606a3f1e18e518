"""Stage 1, Vision-Flan: bridge and decoder learn on 187 human-labelled tasks -> VISION-FLAN BASE.

    python -m vflax.launch --config=configs/stage1.py --workdir=runs/stage1
    python -m vflax.launch --config=configs/stage1.py:tiny --workdir=runs/tiny     (any CPU, no downloads)
    python -m vflax.launch --config=configs/stage1.py:7b-lora --workdir=runs/stage1-7b-lora

13b and 7b start from the WORKDIR of stage 0 (LLaVA before visual instruction tuning [VF]) and read
data/vision-flan, made by  python -m data_pipeline.convert --format=vision_flan.
[VF] states lr 2e-5, batch 16 per device, one epoch; 1,664,261 instances at 16 x 8 are 13,003 steps. What the paper
leaves open (schedule, warm-up, decay, length, padding) is LLaVA-1.5's. With -lora (13b-lora, 7b-lora, tiny-lora)
adapters learn in the decoder's place, with the numbers of LLaVA-1.5's finetune_lora.sh.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, *common.LORA)


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant, VARIANTS)
    config = common.base(1, variant)
    size, _, adapters = variant.partition("-")
    if size == "tiny":
        common.tiny_finetune(config, "stage1")
        return common.tiny_lora(config) if adapters else config
    common.start_from(config, "runs/stage0", "configs/stage0.py:{size}")
    return common.lora(config) if adapters else config
