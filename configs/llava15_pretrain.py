"""LLaVA-1.5's pretraining, which is what Vision-Flan's stage 0 is: configs/stage0.py under LLaVA-1.5's name.

    python -m vflax.launch --config=configs/llava15_pretrain.py --workdir=runs/stage0

One WORKDIR serves both papers: configs/llava15_finetune.py and configs/stage1.py start from runs/stage0 (7b: from
runs/stage0-7b). 558,128 captions at 256 are 2,181 steps.
"""

from __future__ import annotations

from configs.stage0 import get_config as get_config
