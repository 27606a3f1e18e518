"""Stage 1, Vision-Flan: bridge and decoder learn on 187 human-labelled tasks -> VISION-FLAN BASE.

    python -m vflax.launch --config=configs/stage1.py --workdir=runs/stage1
    python -m vflax.launch --config=configs/stage1.py:tiny --workdir=runs/tiny     (any CPU, no downloads)

13b and 7b start from the WORKDIR of stage 0 (LLaVA before visual instruction tuning [VF]) and read
data/vision-flan, made by  python -m data_pipeline.convert --format=vision_flan.
[VF] states lr 2e-5, batch 16 per device, one epoch; 1,664,261 instances at 16 x 8 are 13,003 steps. What the paper
leaves open (schedule, warm-up, decay, length, padding) is LLaVA-1.5's.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant)
    config = common.base(1, variant)
    if variant == "tiny":
        common.tiny(config)
        config.init.checkpoint = "cache:stage0-tiny"  # made by the config below on first use, then kept
        config.init.make = "configs/stage0.py:tiny"
        config.epochs = 4
        config.batch.samples = 32
        config.optimizer.lr = 1.5e-3
        config.evaluate.tasks = ("loss", "accuracy")
        config.evaluate.max_new_tokens = 40
        return config
    config.init.checkpoint = "runs/stage0" if variant == "13b" else f"runs/stage0-{variant}"
    return config
