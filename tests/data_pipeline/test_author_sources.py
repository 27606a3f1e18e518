"""data_pipeline/author: every loader gives records with a key of their own, their fields and their picture."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.core import example_serializer

from data_pipeline.author import generated, idx, pictures, table, tfds_directory
from data_pipeline.author.sources import Listing, Source
from tests.data_pipeline import author_files
from tests.data_pipeline.author_files import png
from vflax import images
from vflax.errors import UserError


def rows(listing: Listing) -> list[tuple[str, dict]]:
    return [(record.key, dict(record.fields)) for record in listing.records]


def write_idx(folder: Path, pixels: np.ndarray, labels: list[int]) -> Source:
    raw = struct.pack(">I3I", 0x803, *pixels.shape) + pixels.tobytes()
    (folder / "images.gz").write_bytes(gzip.compress(raw))
    (folder / "labels").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))
    return idx("images.gz", "labels", names=("zero", "one"))


def zipped(folder: Path, to: Path, top: str = "") -> Path:
    with zipfile.ZipFile(to, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, top + path.relative_to(folder).as_posix())
    return to


# ---------------------------------------------------------------------------------------------------------
# IDX


def test_idx_files_give_a_picture_without_loss_and_the_name_of_its_label(tmp_path):
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    listing = write_idx(tmp_path, pixels, [1, 0]).load(tmp_path)
    assert rows(listing) == [
        ("00000", {"label": "one", "number": 1}),
        ("00001", {"label": "zero", "number": 0}),
    ]
    np.testing.assert_array_equal(np.asarray(images.load(listing.records[1].read().data)), pixels[1])


def test_an_idx_label_without_a_name_is_refused(tmp_path):
    source = write_idx(tmp_path, np.zeros((1, 2, 2), np.uint8), [7])
    with pytest.raises(UserError, match="label 7 has no name among 2"):
        source.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Folders and zips


def test_a_folder_of_classes_and_the_zip_of_it_give_the_same_records(tmp_path):
    folder = author_files.pictures(tmp_path / "set", each=2)
    zipped(folder, tmp_path / "set.zip")
    one, two = pictures("set").load(tmp_path), pictures("set.zip").load(tmp_path)
    assert rows(one) == rows(two)
    assert rows(one)[0] == ("cat/00.png", {"label": "cat", "file": "00.png"})
    assert [record.read() for record in one.records] == [record.read() for record in two.records]


def test_a_path_names_fields_at_any_depth_and_skips_what_is_a_star(tmp_path):
    folder = author_files.pictures(tmp_path / "set", each=1, classes=("Greek", "Latin"))
    zipped(folder, tmp_path / "a.zip", "images/x/")
    found = pictures("a.zip", path="*/*/{alphabet}/{file}").load(tmp_path)
    assert rows(found)[1] == ("images/x/Latin/00.png", {"alphabet": "Latin", "file": "00.png"})


def test_a_field_takes_as_much_of_a_file_name_as_it_can(tmp_path):
    (tmp_path / "great_dane_12.png").write_bytes(png(1))
    found = pictures(".", path="{breed}_{number}.png").load(tmp_path)
    assert rows(found) == [("great_dane_12.png", {"breed": "great_dane", "number": "12"})]


def test_of_several_places_the_keys_have_the_place_in_front(tmp_path):
    author_files.pictures(tmp_path / "train", each=1)
    author_files.pictures(tmp_path / "test", each=1)
    keys = [record.key for record in pictures("train", "test").load(tmp_path).records]
    assert keys[0] == "train/cat/00.png" and keys[3] == "test/cat/00.png"


def test_pictures_of_another_path_are_counted_and_other_files_are_none(tmp_path):
    author_files.pictures(tmp_path, each=1)
    (tmp_path / "cover.png").write_bytes(png(5))
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / ".hidden.png").write_bytes(png(6))
    found = pictures(".").load(tmp_path)
    assert (len(found.records), found.passed_over) == (3, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: pictures("nowhere"), "there is no nowhere in it"),
        (lambda: pictures(".", path="{a}/{b}/{c}/{d}"), "none of 3 pictures has a path like"),
        (lambda: pictures("cat/00.png"), "neither a folder nor a whole zip"),
        (lambda: pictures(".", path="{a}/{a}"), "each field once"),
        (lambda: pictures(), "expected the folders or zips"),
    ],
)
def test_pictures_that_are_not_there_are_refused_in_words(tmp_path, source, message):
    author_files.pictures(tmp_path, each=1)
    with pytest.raises(UserError, match=message):
        source().load(tmp_path)


def test_without_data_a_source_of_files_asks_for_it():
    with pytest.raises(UserError, match="give --data=DIR"):
        pictures("train").load(None)


# ---------------------------------------------------------------------------------------------------------
# Tables

ROWS = [
    {"image": "cat/00.png", "question": "What is it?", "answer": "cat", "choices": ["cat", "dog"]},
    {"image": "dog/00.png", "question": "And this?", "answer": "dog", "choices": ["dog", "owl"]},
]


def write_rows(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines = [("image", "question", "answer"), *((r["image"], r["question"], r["answer"]) for r in ROWS)]
        sign = "\t" if path.suffix == ".tsv" else ","
        path.write_text("\ufeff" + "".join(sign.join(line) + "\n" for line in lines))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_of_each_kind_gives_its_columns_and_the_picture_that_a_row_names(tmp_path, suffix):
    author_files.pictures(tmp_path / "pics", each=1)
    write_rows(tmp_path / f"t.{suffix}")
    records = table(f"t.{suffix}", image="image", folder="pics").load(tmp_path).records
    assert [(r.key, r.file, r.fields["answer"]) for r in records] == [
        ("00000", "cat/00.png", "cat"),
        ("00001", "dog/00.png", "dog"),
    ]
    assert records[1].read().data == png(1000)
    assert "image" not in records[0].fields
    assert suffix in ("csv", "tsv") or records[0].fields["choices"] == ["cat", "dog"]


def test_parquet_of_the_hub_has_its_pictures_in_it(tmp_path):
    made = [{"image": {"bytes": png(n), "path": None}, "label": n, "id": f"q{n}"} for n in range(5)]
    parquet.write_table(pa.Table.from_pylist(made), tmp_path / "t.parquet", row_group_size=2)
    records = table("t.parquet", image="image", key="id").load(tmp_path).records
    assert [(r.key, dict(r.fields)) for r in records][3] == ("q3", {"label": 3, "id": "q3"})
    assert [r.read().data for r in reversed(records)] == [png(n) for n in reversed(range(5))]


def test_a_row_without_a_picture_is_a_record_whose_picture_cannot_be_had(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"image": "", "answer": "cat"}\n{"image": "gone.png", "answer": "dog"}\n'
    )
    empty, gone = table("t.jsonl", image="image").load(tmp_path).records
    with pytest.raises(images.ImageError, match="expected a path"):
        empty.read()
    with pytest.raises(FileNotFoundError):
        gone.read()


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"image": "../x.png"}\n')
    with pytest.raises(UserError, match="expected a path inside the folder"):
        table("t.jsonl", image="image").load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "image,a\nx.png,1,2\n", r"t.csv, line 2: more cells"),
        ("t.csv", "picture,a\nx.png,1\n", r"t.csv, row 1: no column 'image'; it has picture, a"),
        ("t.csv", "image,a\n", r"t.csv: not one record"),
        ("t.jsonl", '{"image": "x.png"}\n{"ima\n{"image": "y.png"}\n', r"t.jsonl, line 2: not JSON"),
        (
            "t.json",
            '{\n"image": "x.png"\n}',
            r"t.json: expected an array of objects, or one a line; found one object",
        ),
        ("t.json", "[1]", r"t.json, row 1: expected an object"),
        ("t.parquet", "no parquet", r"t.parquet: not readable as Parquet"),
    ],
)
def test_a_damaged_table_is_refused_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        table(name, image="image").load(tmp_path)


def test_two_rows_with_one_key_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"image": "x.png", "id": 1}\n' * 2)
    with pytest.raises(UserError, match="key '1' is there twice"):
        table("t.jsonl", image="image", key="id").load(tmp_path)


def test_a_table_of_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match=r"table\('t.xlsx'\): expected one of .csv"):
        table("t.xlsx", image="image")


# ---------------------------------------------------------------------------------------------------------
# TFDS


def write_tfds(folder: Path, count: int = 3) -> None:
    """A dataset in ArrayRecord with a picture, a class and a text, as TFDS would prepare it."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "name": tfds.features.Text(),
        }
    )
    folder.mkdir(parents=True)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "animals-train.array_record-00000-of-00001"), "group_size:1"
    )
    for n in range(count):
        value = features.encode_example({"image": png(n), "label": n % 2, "name": f"né{n}"})
        writer.write(serializer.get_tf_example(value).SerializeToString(deterministic=True))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        dataset_name="animals", data_dir=folder, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features, split_infos=[split], check_data=False
    )


