"""data_pipeline/image_store.py and archives.py: folders, zips and tars are read alike, by the same names."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from data_pipeline import archives, image_store
from data_pipeline.archives import Entry
from data_pipeline.image_store import ImageStore, Missing
from vflax.errors import UserError
from vflax.folders import NotWritten
from vflax.images import ImageError

MEMBERS = {
    "a.jpg": b"first " * 200,
    "sub/b.png": bytes(range(256)) * 9,
    "sub/ü 1.png": b"odd name",
    "empty.png": b"",
}


def write_zip(
    path: Path, members: dict[str, bytes], top: str = "", method: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(top + name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes], top: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def open_store(images: object, tmp_path: Path, **kw: bool) -> ImageStore:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return ImageStore(str(images), scratch, **kw)


def read(store: ImageStore, name: str) -> bytes:
    [entry] = store.find([name])
    assert isinstance(entry, Entry), entry
    return store.reader.read(entry)


WRITERS = {
    "folder": lambda path: write_folder(path, MEMBERS),
    "stored zip": lambda path: write_zip(path, MEMBERS, method=zipfile.ZIP_STORED),
    "deflated zip": lambda path: write_zip(path, MEMBERS),
    "zip with a top folder": lambda path: write_zip(path, MEMBERS, "images_191task_1k/"),
    "zip with names that begin with ./": lambda path: write_zip(path, MEMBERS, "./"),
    "tar": lambda path: write_tar(path, MEMBERS),
    "tar with a top folder": lambda path: write_tar(path, MEMBERS, "images/"),
    "tar of names that begin with ./": lambda path: write_tar(path, MEMBERS, "./"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_image_is_found_by_its_name_and_comes_back_byte_for_byte(tmp_path, kind):
    store = open_store(WRITERS[kind](tmp_path / "shard_01"), tmp_path)
    assert {name: read(store, name) for name in MEMBERS} == MEMBERS
    assert {name: read(store, f"./{name}") for name in MEMBERS} == MEMBERS
    assert [type(found) for found in store.find(["nowhere.jpg", "sub"])] == [Missing, Missing]
    assert {found.reason for found in store.find(["nowhere.jpg", "sub"])} == {"image_missing"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_reader_goes_to_another_process_and_reads_the_same(tmp_path, kind):
    store = open_store(WRITERS[kind](tmp_path / "shard_01"), tmp_path)
    assert read(store, "a.jpg") == MEMBERS["a.jpg"]  # it holds open files now
    reader = pickle.loads(pickle.dumps(store.reader))
    assert [reader.read(entry) for entry in store.find(list(MEMBERS))] == list(MEMBERS.values())


def test_the_full_name_in_an_archive_is_found_too(tmp_path):
    store = open_store(write_zip(tmp_path / "z", MEMBERS, "top/"), tmp_path)
    assert read(store, "top/sub/b.png") == MEMBERS["sub/b.png"]


def test_two_top_folders_are_none(tmp_path):
    archive = write_zip(tmp_path / "z", {"one/a.jpg": b"1", "two/a.jpg": b"2"})
    store = open_store(archive, tmp_path)
    assert [type(found) for found in store.find(["a.jpg", "one/a.jpg"])] == [Missing, Entry]


def test_what_macos_adds_to_a_zip_hides_no_top_folder(tmp_path):
    archive = write_zip(tmp_path / "z", {"top/a.jpg": b"1", "__MACOSX/top/._a.jpg": b"2"})
    assert read(open_store(archive, tmp_path), "a.jpg") == b"1"


def spell(tmp_path: Path, how: str) -> str:
    write_zip(tmp_path / "images/shard_01", {"a.jpg": b"1"}, "one/")
    write_tar(tmp_path / "images/shard_02", {"b.jpg": b"2"})
    return {
        "commas": f"{tmp_path}/images/shard_01,{tmp_path}/images/shard_02",
        "pattern": f"{tmp_path}/images/shard_*",
        "folder": f"{tmp_path}/images",
    }[how]


@pytest.mark.parametrize("how", ["commas", "pattern", "folder"])
def test_several_archives_without_suffixes_are_one_store(tmp_path, how):
    (tmp_path / "images").mkdir()
    images = spell(tmp_path, how)
    for name in (
        "vision_flan.json",
        "unzip.sh",
        "LICENSE",
        ".gitattributes",
    ):  # what lies beside the shards of the release
        (tmp_path / "images" / name).write_text("{}")
    if how == "pattern":
        assert "*" in images
    store = open_store(images, tmp_path)
    assert [place.kind for place in store.places] == ["zip", "tar"]
    assert (read(store, "a.jpg"), read(store, "b.jpg")) == (b"1", b"2")
    assert store.report() == [
        {"path": "shard_01", "kind": "zip", "entries": 1},
        {"path": "shard_02", "kind": "tar", "entries": 1},
    ]


def test_a_folder_that_also_holds_images_is_a_folder_of_images(tmp_path):
    write_folder(tmp_path / "images", {"a.jpg": b"1"})
    write_zip(tmp_path / "images/extra.zip", {"b.jpg": b"2"})
    assert [place.kind for place in open_store(tmp_path / "images", tmp_path).places] == ["folder"]


def test_a_folder_and_an_archive_together_are_looked_through_in_their_order(tmp_path):
    write_folder(tmp_path / "f", {"a.jpg": b"folder", "c.jpg": b"only here"})
    write_zip(tmp_path / "z", {"a.jpg": b"zip", "b.jpg": b"only there"})
    one = open_store(f"{tmp_path}/f,{tmp_path}/z", tmp_path)
    assert [read(one, name) for name in ("a.jpg", "b.jpg", "c.jpg")] == [
        b"folder",
        b"only there",
        b"only here",
    ]
    two = open_store(f"{tmp_path}/z,{tmp_path}/f", tmp_path)
    assert [read(two, name) for name in ("a.jpg", "b.jpg", "c.jpg")] == [b"zip", b"only there", b"only here"]


@pytest.mark.parametrize("top", ["", "top/"])
@pytest.mark.parametrize("second", ["zip", "tar"])
def test_of_two_archives_the_first_counts_and_other_bytes_in_the_second_are_told(tmp_path, second, top):
    write_zip(tmp_path / "one", {"same.jpg": b"equal", "a.jpg": b"12345"}, top)
    write = write_zip if second == "zip" else write_tar
    write(tmp_path / "two", {"same.jpg": b"equal", "a.jpg": b"54321"}, top and "other/")
    store = open_store(f"{tmp_path}/one,{tmp_path}/two", tmp_path)
    [same, a] = store.find(["same.jpg", "a.jpg"])
    assert (same.other, a.other) == ("", "two")
    assert store.reader.read(a) == b"12345"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_in_one_archive_the_last_member_of_a_name_counts_as_when_it_is_unpacked(tmp_path, write):
    path = write(tmp_path / "z", {"a.jpg": b"old"})
    if write is write_zip:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a.jpg", b"new")
    else:
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo("a.jpg")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"new"))
    store = open_store(path, tmp_path)
    assert read(store, "a.jpg") == b"new"
    assert store.find(["a.jpg"])[0].other == ""


@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
@pytest.mark.parametrize(
    "name", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "a\\..\\b.jpg", "a\0.jpg"]
)
def test_a_name_that_leads_out_is_refused_even_where_an_archive_has_it(tmp_path, write, name):
    members = {"a.jpg": b"1"} if write is write_folder or "\0" in name else {"a.jpg": b"1", name: b"2"}
    store = open_store(write(tmp_path / "images", members), tmp_path)
    [found] = store.find([name])
    assert found.reason == "path_outside"
    # Nor does a member of such a name hide the others.
    assert read(store, "a.jpg") == b"1"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_is_not_read_is_named(tmp_path, method):
    [found] = open_store(write_zip(tmp_path / "z", {"a.jpg": b"1"}, method=method), tmp_path).find(["a.jpg"])
    assert found.reason == "image_damaged" and f"method {method}" in found.detail


def test_an_encrypted_member_is_named(tmp_path):
    path = write_zip(tmp_path / "z", {"a.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # bit 0 of the flags in the directory
    path.write_bytes(data)
    [found] = open_store(path, tmp_path).find(["a.jpg"])
    assert (found.reason, found.detail) == ("image_damaged", "encrypted in its zip archive")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_changed_byte_in_a_zip_is_damage(tmp_path, method):
    path = write_zip(tmp_path / "z", {"a.jpg": os.urandom(1000)}, method=method)
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    store = open_store(path, tmp_path)
    with pytest.raises(ImageError, match="zip archive is damaged"):
        read(store, "a.jpg")


def test_a_member_that_unpacks_to_more_than_it_says_is_damage_and_is_not_unpacked(tmp_path):
    path = write_zip(tmp_path / "z", {"a.jpg": bytes(50 << 20)})
    data = bytearray(path.read_bytes())
    size = data.rindex(b"PK\x01\x02") + 24
    data[size : size + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    store = open_store(path, tmp_path)
    [entry] = store.find(["a.jpg"])
    assert entry.size == 1000
    with pytest.raises(ImageError, match="checksum"):
        store.reader.read(entry)


def test_a_zip_whose_directory_points_elsewhere_is_damage(tmp_path):
    store = open_store(write_zip(tmp_path / "z", {"a.jpg": b"1" * 99}), tmp_path)
    [entry] = store.find(["a.jpg"])
    with pytest.raises(ImageError, match="no member begins"):
        store.reader.read(entry._replace(offset=3))


def test_a_name_of_utf8_that_is_not_marked_as_such_is_read_as_utf8(tmp_path):
    path = write_zip(tmp_path / "z", {"X.jpg": b"1"})
    # As Info-ZIP writes it: the bytes of "ü" without the flag.
    path.write_bytes(path.read_bytes().replace(b"X.jpg", "ü.pg".encode()))
    assert read(open_store(path, tmp_path), "ü.pg") == b"1"


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "MAX_FILE_BYTES", 10)
    store = open_store(write_folder(tmp_path / "f", {"a.jpg": b"1" * 11, "b.jpg": b"1" * 10}), tmp_path)
    [large, small] = store.find(["a.jpg", "b.jpg"])
    assert large.reason == "image_damaged" and "11 bytes" in large.detail
    assert isinstance(small, Entry)


def test_a_pipe_is_no_image(tmp_path):
    folder = write_folder(tmp_path / "f", {"a.jpg": b"1"})
    os.mkfifo(folder / "pipe.jpg")
    assert open_store(folder, tmp_path).find(["pipe.jpg"]) == [Missing("image_missing", "it is not a file")]


def test_without_images_every_image_is_missing_with_a_hint(tmp_path):
    [found] = ImageStore(None, tmp_path).find(["a.jpg"])
    assert found.reason == "image_missing" and "--images" in found.detail


def test_an_index_is_made_again_only_for_changed_archives(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "z", {"a.jpg": b"1"})
    open_store(archive, tmp_path).close()
    made = []
    members = archives._zip_members
    monkeypatch.setattr(archives, "_zip_members", lambda *args: made.append(1) or members(*args))
    assert read(open_store(archive, tmp_path), "a.jpg") == b"1"
    assert not made
    write_zip(archive, {"a.jpg": b"22"})
    assert read(open_store(archive, tmp_path), "a.jpg") == b"22"
    assert made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x" * 1000, mtime=0), r"compressed as a whole \(gzip\).*[Dd]ecompress it first"),
        (b"\xfd7zXZ\0" + bytes(600), r"compressed as a whole \(xz\)"),
        (b"what is this?", r"neither a folder nor a zip or tar"),
        (b"PK\x03\x04" + bytes(600), r"not a whole zip archive .*interrupted download"),
        (None, r"there is no such folder or archive"),
    ],
)
def test_what_is_no_archive_is_refused_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "images.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_store(path, tmp_path)


def test_a_cut_off_archive_is_refused(tmp_path):
    for write in (write_zip, write_tar):
        path = write(tmp_path / "z", {f"{i}.jpg": os.urandom(5000) for i in range(5)})
        path.write_bytes(path.read_bytes()[:14000])
        with pytest.raises(UserError, match=r"not a whole (zip|tar) archive"):
            open_store(path, tmp_path)


def test_an_empty_folder_is_refused_as_a_disk_that_is_not_mounted(tmp_path):
    (tmp_path / "mount").mkdir()
    with pytest.raises(UserError, match=r"mount: an empty folder; is the disk mounted\?"):
        open_store(tmp_path / "mount", tmp_path)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing matches"):
        open_store(tmp_path / "*.tar", tmp_path)


def test_a_comma_in_the_name_of_a_folder_means_itself(tmp_path):
    store = open_store(write_folder(tmp_path / "a,b*", {"a.jpg": b"1"}), tmp_path)
    assert read(store, "a.jpg") == b"1"


def test_more_archives_than_may_be_open_at_once_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "_OPEN_ARCHIVES", 2)
    (tmp_path / "shards").mkdir()
    for i in range(5):
        write_zip(tmp_path / f"shards/{i}", {f"{i}.jpg": bytes([i])})
    store = open_store(tmp_path / "shards", tmp_path)
    assert [read(store, f"{i % 5}.jpg") for i in range(12)] == [bytes([i % 5]) for i in range(12)]


def test_the_checksum_of_a_zip_is_what_the_entry_bears(tmp_path):
    """The digest of a job covers it: a changed image is converted again."""
    [entry] = open_store(write_zip(tmp_path / "z", {"a.jpg": b"123"}), tmp_path).find(["a.jpg"])
    assert (entry.stamp, entry.size) == (zlib.crc32(b"123"), 3)


# ---------------------------------------------------------------------------------------------------------
# On a bucket


class Bucket(LocalFileSystem):
    """A folder, where fsspec looks for a bucket."""

    root = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = os.fspath(path)
        return cls.root + path.removeprefix("s3:/") if path.startswith("s3://") else path


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket."""
    monkeypatch.setattr(Bucket, "root", os.fspath(tmp_path / "buckets"))
    monkeypatch.setitem(_registry, "s3", Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield "s3://b"
    backend.fsspec_backend._get_filesystem.cache_clear()


def put(url: str, data: bytes) -> None:
    path = Path(Bucket._strip_protocol(url))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_a_folder_on_a_bucket_and_an_archive_together_are_looked_through_in_their_order(tmp_path, bucket):
    put(f"{bucket}/coco/a.jpg", b"folder")
    put(f"{bucket}/coco/c.jpg", b"only here")
    write_zip(tmp_path / "vg.zip", {"a.jpg": b"zip", "b.jpg": b"only there"})
    store = open_store(f"{bucket}/coco,{tmp_path}/vg.zip", tmp_path)
    found = [read(store, name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    assert found == [b"folder", b"only there", b"only here"]
    assert store.find(["../a.jpg", "d.jpg"])[0].reason == "path_outside"
    store.close()


def test_two_archives_of_one_name_on_a_bucket_are_two(tmp_path, bucket):
    for folder in ("train", "val"):
        path = write_zip(tmp_path / f"{folder}.zip", {"a.jpg": folder.encode(), f"{folder}.jpg": b"1"})
        put(f"{bucket}/{folder}/images.zip", path.read_bytes())
    store = open_store(f"{bucket}/train/images.zip,{bucket}/val/images.zip", tmp_path)
    assert [place.name for place in store.places] == ["images.zip", "images.zip"]
    assert [read(store, name) for name in ("a.jpg", "train.jpg", "val.jpg")] == [b"train", b"1", b"1"]


def test_an_archive_that_was_put_on_the_bucket_anew_is_fetched_anew(tmp_path, bucket):
    url = f"{bucket}/images.zip"
    put(url, write_zip(tmp_path / "z", {"a.jpg": b"one"}).read_bytes())
    open_store(url, tmp_path).close()
    [copy] = (tmp_path / "scratch/archives").iterdir()
    put(url, write_zip(tmp_path / "z", {"a.jpg": b"two"}).read_bytes())
    os.utime(Bucket._strip_protocol(url), (2e9, 2e9))
    assert copy.stat().st_size == (tmp_path / "z").stat().st_size
    assert read(open_store(url, tmp_path), "a.jpg") == b"two"


def test_a_bucket_that_does_not_answer_is_said_in_words_of_ours(tmp_path, monkeypatch):
    def silent(*args: object) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(image_store, "_paths", silent)
    with pytest.raises(NotWritten, match=r"s3://b: the bucket does not answer \(no credentials\)"):
        open_store("s3://b", tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Damage, and what is no regular file


def damaged_tar(path: Path, how: str) -> Path:
    data = write_tar(path, {f"{i}.jpg": bytes(900) for i in range(5)}).read_bytes()
    second = 2 * 1536  # a header and two blocks each
    path.write_bytes(
        {
            "a byte of a header": data[: second + 10] + b"?" + data[second + 11 :],
            "cut between members": data[:second],
            "cut in a header": data[: second + 300],
            "a foreign block": data[:second] + b"?" * 512 + data[second + 512 :],
        }[how]
    )
    return path


@pytest.mark.parametrize(
    "how", ["a byte of a header", "cut between members", "cut in a header", "a foreign block"]
)
def test_a_tar_whose_headers_end_too_early_is_refused(tmp_path, how):
    with pytest.raises(UserError, match=r"not a whole tar archive .*at byte 3,072"):
        open_store(damaged_tar(tmp_path / "t", how), tmp_path)


def test_a_tar_without_its_end_mark_is_whole_when_the_command_of_the_error_was_run(tmp_path):
    path = damaged_tar(tmp_path / "t", "cut between members")
    path.write_bytes(path.read_bytes() + bytes(1024))
    assert open_store(path, tmp_path).report() == [{"path": "t", "kind": "tar", "entries": 2}]


def test_a_hard_link_in_a_tar_is_the_file_that_it_names(tmp_path):
    files = write_folder(tmp_path / "f", {"a.jpg": b"one", "b.jpg": b"two"})
    os.link(files / "a.jpg", files / "c.jpg")
    os.symlink("b.jpg", files / "d.jpg")
    with tarfile.open(tmp_path / "t", "w") as archive:
        for name in "abcd":
            archive.add(files / f"{name}.jpg", f"top/{name}.jpg")
    store = open_store(tmp_path / "t", tmp_path)
    assert [read(store, f"{name}.jpg") for name in "abc"] == [b"one", b"two", b"one"]
    assert store.report() == [{"path": "t", "kind": "tar", "entries": 3, "skipped": 1}]
    [missing] = store.find(["d.jpg"])
    assert "1 members were passed over (symbolic links" in missing.detail


def test_a_hard_link_is_read_where_an_earlier_archive_has_its_target_too(tmp_path):
    write_zip(tmp_path / "z", {"a.jpg": b"zip"})
    with tarfile.open(tmp_path / "t", "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"tar"))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    store = open_store(f"{tmp_path}/z,{tmp_path}/t", tmp_path)
    assert [read(store, name) for name in ("a.jpg", "b.jpg")] == [b"zip", b"tar"]


def test_links_and_backslashes_in_a_zip_are_passed_over_and_counted(tmp_path):
    path = write_zip(tmp_path / "z", {"a.jpg": b"one"})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("b.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "a.jpg")
        archive.writestr("sub\\c.jpg", b"two")
    store = open_store(path, tmp_path)
    assert store.report() == [{"path": "z", "kind": "zip", "entries": 1, "skipped": 2}]
    assert "2 members were passed over" in store.find(["b.jpg"])[0].detail


@pytest.mark.parametrize("stamp", ["nan", "1e30"])
def test_a_mad_date_in_a_tar_is_no_date(tmp_path, stamp):
    with tarfile.open(tmp_path / "t", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"mtime": stamp}
        archive.addfile(info, io.BytesIO())
    assert open_store(tmp_path / "t", tmp_path).find(["a.jpg"])[0].stamp == 0


def test_an_archive_that_has_the_name_below_its_top_folder_comes_before_a_later_one_that_has_it_in_full(
    tmp_path,
):
    write_zip(tmp_path / "1", {"top/a.jpg": b"first"})
    write_zip(tmp_path / "2", {"a.jpg": b"second", "b.jpg": b""})
    store = open_store(f"{tmp_path}/1,{tmp_path}/2", tmp_path)
    assert read(store, "a.jpg") == b"first"
    assert store.find(["a.jpg"])[0].other == "2"


def test_an_index_of_another_version_is_made_anew(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "z", MEMBERS)
    open_store(path, tmp_path).close()
    added = []
    add = archives.Archives._add
    monkeypatch.setattr(archives.Archives, "_add", lambda *args: added.append(1) or add(*args))
    open_store(path, tmp_path).close()
    assert not added
    monkeypatch.setattr(archives, "__file__", os.fspath(path))
    open_store(path, tmp_path).close()
    assert added


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_image_that_is_there_under_another_suffix_is_missing_and_its_name_is_told(tmp_path, kind):
    """As some of OCR-VQA are."""
    write = {"folder": write_folder, "zip": write_zip}[kind]
    store = open_store(write(tmp_path / "images", {"ocr/a.gif": b"GIF", "ocr/b.jpg": b"JPEG"}), tmp_path)
    one, other = store.find(["ocr/a.jpg", "ocr/c.jpg"])
    assert one.reason == other.reason == "image_missing"
    assert one.detail.endswith("; but there is a.gif: rename it, or the entry's image")
    assert "but there is" not in other.detail


# ---------------------------------------------------------------------------------------------------------
# A disk that fails


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
def test_an_error_of_the_disk_makes_no_image_missing(tmp_path, monkeypatch, code):
    store = open_store(write_folder(tmp_path / "f", MEMBERS), tmp_path)

    def failing(path: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(image_store.os, "lstat", failing)
    with pytest.raises(NotWritten, match=r"a\.jpg: cannot be read .*The same command goes on"):
        store.find(["a.jpg"])


def test_an_archive_that_is_gone_when_it_is_read_makes_no_image_missing(tmp_path):
    path = write_zip(tmp_path / "z", MEMBERS)
    store = open_store(path, tmp_path)
    [entry] = store.find(["a.jpg"])
    path.unlink()
    with pytest.raises(NotWritten, match="cannot be opened any more"):
        store.reader.read(entry)
