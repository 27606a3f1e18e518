"""LLaVA-1.5's visual instruction tuning: bridge and decoder learn on the mixture of 665K (finetune.sh) -> LLaVA-1.5.

    python -m vflax.launch --config=configs/llava15_finetune.py --workdir=runs/llava15
    python -m vflax.launch --config=configs/llava15_finetune.py:7b-lora --workdir=runs/llava15-7b-lora
    python -m vflax.launch --config=configs/llava15_finetune.py:tiny --workdir=runs/llava15-tiny

Starts from the WORKDIR of configs/llava15_pretrain.py and reads data/llava-v1.5-mix665k. 665,298 samples at 128 are
5,198 steps. Every number is that of `common.base`, which has LLaVA-1.5's; with -lora (13b-lora, 7b-lora, tiny-lora)
adapters learn in the decoder's place, with those of finetune_lora.sh. LLaVA-1.5 groups samples with and without image
into batches of their own for speed; here rows are packed instead. tiny has short and long answers for the mixture.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, *common.LORA)


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant, VARIANTS)
    config = common.base("llava-1.5", variant)
    size, _, adapters = variant.partition("-")
    if size == "tiny":
        common.tiny_mixture(config)
        return common.tiny_lora(config) if adapters else config
    common.start_from(config, "runs/stage0", "configs/llava15_pretrain.py:{size}")
    config.data.sources = (common.source("data/llava-v1.5-mix665k"),)
    # 40,688 samples, 6.1 %, are ShareGPT's conversations without an image; long ones are cut in LLaVA-1.5, too, at 2048
    # tokens, and are nothing to stop for.
    config.data.max_problem_share = 0.07
    # Four samples of 541 + about 260 tokens (reckoned from its letters, which others have counted): about 32
    # rows, which divide among 8, 16 and 32 devices.
    config.data.max_length = 3328
    return common.lora(config) if adapters else config
