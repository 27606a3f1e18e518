"""vflax/data/rows.py: what a row looks like, token for token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.whole_rows import assemble
from vflax import images
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.conversation import expand, read_llava, render
from vflax.data.lengths import measure
from vflax.data.mixture import Mixture, SourceSpec
from vflax.data.packing import PackPlan
from vflax.data.rows import RowFormat, RowSource, join
from vflax.data.source import Sample, open_source
from vflax.errors import UserError

NAMES = {"ids", "labels", "segments", "positions", "images"}


def sample(make_example, *args, **kw) -> Sample:
    e = make_example(*args, **kw)
    return Sample(e["id"], e["task"], e["conversations"], e["images"])


@pytest.fixture(scope="module")
def make_rows(dataset, row_format):
    def make(rows_multiple: int = 1, format: RowFormat = row_format, epochs: int = 2, **changes) -> RowSource:
        source = open_source(dataset, "train")
        lengths = measure(source, row_format, show_progress=False)
        mixture = Mixture([SourceSpec(str(dataset))], [source.tasks], [lengths.kept], seed=0)
        settings = {
            "samples": 10,
            "max_length": row_format.max_length,
            "slots": row_format.slots,
            "packing": True,
            "seed": 0,
        }
        plan = PackPlan(lengths.tokens, lengths.images, lengths.supervised, **settings | changes)
        total = plan.total_steps(epochs=epochs)
        return RowSource([source], mixture, plan, format, total_steps=total, rows_multiple=rows_multiple)

    return make


def test_a_row_of_two_samples_is_the_one_made_by_hand(row_format, make_example):
    first, second = sample(make_example, 0, images=1), sample(make_example, 1, images=2)
    row = assemble([first, second], row_format)
    assert set(row) == NAMES
    at = slot = 0
    for segment, item in enumerate([first, second], start=1):
        conversation, _ = read_llava(item.conversations, len(item.images), "front")
        ids, labels = expand(render(conversation, "vicuna_v1", row_format.tokenizer), 4)
        span = slice(at, at + len(ids))
        np.testing.assert_array_equal(row["ids"][span], ids)
        np.testing.assert_array_equal(row["labels"][span], labels)
        np.testing.assert_array_equal(row["segments"][span], segment)
        np.testing.assert_array_equal(row["positions"][span], np.arange(len(ids)))
        for data in item.images:
            expected = images.preprocess(images.decode(data), row_format.rules)
            np.testing.assert_array_equal(row["images"][slot], expected)
            slot += 1
        at += len(ids)
    assert (row["ids"] == IMAGE_TOKEN_ID).sum() == 3 * 4
    assert at < 256
    for name, value in {"ids": 0, "labels": IGNORE_LABEL, "segments": 0, "positions": 0}.items():
        assert (row[name][at:] == value).all()


def test_supervised_labels_are_the_answer_and_its_end_token(row_format, make_example):
    item = sample(make_example, 0, words=4)
    row = assemble([item], row_format)
    supervised = row["labels"][row["labels"] != IGNORE_LABEL]
    assert supervised[-1] == row_format.tokenizer.eos_id
    assert row_format.tokenizer.decode(supervised).strip() == item.conversations[1]["value"]


def test_shapes_and_dtypes_are_those_of_the_device(row_format, make_example):
    row = assemble([sample(make_example, 0, images=0)], row_format)
    assert {name: (value.shape, value.dtype) for name, value in row.items()} == {
        "ids": ((256,), np.int32),
        "labels": ((256,), np.int32),
        "segments": ((256,), np.int32),
        "positions": ((256,), np.int32),
        "images": ((3, 8, 8, 3), np.uint8),
    }
    assert not row["images"].any()


def test_an_empty_row_is_all_padding(row_format):
    row = join([], row_format)
    assert not any(row[name].any() for name in ("ids", "segments", "positions", "images"))
    assert (row["labels"] == IGNORE_LABEL).all()


def test_a_sample_that_is_too_long_is_cut_on_the_right(row_format, make_example):
    item = sample(make_example, 0, words=60)
    whole = assemble([item], row_format)
    used = int((whole["segments"] == 1).sum())
    short = dataclasses.replace(row_format, max_length=used - 10)
    row = assemble([item], short)
    assert row["segments"].all()
    np.testing.assert_array_equal(row["ids"], whole["ids"][: used - 10])
    np.testing.assert_array_equal(row["labels"], whole["labels"][: used - 10])


def test_too_much_for_a_row_is_an_error_not_a_cut(row_format, make_example):
    with pytest.raises(ValueError, match="a row of 256 tokens and 3 images"):
        assemble([sample(make_example, i, images=2) for i in range(2)], row_format)


def test_every_row_is_what_the_plan_says_and_epochs_hold_every_sample(make_rows, row_format, dataset):
    rows = make_rows()
    source = open_source(dataset, "train")
    plan = rows._plan
    seen: list[int] = []
    for i in range(plan.steps_per_epoch(0) * rows.rows_per_step):
        numbers = plan.row(*divmod(i, rows.rows_per_step))
        expected = assemble([source[n] for n in numbers], row_format)
        got = rows[i]
        for name in NAMES:
            np.testing.assert_array_equal(got[name], expected[name])
        seen += numbers
    assert sorted(seen) == list(range(40))


def test_another_mesh_sees_the_same_samples_in_every_step(make_rows):
    one, eight = make_rows(1), make_rows(8)
    r = one.rows_per_step
    assert eight.rows_per_step == -(-r // 8) * 8 > r
    assert one.total_steps == eight.total_steps
    for step in range(one.total_steps):
        for row in range(eight.rows_per_step):
            got = eight[step * eight.rows_per_step + row]
            want = one[step * r + row] if row < r else join([], one._format)
            for name in NAMES:
                np.testing.assert_array_equal(got[name], want[name])


def test_rows_are_the_same_in_any_order_and_there_are_no_others(make_rows):
    rows = make_rows()
    wanted = [rows[i] for i in range(len(rows))]
    again = make_rows()
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        for name in NAMES:
            np.testing.assert_array_equal(again[i][name], wanted[i][name])
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[outside]


def test_lengths_that_are_not_those_of_the_rows_are_refused_by_sample(make_rows, row_format):
    rows = make_rows(format=dataclasses.replace(row_format, template="llava_v1", num_image_tokens=5))
    with pytest.raises(UserError, match=r"sample 's\d+' of .*but the preflight counted .*preflight"):
        for i in range(len(rows)):
            rows[i]
