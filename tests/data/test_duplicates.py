"""vflax/data/duplicates.py: copies of a picture are found, what only looks alike to a hash is not."""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipeline.convert import convert
from data_pipeline.tfds_writer import write_dataset
from vflax import images
from vflax.data import duplicates
from vflax.data.ahead import in_order
from vflax.data.duplicates import Copies, Side, find_copies, near_pairs, traits
from vflax.data.source import Source, open_source
from vflax.errors import UserError


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Smooth patches of colour, as a photograph has."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sample(name: str, *data: bytes, question: str = "What is it?", answer: str = "red") -> dict:
    turns = [{"from": "human", "value": "<image>\n" * len(data) + question}, {"from": "gpt", "value": answer}]
    sizes = [(1, 1)] * len(data)
    return {
        "id": name,
        "task": "t",
        "conversations": turns,
        "images": list(data),
        "sizes": sizes,
        "source": "",
    }


@pytest.fixture
def compare(tmp_path):
    """(training samples, evaluation samples) -> Copies."""

    def compare(
        training: list[dict], asked: list[dict], distance: int = 4, skip: int | None = None
    ) -> Copies:
        write_dataset(tmp_path / "d", {"train": training, "test": asked})
        sides = []
        for split in ("train", "test"):
            source = open_source(tmp_path / "d", split)
            found = traits(source, [tmp_path / "d" / "preflight"], show_progress=False)
            sides.append(Side(source, np.ones(len(source), bool), found))
        if skip is not None:
            sides[0].mask[skip] = False
        return find_copies(sides[1], sides[:1], distance, [tmp_path / "d" / "preflight"], show_progress=False)

    return compare


@pytest.mark.parametrize(
    "copied",
    [
        encoded(picture(3)),
        encoded(picture(3), "JPEG", quality=30),
        encoded(picture(3).resize((160, 120), Image.Resampling.BICUBIC), "JPEG", quality=60),
        encoded(picture(3).resize((224, 224))),
    ],
    ids=["identical", "recompressed", "half the size", "squeezed"],
)
def test_a_copy_is_found_and_nothing_else(compare, copied):
    training = [sample(f"t{i}", encoded(picture(i))) for i in range(20)]
    asked = [sample(f"e{i}", encoded(picture(100 + i))) for i in range(10)]
    asked[6] = sample("copy", copied)
    found = compare(training, asked)
    assert (found.images, found.copied, found.share, found.plain) == (10, 1, 0.1, 0)
    (pair,) = found.pairs
    assert (pair.sample, pair.id, pair.copy, pair.copy_id) == (6, "copy", 3, "t3")


def test_the_worst_level_counts_once_for_a_sample(compare):
    data = encoded(picture(1))
    training = [
        sample("a", data, question="Other?"),
        sample("b", data, question="what IS <image> it?", answer="Green"),
        sample("c", data, answer="blue"),
    ]
    asked = [
        sample("image", data, question="Where?"),
        sample("question", data),
        sample("answer", data, answer="green"),
        sample("twice", encoded(picture(2)), data, question="Other?"),
    ]
    found = compare(training, asked)
    assert found.samples == {"same_image": 1, "same_question": 1, "same_answer": 2}
    assert found.images == 5 and found.copied == 4
    assert {(p.id, p.image, p.copy_id, p.level) for p in found.pairs} == {
        ("answer", 0, "b", "same_answer"),
        ("twice", 1, "a", "same_answer"),
        ("question", 0, "b", "same_question"),
        ("image", 0, "a", "same_image"),
    }
    assert [p.level for p in found.pairs] == ["same_answer"] * 2 + ["same_question", "same_image"]


def test_pictures_of_one_colour_or_one_direction_are_counted_and_not_compared(compare):
    stripes = Image.fromarray(np.repeat(np.arange(0, 250, 2, dtype=np.uint8)[:, None], 90, 1)).convert("RGB")
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white", "teal")] + [stripes]
    found = compare(
        [sample(f"t{i}", encoded(p)) for i, p in enumerate(plain * 3)],
        [sample(f"e{i}", encoded(p)) for i, p in enumerate(plain)],
    )
    assert (found.images, found.plain, found.copied, found.pairs) == (4, 4, 0, [])


def test_drawings_that_hash_alike_but_differ_in_colour_are_no_copies(compare):
    drawings = []
    for colours in (("navy", "yellow"), ("maroon", "cyan")):
        drawing = Image.new("RGB", (64, 64), colours[0])
        ImageDraw.Draw(drawing).ellipse((8, 30, 30, 52), fill=colours[1])
        drawings.append(drawing)
    near = (images.perceptual_hash(drawings[0]) ^ images.perceptual_hash(drawings[1])).bit_count()
    assert near <= 4
    found = compare([sample("t", encoded(drawings[0]))], [sample("e", encoded(drawings[1]))])
    assert (found.plain, found.copied) == (0, 0)


