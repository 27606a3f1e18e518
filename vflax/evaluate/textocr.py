"""TextOCR (Singh et al., 2021): words in photographs, each in a box. As a benchmark of what vision-language models read
it has no official protocol, and Vision-Flan's paper does not tell its own. This one is ours, in full:

* The validation set, TextOCR_0.1_val.json (3,124 images, 107,802 boxes), since the test set's words were not released.
  The training set can be had in its place.
* A word is what stands between spaces, or one of ,;:/|"()[]{}<>, without its other marks ("don't" is dont), casefolded;
  shorter than two letters or digits it is none. Boxes whose text is ".", by which illegible or foreign text is marked,
  and boxes without such a word are left out, and images without others.
* words: "What words are written in the image?", of each image. An answer's words and those of the boxes are compared
  as multisets: a word counts as often as it is in both. Recall, precision and F1 are those of all images together; the
  score is F1.
* crop: "What word is written in the image?", of one box for each image: the one whose id has the smallest sha256, so
  that nobody chose it. The image is cut to the box and a tenth of its longer side (two pixels at least) on all sides;
  where an image is not of the size that the release notes, the box is scaled with it.
  exact: the words of the answer are those of the box; contains: those of the box are among them. The score is exact.
* A question without answer has no word right. An answer without any word is unparsed.

The two kinds of questions are two modes, named vflax's, so that no result passes for somebody else's number.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate.files import digest, json_lines, need
from vflax.evaluate.predictions import OWN, Said, format_of_rows, join, of_vflax, without_answers
from vflax.evaluate.question import SHORT_ANSWER, Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make, mean
from vflax.small_files import read_text

NAME = "textocr"
MODES = {
    "vflax-words": "ours, there being no official one: F1 of the words of whole images",
    "vflax-crop": "ours: the word of one box of each image, exactly",
}
FORMATS = {
    "vflax": OWN,
    "llava": "LLaVA's answers: JSON lines with question_id, which is a key or an image's id, and text",
}
MAX_TOKENS = 128

_ASKED = {"words": "What words are written in the image?", "crop": "What word is written in the image?"}
_FILES = {"val": "TextOCR_0.1_val.json", "train": "TextOCR_0.1_train.json"}
# Images and boxes of release 0.1.
_RELEASED = {"val": (3124, 107802), "train": (21778, 714770)}
# Where people have the images: the last two as their archives unpack.
_FOLDERS = ("images", "train", "train_val_images", "train_images", "train_val_images/train_images")
_SEPARATORS = re.compile(r"[\s,;:/|\"()\[\]{}<>]+")
_LEAST = 2
_MARGIN, _MARGIN_PIXELS = 0.1, 2


class _Box(NamedTuple):
    """A box with its words. corner, size: in pixels of the image, whose size is `of`; x first."""

    id: str
    image: str
    words: tuple[str, ...]
    corner: tuple[float, float]
    size: tuple[float, float]
    of: tuple[float, float]


# --- the release ------------------------------------------------------------------------------------------------------


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The questions about whole images, then those about boxes.

    Args:
        data: a folder with TextOCR_0.1_val.json or TextOCR_0.1_train.json, or such a file; images in a folder beside it
            (images/, train_images/ or train_val_images/), which is not needed to score.
        custom: a set of one's own in this format, of which numbers are not compared with the release.

    Raises:
        UserError: there is none, it cannot be read, or it is not what was released.
    """
    split, path = _file(data)
    images, count, boxes = _boxes(path)
    if not custom and (images, count) != _RELEASED[split]:
        raise UserError(
            f"{path}: {images:,} images and {count:,} boxes, released were {_RELEASED[split][0]:,} and "
            f"{_RELEASED[split][1]:,} (TextOCR 0.1). Fetch it again, or say --custom for a set of your own"
        )
    of_image: dict[str, list[_Box]] = {}
    for box in boxes:
        of_image.setdefault(box.image, []).append(box)
    files = _pictures(path.parent, of_image)
    questions: dict[str, list[Question]] = {"words": [], "crop": []}
    for image, own in of_image.items():
        chosen = min(own, key=lambda box: hashlib.sha256(box.id.encode()).digest())
        for kind, about in (("words", sorted(own)), ("crop", [chosen])):
            key = f"{kind}/{image if kind == 'words' else chosen.id}"
            answer = " ".join(word for box in about for word in box.words)
            read: Callable[[], bytes] | None = None
            if image in files:
                read = files[image].read_bytes if kind == "words" else partial(_crop, files[image], chosen)
            pictures = (Picture(f"{image}.jpg", read),) if read else ()
            questions[kind].append(Question(key, _ASKED[kind], answer, {"kind": kind}, image, pictures))
    return questions["words"] + questions["crop"]


