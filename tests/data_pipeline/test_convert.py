"""data_pipeline/convert.py: a release in, a dataset and a report out; nothing is lost in silence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import vflax
from data_pipeline.convert import convert, main
from tests.data_pipeline.release_files import write_release
from vflax.images import perceptual_hash


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def entry(i: int, **changes: object) -> dict:
    value = {
        "id": f"s{i}",
        "image": f"img{i}.png",
        "task_name": f"task+{i % 2}",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": f"Thing {i}."},
        ],
    }
    value.update(changes)
    return {key: item for key, item in value.items() if item is not None}


class Release:
    """An annotation file and an image folder."""

    def __init__(self, root: Path, entries: list) -> None:
        self.annotations, self.images, self.out = root / "annotation.json", root / "images", root / "out"
        self.images.mkdir(parents=True)
        self.annotations.write_text(json.dumps(entries))
        for i in range(len(entries)):
            (self.images / f"img{i}.png").write_bytes(png(i))

    def convert(self, **kw: object) -> dict:
        kw = {"format": "vision_flan", "out": self.out, "workers": 1, "show_progress": False, **kw}
        return convert(annotations=self.annotations, images=self.images, **kw)

    def read(self, split: str = "train") -> dict[str, dict]:
        return {e["id"].decode(): e for e in tfds.builder_from_directory(self.out).as_data_source(split)}


def files(path: Path) -> dict[str, str]:
    found = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_good_samples_keep_their_bytes_sizes_and_words(tmp_path):
    release = Release(tmp_path, [entry(0), entry(1)])
    report = release.convert()
    got = release.read()
    assert list(got) == ["s0", "s1"]
    assert got["s1"]["images"] == [png(1)]
    np.testing.assert_array_equal(got["s1"]["sizes"], [[24, 16]])
    assert json.loads(got["s1"]["conversations"]) == entry(1)["conversations"]
    assert got["s1"]["source"] == b"annotation.json"
    assert (report["read"], report["written"], report["quarantined"]) == (2, 2, 0)
    assert report["tasks"] == {"task+0": 1, "task+1": 1}
    data = release.annotations.read_bytes()
    assert report["sources"] == [
        {"file": "annotation.json", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    ]


def test_the_index_holds_the_hash_of_each_picture(tmp_path):
    release = Release(tmp_path, [entry(0), entry(1, image=["img1.png", "img0.png"]), entry(2, image=None)])
    release.convert()
    expected = [f"{perceptual_hash(Image.open(io.BytesIO(png(i)))):016x}" for i in range(2)]
    lines = [json.loads(line) for line in (release.out / "index/train.jsonl").read_text().splitlines()]
    assert [line["hashes"] for line in lines] == [[expected[0]], [expected[1], expected[0]], []]


def test_text_only_and_multi_image_samples_are_kept(tmp_path):
    entries = [entry(0, image=None), entry(1, image=["img0.png", "img1.png"]), entry(2, image=[])]
    release = Release(tmp_path, entries)
    assert release.convert()["written"] == 3
    got = release.read()
    assert got["s0"]["images"] == [] and got["s2"]["images"] == []
    assert got["s1"]["images"] == [png(0), png(1)]
    assert got["s0"]["sizes"].shape == (0, 2) and got["s1"]["sizes"].shape == (2, 2)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"image": "nowhere.png"}, "image_missing", "No such file"),
        ({"image": "cut.png"}, "image_damaged", "damaged image"),
        ({"image": "cut.jpg"}, "image_damaged", "truncated"),
        ({"image": "text.png"}, "image_unknown", "not an image"),
        ({"image": "empty.png"}, "image_empty", "empty file"),
        ({"image": ["img0.png", "nowhere.png"]}, "image_missing", "No such file"),
        ({"image": "../secret.png"}, "path_outside", "inside the image folder"),
        ({"image": "a/../../secret.png"}, "path_outside", "inside the image folder"),
        ({"image": "ABSOLUTE"}, "path_outside", "inside the image folder"),
        ({"image": "x" * 5000}, "image_missing", "name too long"),
        ({"image": "sub"}, "image_missing", "directory"),
        ({"image": 7}, "broken_record", "image: expected a path"),
        ({"conversations": []}, "broken_conversation", "no human turn"),
        ({"conversations": [{"from": "human"}]}, "broken_conversation", "value=None"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "broken_conversation",
            "doubled turns",
        ),
        ({"conversations": None}, "broken_conversation", "expected a list"),
        ({"id": "s0"}, "duplicate_id", "same id"),
        ({"id": None}, "broken_record", "id: expected"),
        ({"task_name": None}, "broken_record", "task_name: expected"),
    ],
)
def test_a_bad_sample_is_left_out_and_named_with_its_reason(tmp_path, changes, reason, detail):
    if changes.get("image") == "ABSOLUTE":
        changes = {"image": str(tmp_path / "images/img0.png")}
    release = Release(tmp_path, [entry(0), entry(1, **changes), entry(2)])
    (tmp_path / "secret.png").write_bytes(png(9))
    (release.images / "sub").mkdir()
    (release.images / "cut.png").write_bytes(png(9, (200, 200))[:-2000])
    (release.images / "text.png").write_text("<html>404</html>")
    (release.images / "empty.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(buffer, "JPEG")
    (release.images / "cut.jpg").write_bytes(buffer.getvalue()[:-20])
    report = release.convert()
    assert list(release.read()) == ["s0", "s2"]
    assert (report["read"], report["written"], report["reasons"]) == (3, 2, {reason: 1})
    [problem] = report["quarantine"]
    assert problem["number"] == 1
    assert problem["id"] == str(entry(1, **changes).get("id", ""))
    assert detail in problem["detail"]
    if reason.startswith(("image_", "path_")):
        image = changes["image"]
        assert problem["file"] == (image[-1] if isinstance(image, list) else image)
    manifest = json.loads((release.out / "manifest.json").read_text())["splits"]["train"]
    assert manifest | {"quarantine": [problem]} == report


def test_an_entry_that_is_no_object_is_named_by_its_place(tmp_path):
    release = Release(tmp_path, [entry(0), "what?"])
    [problem] = release.convert()["quarantine"]
    assert (problem["number"], problem["reason"]) == (1, "broken_record")


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    turns = [{"from": "human", "value": "<image>\nx\ud83dy"}, {"from": "gpt", "value": "z"}]
    release = Release(tmp_path, [entry(0, conversations=turns)])
    assert release.convert()["written"] == 1
    assert json.loads(release.read()["s0"]["conversations"])[0]["value"] == "<image>\nx\ufffdy"


def test_running_again_changes_nothing(tmp_path):
    release = Release(tmp_path, [entry(i) for i in range(4)])
    release.convert()
    before = files(release.out)
    release.convert()
    assert files(release.out) == before


def test_processes_and_one_process_write_the_same_files(tmp_path):
    # Over 1 MiB in all, so that shards of 1 MiB are several.
    entries = [entry(i) for i in range(6)]
    entries[3]["image"] = "nowhere.png"
    release = Release(tmp_path, entries)
    for i in range(6):
        (release.images / f"img{i}.png").write_bytes(png(i, (500, 300)))
    release.convert(shard_size_mb=1, out=tmp_path / "one")
    release.convert(shard_size_mb=1, out=tmp_path / "two", workers=2)
    one = files(tmp_path / "one")
    assert sum("array_record" in name for name in one) > 1
    assert files(tmp_path / "two") == one


def test_a_second_split_keeps_the_first_and_its_report(tmp_path):
    release = Release(tmp_path, [entry(i) for i in range(4)])
    first = release.convert()
    second = release.convert(split="test")
    assert len(release.read("train")) == len(release.read("test")) == 4
    splits = json.loads((release.out / "manifest.json").read_text())["splits"]
    assert {split: report | {"quarantine": []} for split, report in splits.items()} == {
        "train": first,
        "test": second,
    }


def test_llava_files_need_no_task_and_repeated_ids_are_told_apart(tmp_path):
    release = Release(tmp_path, [entry(0, task_name=None), entry(1, task_name=None, id="s0")])
    report = release.convert(format="llava")
    assert list(release.read()) == ["s0", "s0#2"]
    assert report["tasks"] == {"annotation": 2}
    assert report["findings"] == {"repeated_id": 1}
    [line] = (release.out / "findings/train.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "number": 1, "id": "s0#2", "task": "annotation", "file": "", "kind": "repeated_id",
        "detail": "an earlier entry has the id 's0'; here it is 's0#2'",
    }  # fmt: skip


@pytest.mark.parametrize(("asked", "read"), [(None, "test"), ("train", "train")])
@pytest.mark.parametrize("format", ["auto", "scienceqa"])
def test_a_split_of_scienceqa_is_made_of_its_own_problems_unless_others_are_asked_for(
    tmp_path, format, asked, read
):
    annotations, images, _ = write_release(tmp_path / "in", "scienceqa_QCM-LEA", rows=5)
    (images / "test/7").mkdir(parents=True)  # problems 1 to 5 are in train, 6 in val, 7 in test
    (images / "test/7/image.png").write_bytes(png(0))
    report = convert(
        format,
        annotations,
        images,
        tmp_path / "out",
        split="test",
        source_split=asked,
        workers=1,
        show_progress=False,
    )
    assert report["options"]["split"] == read
    assert report["read"] == {"test": 1, "train": 5}[read]


@pytest.mark.parametrize(
    ("args", "content", "message"),
    [
        (["--format=vision_flam"], None, r"--format=vision_flam: expected .*did you mean vision_flan"),
        (["--annotations=MISSING.json"], None, r"--annotations=MISSING.json: there is no such file"),
        (["--images=MISSING"], None, r"--images=MISSING: there is no such folder or archive"),
        ([], '[{"id": 1},', r"not valid JSON: .* line 1, column 12"),
        ([], '{"id": 1}\n{"id": 2}', r"no sample has the key 'task_name', 'conversations'"),
        ([], '{"annotations": []}', r"expected a JSON array of samples, found an object.*annotations"),
        ([], "[]", r"expected a JSON array of samples"),
        ([], '[{"question_id": 1, "text": "x"}]', r"no sample has the key 'id'.*question_id"),
        ([], '[{"id": 1, "image": "a", "conversations": []}]', r"'task_name'.*Try --format=llava"),
        ([], json.dumps([entry(0, image="nowhere.png")]), r"not one of 1 samples can be used.*nowhere\.png"),
        (["--split=Train!"], None, r"split 'Train!'"),
        (["--split=../x/y"], None, r"split '../x/y'"),
        (["--shard_size_mb=0"], None, r"--shard_size_mb=0, .*expected at least 1"),
        (["--workers=0"], None, r"--workers=0: expected at least 1"),
        (["--out=gopher://bucket/data"], None, r"--out=gopher://bucket/data: .*gopher"),
        (["--out=gs:/bucket/data"], None, r"--out=gs:/bucket/data: a slash is missing"),
    ],
)
def test_a_wrong_argument_or_file_ends_with_one_clear_line_and_leaves_nothing(
    tmp_path, capsys, args, content, message
):
    release = Release(tmp_path / "in", [entry(0)])
    if content is not None:
        release.annotations.write_text(content)
    before = files(tmp_path)
    defaults = ["--format=vision_flan", f"--annotations={release.annotations}", f"--images={release.images}"]
    (tmp_path / "here").mkdir()
    assert main([*defaults, f"--out={tmp_path}/here/out", "--workers=1", *args]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert re.search(message, error), error
    assert files(tmp_path) == before
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("option", ["annotations", "images", "out"])
def test_a_bucket_whose_package_is_not_installed_names_what_to_install(tmp_path, monkeypatch, capsys, option):
    def absent(protocol: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("data_pipeline.remote.fsspec.get_filesystem_class", absent)
    release = Release(tmp_path, [entry(0)])
    options = {
        "annotations": str(release.annotations),
        "images": str(release.images),
        "out": str(release.out),
    }
    options[option] = "gs://bucket/x"
    assert main(["--format=vision_flan", *(f"--{name}={value}" for name, value in options.items())]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--{option}=gs://bucket/x" in error and "pip install 'vflax[gcs]'" in error


def test_the_command_line_says_what_was_written_and_what_was_not(tmp_path, capsys):
    release = Release(tmp_path, [entry(0), entry(1, image="nowhere.png"), entry(2)])
    args = [f"--annotations={release.annotations}", f"--images={release.images}", f"--out={release.out}"]
    assert main(["--format=vision_flan", *args]) == 0
    out = capsys.readouterr().out
    assert "2 samples of 1 tasks in split train" in out
    assert "1 of 3 samples left out" in out
    assert "image_missing: s1 nowhere.png" in out


@pytest.mark.parametrize("option", ["annotations", "images"])
def test_a_name_that_is_not_utf_8_is_refused_in_words_that_can_be_printed(tmp_path, capsys, option):
    release = Release(tmp_path / "in", [entry(0)])
    odd = os.fsdecode(os.fsencode(tmp_path / "a") + b"\xff.zip")
    with zipfile.ZipFile(odd, "w"):
        pass
    given = {"annotations": release.annotations, "images": release.images} | {option: odd}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    assert main([*arguments, f"--out={release.out}", "--format=vision_flan"]) == 1
    error = capsys.readouterr().err
    error.encode()
    assert f"--{option}=" in error and "the name is not UTF-8; rename it" in error


def test_text_alone_needs_no_image_folder(tmp_path):
    release = Release(tmp_path, [entry(0, image=None), entry(1)])
    report = convert("vision_flan", release.annotations, None, release.out, workers=1, show_progress=False)
    assert list(release.read()) == ["s0"]
    [problem] = report["quarantine"]
    assert problem["reason"] == "image_missing" and "--images" in problem["detail"]
    assert report["images"] == []


def zipped(release: Release, name: str, files: dict[str, bytes]) -> str:
    path = release.annotations.with_name(name)
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr("images/" + file, data)
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_archives_give_the_same_samples_as_the_unpacked_folder(tmp_path, workers):
    release = Release(tmp_path, [entry(i) for i in range(6)])
    contents = {f"img{i}.png": png(i, (500, 300)) for i in range(6)}
    for name, data in contents.items():
        (release.images / name).write_bytes(data)
    release.convert(shard_size_mb=1)
    one, two = list(contents)[:3], list(contents)[3:]
    shards = [
        zipped(release, "shard_01", {name: contents[name] for name in one}),
        zipped(release, "shard_02", {name: contents[name] for name in two} | {one[0]: png(99)}),
    ]
    report = convert(
        "vision_flan", release.annotations, ",".join(shards), tmp_path / "zipped",
        workers=workers, shard_size_mb=1, show_progress=False,
    )  # fmt: skip
    assert report["findings"] == {"in_two_archives": 1}
    assert [source["entries"] for source in report["images"]] == [3, 4]
    unpacked, zipped_ = files(release.out), files(tmp_path / "zipped")
    differing = {name for name in unpacked if unpacked[name] != zipped_[name]}
    assert differing == {"manifest.json", "findings/train.jsonl"}


def test_an_id_made_for_a_repeated_one_is_never_one_that_is_taken(tmp_path):
    ids = ["a", "a", "a#2", "b#2", "b", "b"]
    release = Release(tmp_path, [entry(i, id=name) for i, name in enumerate(ids)])
    release.convert(format="llava")
    assert list(release.read()) == ["a", "a#2", "a#2#2", "b#2", "b", "b#3"]


def test_a_shard_of_text_alone_ends_after_so_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.spool.MAX_SHARD_ROWS", 3)
    release = Release(tmp_path, [entry(i, image=None) for i in range(7)])
    release.convert()
    assert list(release.read()) == [f"s{i}" for i in range(7)]
    assert len(list(release.out.glob("*.array_record-*"))) == 3


def test_of_many_samples_left_out_the_report_shows_the_first_and_the_file_holds_all(tmp_path):
    release = Release(tmp_path, [entry(i, **({} if i == 0 else {"image": "nowhere.png"})) for i in range(30)])
    report = release.convert()
    assert [problem["number"] for problem in report["quarantine"]] == list(range(1, 21))
    lines = (release.out / report["quarantine_file"]).read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(1, 30))


def test_the_manifest_holds_what_was_asked_for_and_what_it_was_made_of(tmp_path):
    release = Release(tmp_path, [entry(0), entry(1)])
    release.convert(follow_links=True, shard_size_mb=7, workers=1)
    split = json.loads((release.out / "manifest.json").read_text())["splits"]["train"]
    assert split["options"] == {"follow_links": True, "shard_size_mb": 7}
    assert split["images"] == [{"path": "images", "kind": "folder"}]
    assert split["tool"]["vflax"] == vflax.__version__
    assert str(tmp_path) not in (release.out / "manifest.json").read_text()


@pytest.mark.real_data
def test_real_samples_are_kept_byte_for_byte_and_exactly_the_undecodable_ones_are_named(
    shared_data, tmp_path
):
    """One more real photograph is cut in half, so that there is a truncated one whatever the folder holds."""
    folder = shared_data / "vision-flan-samples"
    entries = json.loads((folder / "annotation.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for item in entries:
        os.symlink(folder / "images" / item["image"], images / item["image"])
    victim = next(item for item in entries if item["image"].endswith(".jpg"))
    data = (images / victim["image"]).read_bytes()
    (images / victim["image"]).unlink()
    (images / victim["image"]).write_bytes(data[: len(data) // 2])

    damaged = set()
    for item in entries:
        try:
            Image.open(images / item["image"]).load()
        except OSError:
            damaged.add(item["id"])
    assert victim["id"] in damaged

    report = convert(
        "vision_flan",
        folder / "annotation.json",
        images,
        tmp_path / "out",
        follow_links=True,
        show_progress=False,
    )
    assert report["read"] == 204
    assert report["written"] == 204 - len(damaged)
    assert {problem["id"] for problem in report["quarantine"]} == damaged
    assert set(report["reasons"]) == {"image_damaged"}
    by_id = {item["id"]: item for item in entries}
    for record in tfds.builder_from_directory(tmp_path / "out").as_data_source("train"):
        item = by_id[record["id"].decode()]
        assert record["images"] == [(images / item["image"]).read_bytes()]
        assert record["task"].decode() == item["task_name"]
        assert json.loads(record["conversations"]) == item["conversations"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_the_image_folder_is_followed_only_when_asked_for(tmp_path, kind):
    image = "img0.png" if kind == "file" else "link/real.png"
    release = Release(tmp_path, [entry(0, image=image), entry(1)])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/real.png").write_bytes(png(5))
    (release.images / "img0.png").unlink()
    if kind == "file":
        os.symlink(tmp_path / "elsewhere/real.png", release.images / image)
    else:
        os.symlink(tmp_path / "elsewhere", release.images / "link")
    [problem] = release.convert()["quarantine"]
    assert (problem["reason"], problem["file"]) == ("path_outside", image)
    assert "--follow_links" in problem["detail"]
    release.convert(follow_links=True)
    assert release.read()["s0"]["images"] == [png(5)]


def test_a_link_that_stays_in_the_image_folder_is_followed(tmp_path):
    release = Release(tmp_path, [entry(0, image="alias.png"), entry(1)])
    os.symlink("img1.png", release.images / "alias.png")
    release.convert()
    assert release.read()["s0"]["images"] == [png(1)]
