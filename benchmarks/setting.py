"""What both sides of a comparison agree on: the model, precision and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig


@dataclass(frozen=True)
class Setting:
    """How both train.

    Attributes:
        compute: dtype of matrix products; float32 sums and norms stay what each framework makes them.
        masters: dtype of the parameters that learn and of Adam's moments.
        remat: "none", or "full": each layer is recomputed from its input.
        lr, b1, b2, eps, clip: AdamW behind a clip of the global norm; no decay, a constant rate.
    """

    compute: str = "float32"
    masters: str = "float32"
    remat: str = "none"
    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0


def llava(
    patch: int,
    vision: tuple[int, int, int, int],
    decoder: tuple[int, int, int, int],
    vocabulary: int = 32000,
    size: int = 336,
) -> LlavaConfig:
    """A LLaVA-1.5 of other sizes: pictures of `size` pixels in patches; features of the last tower layer but one.

    Args:
        patch: pixels of a patch's side.
        vision: of the tower, layers, width, heads and width of the MLP.
        decoder: the same of the decoder.
        vocabulary: V.
        size: pixels of a picture's side.
    """
    layers, width, heads, mlp = vision
    tower = VisionConfig(
        image_size=size, patch_size=patch, width=width, mlp_dim=mlp, num_layers=layers, num_heads=heads,
        hidden_act="quick_gelu", norm_eps=1e-5, feature_layer=-2, keep_cls=False,
        image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip
    layers, width, heads, mlp = decoder
    words = DecoderConfig(
        vocab_size=vocabulary, width=width, mlp_dim=mlp, num_layers=layers, num_heads=heads, num_kv_heads=heads,
        head_dim=width // heads, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, max_positions=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(tower, BridgeConfig("mlp2x_gelu", tower.width, words.width), words)
