"""From named tensors to sharded arrays, leaf by leaf: each process reads only the slices that its devices hold."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from vflax.errors import UserError
from vflax.models.llava import LlavaConfig
from vflax.models.lora import SCALE, LoraConfig, quantise
from vflax.weights import names
from vflax.weights.file_source import TensorSource
from vflax.weights.names import Entry, Index

# {int8 kernel's path: scales [L, out]}.
Scales = dict[str, np.ndarray]
# So many lines of each kind are shown; a wrong config can make thousands.
_SHOWN = 20
# Of a leaf that is larger, so much is on the host at a time.
_BLOCK_BYTES = 64 << 20


def load_params(
    source: TensorSource,
    config: LlavaConfig,
    shardings: Mapping[str, Sharding],
    dtypes: Mapping[str, Any],
    lora: LoraConfig | None = None,
) -> dict[str, jax.Array]:
    """Load parameters into sharded arrays.

    Host memory beyond the arrays is one block of a leaf. Every process of a run calls it, and reads what its own
    devices hold.

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
        kinds = compare(source, names.expected(config, lora), names.spare(config.decoder))
    else:
        table = names.table(config, lora)
        wanted = {name: table[path].tensor_shape for path in paths for name in table[path].names}
        kinds = compare(source, wanted, source.names())
    if any(kinds.values()):
        raise UserError(_report(source, config, kinds))


def compare(
    source: TensorSource, wanted: Mapping[str, tuple[int, ...]], spare: Collection[str]
) -> dict[str, list[str]]:
    """Everything that is "missing", "of another shape" or "unexpected" in a source, a line for each tensor.

    Args:
        source: the tensors; nothing is read.
        wanted: {canonical name: shape}.
        spare: names that may be there, too.
    """
    present = set(source.names())
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in present]
    shapes = {name: source.shape(name) for name in wanted if name in present}
    wrong = [
        f"{name} is {list(shape)}, the config asks for {list(wanted[name])}; in {source.where(name)}"
        for name, shape in shapes.items()
        if shape != wanted[name]
    ]
    allowed = {*wanted, *spare}
    unexpected = [f"{name} in {source.where(name)}" for name in source.names() if name not in allowed]
    return {"missing": missing, "of another shape": wrong, "unexpected": unexpected}


def _report(source: TensorSource, config: LlavaConfig, kinds: dict[str, list[str]]) -> str:
    places = sorted({source.where(name).split(" (")[0] for name in source.names()})
    lines = [f"the weights do not fit the config (read from {', '.join(places[:8]) or 'nothing'}):"]
    for kind, found in kinds.items():
        if found:
            lines.append(f"  {len(found)} tensors {kind}:")
            lines += [f"    {line}" for line in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"    ... and {len(found) - _SHOWN} more")
    lines += _bridge_hint(source, config)
    lines.append("  Check that config.json belongs to these files and that all of them are there.")
    return "\n".join(lines)


def _bridge_hint(source: TensorSource, config: LlavaConfig) -> list[str]:
    """The commonest way for the two to differ: runs of the original LLaVA wrote a wrong kind of projector down."""
    found = sum(bool(re.fullmatch(rf"{names.BRIDGE}\.linear_\d+\.weight", name)) for name in source.names())
    if found in (0, config.bridge.num_linears):
        return []
    kind = "linear" if found == 1 else f"mlp{found}x_gelu"
    return [
        f"  The bridge of these files is {kind}, the config says {config.bridge.kind} (in the original LLaVA's "
        "config.json: mm_projector_type)."
    ]


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
    """One leaf, in `dtype`."""

    def read(block: Index) -> np.ndarray:
        return read_param(source, entry, block, dtype)

    return _fill(entry.param_shape, sharding, dtype, lambda index: _blocks(entry, index, dtype), read)