def test_samples_without_images_are_compared_by_their_texts(compare):
    training = [sample("a", question="One?"), sample("b", encoded(picture(1)), question="Two?")]
    asked = [
        sample("x", question=" one? "),
        sample("y", question="One?", answer="no"),
        sample("z", question="Two?"),
    ]
    found = compare(training, asked)
    assert (found.same_text, found.images, found.share) == (1, 0, 0.0)


def test_samples_that_are_not_trained_on_are_no_copies(compare):
    data = encoded(picture(1))
    training = [sample("a", data), sample("b", encoded(picture(2)))]
    assert compare(training, [sample("x", data)]).copied == 1
    assert compare(training, [sample("x", data)], skip=0).copied == 0


def all_pairs(a: np.ndarray, b: np.ndarray, distance: int) -> np.ndarray:
    """int [3, p]: i, j, bits, sorted."""
    found = np.hstack([np.zeros((3, 0), int), *(np.stack(block) for block in near_pairs(a, b, distance))])
    return found[:, np.lexsort((found[1], found[0]))]


def test_the_search_finds_exactly_the_pairs_that_comparing_all_finds(monkeypatch):
    monkeypatch.setattr(duplicates, "_CANDIDATES", 50)  # several rounds
    rng = np.random.default_rng(0)
    a = np.unique(rng.integers(0, 2**64, 300, dtype=np.uint64))
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (300, 8), dtype=np.uint64), axis=1)
    b = np.unique(np.concatenate([a[:100], a[100:200] ^ (flips[:100] & flips[100:200]), a ^ flips[: len(a)]]))
    bits = np.bitwise_count(a[:, None] ^ b[None])
    for distance in range(duplicates.MAX_DISTANCE + 1):
        i, j, found = all_pairs(a, b, distance)
        np.testing.assert_array_equal(np.stack([i, j]), np.nonzero(bits <= distance))
        np.testing.assert_array_equal(found, bits[i, j])
    assert all_pairs(a[:0], b, 4).size == all_pairs(a, b[:0], 4).size == 0


def test_ranges_are_gone_through_place_by_place_in_blocks(monkeypatch):
    monkeypatch.setattr(duplicates, "_CANDIDATES", 4)
    first, last = np.array([3, 0, 5, 5, 9]), np.array([3, 7, 5, 8, 11])
    blocks = list(duplicates._ranges(first, last))
    assert [len(i) for i, _ in blocks] == [4, 4, 4]
    found = [pair for i, place in blocks for pair in zip(i.tolist(), place.tolist(), strict=True)]
    assert found == [(i, place) for i in range(5) for place in range(first[i], last[i])]


def test_a_placeholder_in_many_samples_is_counted_without_holding_all_its_pairs(compare, monkeypatch):
    placeholder, other = encoded(picture(1, (48, 32))), encoded(picture(2, (48, 32)))
    training = [sample(f"t{i}", placeholder, question=f"{i % 40}?", answer="yes") for i in range(80)]
    training += [sample("other", other)]
    asked = [sample(f"e{i}", placeholder, question=f"{20 + i}?", answer="yn"[i % 2]) for i in range(30)]
    asked += [sample("yes", placeholder, question="7?", answer="yes"), sample("x", other)]
    held = []
    ranges = duplicates._ranges

    def counted(first, last):
        for block in ranges(first, last):
            held.append(len(block[0]))
            yield block

    monkeypatch.setattr(duplicates, "_ranges", counted)
    monkeypatch.setattr(duplicates, "_CANDIDATES", 100)
    found = compare(training, asked)
    assert max(held) == 100
    assert sum(held) < 31 * 80  # what is the same to a person who asks is compared once
    assert (found.images, found.copied) == (32, 32)
    assert found.samples == {"same_image": 10, "same_question": 20, "same_answer": 2}
    copies = {pair.id: pair.copy_id for pair in found.pairs}
    assert (copies["e3"], copies["e29"], copies["yes"], copies["x"]) == ("t23", "t0", "t7", "other")


