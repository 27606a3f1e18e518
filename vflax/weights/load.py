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

    def cut(region: Index) -> list[Index]:
        return _blocks(entry, region, dtype)

    def read(block: Index) -> np.ndarray:
        return read_param(source, entry, block, dtype)

    return _fill(entry.param_shape, sharding, dtype, entry.row_axes, cut, read)


def _load_quantised(
    source: TensorSource, entry: Entry, sharding: Sharding, scales: Scales, want_scales: bool
) -> jax.Array:
    """An int8 kernel [L, in, out], or its scales [L, out]. Whole columns are read: all of one decides its scale.

    Args:
        scales: {kernel's path: scales found so far, NaN where not yet}, for the leaf that holds them comes later.
    """
    layers, rows, columns = entry.param_shape
    known = scales.setdefault(entry.path, np.full((layers, columns), np.nan, np.float32))

    def cut(region: Index) -> list[Index]:
        # Of the float32 columns that are read, not of the integers, a block has its size.
        return _blocks(entry, (region[0], slice(0, rows), region[-1]), np.dtype(np.float32))

    def read(block: Index) -> np.ndarray:
        layer, _, outer = block
        quantised = [quantise(kernel) for kernel in read_param(source, entry, block, np.dtype(np.float32))]
        known[layer, outer] = [scale for _, scale in quantised]
        return np.stack([integers for integers, _ in quantised])

    def read_scales(block: Index) -> np.ndarray:
        if np.isnan(known[block]).any():
            for part in cut(block):
                read(part)
        return known[block]

    if want_scales:
        return _fill((layers, columns), sharding, known.dtype, (0, 1), lambda region: [region], read_scales)
    return _fill(entry.param_shape, sharding, np.dtype(np.int8), entry.row_axes, cut, read)


def _fill(
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype,
    axes: tuple[int, ...],
    cut: Callable[[Index], list[Index]],
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """Make an array. What is large is filled on its devices block by block, so that the host never holds all of it.

    Args:
        axes: devices whose parts differ along other axes only share what is read.
        cut: a region of the array to blocks, which may be wider than it along other axes.
        read: reads a block.
    """
    shards: dict[jax.Device, jax.Array] = {}
    for region, parts in _regions(shape, sharding, axes):
        blocks = cut(region)
        if len(blocks) > 1:
            for device, index in parts.items():
                shards[device] = jnp.zeros([s.stop - s.start for s in index], dtype, device=device)
        for block in blocks:
            whole = read(block)
            for device, index in parts.items():
                # The part of the block that the device holds, seen from the block and from the device.
                both = [
                    (max(b.start, s.start), min(b.stop, s.stop)) for b, s in zip(block, index, strict=True)
                ]
                inner = tuple(slice(x - b.start, y - b.start) for (x, y), b in zip(both, block, strict=True))
                part = jax.device_put(whole[inner], device)
                if len(blocks) == 1:
                    shards[device] = part
                else:
                    start = tuple(x - s.start for (x, _), s in zip(both, index, strict=True))
                    shards[device] = _put(shards[device], part, start)
            # Else the host would read ahead, and hold what it has read, as fast as the disk gives it.
            jax.block_until_ready([shards[device] for device in parts])
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))


def _regions(
    shape: tuple[int, ...], sharding: Sharding, axes: tuple[int, ...]
) -> list[tuple[Index, dict[jax.Device, Index]]]:
    """What this process's devices hold: [(a region of the array, {device: its part})], a part in one region only.

    Parts that differ along other axes than `axes` lie in one region, for a file holds whole rows: what one device
    leaves of them, the next one needs.
    """
    regions: dict[str, dict[jax.Device, Index]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounded = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        regions.setdefault(str([bounded[axis] for axis in axes]), {})[device] = bounded
    return [
        (
            tuple(
                slice(min(s.start for s in along), max(s.stop for s in along))
                for along in zip(*parts.values(), strict=True)
            ),
            parts,
        )
        for parts in regions.values()
    ]


def _blocks(entry: Entry, index: Index, dtype: np.dtype) -> list[Index]:
    """Cut a part of a parameter into blocks of about _BLOCK_BYTES: rows of one layer's tensor, as they lie on disk."""
    sizes = [s.stop - s.start for s in index]
    if math.prod(sizes) * dtype.itemsize <= _BLOCK_BYTES:
        return [index]
    stacked = int(entry.layers is not None)
    axis = entry.row_axes[-1]
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
