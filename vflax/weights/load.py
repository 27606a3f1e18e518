"""From named tensors to sharded arrays, leaf by leaf: each process reads only the slices that its devices hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from vflax.errors import UserError
from vflax.models.llava import LlavaConfig
from vflax.models.lora import SCALE, LoraConfig, quantise
from vflax.weights import names
from vflax.weights.names import LM_HEAD, Entry
from vflax.weights.safetensors_source import TensorSource

# {(int8 kernel, layers, columns): their scales}, kept from reading the kernel for the leaf that holds them.
Scales = dict[tuple[str, str, str], np.ndarray]
# So many lines of each kind are shown; a wrong config can make thousands.
_SHOWN = 20


def load_params(
    source: TensorSource,
    config: LlavaConfig,
    shardings: Mapping[str, Sharding],
    dtypes: Mapping[str, Any],
    lora: LoraConfig | None = None,
) -> dict[str, jax.Array]:
    """Load parameters into sharded arrays.

    Host memory beyond the arrays is one leaf's slices of this process. Every process of a run calls it.

    Args:
        source: the tensors.
        config: the model they belong to.
        shardings: {parameter path: sharding}; these leaves are loaded, all of the model or some.
        dtypes: {parameter path: dtype} for the same paths; int8 quantises a kernel, see vflax/models/lora.py.
        lora: the model's adapters.

    Returns:
        {parameter path: array} for the paths of `shardings`, in their order.

    Raises:
        UserError: for all missing, mis-shaped and, when the whole model is loaded, unexpected tensors at
            once.
    """
    table = names.table(config, lora)
    wanted = {path: names.weight_of(path) for path in shardings}
    unknown = sorted(set(wanted.values()) - set(table))
    if unknown:
        raise UserError(f"the model has no such parameters: {', '.join(unknown)}")
    check(source, config, None if set(wanted.values()) == set(table) else wanted.values(), lora)
    scales: Scales = {}
    params = {}
    for path, sharding in shardings.items():
        entry, dtype = table[wanted[path]], np.dtype(dtypes[path])
        if path.endswith(f"/{SCALE}") or dtype == np.int8:
            params[path] = _load_quantised(source, entry, sharding, scales, path.endswith(f"/{SCALE}"))
        else:
            params[path] = _load_leaf(source, entry, sharding, dtype)
    return params


def check(
    source: TensorSource,
    config: LlavaConfig,
    paths: Iterable[str] | None = None,
    lora: LoraConfig | None = None,
) -> None:
    """Compare a source with the model before anything is read.

    Args:
        source: the tensors.
        config: the model.
        paths: parameters that must be there; None: all, the carried tensors too, and nothing else may be.
        lora: the model's adapters.

    Raises:
        UserError: listing everything that is missing, unexpected or mis-shaped, with the files.
    """
    if paths is None:
        wanted = names.expected(config, lora)
    else:
        table = names.table(config, lora)
        wanted = {name: table[path].tensor_shape for path in paths for name in table[path].names}
    present = set(source.names())
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in present]
    shapes = {name: source.shape(name) for name in wanted if name in present}
    wrong = [
        f"{name} is {list(shape)}, the config asks for {list(wanted[name])}; in {source.where(name)}"
        for name, shape in shapes.items()
        if shape != wanted[name]
    ]
    unexpected = []
    if paths is None:
        # Tied weights may be stored twice; Hugging Face, too, takes the embedding.
        allowed = set(wanted) | ({LM_HEAD} if config.decoder.tie_word_embeddings else set())
        unexpected = [f"{name} in {source.where(name)}" for name in source.names() if name not in allowed]
    kinds = {"missing": missing, "of another shape": wrong, "unexpected": unexpected}
    if any(kinds.values()):
        raise UserError(_report(source, kinds))


def _report(source: TensorSource, kinds: dict[str, list[str]]) -> str:
    places = sorted({source.where(name).split(" (")[0] for name in source.names()})
    lines = [f"the weights do not fit the config (read from {', '.join(places[:8]) or 'nothing'}):"]
    for kind, found in kinds.items():
        if found:
            lines.append(f"  {len(found)} tensors {kind}:")
            lines += [f"    {line}" for line in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"    ... and {len(found) - _SHOWN} more")
    lines.append("  Check that config.json belongs to these files and that all of them are there.")
    return "\n".join(lines)


def read_param(source: TensorSource, entry: Entry, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """Read a part of a parameter.

    Args:
        source: the tensors.
        entry: the parameter.
        index: a slice of step 1 per axis of the parameter, the layer axis included.
        dtype: of the result.
    """
    bounded = tuple(slice(*s.indices(n)) for s, n in zip(index, entry.param_shape, strict=True))
    if entry.layers is None:
        return entry.to_param(source.read(entry.pattern, entry.tensor_index(bounded))).astype(dtype)
    out = np.empty([s.stop - s.start for s in bounded], dtype)
    inner = entry.tensor_index(bounded[1:])
    for i, name in enumerate(entry.names[bounded[0]]):
        out[i] = entry.to_param(source.read(name, inner))
    return out


def _load_leaf(source: TensorSource, entry: Entry, sharding: Sharding, dtype: np.dtype) -> jax.Array:
    read: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        # Replicas ask for the same slices once per device.
        index = tuple(index or ())
        key = str(index)
        if key not in read:
            read[key] = read_param(source, entry, index, dtype)
        return read[key]

    return jax.make_array_from_callback(entry.param_shape, sharding, part)


def _load_quantised(
    source: TensorSource, entry: Entry, sharding: Sharding, scales: Scales, want_scales: bool
) -> jax.Array:
    """An int8 kernel [L, in, out], or its scales [L, out]. Whole columns are read: all of one decides its scale."""
    layers, _, columns = entry.param_shape
    integers: dict[tuple[str, str, str], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = (entry.path, str(index[0]), str(index[-1]))
        if key not in (scales if want_scales else integers):
            whole = [
                quantise(read_param(source, entry, (slice(i, i + 1), slice(None), index[-1]), np.dtype(np.float32)))
                for i in range(*index[0].indices(layers))
            ]  # fmt: skip
            integers[key] = np.concatenate([q for q, _ in whole])
            scales[key] = np.concatenate([scale for _, scale in whole])
        return scales[key] if want_scales else integers[key][:, index[1]]

    shape = (layers, columns) if want_scales else entry.param_shape
    return jax.make_array_from_callback(shape, sharding, part)
