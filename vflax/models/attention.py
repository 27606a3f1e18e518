"""One attention function, several backends.

Which key a query may look at, for a row that packs two samples (segments 1 and 2) and one padding token (0):

            keys   1 1 1 2 2 0
        query 1    x . . . . .
              1    x x . . . .
              1    x x x . . .
              2    . . . x . .
              2    . . . x x .
              0    . . . . . x

A padding query sees itself, so no row of the softmax is ever empty and nothing can become NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vflax.errors import UserError
from vflax.models.blockwise import MASKED, blockwise, scale
from vflax.sharding import batch_shards

BACKENDS = ("auto", "reference", "blockwise", "splash", "cudnn")

# The name under which a remat policy finds what attention hands to its backward pass.
OUTPUT = "attention_output"
# The operation by which it finds the same of cuDNN: JAX's own, in jax/_src/cudnn/fused_attention_stablehlo.py.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"

_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
# The largest head that cuDNN's flash attention takes on every GPU generation since Ampere.
_CUDNN_MAX_HEAD_DIM = 128
# From as many tokens of a row on blocks are faster on a CPU (benchmarks/attention.py).
_LONG = 512


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal: bool,
    backend: str,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, kept inside segments; softmax in float32.

    Args:
        q: [B, T, H, K].
        k, v: [B, U, KV, K]; H is a multiple of KV (grouped queries, arXiv 2305.13245).
        q_segments, kv_segments: int [B, T] and [B, U]; a query sees keys of its own segment only.
            None (both): every key is seen.
        causal: a query also sees no key at a later index (T == U).
        backend: "reference" (anywhere), "blockwise" (anywhere, causal, as many queries as keys; made for long rows on a
            CPU), "splash" (TPU; as many queries as keys), "cudnn" (GPU, bfloat16 or float16), or "auto", the best that
            the platform of the mesh, or without one of this process, can run. By name, splash also runs on a CPU,
            slowly, as its kernel's program step by step.

    Returns:
        [B, T, H, K] in q's dtype.

    Raises:
        UserError: an unknown backend, or one by name that cannot run this.
    """
    chosen = _choose(q, k, q_segments is not None, causal, backend)
    if chosen == "splash":
        from vflax.models.splash import splash  # Pallas takes a second to import

        return splash(q, k, v, q_segments, OUTPUT, causal=causal, interpret=platform() == "cpu")
    if chosen == "blockwise":
        return blockwise(q, k, v, q_segments, OUTPUT)
    if chosen == "cudnn":
        # What order forbids is not computed at all when it is named; what a mask forbids is computed and thrown away.
        # (cuDNN has a layout for segments, too, but jax.nn does not pass it on.)
        apart = _mask(q, k, q_segments, kv_segments, causal=False)
        return jax.nn.dot_product_attention(q, k, v, mask=apart, is_causal=causal, implementation="cudnn")
    return _reference(q, k, v, _mask(q, k, q_segments, kv_segments, causal))


def filled(x: jax.Array, *, causal: bool, backend: str) -> tuple[jax.Array, jax.Array | None]:
    """x [B, T, D] filled up to the tokens of whole blocks, where the backend works in blocks.

    It would fill up q, k and v itself; x, before they are made of it, is one array instead of three.

    Returns:
        x, and segments for it that keep attention off what was filled up; None: x is as it was.
    """
    if backend != "splash" and (backend != "auto" or platform() != "tpu"):
        return x, None
    from vflax.models.splash import beyond

    length, room = x.shape[1], beyond(x.shape[1], causal)
    if not room:
        return x, None
    segments = jnp.broadcast_to(jnp.arange(length + room) >= length, (x.shape[0], length + room))
    return jnp.pad(x, ((0, 0), (0, room), (0, 0))), segments.astype(jnp.int32)


