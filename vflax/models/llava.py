"""LLaVA (Liu et al., arXiv 2304.08485, 2310.03744): vision tower -> bridge -> decoder.

How image features find their places. N features per image, here N = 2, two slots, one row:

    ids        7  I  I  9  4  I  I  5          I = IMAGE_TOKEN_ID
    k          .  0  1  .  .  2  3  .          k-th placeholder of the row
    feature    .  a0 a1 .  .  b0 b1 .          slot k // N, feature k % N
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.models.attention import check_backend
from vflax.models.bridge import BRIDGE_KINDS, Bridge, BridgeConfig
from vflax.models.clip_vit import VISION_KINDS, VisionConfig, VisionTower
from vflax.models.layers import check_remat
from vflax.models.llama import DECODER_KINDS, ROPE_KINDS, Decoder, DecoderConfig, RopeScaling
from vflax.models.lora import LoraConfig, adapt
from vflax.sharding import BATCH_AXES, constrain
from vflax.values import OBJECT, missing, wrong

Params = dict[str, Any]
"""{path: array}, path joined by "/", for example decoder/layers/attention/q/kernel."""


@dataclass(frozen=True)
class LlavaConfig:
    """Everything that a checkpoint decides about the model's shape and numbers."""

    vision: VisionConfig
    bridge: BridgeConfig
    decoder: DecoderConfig

    def __post_init__(self) -> None:
        problems = []
        if self.bridge.in_width != self.vision.width:
            problems.append(f"bridge.in_width={self.bridge.in_width} is not vision.width={self.vision.width}")
        if self.bridge.out_width != self.decoder.width:
            problems.append(
                f"bridge.out_width={self.bridge.out_width} is not decoder.width={self.decoder.width}"
            )
        if problems:
            raise UserError("model config: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types."""
        plain = dataclasses.asdict(self)
        for key in ("image_mean", "image_std"):
            plain["vision"][key] = list(plain["vision"][key])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LlavaConfig:
        """The inverse of to_dict.

        Raises:
            UserError: naming every key that is missing, unknown or not of its kind.
        """
        parts = {
            "vision": (VisionConfig, VISION_KINDS),
            "bridge": (BridgeConfig, BRIDGE_KINDS),
            "decoder": (DecoderConfig, DECODER_KINDS),
        }
        if not OBJECT.holds(plain):
            raise UserError(f"model config: expected {OBJECT.words}, found a {type(plain).__name__}")
        not_objects = wrong(plain, dict.fromkeys(parts, OBJECT))
        problems = [*missing(cls, plain), *not_objects.values()]
        for name, (part, kinds) in parts.items():
            if name in plain and name not in not_objects:
                problems += missing(part, plain[name], f"{name}.")
                problems += wrong(plain[name], kinds, f"{name}.").values()
        decoder = plain.get("decoder")
        scaling = decoder.get("rope_scaling") if isinstance(decoder, dict) else None
        if isinstance(scaling, dict):
            problems += missing(RopeScaling, scaling, "decoder.rope_scaling.")
            problems += wrong(scaling, ROPE_KINDS, "decoder.rope_scaling.").values()
        if problems:
            raise UserError("model config: " + "; ".join(problems))
        vision: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in plain["vision"].items()
        }
        decoder = {**plain["decoder"], "rope_scaling": None if scaling is None else RopeScaling(**scaling)}
        return cls(VisionConfig(**vision), BridgeConfig(**plain["bridge"]), DecoderConfig(**decoder))


