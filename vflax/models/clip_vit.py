"""The vision tower: CLIP's ViT (Radford et al., arXiv 2103.00020), up to the layer whose output is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vflax.errors import UserError
from vflax.models.attention import attention, filled
from vflax.models.layers import KERNEL_INIT, LayerNorm, linear, scan_layers, stack
from vflax.models.product import product
from vflax.sharding import BATCH_AXES, constrain
from vflax.values import COUNT, FLAG, LAYERS, POSITIVE, SHARE, TEXT, WHOLE, Kind


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x): OpenAI CLIP's activation, not the same function as GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with erf (Hendrycks and Gimpel, arXiv 1606.08415), not the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"quick_gelu": quick_gelu, "gelu": exact_gelu}


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower, and which of its states is used.

    feature_layer counts as Hugging Face's `hidden_states`: 0 is the embeddings after pre_norm, i the output
    of layer i (from 1), negative numbers count from the end: -2 is the output of the last layer but one.
    """

    image_size: int
    patch_size: int
    width: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    hidden_act: str
    norm_eps: float
    feature_layer: int
    keep_cls: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        problems = []
        if self.image_size % self.patch_size:
            problems.append(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        if self.width % self.num_heads:
            problems.append(f"width={self.width} is no multiple of num_heads={self.num_heads}")
        if self.hidden_act not in _ACTIVATIONS:
            problems.append(f"hidden_act={self.hidden_act!r}: expected one of {', '.join(_ACTIVATIONS)}")
        if not -self.num_layers - 1 <= self.feature_layer <= self.num_layers:
            problems.append(
                f"feature_layer={self.feature_layer} is outside the {self.num_layers + 1} hidden states of "
                f"num_layers={self.num_layers}"
            )
        if problems:
            raise UserError("vision config: " + "; ".join(problems))

    @property
    def num_patches(self) -> int:
        """Patches per image, without CLS."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """N, the features that one image gives."""
        return self.num_patches + int(self.keep_cls)

    @property
    def num_computed_layers(self) -> int:
        """Layers that feature_layer needs; those behind it are neither built nor computed."""
        if self.feature_layer >= 0:
            return self.feature_layer
        return self.num_layers + 1 + self.feature_layer


# What the fields of a VisionConfig that comes from a file must be.
VISION_KINDS: dict[str, Kind] = {
    "image_size": COUNT,
    "patch_size": COUNT,
    "width": COUNT,
    "mlp_dim": COUNT,
    "num_layers": LAYERS,
    "num_heads": COUNT,
    "hidden_act": TEXT,
    "norm_eps": POSITIVE,
    "feature_layer": WHOLE,
    "keep_cls": FLAG,
    "image_mean": SHARE.listed(3),
    "image_std": POSITIVE.listed(3),
}


class VisionAttention(nnx.Module):
    """Multi-head self-attention over the patches of one image."""

    def __init__(self, config: VisionConfig, *, attention: str, rngs: nnx.Rngs, **dtypes: Any) -> None:
        width = config.width
        self.q = linear(width, width, use_bias=True, rngs=rngs, **dtypes)
        self.k = linear(width, width, use_bias=True, rngs=rngs, **dtypes)
        self.v = linear(width, width, use_bias=True, rngs=rngs, **dtypes)
        self.out = linear(width, width, use_bias=True, rngs=rngs, **dtypes)
        self.num_heads = config.num_heads
        self.backend = attention

    def __call__(self, x: jax.Array) -> jax.Array:
        length = x.shape[1]
        x, own = filled(x, causal=False, backend=self.backend)
        # [B, T, D] -> [B, T, H, K]
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = self.q(x).reshape(shape), self.k(x).reshape(shape), self.v(x).reshape(shape)
        mixed = attention(q, k, v, q_segments=own, kv_segments=own, causal=False, backend=self.backend)
        # [B, T, H, K] -> [B, T, D]
        return self.out(mixed.reshape(x.shape))[:, :length]


class VisionMlp(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, **dtypes: Any) -> None:
        self.fc1 = linear(config.width, config.mlp_dim, use_bias=True, rngs=rngs, **dtypes)
        self.fc2 = linear(config.mlp_dim, config.width, use_bias=True, rngs=rngs, **dtypes)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.hidden_act](self.fc1(x)))


class VisionLayer(nnx.Module):
    """A pre-norm transformer block: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: VisionConfig, *, attention: str, rngs: nnx.Rngs, **dtypes: Any) -> None:
        self.norm1 = LayerNorm(config.width, config.norm_eps, **dtypes)
        self.attention = VisionAttention(config, attention=attention, rngs=rngs, **dtypes)
        self.norm2 = LayerNorm(config.width, config.norm_eps, **dtypes)
        self.mlp = VisionMlp(config, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nnx.Module):
    """The ViT's strided convolution, written as one matrix product over flattened patches."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        shape = (config.patch_size, config.patch_size, 3, config.width)
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), shape, param_dtype))
        self.config = config
        self.dtype = dtype

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> [B, patches, D]."""
        config = self.config
        side, patch = config.image_size // config.patch_size, config.patch_size
        # [B, side*P, side*P, 3] -> [B, side, P, side, P, 3] -> [B, side, side, P, P, 3]; moved as bytes.
        patches = images.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        mean, std = np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
        patches = (patches.astype(jnp.float32) / np.float32(255) - mean) / std
        # -> [B, side*side, P*P*3] x [P*P*3, D]
        flat = patches.reshape(-1, side * side, patch * patch * 3).astype(self.dtype)
        return product(flat, self.kernel[...].reshape(-1, config.width).astype(self.dtype))


class VisionTower(nnx.Module):
    """CLIP ViT from bytes to the features of config.feature_layer."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
        attention: str,
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.class_embedding = nnx.Param(KERNEL_INIT(rngs.params(), (config.width,), param_dtype))
        self.patch_embedding = PatchEmbedding(config, rngs=rngs, **dtypes)
        positions = (config.num_patches + 1, config.width)
        self.position_embedding = nnx.Param(KERNEL_INIT(rngs.params(), positions, param_dtype))
        self.pre_norm = LayerNorm(config.width, config.norm_eps, **dtypes)
        if config.num_computed_layers:
            self.layers = stack(
                lambda rngs: VisionLayer(config, attention=attention, rngs=rngs, **dtypes),
                config.num_computed_layers,
                rngs,
            )
        self.config = config
        self.dtype = dtype
        self.remat = remat

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features of a batch of images.

        Args:
            images: uint8 [B, H, W, 3]; normalised here, in float32, by the config's mean and std.

        Returns:
            [B, N, D] in the compute dtype, CLS first when it is kept.
        """
        patches = self.patch_embedding(images)
        batch, _, width = patches.shape
        cls = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (batch, 1, width))
        # [B, 1, D] + [B, patches, D] -> [B, 1 + patches, D]
        x = jnp.concatenate([cls, patches], axis=1) + self.position_embedding[...].astype(self.dtype)
        x = constrain(self.pre_norm(x), BATCH_AXES)
        if self.config.num_computed_layers:
            x = scan_layers(lambda layer, x: constrain(layer(x), BATCH_AXES), self.layers, x, self.remat)
        return x if self.config.keep_cls else x[:, 1:]
