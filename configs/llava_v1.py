"""The first LLaVA (Liu et al., 2023): CLIP at 224 px, a linear bridge, two steps.

    python -m vflax.launch --config=configs/llava_v1.py:13b-align --workdir=runs/llava-v1-align
    python -m vflax.launch --config=configs/llava_v1.py --workdir=runs/llava-v1
    python -m vflax.launch --config=configs/llava_v1.py:tiny --workdir=runs/llava-v1-tiny      (any CPU, no downloads)

1. 13b-align, 7b-align, tiny-align: the bridge alone learns, on 595K captions of CC3M (data/llava-cc3m-595k): stage 0 at
   224 px with a linear bridge. 595,375 captions at 128 are 4,652 steps.
2. 13b, 7b, tiny: bridge and decoder learn on LLaVA-Instruct-158K (data/llava-instruct-150k), three epochs from the
   WORKDIR of step 1. 157,712 samples at 32 are 4,929 steps an epoch, 14,787 in all.

Where the paper and the scripts that its repository keeps of it differ, these are the paper's numbers and the scripts'
form: the paper tunes Vicuna v0, with its template ("###"), and asks for captions by one of 11 questions; the scripts
tune v1.3 with template v1 and have captions without a question, as here. finetune_full_schedule.sh has a batch of 128.
Hugging Face's LLaVA has no linear bridge, so nothing is exported at the end; the original format does:
python -m vflax.weights.export --model=runs/llava-v1 --format=llava --out=exported
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, stage0

ALIGN = ("13b-align", "7b-align", "tiny-align")
VARIANTS = (*common.VARIANTS, *ALIGN)


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant, VARIANTS)
    size, _, aligns = variant.partition("-")
    return _align(size) if aligns else _finetune(size)


def v1(config: ConfigDict) -> ConfigDict:
    """What every model of the first LLaVA has in place of LLaVA-1.5's."""
    config.model.bridge = "linear"  # [LLaVA]
    config.image.mode = "crop"  # [LLaVA] CLIP's own: resize the shorter side, centre crop
    config.export = False
    return config


def start_from_alignment(config: ConfigDict) -> None:
    """Start from the WORKDIR of step 1, at the config's size."""
    if config.variant.startswith("tiny"):
        config.init.checkpoint = "cache:llava-v1-align-tiny"
        config.init.make = "configs/llava_v1.py:tiny-align"
    else:
        common.start_from(config, "runs/llava-v1-align", "configs/llava_v1.py:{size}-align")


def _align(size: str) -> ConfigDict:
    config = v1(stage0.get_config(size))
    config.variant = f"{size}-align"
    if size == "tiny":
        return config
    common.start_from_parts(config, "clip-vit-large-patch14", f"vicuna-{size}-v1.3")  # [LLaVA] pretrain.sh
    config.data.sources = (common.source("data/llava-cc3m-595k"),)
    config.data.max_length = 1152  # four of 256 + 32 tokens; 32 rows, which divide among 8, 16 and 32 devices
    config.batch.samples = 128  # [LLaVA] 16 x 8
    config.optimizer.lr = 2e-3  # [LLaVA]
    return config


def _finetune(size: str) -> ConfigDict:
    config = v1(common.base("llava-v1", size))
    if size == "tiny":
        common.tiny_finetune(config, "stage2")  # long answers, as LLaVA-Instruct has
        config.evaluate.max_new_tokens = 160
        config.epochs = 8  # of 1,000 samples; three end at a held-out loss of 0.71, eight at 0.13
    else:
        config.epochs = 3  # [LLaVA]
        config.data.sources = (common.source("data/llava-instruct-150k"),)
        config.batch.samples = 32  # [LLaVA]
        config.optimizer.lr = 2e-5  # [LLaVA]
        # Four of 256 + about 200 tokens (LLaVA's GPT-4 data), and no sample is cut that LLaVA keeps whole. 32 samples
        # make 8 rows: on more devices than that some compute empty ones.
        config.data.max_length = 2048
    start_from_alignment(config)
    return config