class Llava(nnx.Module):
    """The whole model. B rows, T tokens, S image slots, N features per image, D width, V vocabulary."""

    def __init__(
        self,
        config: LlavaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
        attention: str,
        lora: LoraConfig | None = None,
    ) -> None:
        """Build the model with random parameters.

        Args:
            config: shapes and numbers.
            rngs: its "params" stream draws the parameters.
            dtype: what matrix products compute in; norms, rotary positions, softmax and logits are float32.
            param_dtype: what parameters are kept in; they are cast to dtype where they are used.
            remat: what the backward pass recomputes of a layer, a name from vflax.models.layers.REMAT_POLICIES.
            attention: a backend's name, see vflax.models.attention.
            lora: which linears have adapters, and how their weights are held; None: the model as it is.
        """
        check_remat(remat)
        check_backend(attention)
        dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
        run = {"remat": remat, "attention": attention}
        self.vision = VisionTower(config.vision, rngs=rngs, **dtypes, **run)
        self.bridge = Bridge(config.bridge, rngs=rngs, **dtypes)
        self.decoder = Decoder(config.decoder, rngs=rngs, **dtypes, **run)
        if lora is not None:
            adapt(self, lora, rngs)
        self.config = config

    def __call__(
        self, ids: jax.Array, images: jax.Array, segments: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """Logits, float32 [B, T, V], for the arguments of `hidden`."""
        return self.decoder.logits(self.hidden(ids, images, segments, positions))

    def hidden(
        self,
        ids: jax.Array,
        images: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
            ids: int32 [B, T]; every image stands as N times IMAGE_TOKEN_ID.
            images: uint8 [B, S, H, W, 3], in order of appearance in the row; S = 0 skips tower and bridge.
            segments: int32 [B, T]; 1.. per sample of the row, 0 for padding.
            positions: int32 [B, T]; 0.. restarting with each sample.
            keys: of the adapters' dropout, key array [B]; None: without dropout.

        Returns:
            [B, T, D] in the compute dtype.
        """
        return self.hidden_from_features(ids, self.features(images), segments, positions, keys)

    def features(self, images: jax.Array) -> jax.Array:
        """What the tower sees: uint8 [B, S, H, W, 3] -> [B, S, N, tower width]."""
        batch, slots = images.shape[:2]
        shape = (batch, slots, self.config.vision.num_tokens, self.config.vision.width)
        if slots == 0:
            return jnp.zeros(shape, self.vision.dtype)
        # [B, S, H, W, 3] -> [B*S, H, W, 3]
        flat = constrain(images.reshape(batch * slots, *images.shape[2:]), BATCH_AXES)
        # [B*S, N, D] -> [B, S, N, D]
        return constrain(self.vision(flat).reshape(shape), BATCH_AXES)

    def hidden_from_features(
        self,
        ids: jax.Array,
        features: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """As `hidden`, from features [B, S, N, tower width] that were computed before."""
        return self.decoder(self.embed(ids, features), segments, positions, keys)

    def embed(self, ids: jax.Array, features: jax.Array) -> jax.Array:
        """ids [B, T], features [B, S, N, tower width] -> token embeddings with images in place [B, T, D]."""
        is_image = ids == IMAGE_TOKEN_ID
        # IMAGE_TOKEN_ID lies outside the vocabulary; what is looked up in its stead is replaced below.
        # The table is cut by its width along fsdp. Looked up like that first, each slice keeps to its own rows.
        words = constrain(self.decoder.embed_tokens(jnp.maximum(ids, 0)), "data", None, "fsdp")
        words = constrain(words, BATCH_AXES)
        if features.shape[1] == 0:
            return words
        batch, slots, tokens, _ = features.shape
        # [B, S, N, D] -> [B, S*N, D]: feature k of a row is slot k // N, feature k % N.
        seen = constrain(self.bridge(features).reshape(batch, slots * tokens, -1), BATCH_AXES)
        # [B, T]: k counts the row's placeholders from 0; text positions point at a feature that is not used.
        k = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, slots * tokens - 1)
        # [B, S*N, D] gathered by [B, T, 1] -> [B, T, D]
        placed = jnp.take_along_axis(seen, k[..., None], axis=1)
        return constrain(jnp.where(is_image[..., None], placed, words), BATCH_AXES)


def split(model: Llava) -> tuple[Any, Params]:
    """Take a model apart: (graphdef, flat parameters {path: array})."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, {
        "/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)
    }


def merge(graphdef: Any, params: Params) -> Llava:
    """Put a model together from `split`'s two halves; inside jit it happens only while tracing."""
    state = nnx.from_flat_state([(tuple(path.split("/")), nnx.Param(x)) for path, x in params.items()])
    return nnx.merge(graphdef, state)


def cast_kernels(graphdef: Any, params: Params) -> Params:
    """The parameters with all float kernels in the compute dtype, as their layers would cast them.

    Cast before the scan over layers, a kernel is gathered, and its gradient stacked, in the compute dtype, which takes
    half the memory. The numbers are the same.
    """
    dtype = merge(graphdef, params).decoder.dtype
    return {
        path: leaf.astype(dtype) if path.endswith("/kernel") and leaf.dtype != jnp.int8 else leaf
        for path, leaf in params.items()
    }


def init(config: LlavaConfig, key: jax.Array, **kw: Any) -> Params:
    """Random parameters: kernels and embeddings normal(0, 0.02), norms one, biases zero. Can be jitted.

    Args:
        config: the model.
        key: a JAX random key.
        kw: the keyword arguments of `Llava` but rngs.
    """
    return split(Llava(config, rngs=nnx.Rngs(key), **kw))[1]


def abstract(config: LlavaConfig, **kw: Any) -> tuple[Any, Params]:
    """The model without its numbers: (graphdef, {path: ShapeDtypeStruct}); nothing is allocated."""
    model = nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0), **kw))
    graphdef, params = split(model)
    return graphdef, {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
