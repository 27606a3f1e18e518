"""The model's own forward pass with weights that are read where they are used: logits of a model larger than memory.

The modules are those of vflax/models. Their linears, embedding and stacks of layers are replaced by objects that read
from a source, a block of rows at a time, so the host never holds more than one block beside the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vflax.models.clip_vit import VisionLayer
from vflax.models.llama import DecoderLayer
from vflax.models.llava import Llava, LlavaConfig
from vflax.weights import names
from vflax.weights.file_source import TensorSource
from vflax.weights.load import read_param
from vflax.weights.names import EMBEDDING, LM_HEAD
from vflax.weights.safetensors_io import row_blocks

_DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def logits(source: TensorSource, config: LlavaConfig, ids: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Logits of one segment per row: float32 [B, T, V]. See `hidden` for the arguments."""
    states = hidden(source, config, ids, images)
    return np.concatenate(list(logit_blocks(source, config, states, config.decoder.vocab_size)), axis=-1)


def hidden(source: TensorSource, config: LlavaConfig, ids: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Hidden states after the final norm, computed in float32 on the host's CPU.

    Args:
        source: the weights.
        config: the model they belong to.
        ids: int32 [B, T]; every image stands as N times IMAGE_TOKEN_ID.
        images: uint8 [B, S, H, W, 3].

    Returns:
        float32 [B, T, D].
    """
    with jax.default_device(_host()):
        model = nnx.eval_shape(
            lambda: Llava(config, rngs=nnx.Rngs(0), remat="none", attention="reference", **_DTYPES)
        )
        _Weights(source, config).fill(model)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return np.asarray(
            model.hidden(jnp.asarray(ids), jnp.asarray(images), jnp.ones_like(positions), positions)
        )


def logit_blocks(
    source: TensorSource, config: LlavaConfig, states: np.ndarray, rows: int
) -> Iterator[np.ndarray]:
    """Hidden states [B, T, D] -> logits float32 [B, T, v] of one block of the first `rows` ids after the other."""
    head = EMBEDDING if config.decoder.tie_word_embeddings else LM_HEAD
    with jax.default_device(_host()):
        x = jnp.asarray(states)
        for index in row_blocks((rows, *source.shape(head)[1:]), 4):
            yield np.asarray(_product(x, source.read(head, index)))


def _product(x: jax.Array, rows: np.ndarray) -> jax.Array:
    """x [..., in] times some rows [o, in] of a tensor: [..., o]."""
    # [..., in] x [o, in] -> [..., o]. Waited for, else blocks would be read faster than they are used.
    return jnp.einsum("...i,oi->...o", x, jnp.asarray(rows.astype(np.float32))).block_until_ready()


def _host() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator only
        return jax.local_devices()[0]


class _Weights:
    """A source seen by parameter path."""

    def __init__(self, source: TensorSource, config: LlavaConfig) -> None:
        self.source = source
        self.config = config
        self.table = names.table(config)

    def fill(self, module: nnx.Module, path: str = "", layer: int | None = None) -> None:
        """Give an abstract module its weights: small ones at once, large ones where they are used.

        Args:
            module: made by nnx.eval_shape.
            path: the module's own, with "/" at the end.
            layer: for one layer of a stack, its number.
        """
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Param):
                setattr(module, name, nnx.Param(jnp.asarray(self.param(path + name, layer))))
            elif name == "layers":
                setattr(module, name, _Layers(self, f"{path}{name}/"))
            elif name == "embed_tokens":
                setattr(module, name, _Embedding(self))
            elif f"{path}{name}/kernel" in self.table and len(self.table[f"{path}{name}/kernel"].axes) == 2:
                setattr(module, name, _Linear(self, f"{path}{name}/", layer))
            elif isinstance(child, nnx.Module):
                self.fill(child, f"{path}{name}/", layer)

    def param(self, path: str, layer: int | None) -> np.ndarray:
        """A parameter, or one layer of a stacked one, in float32."""
        entry = self.table[path]
        index = tuple(slice(0, n) for n in entry.shape)
        if entry.layers is None:
            return read_param(self.source, entry, index, np.dtype(np.float32))
        assert layer is not None
        return read_param(self.source, entry, (slice(layer, layer + 1), *index), np.dtype(np.float32))[0]

    def product(self, x: jax.Array, name: str) -> jax.Array:
        """x [..., in] times the tensor [out, in], transposed: [..., out]."""
        blocks = row_blocks(self.source.shape(name), 4)
        return jnp.concatenate([_product(x, self.source.read(name, index)) for index in blocks], axis=-1)


class _Linear:
    """A dense layer whose kernel is read when it is called."""

    def __init__(self, weights: _Weights, path: str, layer: int | None) -> None:
        self._weights, self._path, self._layer = weights, path, layer

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        name = self._weights.table[f"{self._path}kernel"].names[self._layer or 0]
        y = self._weights.product(x, name)
        if f"{self._path}bias" in self._weights.table:
            y = y + self._weights.param(f"{self._path}bias", self._layer)
        return y


class _Embedding:
    """A table of embeddings of which the asked rows are read."""

    def __init__(self, weights: _Weights) -> None:
        self._source = weights.source

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [B, T] -> float32 [B, T, D]."""
        width = self._source.shape(EMBEDDING)[1]
        known, where = np.unique(np.asarray(ids), return_inverse=True)
        rows = [self._source.read(EMBEDDING, (slice(i, i + 1), slice(0, width)))[0] for i in known]
        return jnp.asarray(np.stack(rows).astype(np.float32)[where.reshape(ids.shape)])


class _Layers:
    """A stack, layer by layer."""

    def __init__(self, weights: _Weights, path: str) -> None:
        self._weights, self._path = weights, path

    def __iter__(self) -> Iterator[Any]:
        config = self._weights.config
        if self._path.startswith("vision/"):
            number = config.vision.num_computed_layers
        else:
            number = config.decoder.num_layers
        for i in range(number):
            layer = nnx.eval_shape(self._abstract)
            self._weights.fill(layer, self._path, i)
            yield layer

    def _abstract(self) -> nnx.Module:
        config = self._weights.config
        if self._path.startswith("vision/"):
            return VisionLayer(config.vision, attention="reference", rngs=nnx.Rngs(0), **_DTYPES)
        return DecoderLayer(config.decoder, remat="none", rngs=nnx.Rngs(0), **_DTYPES)
