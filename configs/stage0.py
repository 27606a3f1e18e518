"""Stage 0, feature alignment: the bridge alone learns, on captions (LLaVA-1.5's pretrain.sh).

    python -m vflax.launch --config=configs/stage0.py --workdir=runs/stage0
    python -m vflax.launch --config=configs/stage0.py:tiny --workdir=runs/stage0-tiny

13b and 7b want two directories of weights, weights/clip-vit-large-patch14-336 and weights/vicuna-{13b,7b}-v1.5
(or --config.init.vision=DIR --config.init.decoder=DIR), and 558K captions converted to data/llava-pretrain.
tiny has no pretrained tower or decoder to start from, so there everything learns.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "13b") -> ConfigDict:
    common.check_variant(variant)
    config = common.base(0, variant)
    config.template = "plain"  # [LLaVA-1.5] --version plain: image, caption, newline
    config.image.mode = (
        "crop"  # [LLaVA-1.5] pretrain.sh sets no aspect ratio: resize the shorter side, centre crop
    )
    config.data.max_length = 2432  # captions are short: four of 576 + 32 tokens
    config.batch.samples = 256  # [LLaVA-1.5] 32 x 8
    config.optimizer.lr = 1e-3  # [LLaVA-1.5]
    config.freeze = (
        (r"vision/.*", "frozen"),
        (r"bridge/.*", "trainable"),  # [LLaVA-1.5] tune_mm_mlp_adapter
        (r"decoder/.*", "frozen"),
    )
    if variant == "tiny":
        common.tiny(config, "stage0")
        config.tokenizer = "mini:tokenizer"
        config.model.vision = ConfigDict(common.TINY_VISION)
        config.model.decoder = ConfigDict(common.TINY_DECODER)
        config.freeze = ((r".*", "trainable"),)
        config.steps = 1500
        config.batch.samples = 32
        config.optimizer.lr = 1.5e-3
        # The embeddings of words that no caption has (those of questions) get next to no gradient, but Adam makes
        # whole steps of it, all in one direction, until they are all alike. A larger eps makes these steps small.
        config.optimizer.eps = 1e-4
        return config
    common.start_from_parts(config, "clip-vit-large-patch14-336", f"vicuna-{variant}-v1.5")  # [LLaVA-1.5]
    config.data.sources = (common.source("data/llava-pretrain"),)
    return config
