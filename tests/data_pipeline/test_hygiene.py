"""data_pipeline/hygiene.py: what happens to which kind of damage; docs/data.md has the same table."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_pipeline import hygiene
from data_pipeline.image_store import Missing
from data_pipeline.records import Problem, RawSample
from tests.data_pipeline.test_convert import Release, entry, png
from vflax import images

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}]


def sample(conversations: object = TURNS, files: tuple[str, ...] = ("a.png",)) -> RawSample:
    return RawSample(3, "s3", "task", files, conversations)


def check(data: bytes) -> hygiene.Checked | Problem:
    return hygiene.check(sample(), [lambda: data], "release")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    values = np.random.default_rng(0).integers(0, 255, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode if mode == "CMYK" else None)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind: str, count: int) -> bytes:
    first, *others = [noise(20 + 0 * i, 20).rotate(90 * i) for i in range(count)]
    return encoded(first, kind, save_all=True, append_images=others)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(40, 30), "JPEG", exif=exif)


def bomb() -> bytes:
    data = encoded(noise(8, 8), "PNG")
    header = b"IHDR" + (30000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + PngImagePlugin.o32(PngImagePlugin._crc32(header)) + data[33:]


def palette(transparent: bool) -> bytes:
    image = noise(20, 20).convert("P")
    return encoded(image, "PNG", **({"transparency": image.getpixel((0, 0))} if transparent else {}))


LEFT_OUT = {
    "0 bytes": (b"", "image_empty"),
    "a web page": (b"<html>404 not found</html>", "image_unknown"),
    "a PDF": (b"%PDF-1.7 " + bytes(100), "image_unknown"),
    "a JPEG cut off": (encoded(noise(64, 64), "JPEG")[:-200], "image_damaged"),
    "a PNG cut off": (encoded(noise(64, 64), "PNG")[:-200], "image_damaged"),
    "a GIF cut off": (encoded(noise(64, 64), "GIF")[:-200], "image_damaged"),
    "a WebP cut off": (encoded(noise(64, 64), "WEBP")[:-200], "image_damaged"),
    "the head of a JPEG": (encoded(noise(64, 64), "JPEG")[:30], "image_damaged"),
    "the head of a PNG": (encoded(noise(64, 64), "PNG")[:20], "image_damaged"),
    "the head of a GIF": (encoded(noise(64, 64), "GIF")[:8], "image_damaged"),
    "a bomb": (bomb(), "image_bomb"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_bad_image_leaves_its_sample_out_under_a_reason_of_its_kind(kind):
    data, reason = LEFT_OUT[kind]
    problem = check(data)
    assert isinstance(problem, Problem)
    assert (problem.number, problem.id, problem.task, problem.file) == (3, "s3", "task", "a.png")
    assert problem.reason == reason
    assert problem.detail and "\n" not in problem.detail


KEPT = {
    "a plain JPEG": (encoded(noise(40, 30), "JPEG"), []),
    "a grey JPEG": (encoded(noise(40, 30, "L"), "JPEG"), []),
    "a palette": (palette(False), []),
    "an animated GIF": (frames("GIF", 3), ["animated"]),
    "an animated PNG": (frames("PNG", 3), ["animated"]),
    "an animated WebP": (frames("WEBP", 3), ["animated"]),
    "a GIF of one frame": (frames("GIF", 1), []),
    "a photograph with its preview": (frames("MPO", 2), []),
    "a CMYK JPEG": (encoded(noise(40, 30, "CMYK"), "JPEG"), ["cmyk"]),
    "a PNG of 16 bits": (
        encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        ["sixteen_bit"],
    ),
    "a TIFF of floats": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), ["sixteen_bit"]),
    "an alpha channel in use": (encoded(noise(40, 30, "RGBA"), "PNG"), ["transparent"]),
    "grey with an alpha channel": (encoded(noise(40, 30, "LA"), "PNG"), ["transparent"]),
    "a transparent colour": (palette(True), ["transparent"]),
    "an alpha channel that hides nothing": (encoded(noise(40, 30).convert("RGBA"), "PNG"), []),
    "turned by EXIF": (rotated(6), ["exif_rotated"]),
    "upright by EXIF": (rotated(1), []),
    "a mad EXIF value": (rotated(77), []),
    "one pixel": (encoded(noise(1, 1), "PNG"), ["one_pixel"]),
    "a line": (encoded(noise(1, 5), "PNG"), ["one_pixel"]),
    "a strip of 20 to 1": (encoded(noise(100, 5), "PNG"), []),
    "a strip of over 20 to 1": (encoded(noise(5, 101), "PNG"), ["extreme_aspect"]),
}


@pytest.mark.parametrize("kind", KEPT)
def test_an_odd_image_is_kept_as_it_is_and_noted(kind):
    data, kinds = KEPT[kind]
    checked = check(data)
    assert isinstance(checked, hygiene.Checked)
    assert [(f.kind, f.file, f.number, f.id) for f in checked.findings] == [
        (kind, "a.png", 3, "s3") for kind in kinds
    ]
    assert checked.example["images"] == [data]
    # What training will see, and the hash of just that.
    seen = images.decode(data)
    assert checked.example["sizes"] == [seen.size]
    assert checked.hashes == [images.perceptual_hash(seen)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_seen(kind):
    first, second = Image.new("RGB", (20, 20), (250, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 250))
    data = encoded(first, kind, save_all=True, append_images=[second])
    checked = check(data)
    assert [finding.kind for finding in checked.findings] == ["animated"]
    red, _, blue = images.decode(data).getpixel((10, 10))
    assert red > 240 and blue < 10


def test_a_gif_whose_second_frame_is_cut_off_is_kept_for_its_first():
    data = frames("GIF", 2)
    checked = check(data[: len(data) - 300])
    assert isinstance(checked, hygiene.Checked)


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        (None, "broken_conversation"),
        ([], "broken_conversation"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "broken_conversation"),
        ([{"from": "human", "value": "a"}], "unanswered"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}], "empty_answer"),
        (
            [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": ""},
                {"from": "human", "value": "b"},
                {"from": "gpt", "value": "never reached"},
            ],
            "empty_answer",
        ),
    ],
)
def test_a_conversation_that_teaches_nothing_is_left_out(conversations, reason):
    problem = hygiene.check(sample(conversations), [lambda: png(0)], "release")
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.file) == (reason, "")


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("conversations", "kind"),
    [
        (turns("<image>a", "b", "c", ""), "empty_answer"),
        (turns("<image>a", "b", "", "d"), "empty_question"),
        (turns("<image>a", "b", "c"), "unanswered"),
        (turns("<image><image>a", "b"), "extra_image_marker"),
        (turns("<image>a", "b <image>"), "marker_in_answer"),
        (turns("a", "b"), "image_without_marker"),
        ([{"from": "system", "value": "Be brief."}, *TURNS], "first_turn_dropped"),
        (turns("<image>a\ud83d", "b"), "lone_surrogate"),
    ],
)
def test_a_conversation_that_is_odd_is_kept_as_it_is_and_noted(conversations, kind):
    checked = hygiene.check(sample(conversations), [lambda: png(0)], "release")
    assert isinstance(checked, hygiene.Checked)
    assert [(finding.kind, finding.file) for finding in checked.findings] == [(kind, "")]
    assert checked.example["conversations"] == conversations


def test_a_marker_in_a_sample_without_images_has_a_name_of_its_own():
    checked = hygiene.check(sample(files=()), [], "release")
    assert isinstance(checked, hygiene.Checked)
    assert [finding.kind for finding in checked.findings] == ["marker_without_image"]


def test_a_missing_image_keeps_the_reason_that_the_store_gave():
    problem = hygiene.check(sample(), [Missing("path_outside", "a link")], "release")
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.detail, problem.file) == ("path_outside", "a link", "a.png")


def test_an_image_that_is_gone_when_it_is_read_is_missing():
    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    problem = hygiene.check(sample(), [gone], "release")
    assert isinstance(problem, Problem)
    assert problem.reason == "image_missing"


def test_an_error_of_pillow_after_decoding_is_damage_and_not_a_disk_that_fails(monkeypatch):
    def odd(image: Image.Image) -> int:
        raise OSError("unrecognized data stream contents")

    monkeypatch.setattr(images, "perceptual_hash", odd)
    problem = check(palette(False))
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.detail) == ("image_damaged", "unrecognized data stream contents")


def test_transparency_that_pillow_cannot_read_is_damage_and_ends_no_run(monkeypatch):
    def odd(image: Image.Image) -> float:
        raise ValueError("conversion not supported")

    monkeypatch.setattr(hygiene, "_lowest_alpha", odd)
    problem = check(palette(True))
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.detail) == ("image_damaged", "transparency: conversion not supported")


def test_findings_are_counted_and_listed_for_samples_that_are_kept_only(tmp_path: Path):
    entries = [
        entry(0),
        entry(1),
        entry(2, image=["img2.png", "nowhere.png"]),
        entry(3, conversations=turns("a", "b")),
    ]
    release = Release(tmp_path, entries)
    for i in (1, 2):
        (release.images / f"img{i}.png").write_bytes(rotated(6))
    report = release.convert()
    assert report["findings"] == {"exif_rotated": 1, "image_without_marker": 1}
    lines = [json.loads(line) for line in (release.out / "findings/train.jsonl").read_text().splitlines()]
    assert [(line["id"], line["kind"], line["file"]) for line in lines] == [
        ("s1", "exif_rotated", "img1.png"),
        ("s3", "image_without_marker", ""),
    ]
    lines = [json.loads(line) for line in (release.out / "quarantine/train.jsonl").read_text().splitlines()]
    assert lines == report["quarantine"]
    assert [(line["id"], line["reason"], line["number"]) for line in lines] == [("s2", "image_missing", 2)]


def test_every_finding_and_reason_stands_in_the_documentation():
    """Reasons are named in the code as texts beside Problem(...) and Missing(...)."""
    root = Path(__file__).parents[2]
    text = (root / "docs/data.md").read_text("utf-8")
    sources = [root / "data_pipeline" / f"{name}.py" for name in ("hygiene", "spool", "shard", "image_store")]
    sources += (root / "data_pipeline/releases").glob("*.py")
    code = "\n".join(path.read_text("utf-8") for path in sources)
    told = re.findall(r'"((?:image|path|broken|duplicate|repeated|in_two|not_a|empty)_\w+)"', code)
    known = {"broken_record", "not_a_caption", "path_outside", "image_missing", "duplicate_id", "repeated_id"}
    assert known <= set(told)
    reasons = {reason for _, reason in LEFT_OUT.values()} | set(told) - {"image_folder"}
    for name in {*hygiene.IMAGE_FINDINGS, *hygiene.CONVERSATION_FINDINGS, *reasons}:
        assert f"`{name}`" in text, name
