"""The attention function: what may be seen, grouped heads, and backends refused where they cannot run."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from vflax.errors import UserError
from vflax.models import attention as module
from vflax.models.attention import BACKENDS, CUDNN_FORWARD, attention
from vflax.models.layers import rematerialised

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]], np.int32)


def heads(length: int, num: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, length, num, 8))


def by_hand(q: jax.Array, k: jax.Array, v: jax.Array, visible: np.ndarray) -> np.ndarray:
    """One query at a time in float64; visible [B, T, U]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        scores = k[b, :, h // group] @ q[b, t, h] / np.sqrt(q.shape[3])
        weights = np.where(visible[b, t], np.exp(scores - scores.max()), 0)
        out[b, t, h] = (weights / weights.sum()) @ v[b, :, h // group]
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_queries_see_earlier_tokens_of_their_own_segment(num_kv_heads: int) -> None:
    q, k, v = heads(6, 6, 0), heads(6, num_kv_heads, 1), heads(6, num_kv_heads, 2)
    visible = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tril(np.ones((6, 6), bool))
    got = attention(q, k, v, q_segments=SEGMENTS, kv_segments=SEGMENTS, causal=True, backend="reference")
    np.testing.assert_allclose(got, by_hand(q, k, v, visible), atol=1e-5)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, visible: np.ndarray) -> jax.Array:
    """The formula as one writes it, left to autodiff: k and v repeated for their query heads."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,buhk->bhtu", q, k) / np.sqrt(q.shape[3])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhtu,buhk->bthk", weights, v)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_the_written_gradient_equals_autodiff_of_the_plain_formula(num_kv_heads: int) -> None:
    q, k, v = heads(6, 6, 0), heads(6, num_kv_heads, 1), heads(6, num_kv_heads, 2)
    visible = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tril(np.ones((6, 6), bool))
    out_grad = heads(6, 6, 3)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, q_segments=SEGMENTS, kv_segments=SEGMENTS, causal=True, backend="reference")

    got = jax.jit(lambda *qkv: jax.vjp(ours, *qkv)[1](out_grad))(q, k, v)
    expected = jax.jit(lambda *qkv: jax.vjp(lambda *x: plain(*x, visible), *qkv)[1](out_grad))(q, k, v)
    for ours_, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=1e-5)


def test_without_segments_and_order_everything_is_seen() -> None:
    q, k, v = heads(6, 4, 0), heads(9, 4, 1), heads(9, 4, 2)
    got = attention(q, k, v, causal=False, backend="reference")
    np.testing.assert_allclose(got, by_hand(q, k, v, np.ones((2, 6, 9), bool)), atol=1e-5)


def test_a_query_that_may_see_nothing_gives_a_number() -> None:
    q, k, v = heads(1, 4, 0), heads(6, 2, 1), heads(6, 2, 2)
    ones, zeros = np.ones((2, 1), np.int32), np.zeros((2, 6), np.int32)
    got = attention(q, k, v, q_segments=ones, kv_segments=zeros, causal=False, backend="reference")
    assert np.isfinite(got).all()


def test_softmax_is_float32_when_the_inputs_are_bfloat16() -> None:
    q, k, v = (heads(6, 4, seed).astype(jnp.bfloat16) for seed in range(3))
    jaxpr = str(jax.make_jaxpr(lambda *qkv: attention(*qkv, causal=True, backend="reference"))(q, k, v).jaxpr)
    exponentials = [line for line in jaxpr.splitlines() if " = exp " in line]
    assert exponentials and all("f32[" in line for line in exponentials)
    assert attention(q, k, v, causal=True, backend="reference").dtype == jnp.bfloat16


def test_auto_is_the_reference_on_a_cpu() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("this is about the choice on a CPU")
    q, k, v = heads(6, 4, 0), heads(6, 2, 1), heads(6, 2, 2)
    chosen = attention(q, k, v, causal=True, backend="auto")
    np.testing.assert_array_equal(chosen, attention(q, k, v, causal=True, backend="reference"))


def test_cudnn_is_refused_by_name_without_a_gpu() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("this is about machines without a GPU")
    with pytest.raises(UserError, match=r"attention='cudnn' needs an NVIDIA GPU.*cpu.*'reference'"):
        attention(heads(6, 4, 0), heads(6, 4, 1), heads(6, 4, 2), causal=True, backend="cudnn")


def test_cudnn_equals_the_reference_on_a_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    q, k, v = (heads(6, num, seed).astype(jnp.bfloat16) for seed, num in enumerate((6, 2, 2)))
    out = [
        attention(q, k, v, q_segments=SEGMENTS, kv_segments=SEGMENTS, causal=True, backend=backend)
        for backend in ("cudnn", "reference")
    ]
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in out), atol=2e-2)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=rf"attention='flash'.*{', '.join(BACKENDS)}"):
        attention(heads(6, 4, 0), heads(6, 4, 1), heads(6, 4, 2), causal=True, backend="flash")


@pytest.fixture
def traced_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made as for a GPU, and cannot run: all that JAX asks of one until then is which cuDNN it has."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(module, "platform", lambda: "gpu")


@pytest.mark.usefixtures("traced_for_a_gpu")
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize(("causal", "mask_type"), [(True, "CAUSAL"), (False, "NO_MASK")])
def test_cudnn_is_told_the_order_and_gets_a_mask_for_segments_alone(
    segments: np.ndarray | None, causal: bool, mask_type: str
) -> None:
    x = jnp.zeros((2, 6, 2, 8), jnp.bfloat16)

    def run(x: jax.Array) -> jax.Array:
        return attention(
            x, x, x, q_segments=segments, kv_segments=segments, causal=causal, backend="auto"
        ).sum()

    program = str(jax.make_jaxpr(jax.grad(run))(x))
    # Both of the forward and of the backward kernel.
    assert re.findall(r"mask_type=MaskType\.(\w+)", program) == [mask_type] * 2
    assert re.findall(r"variadic_args=\((\w+),", program) == [str(segments is not None)] * 2


@pytest.mark.usefixtures("traced_for_a_gpu")
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_takes_an_odd_number_of_tokens_without_segments(causal: bool) -> None:
    x = jnp.zeros((2, 5, 2, 8), jnp.bfloat16)
    program = jax.make_jaxpr(lambda x: attention(x, x, x, causal=causal, backend="auto"))(x)
    assert f"{CUDNN_FORWARD}[" in str(program)


@pytest.mark.usefixtures("traced_for_a_gpu")
@pytest.mark.parametrize(
    ("policy", "times"),
    [("none", 1), ("offload", 2), ("full", 2), ("offload_attention", 1), ("attention", 1), ("dots", 1)],
)
def test_on_a_gpu_cudnns_forward_kernel_runs_once_where_its_output_is_kept(policy: str, times: int) -> None:
    x, segments = jnp.zeros((2, 6, 2, 8), jnp.bfloat16), jnp.asarray(SEGMENTS)

    def layer(weight: jax.Array, x: jax.Array) -> jax.Array:
        x = x @ weight
        return attention(x, x, x, q_segments=segments, kv_segments=segments, causal=True, backend="auto")

    def loss(weights: jax.Array) -> jax.Array:
        step = rematerialised(layer, policy)
        return jax.lax.scan(lambda x, weight: (step(weight, x), None), x, weights)[0].sum()

    traced = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((3, 8, 8), jnp.bfloat16))
    needed, _ = dce_jaxpr(traced.jaxpr, [True])
    assert str(needed).count(f"{CUDNN_FORWARD}[") == times
