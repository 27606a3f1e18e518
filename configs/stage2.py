"""Stage 2, 1,000 GPT-4-style examples: bridge and decoder learn to answer as people like -> VISION-FLAN CHAT.

    python -m vflax.launch --config=configs/stage2.py --workdir=runs/stage2
    python -m vflax.launch --config=configs/stage2.py:tiny --workdir=runs/stage2-tiny

[VF] states lr 1e-5, batch 8, 128 steps on 1,000 examples drawn at random from LLaVA's GPT-4 data. Read as 8 in all
that is 1,024 samples, about one epoch: the variants 13b and 7b. Read as 8 per device on 8 devices it is 8,192
samples, about eight epochs: 13b-per-device and 7b-per-device (and tiny-per-device, eight times what tiny sees). With
-lora (13b-lora, 7b-lora, tiny-lora) adapters learn in the decoder's place, with the learning rates of LLaVA-1.5's
finetune_task_lora.sh.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

PER_DEVICE = ("13b-per-device", "7b-per-device", "tiny-per-device")
VARIANTS = (*common.VARIANTS, *PER_DEVICE, *common.LORA)


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant, VARIANTS)
    config = common.base(2, variant)
    config.optimizer.lr = 1e-5  # [VF]
    config.steps = 128  # [VF]
    config.data.budget = 1000  # [VF]
    size, _, kind = variant.partition("-")
    if size == "tiny":
        common.tiny(config, "stage2")
        config.init.checkpoint = "runs/tiny"
        config.init.make = "configs/stage1.py:tiny"
        config.steps = 100
        config.batch.samples = 256 if kind == "per-device" else 32
        config.optimizer.lr = 1e-4
        config.evaluate.tasks = ("loss", "accuracy")
        # What stage 1 taught must stay; only how much is said when a sentence was asked for may change.
        config.evaluate.sources = (common.questions("mini:stage1", "test"),)
        config.evaluate.sources[0].exclude = ("GENERATION+*",)
        config.evaluate.max_new_tokens = 160
        return common.tiny_lora(config) if kind == "lora" else config
    config.batch.samples = 64 if kind == "per-device" else 8  # [VF] batch 8
    # Few samples, so the rows are short: two of 576 + about 200 tokens (LLaVA's GPT-4 data), and no sample is cut that
    # LLaVA-1.5 keeps whole. 64 samples make 32 rows, which divide among 8, 16 and 32 devices; of 2944 tokens they would
    # be 20. 8 samples make 4: on 8 devices and more each computes one row, full or empty, so that only its length
    # counts; a row for each sample would take as long there, and twice as long on 4.
    config.data.max_length = 2048
    config.data.slots = 2
    config.data.sources = (common.source("data/llava-instruct-150k"),)
    common.start_from(config, "runs/stage1", "configs/stage1.py:{size}")
    return common.lora(config) if kind == "lora" else config
