"""Your own data on a LLaVA that is trained already: adapters (LoRA) and the bridge learn -> a Hugging Face directory.

    python -m vflax.launch --config=configs/finetune.py --workdir=runs/mine \\
        --config.init.checkpoint=llava-hf/llava-1.5-7b-hf@main --config.data.sources[0].path=data/mine

Numbers are those of LLaVA-1.5's finetune_task_lora.sh, but for the batch, which is that of one of its eight devices.
Variant "full" trains the decoder itself, at LLaVA-1.5's 2e-5. docs/finetune.md is the page on it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "lora") -> ConfigDict:
    common.check_variant(variant, ("lora", "full"))
    config = common.base("finetune", variant)
    config.init.checkpoint = "llava-hf/llava-1.5-7b-hf@main"
    config.data.sources = (common.source("data/mine"),)
    # [LLaVA-1.5] per device. Were they Vision-Flan's, they would be 4 rows of 2944 tokens, for 1, 2 or 4 devices. On 8,
    # max_length=2048 with slots=2 (8 rows) is 30 % less work for each; on one device it would be 39 % more.
    config.batch.samples = 16
    config.checkpoint.every = 100  # such runs are short
    return common.lora(config) if variant == "lora" else config
