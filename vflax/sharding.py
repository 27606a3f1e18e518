"""Mesh, path rules and the check that nothing large is left unsharded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vflax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Every batch dimension is spread over both of these.
BATCH_AXES = ("data", "fsdp")

# (pattern for the whole path, axis per dimension). The first match decides. Kernels are [in, out] behind the
# stacked layer axis; a column-parallel kernel shards its outputs over `tensor`, a row-parallel one its inputs
# (Shoeybi et al., Megatron-LM, 2019), and `fsdp` takes the other dimension. An adapter lies like its kernel, and the
# scales of an int8 kernel like its outputs.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"decoder/embed_tokens/embedding", ("tensor", "fsdp")),
    (r"decoder/lm_head/kernel", ("fsdp", "tensor")),
    (r"decoder/layers/(attention/(q|k|v)|mlp/(gate|up))/(kernel|lora_a|lora_b)", (None, "fsdp", "tensor")),
    (r"decoder/layers/(attention/o|mlp/down)/(kernel|lora_a|lora_b)", (None, "tensor", "fsdp")),
    (r"decoder/layers/(attention/(q|k|v)|mlp/(gate|up))/kernel_scale", (None, "tensor")),
    (r"decoder/layers/(attention/o|mlp/down)/kernel_scale", (None, "fsdp")),
    (r"vision/layers/(attention/(q|k|v)|mlp/fc1)/(kernel|lora_a|lora_b)", (None, "fsdp", "tensor")),
    (r"vision/layers/(attention/out|mlp/fc2)/(kernel|lora_a|lora_b)", (None, "tensor", "fsdp")),
    (r"vision/patch_embedding/kernel", (None, None, None, "fsdp")),
    (r"vision/position_embedding", (None, "fsdp")),
    (r"bridge/layers_\d+/(kernel|lora_a|lora_b)", ("fsdp", "tensor")),
    (r".*/(scale|bias)|vision/class_embedding", ()),
)
# A model with more of its bytes than this on every device is refused: a rule must be missing.
MAX_UNSHARDED = 0.02
# A leaf below this many bytes is not worth a collective, so it does not count as left unsharded.
_SMALL = 2**16


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the (data, fsdp, tensor) mesh; one of the sizes may be -1 and takes what is left.

    `data` runs across slices where there are several (DCN), the rest inside a slice (ICI).

    Raises:
        UserError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    named = dict(zip(AXES, sizes, strict=True))
    fixed = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(
            f"config.mesh={named}: each size is a positive number, and at most one is -1 (what is left)"
        )
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh={named} needs {fixed} devices (times the -1), but there are {len(devices)}. "
            "Set config.mesh.data, .fsdp and .tensor so that their product is the number of devices."
        )
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) > 1:
        if sizes[0] % len(slices):
            raise UserError(
                f"config.mesh.data={sizes[0]} must be a multiple of the {len(slices)} slices, for it runs across them: "
                f"--config.mesh.data={len(slices)}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // len(slices), *sizes[1:]),
            (len(slices), 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    if _reaches_over_hosts(grid):
        grid = _host_by_host(sizes, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _reaches_over_hosts(grid: np.ndarray) -> bool:
    """Each process reads the rows of its own devices; along `tensor` all devices hold the same rows."""
    return any(len({d.process_index for d in line}) > 1 for line in grid.reshape(-1, grid.shape[2]))


def _host_by_host(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """A grid whose `tensor` lines stay inside hosts, where the layout of the whole slice has others: on a 4 x 4 slice a
    line of 4 is a row of chips, and a host has 2 x 2.

    Raises:
        UserError: there is none.
    """
    data, fsdp, tensor = sizes
    per_host = len(devices) // len({d.process_index for d in devices})
    lines = per_host // tensor
    if per_host % tensor or (fsdp % lines and data % lines):
        raise UserError(
            f"config.mesh.tensor={tensor} reaches over hosts of {per_host} devices each. Choose one that divides the "
            "devices of a host, and give the rest to config.mesh.fsdp"
        )
    inside = (1, lines, tensor) if fsdp % lines == 0 else (lines, 1, tensor)
    outside = (data // inside[0], fsdp // inside[1], 1)
    return mesh_utils.create_hybrid_device_mesh(
        inside, outside, devices, process_is_granule=True, allow_split_physical_axes=True
    )


def param_spec(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one parameter: its rule, less the axes that do not divide their dimension.

    Raises:
        UserError: when no rule covers the path.
    """
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            kept = [
                axis if axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=False)
            ]
            return PartitionSpec(*kept)
    raise UserError(f"vflax/sharding.py has no rule for the parameter {path!r}")


def param_shardings(params: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """{path: NamedSharding} for {path: anything with .shape and .dtype}, after the coverage check.

    Raises:
        UserError: when more than 2 % of the model's bytes would lie whole on every device of the fsdp and
            tensor axes; the largest such parameters are named.
    """
    specs = {path: param_spec(path, leaf.shape, mesh) for path, leaf in params.items()}
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        size = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in params.items()}
        whole = {
            path: size[path]
            for path, spec in specs.items()
            if all(axis is None for axis in spec) and size[path] >= _SMALL
        }
        share = sum(whole.values()) / max(1, sum(size.values()))
        if share > MAX_UNSHARDED:
            worst = sorted(whole, key=whole.__getitem__, reverse=True)[:5]
            raise UserError(
                f"{share:.1%} of the model is not sharded over mesh {dict(mesh.shape)} "
                f"(at most {MAX_UNSHARDED:.0%} may be): "
                + ", ".join(f"{path} {tuple(params[path].shape)}" for path in worst)
                + ". Choose config.mesh.fsdp and config.mesh.tensor so that they divide these shapes."
            )
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch leaf [A, B, ...]: accumulation steps in sequence, rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def platform(mesh: Mesh) -> str:
    """Of a mesh's devices: "tpu", "gpu" or "cpu"."""
    name = mesh.devices.flat[0].platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def inner_shards() -> int:
    """Into how many parts the inner widths of a layer are split, on the mesh at hand; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["tensor"]


def on_own_rows_and_heads(run: Callable[..., jax.Array], kv_heads: int) -> Callable[..., jax.Array]:
    """`run`, each device with its own part, on the mesh at hand; `run` as it is without one.

    Args:
        run: of q [B, T, H, K], k and v [B, T, KV, K] and segments [B, T] to an array as q.
        kv_heads: KV. Every device along `tensor` has all heads where they do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    tensor = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, tensor)
    return jax.shard_map(run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Pin the sharding of an activation inside jit; a no-op where no mesh is set.

    GSPMD loses the batch sharding in a reshape such as [B, S, ...] -> [B * S, ...] and then silently
    replicates everything behind it, so images and features are pinned by hand.

    Args:
        x: an array of any shape.
        spec: one entry per leading dimension: a mesh axis, several, or None. Missing entries are None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
