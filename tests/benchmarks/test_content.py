"""Both sides of a comparison train on the same: benchmarks/content.py, benchmarks/draw.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from benchmarks import content, draw
from benchmarks.ours import Ours
from benchmarks.setting import Setting, llava
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.step import supervised_tokens

MODEL = llava(28, (2, 16, 2, 32), (2, 16, 2, 32), vocabulary=64, size=56)


def lengths() -> content.Lengths:
    return content.lognormal(96, seed=3)


def source() -> content.Content:
    return content.Content(lengths(), image_tokens=4, image_size=56, vocabulary=64)


def test_texts_without_real_data_are_as_long_as_real_ones() -> None:
    found = content.lognormal(100_000).statistics()
    assert abs(found["text_mean"] - 128) < 2
    assert abs(found["text_p90"] - 210) < 3


def test_batches_of_llavas_sampler_are_dealt_out_by_length() -> None:
    # 9 goes to the first, 8 to the second, 5 to the second (8 < 9), which is full then; 1 to the first.
    words = np.array([1, 8, 9, 5])
    batches = content.length_grouped(words, batch=2, seed=0, devices=2)
    assert [sorted(words[b].tolist(), reverse=True) for b in batches] == [[9, 1], [8, 5]]


def test_each_batch_of_a_run_of_llavas_sampler_has_one_of_its_longest_samples() -> None:
    words = lengths().words
    batches = content.length_grouped(words, batch=4, seed=0, devices=8)
    assert len(batches) == 3 * 8
    assert {len(b) for b in batches} == {4}
    assert len(np.unique(np.concatenate(batches))) == 96
    for start in range(0, 24, 8):
        run = batches[start : start + 8]
        longest = np.sort(words[np.concatenate(run)])[::-1][:8]
        assert [words[b].max() for b in run] == longest.tolist()
    assert not np.array_equal(batches[0], content.length_grouped(words, 4, 1)[0])


def test_packed_and_padded_rows_hold_the_same_samples() -> None:
    made = source()
    plan = made.plan(samples=16, rows=4)
    steps = plan.steps_per_epoch(0)
    packed = [made.packed(plan, step) for step in range(steps)]
    assert sum(samples for _, samples in packed) == 96
    padded = made.padded(range(96))

    def supervised(batches: list[content.Rows]) -> list[int]:
        labels = np.concatenate([b["labels"].ravel() for b in batches])
        return np.bincount(labels[labels != IGNORE_LABEL], minlength=64).tolist()

    assert supervised([rows for rows, _ in packed]) == supervised([padded])
    assert sum(int((rows["segments"] > 0).sum()) for rows, _ in packed) == int(made.tokens.sum())
    images = sum(int((rows["ids"] == IMAGE_TOKEN_ID).sum()) for rows, _ in packed)
    assert images == int((padded["ids"] == IMAGE_TOKEN_ID).sum()) == 96 * 4


def test_no_row_supervises_more_than_the_capacity_of_its_batches() -> None:
    batches = [source().padded(range(start, start + 8)) for start in range(0, 96, 8)]
    capacity = content.capacity_of(batches)
    most = max(int(supervised_tokens(row)) for b in batches for row in b["labels"])
    assert most <= capacity < most + 32


def test_with_a_loss_on_every_token_a_sample_s_first_alone_has_none() -> None:
    made = source()
    rows = made.rows([[0, 1], [2]], int(made.tokens[:3].sum()), 2)
    everywhere = content.all_supervised(rows)
    supervised = everywhere["labels"] != IGNORE_LABEL
    assert supervised.sum() == made.tokens[:3].sum() - 3
    assert not supervised[rows["positions"] == 0].any() and (everywhere["labels"][supervised] >= 0).all()
    assert everywhere["ids"] is rows["ids"]


def test_weights_are_the_same_to_the_bit_in_jax_and_torch() -> None:
    for name in ("multi_modal_projector.linear_1.weight", "language_model.model.norm.weight"):
        ours = draw.in_jax(draw.seed_of(name), (37, 11), *draw.scale_and_shift(name))
        theirs = torch.zeros(37, 11)
        draw.in_torch(name, theirs)
        assert np.array_equal(np.asarray(ours), theirs.numpy())
        assert 0 < theirs.std() < 0.1


@pytest.mark.slow
def test_masters_can_be_bfloat16_and_the_step_keeps_them_so() -> None:
    side = Ours(MODEL, Setting(compute="bfloat16", masters="bfloat16", remat="full"))
    state, frozen = side.start()
    batch = side.put(source().padded(range(2)))
    step = side.step(content.capacity_of([source().padded(range(2))]), state, frozen, batch)
    state, metrics = step(state, frozen, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"bfloat16"}
    assert np.isfinite(float(metrics["loss"]))