def test_a_tfds_directory_gives_names_of_classes_texts_and_the_bytes_of_its_pictures(tmp_path):
    write_tfds(tmp_path / "animals" / "1.0.0")
    listing = tfds_directory("animals/1.0.0", key="name").load(tmp_path)
    assert rows(listing) == [
        ("né0", {"label": "cat", "name": "né0"}),
        ("né1", {"label": "dog", "name": "né1"}),
        ("né2", {"label": "cat", "name": "né2"}),
    ]
    assert [record.read().data for record in listing.records] == [png(0), png(1), png(2)]
    part = tfds_directory("animals/1.0.0", split="train[1:]").load(tmp_path)
    assert [record.fields["name"] for record in part.records] == ["né1", "né2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": "."}, "TFDS cannot open it .*a folder with dataset_info.json"),
        ({"split": "test"}, "TFDS cannot open it .*split 'test'"),
        ({"image": "photo"}, "no picture 'photo' among its features; pictures are image"),
    ],
)
def test_what_is_no_such_tfds_directory_is_refused(tmp_path, options, message):
    write_tfds(tmp_path / "animals")
    with pytest.raises(UserError, match=message):
        tfds_directory(**{"folder": "animals", **options}).load(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Generators


def test_a_generator_may_yield_images_bytes_and_paths(tmp_path):
    author_files.pictures(tmp_path, each=1)

    def records(data):
        yield {"picture": Image.new("RGB", (3, 2), "red"), "label": "red"}
        yield {"picture": png(7), "label": "noise", "key": "mine"}
        yield {"picture": "cat/00.png", "label": "cat"}

    listing = generated(records).load(tmp_path)
    assert rows(listing) == [
        ("00000", {"label": "red"}),
        ("mine", {"label": "noise"}),
        ("00002", {"label": "cat"}),
    ]
    assert [images.load(record.read().data).size for record in listing.records] == [(3, 2), (8, 6), (8, 6)]
    assert listing.records[2].file == "cat/00.png"


def test_what_is_drawn_is_known_by_its_pixels(tmp_path):
    """Encoders of other versions write other bytes."""

    def draw(color):
        source = generated(lambda data: iter([{"picture": Image.new("RGB", (3, 2), color)}]))
        return source.load(None).records[0].read()

    found = draw("red")
    assert found.digest == hashlib.sha256(b"RGB 3 2 " + bytes((255, 0, 0)) * 6).hexdigest()
    assert found.digest != draw("blue").digest


@pytest.mark.parametrize(
    ("yielded", "message"),
    [
        (lambda: {"label": "x"}, "record 0: yielded .*expected a dict with a picture"),
        (lambda: {"picture": 3}, "record 0: picture is a int"),
        (lambda: 1 / 0, "record 0: ZeroDivisionError: division by zero"),
    ],
)
def test_a_generator_that_fails_is_named_with_the_record(yielded, message):
    def records(data):
        yield yielded()

    with pytest.raises(UserError, match=f"records: {message}"):
        generated(records).load(None)
