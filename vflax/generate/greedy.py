"""Greedy answers: one jitted function that reads the prompts and then writes token by token with a KV cache.

What the cache of one row holds, for a prompt of 3 tokens in a bucket of 5 and two tokens written so far:

    index      0 1 2 3 4 | 5 6 7        the prompt's bucket | room for max_new_tokens
    token      p p p . . | a b .
    segment    1 1 1 0 0 | 1 1 0        0 is never looked at
    position   0 1 2 . . | 3 4 .        rotary positions go on from the true length

Every row writes to the same index, so that a step is one slice update; the hole costs nothing but its room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.models import llava
from vflax.models.attention import platform
from vflax.sharding import BATCH_AXES, constrain
from vflax.xla_options import compiler_options

Prompt = tuple[np.ndarray, np.ndarray]
"""(ids int32 [n] with each image as N times IMAGE_TOKEN_ID, images uint8 [s, H, W, 3])."""


class Generated(NamedTuple):
    """What a batch of prompts gave.

    tokens: int32 [B, max_new_tokens], the end token included, then pad_id.
    lengths: int32 [B], tokens written, the end token included.
    margins: float32 [B, max_new_tokens], the largest logit less the second largest at each step, then inf.
    """

    tokens: jax.Array
    lengths: jax.Array
    margins: jax.Array


class _Loop(NamedTuple):
    step: jax.Array  # tokens written so far by the rows that are not done
    last: jax.Array  # [B] the token to read next
    done: jax.Array  # [B]
    out: Generated
    cache: Any
    kv_segments: jax.Array  # [B, C]


def make_generate(
    graphdef: Any, *, max_new_tokens: int, pad_id: int, cache_dtype: Any = None
) -> Callable[..., Generated]:
    """Build the jitted function for one model, one budget and the platform of the mesh at hand; the same of these give
    the same function.

    Args:
        graphdef: the model, from `llava.split` or `llava.abstract`.
        max_new_tokens: the most tokens a row may write, its end token included.
        pad_id: fills a row behind its end token.
        cache_dtype: dtype of the cached keys and values; None: the model's compute dtype.

    Returns:
        fn(params, ids [B, T], images uint8 [B, S, H, W, 3], segments [B, T], positions [B, T], eos_ids [E])
        -> Generated. Prompts are padded on the right; segments are 1 for tokens and 0 for padding. A row ends
        with any of eos_ids; a row without tokens writes nothing. T, B and S are static, E too.
    """
    return _jitted(graphdef, max_new_tokens, pad_id, cache_dtype, platform())


@lru_cache(maxsize=16)
def _jitted(
    graphdef: Any, max_new_tokens: int, pad_id: int, cache_dtype: Any, platform: str
) -> Callable[..., Generated]:
    def generate(
        params: llava.Params,
        ids: jax.Array,
        images: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        eos_ids: jax.Array,
    ) -> Generated:
        model = llava.merge(graphdef, params)
        decoder = model.decoder
        batch, width = ids.shape
        prompt_lengths = segments.sum(axis=1)

        x, cache = decoder.prefill(
            model.embed(ids, model.features(images)), segments, positions, width + max_new_tokens
        )
        if cache_dtype is not None:
            cache = jax.tree.map(lambda c: c.astype(cache_dtype), cache)
        # [B, T, D] -> [B, D]: the hidden state of each row's last token says what comes next.
        last = jnp.take_along_axis(x, jnp.maximum(prompt_lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        empty = Generated(
            tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            margins=jnp.full((batch, max_new_tokens), jnp.inf, jnp.float32),
        )
        write = partial(_write, eos_ids=eos_ids)
        state = write(
            _Loop(
                step=jnp.int32(0),
                last=jnp.zeros((batch,), jnp.int32),
                done=prompt_lengths == 0,
                out=empty,
                cache=cache,
                kv_segments=jnp.pad(segments, ((0, 0), (0, max_new_tokens))),
            ),
            decoder.logits(last),
        )

        def more(state: _Loop) -> jax.Array:
            return (state.step < max_new_tokens) & ~state.done.all()

        def advance(state: _Loop) -> _Loop:
            slot = width + state.step - 1
            kv_segments = state.kv_segments.at[:, slot].set(1)
            x, cache = decoder.decode(
                decoder.embed_tokens(state.last[:, None]),
                state.cache,
                slot,
                kv_segments,
                (prompt_lengths + state.step - 1)[:, None],
            )
            return write(state._replace(cache=cache, kv_segments=kv_segments), decoder.logits(x[:, 0]))

        out = jax.lax.while_loop(more, advance, state).out
        # Replicated, so that every process of a pod can read the answers.
        return Generated(*(constrain(x, None) for x in out))

    return jax.jit(generate, compiler_options=compiler_options(platform))


def _write(state: _Loop, logits: jax.Array, *, eos_ids: jax.Array) -> _Loop:
    """Choose each row's next token from float32 logits [B, V] and write it, where the row is not done."""
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best = logits.max(axis=-1)
    second = jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], -jnp.inf, logits).max(axis=-1)
    tokens, lengths, margins = state.out
    alive, at = ~state.done, state.step
    out = Generated(
        tokens=tokens.at[:, at].set(jnp.where(alive, token, tokens[:, at])),
        lengths=lengths + alive,
        margins=margins.at[:, at].set(jnp.where(alive, best - second, margins[:, at])),
    )
    ended = (token[:, None] == eos_ids).any(axis=-1)
    # A row that is done goes on reading its last token; what it computes is thrown away.
    last = jnp.where(alive, token, state.last)
    return state._replace(step=at + 1, last=last, done=state.done | ended, out=out)


