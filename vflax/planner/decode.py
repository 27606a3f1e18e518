"""Answers in place of training: vflax/generate's own jitted function, compiled for a slice."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vflax import aot, jaxpr_flops, sharding
from vflax.errors import UserError
from vflax.generate.greedy import bucket, make_generate
from vflax.generate.open import answer_mesh
from vflax.hlo import Program
from vflax.models import llava
from vflax.models.llava import LlavaConfig
from vflax.planner.figures import KERNEL_SHARE


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked at a time.

    Attributes:
        rows: prompts; prompt: tokens of each, its image included; new_tokens: of an answer.
    """

    rows: int
    prompt: int
    new_tokens: int

    def __post_init__(self) -> None:
        wrong = [
            f"--{flag}={value}: at least 1"
            for flag, value in (
                ("decode-rows", self.rows), ("prompt-tokens", self.prompt), ("new-tokens", self.new_tokens)
            )
            if value < 1
        ]  # fmt: skip
        if wrong:
            raise UserError("; ".join(wrong))


def describe(
    config: ConfigDict, model: LlavaConfig, target: aot.Target, request: Request, price: float | None = None
) -> dict[str, Any]:
    """Compile greedy answers with all weights in config.dtype and say what a chip holds and how long it takes.

    The mesh is that of an engine. Rows are as many as were asked for, or the next more that divide among its
    chips along data and fsdp.

    Raises:
        UserError: prompt and answer are longer than the decoder can take.
    """
    prompt = bucket(request.prompt)
    length = prompt + request.new_tokens
    if length > model.decoder.max_positions:
        raise UserError(
            f"a prompt of {prompt} tokens (--prompt-tokens={request.prompt}, rounded up) and an answer of "
            f"{request.new_tokens} are {length}, more than the {model.decoder.max_positions} positions that the "
            "decoder knows"
        )
    images = int(model.vision.num_tokens < request.prompt)
    mesh = answer_mesh(model, target.devices)
    shards = sharding.batch_shards(mesh)
    rows = -(-request.rows // shards) * shards
    with jax.set_mesh(mesh):
        graphdef, shapes = llava.abstract(
            model, dtype=config.dtype, param_dtype=config.dtype, remat="none", attention=config.attention
        )
    where = sharding.param_shardings(shapes, mesh)
    placed = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[p]) for p, x in shapes.items()}
    batch = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    tokens = jax.ShapeDtypeStruct((rows, prompt), jnp.int32, sharding=batch)
    size = model.vision.image_size
    pictures = jax.ShapeDtypeStruct((rows, images, size, size, 3), jnp.uint8, sharding=batch)
    ends = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):  # whose platform has the compiler's options
        generate: Any = make_generate(graphdef, max_new_tokens=request.new_tokens, pad_id=0)
        traced = generate.trace(placed, tokens, pictures, tokens, tokens, ends)
    compiled = aot.compile_traced(traced, mesh)
    weights = sum(math.prod(where[p].shard_shape(x.shape)) * x.dtype.itemsize for p, x in shapes.items())
    decoder = model.decoder
    heads = decoder.num_kv_heads // math.gcd(decoder.num_kv_heads, mesh.shape["tensor"])
    cache = (
        2 * decoder.num_layers * rows // shards * length * heads * decoder.head_dim
        * jnp.dtype(config.dtype).itemsize
    )  # fmt: skip
    limit = target.slice.generation.hbm if target.slice else None
    result: dict[str, Any] = {
        "topology": target.name, "chips": target.chips, "mesh": dict(mesh.shape), "rows": rows, "prompt": prompt,
        "images": images, "new_tokens": request.new_tokens, "fits": False, "reason": None,
        "refused": None,  # nothing is asked before answers start
        "memory": {"limit": limit, "weights": weights, "cache": cache},
    }  # fmt: skip
    if isinstance(compiled, aot.Overflow):
        return result | {"reason": f"does not fit: {compiled.message}"}
    result["memory"]["peak"] = compiled.memory.peak
    result["fits"] = limit is None or compiled.memory.peak <= limit
    result["compile"] = {"seconds": compiled.seconds, "cpu_seconds": compiled.cpu_seconds}
    if compiled.program is None:
        return result | {"reason": aot.NO_TIMES}
    if target.slice is None:
        return result
    clock, peak = target.slice.generation.clock, target.slice.generation.peak
    kernels = jaxpr_flops.count(traced.jaxpr).in_kernels / target.chips / (peak * KERNEL_SHARE)
    token = _token_cycles(compiled.program, request.new_tokens)
    if token is None:
        return result | {"reason": "the loop that writes tokens was not found in the program: no times"}
    first = compiled.program.cycles - token * request.new_tokens
    prefill, each = first / clock + kernels, token / clock
    total = prefill + request.new_tokens * each
    cost = total * target.chips * price / 3600 / rows * 1000 if price is not None else None
    return result | {
        "collectives": compiled.program.collective_bytes(),
        "prefill": {"cycles": first, "seconds": prefill},
        "token": {
            "cycles": token,
            "seconds": each,
            # Each weight and the whole cache are read once.
            "floor_seconds": (weights + cache) / target.slice.generation.bandwidth,
        },
        "tokens_per_s": rows / each,
        "answers_per_s": rows / total,
        "cost_per_1000": cost,
    }


def _token_cycles(program: Program, new_tokens: int) -> int | None:
    """Estimated cycles of one turn of the loop that writes tokens: the outermost one with a loop over layers in it.

    None where the compiler has made something else of it.
    """
    found = [cycles for _, turns, cycles, nested in program.loops() if turns == new_tokens and nested]
    return found[-1] if found else None