def _load_quantised(
    source: TensorSource, entry: Entry, sharding: Sharding, scales: Scales, want_scales: bool
) -> jax.Array:
    """An int8 kernel [L, in, out], or its scales [L, out]. Whole columns are read: all of one decides its scale.

    Args:
        scales: {kernel's path: scales found so far, NaN where not yet}, for the leaf that holds them comes later.
    """
    layers, rows, columns = entry.param_shape
    known = scales.setdefault(entry.path, np.full((layers, columns), np.nan, np.float32))

    def read(block: Index) -> np.ndarray:
        layer, inner, outer = block
        whole = read_param(source, entry, (layer, slice(0, rows), outer), np.dtype(np.float32))
        quantised = [quantise(kernel) for kernel in whole]
        known[layer, outer] = [scale for _, scale in quantised]
        return np.stack([integers[inner] for integers, _ in quantised])

    if not want_scales:
        # Of the float32 columns that are read, not of the integers, a block has its size.
        float32 = np.dtype(np.float32)
        return _fill(
            entry.param_shape, sharding, np.dtype(np.int8),
            lambda index: [
                (layer, index[1], outer)
                for layer, _, outer in _blocks(entry, (index[0], slice(0, rows), index[2]), float32)
            ],
            read,
        )  # fmt: skip

    def read_scales(block: Index) -> np.ndarray:
        if np.isnan(known[block]).any():
            for layer in range(block[0].start, block[0].stop):
                read((slice(layer, layer + 1), slice(0, 0), block[1]))
        return known[block]

    return _fill((layers, columns), sharding, known.dtype, lambda index: [index], read_scales)


def _fill(
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype,
    blocks_of: Callable[[Index], list[Index]],
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """Make an array. What is large is filled on its devices block by block, so that the host never holds all of it.

    Args:
        blocks_of: cuts a part of the array into blocks.
        read: reads a block.
    """
    devices: dict[str, list[jax.Device]] = {}
    indices: dict[str, Index] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounded = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        # Replicas ask for the same slices.
        devices.setdefault(str(bounded), []).append(device)
        indices[str(bounded)] = bounded
    shards: dict[jax.Device, jax.Array] = {}
    for key, index in indices.items():
        blocks = blocks_of(index)
        if len(blocks) == 1:
            whole = read(blocks[0])
            shards |= {device: jax.device_put(whole, device) for device in devices[key]}
            continue
        local = [s.stop - s.start for s in index]
        shards |= {device: jnp.zeros(local, dtype, device=device) for device in devices[key]}
        for block in blocks:
            part = read(block)
            start = tuple(b.start - s.start for b, s in zip(block, index, strict=True))
            for device in devices[key]:
                shards[device] = _put(shards[device], jax.device_put(part, device), start)
            # Else the host would read ahead, and hold what it has read, as fast as the disk gives it.
            jax.block_until_ready([shards[device] for device in devices[key]])
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))


def _blocks(entry: Entry, index: Index, dtype: np.dtype) -> list[Index]:
    """Cut a part of a parameter into blocks of about _BLOCK_BYTES: rows of one layer's tensor, as they lie on disk."""
    sizes = [s.stop - s.start for s in index]
    if math.prod(sizes) * dtype.itemsize <= _BLOCK_BYTES:
        return [index]
    stacked = int(entry.layers is not None)
    axis = entry.axes.index(0) + stacked  # the parameter's axis that is the first one of the tensor
    rows = index[axis]
    row_bytes = math.prod(sizes[stacked:]) // sizes[axis] * dtype.itemsize
    step = max(1, _BLOCK_BYTES // row_bytes)
    cuts = [slice(a, min(a + step, rows.stop)) for a in range(rows.start, rows.stop, step)]
    layers = [(slice(i, i + 1),) for i in range(index[0].start, index[0].stop)] if stacked else [()]
    return [(*layer, *index[stacked:axis], cut, *index[axis + 1 :]) for layer in layers for cut in cuts]


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf: jax.Array, block: jax.Array, start: tuple[int, ...]) -> jax.Array:
    """Write a block into a leaf, in the leaf's own memory."""
    if leaf.dtype != jnp.bfloat16:
        return jax.lax.dynamic_update_slice(leaf, block, start)
    # As bits, for XLA's CPU backend copies bfloat16 number by number, six times slower.
    bits, part = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (leaf, block))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(bits, part, start), leaf.dtype)