def prompt(question: Question, style: str) -> str:
    """What a model is asked; style "llava": with LLaVA's request for a short answer, where that is one word."""
    if style == "llava" and question.groups["kind"] == "crop":
        return f"{question.text}\n{SHORT_ANSWER}"
    return question.text


def counted(question: Question, mode: str) -> bool:
    """Whether a question is of the kind that a mode counts."""
    return question.groups["kind"] == mode.removeprefix("vflax-")


def words(text: str) -> list[str]:
    """The words of a text, as the protocol has them."""
    parts = ("".join(filter(str.isalnum, part)).casefold() for part in _SEPARATORS.split(text))
    return [part for part in parts if len(part) >= _LEAST]


def _file(data: Path) -> tuple[str, Path]:
    for split, name in _FILES.items():
        path = data if data.name == name else data / name
        if path.is_file():
            return split, path
    raise UserError(f"{data}: no {' or '.join(_FILES.values())}; fetch it from textvqa.org/textocr/dataset")


def _boxes(path: Path) -> tuple[int, int, list[_Box]]:
    """How many images and boxes there are, and those boxes that have words. The file of the training set has 280 MB,
    most of it outlines; what is not needed is dropped as it is parsed."""

    def kept(value: dict[str, Any]) -> Any:
        if "utf8_string" in value:
            return {name: value.get(name) for name in ("image_id", "bbox", "utf8_string")}
        return (float(value["width"]), float(value["height"])) if "width" in value else value

    text = read_text(path)
    try:
        whole = json.loads(text, object_hook=kept)
        found = []
        for id, row in whole["anns"].items():
            x, y, width, height = map(float, row["bbox"])
            own = () if row["utf8_string"] == "." else tuple(words(row["utf8_string"]))
            if own:
                image = row["image_id"]
                found.append(_Box(id, image, own, (x, y), (width, height), whole["imgs"][image]))
        if not found:
            raise ValueError("no box has a word")
        return len(whole["imgs"]), len(whole["anns"]), found
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not readable as TextOCR ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _pictures(folder: Path, images: Collection[str]) -> dict[str, Path]:
    """{image: its file}; empty: there is no folder of them.

    Raises:
        UserError: there is one, and it lacks some.
    """
    found: dict[str, Path] = {}
    for name in _FOLDERS:
        own = {image: folder / name / f"{image}.jpg" for image in images if image not in found}
        found |= {image: path for image, path in own.items() if path.is_file()}
    missing = [image for image in images if image not in found]
    if found and missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(images):,} images are not there, the first: {missing[0]}.jpg; fetch "
            "train_val_images.zip again"
        )
    return found


def _crop(path: Path, box: _Box) -> bytes:
    """The image within the box and its margin, as PNG."""
    from PIL import Image

    with Image.open(path) as image:
        scale = [own / released for own, released in zip(image.size, box.of, strict=True)]
        corner = [low * by for low, by in zip(box.corner, scale, strict=True)]
        size = [length * by for length, by in zip(box.size, scale, strict=True)]
        margin = max(_MARGIN * max(size), _MARGIN_PIXELS)
        left, top = (max(int(low - margin), 0) for low in corner)
        right, bottom = (
            min(math.ceil(low + length + margin), end)
            for low, length, end in zip(corner, size, image.size, strict=True)
        )
        file = io.BytesIO()
        image.convert("RGB").crop((left, top, max(right, left + 1), max(bottom, top + 1))).save(file, "PNG")
    return file.getvalue()