def test_drawings_of_one_hash_with_the_same_texts_are_each_looked_at(compare):
    drawings = []
    for colours in (("navy", "yellow"), ("maroon", "cyan")):
        drawing = Image.new("RGB", (64, 64), colours[0])
        ImageDraw.Draw(drawing).ellipse((8, 30, 30, 52), fill=colours[1])
        drawings.append(encoded(drawing))
    found = compare([sample("a", drawings[0]), sample("b", drawings[1])], [sample("x", drawings[1])])
    assert [(pair.copy_id, pair.level) for pair in found.pairs] == [("b", "same_answer")]


def test_pictures_are_decoded_only_a_little_ahead_of_where_they_are_used():
    taken = []
    items = (taken.append(i) or i for i in range(50))
    with ThreadPoolExecutor(2) as pool:
        for i, square in in_order(pool, lambda i: i * i, items, ahead=5):
            assert square == i * i and len(taken) <= i + 5
    assert taken == list(range(50))


def test_what_was_found_is_kept_for_the_same_two_sides(compare, monkeypatch):
    training = [sample(f"t{i}", encoded(picture(i))) for i in range(3)]
    asked = [sample("e", encoded(picture(1), "JPEG", quality=50))]
    first = compare(training, asked)
    monkeypatch.setattr(duplicates, "near_pairs", None)  # would fail if it were called
    assert compare(training, asked) == first
    for change in ({"distance": 3}, {"skip": 1}):
        with pytest.raises(TypeError):
            compare(training, asked, **change)
    with pytest.raises(TypeError):
        compare(training[:2], asked)


def test_hashes_of_the_index_spare_the_decoding(tmp_path, monkeypatch):
    source = written(tmp_path)
    monkeypatch.setattr(images, "decode", None)
    found = traits(source, [], show_progress=False)
    assert found.hashes.tolist() == [images.perceptual_hash(picture(1))]


def test_a_picture_that_the_index_knows_and_the_shards_lost_is_named(tmp_path):
    write_dataset(
        tmp_path / "d", {"train": [sample("a", encoded(picture(1)))], "test": [sample("b", b"lost")]}
    )
    sources = [open_source(tmp_path / "d", split) for split in ("train", "test")]
    known = traits(sources[0], [], show_progress=False)
    sides = [Side(source, np.ones(1, bool), known) for source in sources]
    with pytest.raises(UserError, match=r"sample 'b' of .*/d \(split test\), image 0: not an image"):
        find_copies(sides[1], sides[:1], 4, [], show_progress=False)


def test_damaged_images_of_another_program_s_dataset_are_named(tmp_path):
    write_dataset(tmp_path / "d", {"train": [sample("a", encoded(picture(1))), sample("b", b"no picture")]})
    found = traits(open_source(tmp_path / "d", "train"), [], show_progress=False)
    assert found.damaged.tolist() == [1] and found.hashes[1] == 0


def written(folder) -> Source:
    """A dataset whose index has hashes."""
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(encoded(picture(1)))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (folder / "a.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    convert("llava", folder / "a.json", folder / "images", folder / "d", show_progress=False)
    return open_source(folder / "d", "train")


def test_damaged_traits_are_found_again(tmp_path):
    source, caches = written(tmp_path), [tmp_path / "cache"]
    first = traits(source, caches, show_progress=False)
    (file,) = caches[0].iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:3], b""):
        file.write_bytes(damaged)
        assert traits(source, caches, show_progress=False).hashes.tolist() == first.hashes.tolist()
        assert file.read_bytes() == whole


def test_a_dataset_indexed_anew_has_the_hashes_of_its_new_index(tmp_path):
    caches = [tmp_path / "cache"]
    before = traits(written(tmp_path), caches, show_progress=False)
    index, contents = tmp_path / "d" / "index" / "train.jsonl", tmp_path / "d" / "contents.json"
    old = f"{int(before.hashes[0]):016x}"
    assert old in index.read_text()
    index.write_text(index.read_text().replace(old, "00000000000000ff"))
    known = json.loads(contents.read_text())
    known["splits"]["train"]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    contents.write_text(json.dumps(known))
    after = traits(open_source(tmp_path / "d", "train"), caches, show_progress=False)
    assert after.hashes.tolist() == [0xFF]


def test_what_no_folder_takes_is_told_with_the_reason(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    write_dataset(tmp_path / "d", {"train": [sample("a", question="What?")]})
    source = open_source(tmp_path / "d", "train")
    traits(source, [tmp_path / "file", tmp_path / "cache"], show_progress=False)
    assert capsys.readouterr().err == ""
    traits(source, [tmp_path / "file", tmp_path / "file" / "too"], show_progress=False)
    assert f"cannot be kept in {tmp_path}/file (File exists) or" in capsys.readouterr().err
