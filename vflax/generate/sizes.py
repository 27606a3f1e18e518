"""How large an engine is: what is asked for, and what comes of it on the devices at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from vflax.errors import UserError
from vflax.generate.programs import Layout
from vflax.models.llava import LlavaConfig
from vflax.sharding import batch_shards, platform

# Unless told, a cache on a CPU is no larger than this, or what the slots need; elsewhere it takes this share of what is
# free.
_CPU_CACHE = 2 << 30
_CACHE_SHARE = 0.8


@dataclass(frozen=True)
class EngineSettings:
    """How large an engine is.

    slots: requests that run at a time.
    max_length: tokens of prompt and answer together; None: the decoder's positions, at most 4,096.
    cache_tokens: tokens that the key-value cache holds; None: all slots at their longest and half as much for prompts
        that begin alike, or what the device's memory has room for.
    int8_cache: hold keys and values in 8 bits.
    chunk: tokens of a prompt that are read at a time.
    page: tokens of a page of the cache; block: keys that attention takes at a time. Chunk and block are multiples of
        page; None, all three: by platform.
    pictures: whose features are kept.
    row_sizes: numbers of rows that a call of decode may have: "equal": those with the same bits; "any": all that are
        compiled, so that the last bits of an answer depend on how many others run; faster for few requests on a CPU.
    """

    slots: int = 8
    max_length: int | None = None
    cache_tokens: int | None = None
    int8_cache: bool = False
    chunk: int | None = None
    page: int | None = None
    block: int | None = None
    pictures: int = 64
    row_sizes: str = "equal"


def row_sizes(where: str, slots: int) -> list[int]:
    """Numbers of rows that decode is compiled for, rising. On a CPU a row costs time; elsewhere all slots take hardly
    longer than one, since reading the weights is what takes time; but a GPU has faster products for one row."""
    few = {"cpu": (1, 2, 8, 16, 32), "gpu": (1, 8, 32)}.get(where, ())
    return sorted({size for size in few if size < slots} | {slots})


def reference_size(where: str, sizes: Sequence[int]) -> int:
    """The number of rows whose bits others are compared with."""
    return max(size for size in sizes if size <= 8 or size == sizes[0]) if where == "cpu" else sizes[-1]


def layout_of(settings: EngineSettings, config: LlavaConfig, mesh: Mesh, dtype: Any) -> Layout:
    """The sizes of an engine.

    Raises:
        UserError: naming every setting that is impossible.
    """
    where = platform(mesh)
    # A block of several pages is put together before it is used: on a TPU that takes as long as the attention itself,
    # on a GPU decode's kernel reads pages where they lie.
    usual = 64 if where == "cpu" else 512
    page = settings.page or (512 if where == "tpu" else 64)
    chunk, block = settings.chunk or usual, settings.block or usual
    max_length = settings.max_length or min(config.decoder.max_positions, 4096)
    shards = batch_shards(mesh)
    slots = -(-settings.slots // shards)
    wanted = settings.cache_tokens or _default_cache_tokens(
        settings.slots * max_length, mesh, _token_bytes(config, dtype, settings.int8_cache)
    )
    tokens = -(-wanted // shards)  # what one shard holds
    problems = []
    if settings.slots < 1:
        problems.append(f"slots={settings.slots}: at least 1")
    if not 2 <= max_length <= config.decoder.max_positions:
        problems.append(
            f"max_length={max_length}: from 2 to the {config.decoder.max_positions} positions that the decoder knows"
        )
    if chunk % page or block % page:
        problems.append(f"chunk={chunk} and block={block}: multiples of page={page}")
    least = chunk + page * (slots + 1)
    if tokens < least:
        problems.append(
            f"cache_tokens={wanted}: at least {shards * least:,}, a chunk and a page for each slot"
        )
    per_chunk = shards * (chunk // config.vision.num_tokens + 2)
    if settings.pictures < per_chunk:
        problems.append(
            f"pictures={settings.pictures}: at least {per_chunk}, as many as prefill reads at a time"
        )
    if settings.row_sizes not in ("equal", "any"):
        problems.append(f"row_sizes={settings.row_sizes!r}: equal or any")
    if problems:
        raise UserError("engine: " + "; ".join(problems))
    # A table reaches over whole chunks and whole blocks, and one page over the first chunk.
    unit = math.lcm(chunk, block)
    table = -(-max(max_length, chunk + 1) // unit) * unit // page
    return Layout(
        shards, slots, 1 + tokens // page, page, chunk, block // page, table, settings.pictures, max_length
    )


def _token_bytes(config: LlavaConfig, dtype: Any, int8: bool) -> int:
    """Bytes of one token in the cache."""
    decoder = config.decoder
    head = decoder.head_dim + 4 if int8 else decoder.head_dim * jnp.dtype(dtype).itemsize
    return 2 * decoder.num_layers * decoder.num_kv_heads * head


def _default_cache_tokens(longest: int, mesh: Mesh, token_bytes: int) -> int:
    """Half as much again as all slots at their longest need, unless the devices lack the memory."""
    wanted = longest * 3 // 2
    stats = mesh.devices.flat[0].memory_stats()
    if stats is None:  # a CPU
        return min(wanted, max(longest, _CPU_CACHE // token_bytes))
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return min(wanted, int(free * _CACHE_SHARE) * mesh.size // token_bytes)
