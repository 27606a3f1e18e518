"""TextOCR by vflax's own protocol: which words and boxes are asked about, and how answers are counted."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vflax.errors import UserError
from vflax.evaluate import textocr

# Image, its boxes' texts: "." is illegible, "a" and "!" are no words.
IMAGES = {"aa01": ["STOP", "Coca-Cola", ".", "a"], "bb02": ["stop,Stop"], "cc03": [".", "!"]}
BOX = [4.2, 10.0, 20.5, 6.0]  # x, y, width, height


def write_data(
    folder: Path, images: dict[str, list[str]] = IMAGES, name: str = "TextOCR_0.1_val.json"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {"imgs": {}, "anns": {}, "imgToAnns": {}, "info": {"version": "0.1"}}
    for image, texts in images.items():
        whole["imgs"][image] = {
            "id": image,
            "width": 64,
            "height": 32,
            "set": "val",
            "file_name": f"train/{image}.jpg",
        }
        whole["imgToAnns"][image] = [f"{image}_{n}" for n in range(1, len(texts) + 1)]
        for id, text in zip(whole["imgToAnns"][image], texts, strict=True):
            whole["anns"][id] = {
                "id": id, "image_id": image, "bbox": BOX, "utf8_string": text, "points": [0.0] * 8, "area": 123.0
            }  # fmt: skip
    (folder / name).write_text(json.dumps(whole))
    return folder


def write_images(folder: Path) -> Path:
    """Black, and white within the box."""
    folder.mkdir(parents=True)
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[10:16, 4:25] = 255
    for image in IMAGES:
        Image.fromarray(pixels).save(folder / f"{image}.jpg", quality=95)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chosen(image: str, boxes: list[int]) -> str:
    return min((f"{image}_{n}" for n in boxes), key=lambda id: hashlib.sha256(id.encode()).hexdigest())


def own_rows(said: dict[str, str | None]) -> list[dict[str, Any]]:
    return [{"key": key, "prediction": text} for key, text in said.items()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("STOP", ["stop"]),
        ("Coca-Cola", ["cocacola"]),
        ("U.S.A. don't", ["usa", "dont"]),
        ("stop,Stop; 10:30", ["stop", "stop", "10", "30"]),
        ('"EXIT" (open)', ["exit", "open"]),
        ("a 1 I", []),
        ("Straße", ["strasse"]),
        (" .\n", []),
    ],
)
def test_words_are_casefolded_letters_and_digits(text: str, words: list[str]) -> None:
    assert textocr.words(text) == words


@settings(deadline=None)
@given(st.text())
def test_words_of_words_are_the_same(text: str) -> None:
    found = textocr.words(text)
    assert textocr.words(" ".join(found)) == found


def test_images_and_boxes_with_words_are_asked_about(tmp_path: Path) -> None:
    questions = textocr.load(write_data(tmp_path), custom=True)
    first, second = chosen("aa01", [1, 2]), chosen("bb02", [1])
    answer = "stop" if first == "aa01_1" else "cocacola"
    assert [(q.key, q.answer) for q in questions] == [
        ("words/aa01", "stop cocacola"), ("words/bb02", "stop stop"),
        (f"crop/{first}", answer), (f"crop/{second}", "stop stop"),
    ]  # fmt: skip
    assert [q.unit for q in questions] == ["aa01", "bb02"] * 2
    assert not any(q.pictures for q in questions)
    assert questions == textocr.load(tmp_path / "TextOCR_0.1_val.json", custom=True)


def test_the_box_that_is_asked_about_does_not_hang_on_the_order_of_the_file(tmp_path: Path) -> None:
    data = write_data(tmp_path, {"aa01": [f"word{n}" for n in range(9)]})
    straight = textocr.load(data, custom=True)
    path = data / "TextOCR_0.1_val.json"
    whole = json.loads(path.read_text())
    whole["anns"] = dict(reversed(whole["anns"].items()))
    path.write_text(json.dumps(whole))
    assert textocr.load(data, custom=True) == straight


@pytest.mark.parametrize("folder", textocr._FOLDERS)
def test_images_are_found_where_people_have_them(folder: str, tmp_path: Path) -> None:
    write_images(write_data(tmp_path) / folder)
    questions = textocr.load(tmp_path, custom=True)
    assert questions[0].pictures[0].name == "aa01.jpg"
    assert questions[0].pictures[0].read() == (tmp_path / folder / "aa01.jpg").read_bytes()


def test_a_crop_is_the_box_and_a_tenth_of_its_longer_side(tmp_path: Path) -> None:
    write_images(write_data(tmp_path) / "images")
    read = textocr.load(tmp_path, custom=True)[2].pictures[0].read
    crop = np.asarray(Image.open(io.BytesIO(read())))
    # The margin is 2.05: from 2.15 to 26.75 and from 7.95 to 18.05, in whole pixels outwards.
    assert crop.shape == (19 - 7, 27 - 2, 3)
    assert (crop[4:8, 4:20] > 200).all()
    assert (crop[:1] < 60).all()


def test_a_crop_ends_with_the_image(tmp_path: Path) -> None:
    path = write_images(tmp_path / "images") / "aa01.jpg"
    box = textocr._Box("aa01_1", "aa01", ("stop",), (50, 30), (100, 100), (64, 32))
    assert Image.open(io.BytesIO(textocr._crop(path, box))).size == (64 - 40, 32 - 20)


def test_a_box_is_scaled_with_an_image_of_another_size(tmp_path: Path) -> None:
    path = write_images(tmp_path / "images") / "aa01.jpg"
    Image.open(path).resize((128, 64)).save(path)
    box = textocr._Box("aa01_1", "aa01", ("stop",), (5, 10), (20, 5), (64, 32))
    # Twice: from 10 to 50 and from 20 to 30, and 4 on all sides.
    assert Image.open(io.BytesIO(textocr._crop(path, box))).size == (54 - 6, 34 - 16)


def test_an_image_that_is_missing_is_named(tmp_path: Path) -> None:
    (write_images(write_data(tmp_path) / "images") / "bb02.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are not there, the first: bb02\.jpg"):
        textocr.load(tmp_path, custom=True)


def test_prompts_ask_for_words(tmp_path: Path) -> None:
    words, _, crop, _ = textocr.load(write_data(tmp_path), custom=True)
    assert textocr.prompt(words, "llava") == "What words are written in the image?"
    assert textocr.prompt(crop, "plain") == "What word is written in the image?"
    assert textocr.prompt(crop, "llava").endswith("?\nAnswer the question using a single word or phrase.")


@pytest.mark.parametrize("format", ["vflax", "llava"])
def test_words_are_counted_as_multisets_over_all_images(format: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    said = {"aa01": "It says Stop and STOP.", "bb02": "stop, stop, go"}
    if format == "vflax":
        rows = own_rows({f"words/{image}": text for image, text in said.items()})
    else:
        rows = [{"question_id": image, "text": text, "prompt": "?"} for image, text in said.items()]
        rows.append({"question_id": f"crop/{chosen('aa01', [1, 2])}", "text": None})
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert textocr.recognise(path) == format
    found = textocr.score(path, format, data, "vflax-words", custom=True)
    # There are 2 + 2 words; read were it, says, stop, and, stop; stop, stop, go; right 1 + 2.
    assert found.metrics == {
        "f1": pytest.approx(100 * 6 / 12), "recall": pytest.approx(75), "precision": pytest.approx(100 * 3 / 8)
    }  # fmt: skip
    assert found.score == found.metrics["f1"]
    assert [v.score for v in found.verdicts] == [pytest.approx(2 / 7), pytest.approx(4 / 5)]
    assert found.verdicts[0].why == "1 of 2 words, and 4 that are not there"
    assert "no official" in found.manifest["protocol"]


def test_crops_are_exact_or_contain_the_word(tmp_path: Path) -> None:
    data = write_data(
        tmp_path / "data", {"aa01": ["STOP"], "bb02": ["stop"], "cc03": ["U.S."], "dd04": ["10:30"]}
    )
    said = {
        "crop/aa01_1": "Stop.", "crop/bb02_1": "The word is stop", "crop/cc03_1": "USA", "crop/dd04_1": "10.30"
    }  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", own_rows(said))
    found = textocr.score(path, "vflax", data, "vflax-crop", custom=True)
    assert found.metrics == {"exact": 25, "contains": 50}
    assert [v.why for v in found.verdicts] == [
        "the word",
        "the word and others",
        "another word",
        "another word",
    ]


def test_what_is_missing_or_has_no_word_is_wrong_and_counted(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", {"aa01": ["one"], "bb02": ["two"], "cc03": ["six"], "dd04": ["ten"]})
    said = {"words/aa01": "one", "words/bb02": "...", "words/cc03": None}
    path = write_lines(tmp_path / "a.jsonl", own_rows(said))
    found = textocr.score(path, "vflax", data, "vflax-words", custom=True)
    assert (found.n, found.missing, found.unparsed) == (4, 2, 1)
    assert found.metrics == {"f1": pytest.approx(40), "recall": 25, "precision": 100}
    assert [v.why for v in found.verdicts[1:]] == ["no word", "no prediction", "no prediction"]


def test_nothing_read_is_no_division_by_zero(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", own_rows({"words/aa01": ""}))
    found = textocr.score(path, "vflax", write_data(tmp_path / "data"), "vflax-words", custom=True)
    assert found.metrics == {"f1": 0, "recall": 0, "precision": 0}


def test_limit_takes_the_first_images_of_each_kind(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    path = write_lines(tmp_path / "a.jsonl", own_rows({"words/aa01": "stop cocacola", "words/bb02": "x"}))
    found = textocr.score(path, "vflax", data, "vflax-words", custom=True, limit=1)
    assert (found.n, found.score) == (1, 100)


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    images = {f"i{n}": [f"word{n}"] for n in range(20)}
    data = write_data(tmp_path / "data", images)
    rows = own_rows({f"words/i{n}": f"word{n} more" if n % 3 else "none" for n in range(20)})
    straight = textocr.score(
        write_lines(tmp_path / "a.jsonl", rows), "vflax", data, "vflax-words", custom=True
    )
    random.Random(0).shuffle(rows)
    shuffled = textocr.score(
        write_lines(tmp_path / "b.jsonl", rows), "vflax", data, "vflax-words", custom=True
    )
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (own_rows({"words/aa01": "x"}) * 2, "answered twice"),
        (own_rows({"words/zz99": "x"}), "no question of this TextOCR"),
        (own_rows({"crop/bb02_1": "x"}), "no answer to a question of kind words; say --mode"),
        ([{"key": "words/aa01"}], "line 1: lacks prediction"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=said):
        textocr.score(path, "vflax", write_data(tmp_path / "data"), "vflax-words", custom=True)


def test_predictions_need_the_release(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", own_rows({"words/aa01": "x"}))
    with pytest.raises(UserError, match="say --data=DIR of TextOCR"):
        textocr.score(path, "vflax", None, "vflax-words")


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    assert textocr.recognise(write_lines(tmp_path / "a.jsonl", [{"other": 1}])) is None
    assert textocr.recognise(tmp_path) is None


def test_a_part_of_the_release_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path)
    with pytest.raises(
        UserError, match=r"3 images and 7 boxes, released were 3,124 and 107,802 \(TextOCR 0\.1\)"
    ):
        textocr.load(data)
    monkeypatch.setattr(textocr, "_RELEASED", {"val": (3, 7)})
    assert len(textocr.load(data)) == 4


def test_the_validation_set_is_taken_before_the_training_set(tmp_path: Path) -> None:
    write_data(tmp_path, {"tt01": ["train"]}, "TextOCR_0.1_train.json")
    assert textocr.load(tmp_path, custom=True)[0].key == "words/tt01"
    write_data(tmp_path)
    assert textocr.load(tmp_path, custom=True)[0].key == "words/aa01"
    assert textocr.load(tmp_path / "TextOCR_0.1_train.json", custom=True)[0].key == "words/tt01"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), r"no TextOCR_0\.1_val\.json or TextOCR_0\.1_train\.json"),
        (lambda path: path.write_bytes(b"\xff"), r"^\S+val\.json: not readable as text in UTF-8"),
        (lambda path: path.write_text("["), "not readable as TextOCR"),
        (lambda path: path.write_text("[]"), "not readable as TextOCR"),
        (lambda path: path.write_text('{"imgs": {}}'), "KeyError: 'anns'"),
        (
            lambda path: path.write_text(path.read_text().replace('"aa01": {', '"aa02": {')),
            "KeyError: 'aa01'",
        ),
        (lambda path: path.write_text('{"imgs": {}, "anns": {}}'), "no box has a word"),
        (
            lambda path: path.write_text(path.read_text().replace("[4.2, 10.0, 20.5, 6.0]", "[4.2]")),
            "not readable as TextOCR",
        ),
    ],
)
def test_what_is_no_textocr_is_refused(change: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    change(write_data(tmp_path) / "TextOCR_0.1_val.json")
    with pytest.raises(UserError, match=said):
        textocr.load(tmp_path, custom=True)