@dataclass(frozen=True)
class Answer:
    """One prompt's answer.

    ids: int32 [n], without the end token.
    ended: an end token came; otherwise the budget ran out.
    tokens: int32 [m], as written, the end token included.
    margins: float32 [m], the largest logit less the second largest where each token was chosen.
    """

    ids: np.ndarray
    ended: bool
    tokens: np.ndarray
    margins: np.ndarray


def greedy(
    params: llava.Params,
    graphdef: Any,
    prompts: Sequence[Prompt],
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    cache_dtype: Any = None,
) -> list[Answer]:
    """Answer any number of prompts, whatever their lengths and image counts.

    Prompts of like length share a batch. Lengths are padded to one of `bucket`'s sizes, image slots to a
    power of two, the last batch with empty rows: what is compiled is bounded by (buckets x slot counts), not
    by the prompts.

    Args:
        params: flat parameters; may be sharded over a mesh.
        graphdef: the model.
        prompts: at least one token each.
        eos_ids: a row ends with any of these.
        pad_id: fills the inside of batches; never returned.
        max_new_tokens: the most tokens of an answer, its end token included.
        batch_size: rows per call, rounded up to what the ambient mesh's batch axes divide.
        cache_dtype: see `make_generate`.

    Returns:
        The answers in the prompts' order.

    Raises:
        UserError: a prompt without tokens, or one whose placeholders are not N per image.
    """
    vision = llava.merge(graphdef, params).config.vision
    _check(prompts, vision.num_tokens)
    generate = make_generate(graphdef, max_new_tokens=max_new_tokens, pad_id=pad_id, cache_dtype=cache_dtype)
    ends = np.asarray(eos_ids, np.int32).reshape(-1)
    rows = -(-batch_size // _mesh_unit()) * _mesh_unit()
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i][1]) > 0, len(prompts[i][0])))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = _pad([prompts[i] for i in chosen], rows, vision.image_size, pad_id)
        tokens, lengths, margins = map(np.asarray, generate(params, *batch, ends))
        for row, i in enumerate(chosen):
            written = tokens[row, : lengths[row]]
            ended = bool(np.isin(written[-1], ends))
            answers[i] = Answer(
                ids=written[: len(written) - ended],
                ended=ended,
                tokens=written,
                margins=margins[row, : lengths[row]],
            )
    return [answers[i] for i in range(len(prompts))]


def bucket(length: int) -> int:
    """The padded length of a prompt: a multiple of 32 up to 256, then four sizes per doubling."""
    step = max(32, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _check(prompts: Sequence[Prompt], num_image_tokens: int) -> None:
    problems = []
    for i, (ids, images) in enumerate(prompts):
        placeholders = int(np.sum(ids == IMAGE_TOKEN_ID))
        if len(ids) == 0:
            problems.append(f"prompt {i} has no tokens")
        elif placeholders != len(images) * num_image_tokens:
            problems.append(
                f"prompt {i} has {len(images)} images of {num_image_tokens} tokens, "
                f"but {placeholders} placeholders"
            )
    if problems:
        raise UserError("generate: " + "; ".join(problems))


def _mesh_unit() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _pad(
    prompts: Sequence[Prompt], rows: int, image_size: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts -> ids [rows, T], images [rows, S, H, W, 3], segments [rows, T], positions [rows, T]."""
    width = bucket(max(len(ids) for ids, _ in prompts))
    slots = max(len(images) for _, images in prompts)
    slots = 1 << (slots - 1).bit_length() if slots else 0
    ids = np.full((rows, width), pad_id, np.int32)
    images = np.zeros((rows, slots, image_size, image_size, 3), np.uint8)
    segments = np.zeros((rows, width), np.int32)
    for row, (prompt_ids, prompt_images) in enumerate(prompts):
        ids[row, : len(prompt_ids)] = prompt_ids
        images[row, : len(prompt_images)] = prompt_images
        segments[row, : len(prompt_ids)] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape)
    return ids, images, segments, positions