# --- predictions ------------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file; None: none of these."""
    if predictions.is_dir():
        return None
    return format_of_rows(predictions, {"key": "vflax", "question_id": "llava"})


def _of_llava(path: Path) -> Iterator[Said]:
    for number, row in enumerate(json_lines(path), 1):
        need(row, ("question_id", "text"), f"{path}, line {number}")
        id = str(row["question_id"])
        if row["text"] is not None:
            yield Said(id if "/" in id else f"words/{id}", str(row["text"]))


# --- the score --------------------------------------------------------------------------------------------------------


def score(
    predictions: Path,
    format: str,
    data: Path | None,
    mode: str,
    *,
    custom: bool = False,
    limit: int | None = None,
) -> Score:
    """Score a file of predictions; see `vflax.evaluate.mme.score`. The mode decides which kind of questions counts; the
    file may have both."""
    if data is None:
        raise without_answers(predictions, "TextOCR")
    said = of_vflax(predictions) if format == "vflax" else list(_of_llava(predictions))
    questions = load(data, custom=custom)
    joined = join(said, {q.key: q for q in questions}, predictions, "TextOCR")
    kind = mode.removeprefix("vflax-")
    asked = limited([q for q in questions if counted(q, mode)], limit)
    if not any(q.key in joined for q in asked):
        raise UserError(
            f"{predictions}: no answer to a question of kind {kind}; say --mode for the other kind"
        )
    verdicts = [_verdict(question, joined.get(question.key), kind) for question in asked]
    metrics = _Words(verdicts) if kind == "words" else _Crops(verdicts)
    return make(
        NAME, mode, format, verdicts, metrics, metrics.headline, groups={}, printed={},
        manifest={
            "predictions_sha256": digest([predictions]), "custom": custom, "limit": limit,
            "protocol": "vflax's own; there is no official one",
        },
    )  # fmt: skip


def _verdict(question: Question, said: Said | None, kind: str) -> Verdict:
    right = Counter(question.answer.split())
    read = Counter(words(said.text)) if said else Counter()
    both = (right & read).total()
    if kind == "words":
        value = 2 * both / (right.total() + read.total())
        why = f"{both} of {right.total()} words, and {read.total() - both} that are not there"
    else:
        value = float(read == right)
        why = "the word" if value else "the word and others" if right <= read else "another word"
    if said is None or not read:
        why = "no word" if said else "no prediction"
    return Verdict(
        question.key, question.unit, question.groups, question.answer, said.text if said else None,
        " ".join(read.elements()) or None, value, why,
    )  # fmt: skip


class _Words:
    """Recall, precision and F1 of all images together, from how often each counts."""

    headline = "f1"

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        pairs = [(Counter(v.answer.split()), Counter((v.parsed or "").split())) for v in verdicts]
        self._numbers = np.array([(r.total(), p.total(), (r & p).total()) for r, p in pairs])

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        there, read, both = map(int, counts @ self._numbers)
        return {
            "f1": 100 * 2 * both / (there + read),
            "recall": 100 * both / there,
            "precision": 100 * both / read if read else 0.0,
        }


class _Crops:
    """Shares of boxes, from how often each counts."""

    headline = "exact"

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self._exact = np.array([v.score for v in verdicts])
        pairs = [(Counter(v.answer.split()), Counter((v.parsed or "").split())) for v in verdicts]
        self._contains = np.array([float(r <= p) for r, p in pairs])

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        return {"exact": mean(self._exact, counts), "contains": mean(self._contains, counts)}