def platform() -> str:
    """Of the devices that the mesh at hand is for, which need not be here (ahead-of-time compilation); without a mesh
    of this process: "tpu", "gpu" or "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (
        jax.default_backend()
        if device is None
        else {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    )


def check_backend(backend: str) -> None:
    """Raise UserError unless `backend` names a backend that can run here."""
    if backend not in BACKENDS:
        raise UserError(f"attention={backend!r} is not a backend: choose one of {', '.join(BACKENDS)}")
    where = platform()
    if backend == "cudnn" and where != "gpu":
        raise UserError(
            f"attention='cudnn' needs an NVIDIA GPU, but this process runs on {where}: "
            "use attention='auto' or attention='reference'"
        )
    if backend == "splash" and where == "gpu":
        raise UserError("attention='splash' is a kernel for TPUs: use attention='auto' on a GPU")


def _choose(q: jax.Array, k: jax.Array, segments: bool, causal: bool, backend: str) -> str:
    check_backend(backend)
    obstacles = {
        "cudnn": _cudnn_obstacle(q, segments),
        "splash": _obstacle_of_blocks(q, k),
        "blockwise": _obstacle_of_blocks(q, k) if causal else "it is made for causal rows",
    }
    if backend == "auto":
        best = _best(q.shape[1])
        return best if obstacles.get(best) is None else "reference"
    if obstacle := obstacles.get(backend):
        raise UserError(f"attention={backend!r} cannot run this: {obstacle}; use attention='auto'")
    return backend


def _best(length: int) -> str:
    """For rows of so many tokens on the platform at hand."""
    on_cpu = "blockwise" if length >= _LONG else "reference"
    return {"gpu": "cudnn", "tpu": "splash"}.get(platform(), on_cpu)


def writes_scores(backend: str, length: int) -> bool:
    """Whether the scores of whole causal rows of so many tokens are written to memory."""
    return (_best(length) if backend == "auto" else backend) == "reference"


def _obstacle_of_blocks(q: jax.Array, k: jax.Array) -> str | None:
    if q.shape[1] != k.shape[1]:
        return f"it needs as many queries as keys, there are {q.shape[1]} and {k.shape[1]}"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and q.shape[0] % batch_shards(mesh):
        return f"the mesh cuts rows into {batch_shards(mesh)} parts, there are {q.shape[0]}"
    return None


def _cudnn_obstacle(q: jax.Array, segments: bool) -> str | None:
    _, length, _, head_dim = q.shape
    if q.dtype not in _CUDNN_DTYPES:
        return f"it needs bfloat16 or float16, the model computes in {q.dtype}"
    if head_dim % 8 or head_dim > _CUDNN_MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {_CUDNN_MAX_HEAD_DIM}, it is {head_dim}"
    if segments and length % 2:
        return f"with segments it needs an even number of tokens, there are {length}"
    return None


def _mask(
    q: jax.Array, k: jax.Array, q_segments: jax.Array | None, kv_segments: jax.Array | None, causal: bool
) -> jax.Array | None:
    mask = None
    if q_segments is not None and kv_segments is not None:
        # [B, T, 1] == [B, 1, U] -> [B, 1, T, U]
        mask = (q_segments[:, :, None] == kv_segments[:, None, :])[:, None]
    if causal:
        order = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
        mask = order if mask is None else mask & order
    return mask


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # [B, T, H, K] -> [B, T, KV, G, K] -> [B, KV, G, T, K]: G neighbouring query heads share one key head.
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # [B, U, KV, K] -> [B, KV, U, K]
    mixed = _mix(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    # [B, KV, G, T, K] -> [B, T, KV, G, K] -> [B, T, H, K]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


@jax.custom_vjp
def _mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """q [B, KV, G, T, K]; k, v [B, KV, U, K]; mask bool, broadcast to [B, 1, T, U] -> [B, KV, G, T, K].

    The gradient is written out because autodiff keeps several float32 [T, U] arrays per head and layer, and takes
    a row sum over U where one over K is enough (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    return _mix_forward(q, k, v, mask)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array, jax.Array]


def _mix_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, _Residuals]:
    scores = _scores(q, k, mask)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    # [B, KV, G, T, U] x [B, KV, U, K] -> [B, KV, G, T, K]
    out = jnp.einsum("bngtu,bnuk->bngtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = checkpoint_name((out / total).astype(q.dtype), OUTPUT)
    largest, total = checkpoint_name(largest, OUTPUT), checkpoint_name(total, OUTPUT)
    return out, (q, k, v, mask, out, largest, total)


def _mix_backward(residuals: _Residuals, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, largest, total = residuals
    weights = jnp.exp(_scores(q, k, mask) - largest) / total
    # [B, KV, G, T, K] -> [B, KV, G, T, 1]: sum over u of weight times its gradient.
    through_sum = (grad.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    # [B, KV, G, T, K] x [B, KV, U, K] -> [B, KV, G, T, U]
    d_weights = jnp.einsum("bngtk,bnuk->bngtu", grad, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - through_sum) * scale(q)).astype(q.dtype)
    # [B, KV, G, T, U] x [B, KV, G, T, K] -> [B, KV, U, K]
    d_v = jnp.einsum("bngtu,bngtk->bnuk", weights.astype(v.dtype), grad)
    d_k = jnp.einsum("bngtu,bngtk->bnuk", d_scores, q)
    # [B, KV, G, T, U] x [B, KV, U, K] -> [B, KV, G, T, K]
    d_q = jnp.einsum("bngtu,bnuk->bngtk", d_scores, k)
    return d_q, d_k, d_v, None


_mix.defvjp(_mix_forward, _mix_backward)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    # [B, KV, G, T, K] x [B, KV, U, K] -> float32 [B, KV, G, T, U]
    scores = jnp.einsum("bngtk,bnuk->bngtu", q, k, preferred_element_type=jnp.float32) * scale(q)
    return scores if mask is None else jnp.where(mask[:, :, None], scores, MASKED)
