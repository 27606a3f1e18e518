"""vflax/data/lengths.py: measured once, and what cannot be used has a name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_pipeline.tfds_writer import write_dataset
from tests.data.whole_rows import assemble
from vflax.constants import IGNORE_LABEL
from vflax.data import lengths as lengths_lib
from vflax.data.lengths import fingerprint, measure
from vflax.data.rows import encode
from vflax.data.source import Sample, open_source
from vflax.errors import UserError


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def odd_source(tmp_path, make_example):
    """One good sample, and one of each kind of finding."""
    conversations = {
        "good": turns("<image>\nwhat", "red"),
        "truncated": turns("<image>\nwhat", "red " * 500),
        "too_long": turns("<image>\nwhat " * 200, "red"),
        "image_lost": turns("what", "red " * 300, "<image>", "blue"),
        "unanswered": turns("<image>\nwhat"),
        "silent": turns("<image>\nwhat", " "),
        "broken": [*turns("a"), *turns("b", "c")],
        "extra": turns("<image> and <image>", "red"),
    }
    examples = [
        make_example(i) | {"id": name, "conversations": value}
        for i, (name, value) in enumerate(conversations.items())
    ]
    write_dataset(tmp_path / "odd", {"train": examples})
    return open_source(tmp_path / "odd", "train")


def test_lengths_are_those_of_the_rows(dataset, row_format):
    source = open_source(dataset, "train")
    lengths = measure(source, row_format, show_progress=False)
    assert lengths.kept.all()
    for i in range(len(source)):
        row = assemble([source[i]], row_format)
        assert lengths.tokens[i] == (row["segments"] == 1).sum()
        assert lengths.images[i] == len(source[i].images)
        assert lengths.supervised[i] == (row["labels"] != IGNORE_LABEL).sum()


def named(source, lengths) -> dict[str, list[str]]:
    """The findings, with ids."""
    return {kind: [source[i].id for i in numbers] for kind, numbers in lengths.findings.items()}


def test_each_sample_that_is_odd_is_found_by_name(odd_source, row_format):
    lengths = measure(odd_source, row_format, show_progress=False)
    assert named(odd_source, lengths) == {
        "broken_roles": ["broken"],
        "empty_answer": ["silent"],
        "extra_image_marker": ["too_long", "extra"],
        "nothing_supervised": ["unanswered", "silent"],
        "too_long": ["too_long", "image_lost"],
        "truncated": ["truncated"],
        "unanswered": ["unanswered"],
    }
    ids = [text.id for text in odd_source.texts()]
    assert [ids[i] for i in np.flatnonzero(lengths.kept)] == ["good", "truncated", "extra"]
    assert sorted(lengths.dropped_kinds) == ["broken_roles", "nothing_supervised", "too_long"]
    assert lengths.tokens[1] == 256
    for text, uncut in zip(odd_source.texts(), lengths.uncut, strict=True):
        whole = 0 if text.id == "broken" else len(encode(text.conversations, 1, row_format, text.id).ids)
        assert uncut == whole
    assert not lengths.tokens[~lengths.kept].any() and not lengths.images[~lengths.kept].any()


def test_a_sample_stays_exactly_as_long_as_a_supervised_token_fits(tmp_path, row_format, make_example):
    write_dataset(tmp_path / "d", {"train": [make_example(0)]})
    source = open_source(tmp_path / "d", "train")
    row = assemble([source[0]], row_format)
    first = int(np.flatnonzero(row["labels"] != IGNORE_LABEL)[0])
    for max_length, kept in ((first, False), (first + 1, True)):
        short = dataclasses.replace(row_format, max_length=max_length)
        lengths = measure(source, short, show_progress=False)
        assert lengths.kept.tolist() == [kept]
        assert lengths.supervised.tolist() == [int(kept)]


def test_a_second_measuring_reads_the_cache(odd_source, row_format, monkeypatch):
    first = measure(odd_source, row_format, show_progress=False)
    (file,) = (odd_source.path / "preflight").iterdir()
    assert file.name == f"lengths-{fingerprint(odd_source, row_format)}.npz"
    monkeypatch.setattr(lengths_lib, "render_sample", None)
    second = measure(odd_source, row_format, show_progress=False)
    for field in ("tokens", "uncut", "images", "supervised", "kept"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    assert named(odd_source, second) == named(odd_source, first)
    assert second.dropped_kinds == first.dropped_kinds


def test_a_damaged_cache_is_measured_again(odd_source, row_format):
    first = measure(odd_source, row_format, show_progress=False)
    (file,) = (odd_source.path / "preflight").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b""):
        file.write_bytes(damaged)
        again = measure(odd_source, row_format, show_progress=False)
        np.testing.assert_array_equal(again.tokens, first.tokens)
        assert named(odd_source, again) == named(odd_source, first)


def test_a_read_only_dataset_is_cached_elsewhere(tmp_path, odd_source, row_format):
    (odd_source.path / "preflight").write_text("in the way, as on a read-only disk")
    first = measure(odd_source, row_format, fallback_cache=tmp_path / "cache", show_progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = measure(odd_source, row_format, fallback_cache=tmp_path / "cache", show_progress=False)
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_the_fingerprint_follows_all_that_decides_a_length(dataset, row_format):
    source = open_source(dataset, "train")
    base = fingerprint(source, row_format)
    changes = [
        {"template": "llava_v1"},
        {"position": "inline"},
        {"num_image_tokens": 5},
        {"max_length": 255},
        {"rules": dataclasses.replace(row_format.rules, mode="crop")},
    ]
    found = {fingerprint(source, dataclasses.replace(row_format, **change)) for change in changes}
    found.add(fingerprint(open_source(dataset, "test"), row_format))
    assert len(found | {base}) == len(changes) + 2
    assert fingerprint(source, dataclasses.replace(row_format, slots=9)) == base


def test_processes_measure_the_same_as_one(tmp_path, dataset, row_format, monkeypatch):
    source = open_source(dataset, "train")
    one = lengths_lib._measure(source, row_format, workers=1, show_progress=False)
    monkeypatch.setattr(lengths_lib, "_CHUNK", 3)  # several chunks in flight, more than fit at once
    two = lengths_lib._measure(source, row_format, workers=2, show_progress=False)
    for field in ("tokens", "images", "supervised"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    assert named(source, one) == named(source, two)


def test_a_template_that_the_tokenizer_cannot_serve_is_the_users_error_not_a_finding(dataset, row_format):
    source = open_source(dataset, "train")
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        measure(source, dataclasses.replace(row_format, template="chatml"), show_progress=False)


def test_sample_objects_need_no_dataset(row_format, make_example):
    e = make_example(0)
    assert assemble([Sample(e["id"], e["task"], e["conversations"], e["images"])], row_format)["ids"].any()
