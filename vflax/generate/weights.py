"""A model's weights in the form that an engine computes with: layer by layer, in one dtype or the layers in 8 bits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vflax import sharding
from vflax.generate.fused import FUSED
from vflax.generate.programs import Weights
from vflax.models import llava
from vflax.models.llava import LlavaConfig
from vflax.models.lora import SCALE
from vflax.weights.file_source import TensorSource
from vflax.weights.load import check, load_params

_LAYERS = "decoder/layers/"
_KERNEL = re.compile(rf"{_LAYERS}.*/kernel")


def load_weights(source: TensorSource, config: LlavaConfig, mesh: Mesh, dtype: Any, *, int8: bool) -> Weights:
    """Load a model onto a mesh, the largest kernels first: what the layers' own arrays are cut out of is then never
    more than what is yet to come, or a little.

    Args:
        source: the tensors.
        config: the model they belong to.
        mesh: (data, fsdp, tensor).
        dtype: of all that is not int8.
        int8: hold the kernels of the decoder's layers as integers, see vflax/models/lora.py.

    Raises:
        UserError: for tensors that are missing or do not fit the config.
    """
    with jax.set_mesh(mesh):
        _, shapes = llava.abstract(config, dtype=dtype, param_dtype=dtype, remat="none", attention="auto")
    if int8:
        for path in [path for path in shapes if _KERNEL.fullmatch(path)]:
            layers, _, fan_out = shapes[path].shape
            shapes[path] = jax.ShapeDtypeStruct(shapes[path].shape, jnp.int8)
            scale = f"{path.rpartition('/')[0]}/{SCALE}"
            shapes[scale] = jax.ShapeDtypeStruct((layers, fan_out), jnp.float32)
    where = sharding.param_shardings(shapes, mesh)
    dtypes = {path: leaf.dtype for path, leaf in shapes.items()}
    check(source, config)
    fused = mesh.shape["tensor"] == 1
    weights = Weights({}, tuple({} for _ in range(config.decoder.num_layers)))
    for paths in _groups(shapes, fused=fused):
        params = load_params(source, config, {path: where[path] for path in paths}, dtypes)
        found = by_layer(params, config.decoder.num_layers, fused=fused)
        weights.rest.update(found.rest)
        for layer, own in zip(weights.layers, found.layers, strict=True):
            layer.update(own)
    return weights


def _groups(shapes: Mapping[str, Any], *, fused: bool) -> list[list[str]]:
    """The paths of leaves that are loaded at a time: those of a linear, or of several that are fused; largest first."""
    holder = {f"{_LAYERS}{part}": name for name, parts in FUSED.items() for part in parts} if fused else {}
    groups: dict[str, list[str]] = {}
    for path in shapes:
        owner = path.rpartition("/")[0]
        groups.setdefault(holder.get(owner, owner), []).append(path)

    def size(paths: list[str]) -> int:
        return sum(math.prod(shapes[path].shape) * shapes[path].dtype.itemsize for path in paths)

    return sorted(groups.values(), key=size, reverse=True)


def by_layer(params: llava.Params, num_layers: int, *, fused: bool) -> Weights:
    """Take the stacks of the decoder's layers apart; `params` is empty afterwards.

    Args:
        params: of a model.
        num_layers: of its decoder.
        fused: for `vflax.generate.fused`, which is for kernels that are not spread along their outputs.
    """
    layers: list[llava.Params] = [{} for _ in range(num_layers)]
    for name, parts in FUSED.items() if fused else ():
        for kind in ("kernel", SCALE):
            found = [params.pop(f"{_LAYERS}{part}/{kind}", None) for part in parts]
            if found[0] is not None:
                for layer, own in zip(layers, _unstack(*found), strict=True):
                    layer[f"{name}/{kind}"] = own
    rest = {}
    for path in list(params):
        leaf = params.pop(path)
        if not path.startswith(_LAYERS):
            rest[path] = leaf
            continue
        for layer, own in zip(layers, _unstack(leaf), strict=True):
            layer[path.removeprefix(_LAYERS)] = own
    return Weights(rest, tuple(layers))


def _unstack(*leaves: jax.Array) -> list[jax.Array]:
    """[L, ...] -> L arrays that are spread like it; of several, one after the other along the last axis."""
    place = leaves[0].sharding
    if isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*place.spec[1:]))

    def layers(*stacks: jax.Array) -> list[jax.Array]:
        return [jnp.concatenate(of, axis=-1) for of in zip(*stacks, strict=True)]

    return jax.jit(layers, out_shardings=place)(*leaves)
