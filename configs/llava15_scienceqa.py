"""ScienceQA: bridge and decoder learn for 12 epochs to give a lecture, a solution and then the letter (QCM-LEA).

    python -m vflax.launch --config=configs/llava15_scienceqa.py --workdir=runs/scienceqa
    python -m vflax.launch --config=configs/llava15_scienceqa.py:13b-v1 --workdir=runs/scienceqa-v1
    python -m vflax.launch --config=configs/llava15_scienceqa.py:tiny --workdir=runs/scienceqa-tiny

The numbers are those of finetune_sqa.sh, which is the first LLaVA's: LLaVA-1.5's authors tuned no model on ScienceQA,
and their scores of it (71.6 for 13B, on questions with a picture) are without. So there are two models:

13b-v1, 7b-v1, tiny-v1: the first LLaVA's, from the WORKDIR of configs/llava_v1.py's alignment. This is the recipe of
    the paper's 90.92. (Its repository's own run aligned on the 558K, data/llava-pretrain; the paper's on the 595K.)
13b, 7b, tiny: the same on LLaVA-1.5's model, from the WORKDIR of configs/llava15_pretrain.py. No paper has its score.

Reads data/scienceqa, splits train and val. 12,726 questions at 128 are 100 steps an epoch, 1,200 in all. The questions
of the test split are for vflax.evaluate --tasks=scienceqa --style=qcm_lea. As all that has a linear bridge, -v1 is not
exported at the end (configs/llava_v1.py).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, llava_v1

V1 = ("13b-v1", "7b-v1", "tiny-v1")
VARIANTS = (*common.VARIANTS, *V1)


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant, VARIANTS)
    size, _, first = variant.partition("-")
    config = common.base("scienceqa", variant)
    if size == "tiny":
        common.tiny_finetune(config, "scienceqa")
        # An answer is a paragraph, of which vflax.evaluate reads the letter.
        config.evaluate.tasks = ("loss",)
    else:
        config.data.sources = (common.source("data/scienceqa"),)
        config.batch.samples = 128  # [LLaVA] finetune_sqa.sh, 16 x 8; the paper does not say
        config.optimizer.lr = 2e-5  # [LLaVA] finetune_sqa.sh
        # About 330 tokens of text, by the words that ScienceQA's authors count (arXiv 2209.09513, table 1), and an
        # image in every second sample: about 32 rows, and 30 of the 224-px model, which knows 2048 positions.
        config.data.max_length = 2048 if first else 2560
        config.data.slots = 3
    if first:
        llava_v1.v1(config)
        llava_v1.start_from_alignment(config)
    elif size != "tiny":
        common.start_from(config, "runs/stage0", "configs/llava15_pretrain.py:{size}")
    config.epochs = 12  # [LLaVA]
    config.data.eval_split = "val"  # the test split is what is scored
    config.evaluate.style = "qcm_lea"  # as it is trained, where evaluate.tasks has scienceqa
    return config
