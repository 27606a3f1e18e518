from ml_collections import ConfigDict

from vflax.config import load_config


def get_config():
    config = load_config("configs/stage1.py:tiny")
    config.init.checkpoint = config.init.make = ""
    config.tokenizer = "tokenizer"
    config.model.update(
        ConfigDict(
            {
                "vision": {
                    "image_size": 32,
                    "patch_size": 16,
                    "width": 16,
                    "mlp_dim": 24,
                    "num_layers": 2,
                    "num_heads": 2,
                    "hidden_act": "quick_gelu",
                    "norm_eps": 1e-5,
                    "image_mean": (0.48145466, 0.4578275, 0.40821073),
                    "image_std": (0.26862954, 0.26130258, 0.27577711),
                },
                "decoder": {
                    "width": 12,
                    "mlp_dim": 20,
                    "num_layers": 2,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "head_dim": 8,
                    "norm_eps": 1e-5,
                    "rope_theta": 10000.0,
                    "max_positions": 1024,
                    "tie_word_embeddings": False,
                },
            }
        )
    )
    config.freeze = (
        (r"vision/.*", "frozen"),
        (r"decoder/embed_tokens/.*", "frozen"),
        (r"bridge/.*", "trainable"),
        (r"decoder/.*", "trainable"),
    )
    config.steps, config.batch.samples = 3, 8
    config.data.max_length = 640
    config.data.sources[0].cap = 4
    config.evaluate.tasks = ("loss",)
    config.evaluate.samples_per_task = 1
    config.checkpoint.every, config.checkpoint.keep = 0, 1
    config.logging.tensorboard = False
    config.export = False
    return config
