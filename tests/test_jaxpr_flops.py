"""FLOPs from a jaxpr, against counts by hand and against XLA's own where a program has no loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests import toy
from vflax.jaxpr_flops import count, count_function
from vflax.models import splash
from vflax.models.attention import attention

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16


def compiled(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_product_costs_two_operations_for_each_multiplication():
    assert count_function(lambda x, w: x @ w, X, W).total == PRODUCT


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w,
        lambda x, w: jax.grad(lambda w: jnp.square(x @ w @ w).sum())(w),
        lambda x, w: jnp.einsum("ab,bc->ca", x, w) @ x,
        lambda x, w: jax.vmap(lambda row: w @ row)(x),
        lambda x, w: jax.jit(lambda x: x @ w)(x) @ w,
    ],
)
def test_without_loops_it_is_the_compilers_own_count_of_products(function):
    # The compiler adds elementwise operations: of these programs far less than a twentieth.
    assert count_function(function, X, W).total == pytest.approx(compiled(function, X, W), rel=0.05)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 4), (2, 1)])
def test_a_convolution_is_the_compilers_own_count(groups: int, stride: int):
    images = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((4, 4, 8 // groups, 12), jnp.float32)

    def convolve(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    side = (16 - 4) // stride + 1
    by_hand = 2 * (2 * side * side * 12) * (4 * 4 * 8 // groups)
    assert count_function(convolve, images, kernel).total == by_hand
    assert compiled(convolve, images, kernel) == pytest.approx(by_hand, rel=0.01)


def test_the_body_of_a_scan_counts_as_often_as_it_turns():
    def layers(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    assert count_function(layers, X, W).total == 5 * PRODUCT
    assert count_function(lambda x, w: jax.grad(lambda w: layers(x, w).sum())(w), X, W).total == 15 * PRODUCT


def test_what_is_computed_again_counts_again():
    def loss(w, x):
        return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x).sum()

    def saved(w, x):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    # Forward 2, backward 3 (x learns nothing), and again what the second sine needs: both products.
    assert count_function(jax.value_and_grad(saved), W, X).total == 5 * PRODUCT
    assert count_function(jax.value_and_grad(loss), W, X).total == 7 * PRODUCT


def test_what_no_result_needs_does_not_count():
    def run(x, w):
        _, back = jax.vjp(lambda x: x @ w, x)
        return jax.lax.scan(lambda x, _: ((back(x)[0], x @ w @ w)[0], None), x, length=3)[0]

    # Of each turn the gradient alone; the value that jax.vjp made before, and the two products beside it, go nowhere.
    assert count_function(run, X, W).total == 3 * PRODUCT


def test_of_branches_the_dearest_counts():
    def choose(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)

    assert count_function(choose, X, W).total == 2 * PRODUCT


def test_a_while_loop_counts_once_and_says_so():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    found = count_function(loop, X, W)
    assert found.total == PRODUCT
    assert "counted once" in found.notes[0]


def test_functions_with_derivatives_of_their_own_count_by_their_rules():
    @jax.custom_vjp
    def twice(x, w):
        return x @ w

    twice.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T @ saved[1], saved[0].T @ g))
    assert count_function(twice, X, W).total == PRODUCT
    both = jax.value_and_grad(lambda x, w: twice(x, w).sum(), argnums=(0, 1))
    assert count_function(both, X, W).total == (1 + 3) * PRODUCT

    @jax.custom_jvp
    def once(x, w):
        return x @ w

    once.defjvp(lambda at, d: (at[0] @ at[1], d[0] @ at[1] @ at[1]))
    assert count_function(once, X, W).total == PRODUCT
    assert count_function(lambda x, w: jax.jvp(lambda x: once(x, w), (x,), (x,)), X, W).total == 3 * PRODUCT


def test_the_body_of_a_shard_map_counts_for_every_device():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    abstract = mesh.abstract_mesh.update(axis_sizes=(2, 3))

    def run(x, w):
        return jax.shard_map(
            lambda x, w: x @ w, mesh=abstract, in_specs=(PartitionSpec("a"), PartitionSpec()),
            out_specs=PartitionSpec("a"),
        )(x, w)  # fmt: skip

    # Split over a, and done three times over along b.
    assert count_function(run, X, W).total == 3 * PRODUCT


@pytest.mark.parametrize("length", [512, 1100])
def test_the_kernels_of_splash_count_the_blocks_below_the_diagonal(length: int):
    q = jax.ShapeDtypeStruct((2, length, 4, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, length, 2, 128), jnp.bfloat16)
    segments = jnp.ones((2, length), jnp.int32)

    def loss(q, k, v):
        mixed = attention(q, k, v, q_segments=segments, kv_segments=segments, causal=True, backend="splash")
        return mixed.astype(jnp.float32).sum()

    forward = count_function(loss, q, k, k)
    # 2 products forward, 3 for dq, 4 for dk and dv, each of 2 x rows x heads x width x block^2 x blocks.
    block = 512
    blocks = {512: 1, 1100: 6}[length]
    product = 2 * 2 * 4 * 128 * block**2 * blocks
    assert forward.in_kernels == forward.total == 2 * product
    both = count_function(jax.grad(loss, argnums=(0, 1, 2)), q, k, k)
    assert both.in_kernels == (2 + 3 + 4) * product
    assert splash.flops(2, length, 4, 128, 1, causal=True) == 2 * product


def test_the_kernels_of_splash_count_all_blocks_where_every_token_is_seen():
    q = jax.ShapeDtypeStruct((2, 577, 4, 64), jnp.bfloat16)
    found = count_function(lambda q: attention(q, q, q, causal=False, backend="splash"), q)
    # One block of 640 tokens, and heads as wide as the lanes.
    assert found.in_kernels == 2 * 2 * 2 * 4 * 128 * 640**2


def test_a_kernel_without_a_formula_is_named():
    from jax.experimental import pallas as pl

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def call(x, **kw):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="doubled", **kw)(
            x
        )

    assert "doubled is not counted" in count_function(call, X).notes[0]
    cost = pl.CostEstimate(flops=128, bytes_accessed=0, transcendentals=0)
    assert count_function(lambda x: call(x, cost_estimate=cost), X).kernels == {"doubled": 128}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_training_step_is_what_its_layers_cost(remat: str):
    """By hand, of the toy model: every kernel forward and twice backward, and once more where it is computed again.

    A layer's last product is never needed again: what its gradient needs is what goes into it.
    """
    from vflax.models import llava
    from vflax.step import loss_sum

    graphdef, params = llava.abstract(toy.CONFIG, **toy.KW | {"remat": remat})
    rows, length, slots, capacity = 4, 24, 2, 8
    batch = {name: jnp.asarray(x) for name, x in toy.batch(rows).items()}
    found = count(jax.make_jaxpr(jax.grad(lambda p: loss_sum(graphdef, p, batch, capacity)))(params))

    tokens, images = rows * length, rows * slots
    last = 2 * tokens * 32 * 64
    layer = 2 * tokens * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 2) + last
    scores = 2 * rows * 4 * 8 * length**2  # one product of queries and keys, or of weights and values
    again = remat == "full"
    decoder = 2 * (layer * (3 + again) - last * again + scores * (2 + 5 + 2 * again))
    seen = 5 * images  # CLS and four patches
    tower_last = 2 * seen * 16 * 32
    tower_layer = 2 * seen * (16 * 16 * 4 + 16 * 32) + tower_last
    tower_scores = 2 * images * 16 * 5**2
    patches = 2 * images * 4 * 48 * 16 * 2  # only their kernel has a gradient
    tower = (
        2 * (tower_layer * (3 + again) - tower_last * again + tower_scores * (2 + 5 + 2 * again)) + patches
    )
    bridge = 2 * images * 4 * (16 * 32 + 32 * 32) * 3
    head = 2 * rows * capacity * 32 * 64 * 3
    assert found.total == decoder + tower + bridge + head
