"""The TPU's attention kernel, run step by step on the CPU, against the reference."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from tests import small, toy
from vflax.errors import UserError
from vflax.models.attention import attention, filled
from vflax.models.clip_vit import VisionAttention
from vflax.models.layers import rematerialised
from vflax.models.splash import flops

WIDTH = 128


def arrays(length: int, heads: int, kv_heads: int, rows: int = 2) -> tuple[jax.Array, ...]:
    """q, k, v, the gradient of the output, and segments of uneven lengths with padding behind them."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, grad = (jax.random.normal(k, (rows, length, heads, WIDTH)) for k in keys[:2])
    k, v = (jax.random.normal(k, (rows, length, kv_heads, WIDTH)) for k in keys[2:])
    ends = np.array([0.3, 0.55, 0.9]) * length
    segments = np.stack([(np.arange(length)[:, None] >= ends - row).sum(1) + 1 for row in range(rows)])
    return q, k, v, grad, jnp.array(np.where(segments > 3, 0, segments), jnp.int32)


def run(backend: str, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, segments: jax.Array):
    """(output, gradients of q, k and v), at positions that are no padding."""
    real = (segments > 0)[..., None, None]

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        own = {"q_segments": segments, "kv_segments": segments}
        return jnp.where(real, attention(q, k, v, **own, causal=True, backend=backend), 0)

    out, backward = jax.vjp(mixed, q, k, v)
    return out, *backward(grad)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(128, 2, 2), (200, 2, 1)])
def test_the_kernel_gives_the_references_output_and_gradients(length: int, heads: int, kv_heads: int):
    given = arrays(length, heads, kv_heads)
    for ours, expected in zip(run("splash", *given), run("reference", *given), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


NUMBERS = """
import jax
import numpy as np
from tests.models.test_splash import arrays, run
from vflax.sharding import make_mesh

given = arrays(128, 4, 2, rows=4)
expected = run("splash", *given)
with jax.set_mesh(make_mesh(2, 2, 2)):
    compiled = jax.jit(lambda *x: run("splash", *x)).lower(*given).compile()
    for ours, alone in zip(compiled(*given), expected, strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)
"""
SHAPES = """
import jax
from tests.models.test_splash import arrays, kernels, run
from vflax.sharding import make_mesh

given = arrays(128, 4, 2, rows=8)
with jax.set_mesh(make_mesh(2, 2, 2)):
    found = kernels(jax.make_jaxpr(lambda *x: run("splash", *x))(*given).jaxpr)
assert len(found) == 3, found
for kernel in found:
    q, k, v = [x.aval.shape for x in kernel.invars if x.aval.shape[-2:] == (128, 128) and x.aval.ndim == 4][:3]
    # Of 8 rows, 4 query and 2 key heads.
    assert q == (2, 2, 128, 128) and k == v == (2, 1, 128, 128), (q, k, v)
"""
TIMES = """
import jax
from tests.models.test_splash import kernels_of_a_layer
from vflax.sharding import make_mesh

with jax.set_mesh(make_mesh(2, 2, 2)):
    found = {policy: kernels_of_a_layer(policy) for policy in ("full", "attention")}
assert found == {"full": 4, "attention": 3}, found
"""


@pytest.mark.parametrize("program", [NUMBERS, SHAPES], ids=["numbers", "shapes"])
def test_over_a_mesh_each_device_runs_the_kernel_on_its_own_rows_and_heads(program: str):
    on_eight_devices(program)


def on_eight_devices(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], env=small.environment(devices=8), cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


def kernels(jaxpr: Any) -> list[Any]:
    """All Pallas calls in it."""
    return equations(jaxpr, "pallas_call")


def equations(jaxpr: Any, primitive: str) -> list[Any]:
    """All of a primitive's, in loops and what else has a program of its own, too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            found.append(eqn)
        else:
            for inner in core.jaxprs_in_params(eqn.params):
                found += equations(inner, primitive)
    return found


def kernels_of_a_layer(policy: str) -> int:
    """How often a layer's gradient runs one of the kernels: forward, dq, dk+dv."""
    q, k, v, _, segments = arrays(128, 4, 2, rows=4)

    def loss(*qkv: jax.Array) -> jax.Array:
        def layer(*qkv: jax.Array) -> jax.Array:
            own = {"q_segments": segments, "kv_segments": segments}
            return attention(*qkv, **own, causal=True, backend="splash")

        return jnp.square(rematerialised(layer, policy)(*qkv)).sum()

    # All three gradients are wanted: a kernel whose results nobody reads may be left out.
    needed, _ = dce_jaxpr(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v).jaxpr, [True] * 3)
    return len(kernels(needed))


@pytest.mark.parametrize(("policy", "times"), [("full", 4), ("attention", 3)])
def test_the_forward_kernel_runs_once_where_its_output_is_kept(policy: str, times: int):
    assert kernels_of_a_layer(policy) == times


def test_the_forward_kernel_runs_once_over_a_mesh_too():
    on_eight_devices(TIMES)


def test_of_the_log_sum_exps_that_the_kernel_repeats_one_is_held_for_the_backward_pass():
    q, k, v, _, segments = arrays(128, 2, 2)
    q, k, v = (x[..., :64] for x in (q, k, v))

    def mixed(q: jax.Array) -> jax.Array:
        own = {"q_segments": segments, "kv_segments": segments}
        return attention(q, k, v, **own, causal=True, backend="splash")

    program = str(jax.make_jaxpr(lambda q: jax.vjp(mixed, q))(q))
    # name:dtype[shape] of each result
    (held,) = re.findall(r"((?:\w+:\S+\s+)+)= optimization_barrier", program)
    rows, length, heads, _ = q.shape
    assert f"f32[{rows},{heads},{length}]" in held
    assert f"f32[{rows},{heads},{length},128]" in program and f"f32[{rows},{heads},{length},128]" not in held


def test_without_segments_and_order_every_token_of_a_row_is_seen():
    q, k, v, _, _ = arrays(200, 2, 2)
    ours, expected = (attention(q, k, v, causal=False, backend=name) for name in ("splash", "reference"))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_what_fills_up_the_tokens_of_an_image_changes_none_of_its_features():
    tower = toy.CONFIG.vision
    attend = {
        name: VisionAttention(
            tower, attention=name, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32
        )
        for name in ("splash", "reference")
    }
    x = jax.random.normal(jax.random.key(1), (2, 17, tower.width))
    assert filled(x, causal=False, backend="splash")[0].shape == (2, 128, tower.width)
    ours, expected = (run(x) for run in attend.values())
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_more_keys_than_queries_are_not_for_this_kernel():
    q, k, v, _, _ = arrays(128, 2, 2)
    with pytest.raises(UserError, match="as many queries as keys, there are 64 and 128"):
        attention(q[:, :64], k, v, causal=False, backend="splash")


def test_flops_count_the_blocks_on_and_below_the_diagonal():
    # 1024 tokens are 2 x 2 blocks of 512, of which 3 are seen, at 2 products of 2 * 512 * 512 * 128 each.
    assert flops(1, 1024, 1, 128, 1, causal=True) == 3 * 2 * 2 * 512 * 512 * 128


def test_flops_of_a_tower_count_whole_blocks_and_lanes():
    # 577 tokens are one block of 640, heads of 64 are computed as 128.
    assert flops(1, 577, 1, 64, 1, causal=False) == 2 * 2 * 640 * 640 * 128
