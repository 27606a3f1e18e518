"""Stage 1 on real Vision-Flan samples with a small random LLaVA of the real architecture.

    --config=tests/real_data_config.py[:subset|all] --config.data.sources[0].path=DIR --config.tokenizer=FILE

336 px, 14 px patches, 576 image tokens, features of the last layer but one, a LLaMA decoder with the LLaMA-2
vocabulary; only widths and depths are small. `subset` memorises a few samples, `all` learns on every one.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from vflax.config import load_config


def get_config(variant: str = "subset") -> ConfigDict:
    config = load_config("configs/stage1.py")
    config.variant = variant
    config.init.checkpoint = ""
    config.model.vision = ConfigDict(
        {
            "image_size": 336, "patch_size": 14, "width": 64, "mlp_dim": 128, "num_layers": 3, "num_heads": 2,
            "hidden_act": "quick_gelu", "norm_eps": 1e-5,
            "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
        }
    )  # fmt: skip
    config.model.decoder = ConfigDict(
        {
            "width": 128, "mlp_dim": 352, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32,
            "norm_eps": 1e-5, "rope_theta": 10000.0, "max_positions": 4096, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    config.data.eval_split = "train"  # it shall memorise: what it is asked is what it learned
    config.data.max_duplicate_share = 1.0
    config.data.threads = 2
    config.dtype = "float32"
    config.remat = "none"
    config.optimizer.lr = 3e-3
    config.optimizer.b2 = 0.99
    config.evaluate.tasks = ("loss", "accuracy")
    config.evaluate.max_new_tokens = 24
    if variant == "subset":
        config.data.max_length = 768
        config.data.packing = False
        config.data.slots = 1
        config.steps = 70
        config.batch.samples = 12
        config.checkpoint.every = 10
    else:
        config.data.max_problem_share = 0.05
        config.steps = 500
        config.batch.samples = 8
        config.optimizer.lr = 2e-3
        config.checkpoint.every = 20
    return config
