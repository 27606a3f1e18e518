"""Reads and writes files of captions, one at a time, however large they are.

    a JSON array or JSON lines of
        {"image", "conversations": [{"from": "human", ...}, {"from": "gpt", "value": the caption}]}   LLaVA
        {"image", "caption"}
        {"image", "captions": [several]}       one sample for each, as in caps_boxes_*.jsonl
        with "id" or without
    CAPTION<TAB>URL or CAPTION<TAB>FILE, one a line (CC3M's Train_GCC-training.tsv)

each plain or gzipped. What is written is LLaVA's JSON array {"id", "image", "conversations"}.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from etils import epath

from data_pipeline.records import Problem
from data_pipeline.releases.json_stream import read_array
from vflax.errors import UserError

# What LLaVA's chat.json of CC3M calls the images; the number is the line's, from 0.
DEFAULT_IMAGE_NAME = "GCC_train_{number:09d}.jpg"
_CAPTION_KEYS = ("conversations", "caption", "captions")
_HINT = "expected a JSON array, JSON lines or CAPTION<TAB>URL lines"


@dataclass(frozen=True)
class Caption:
    """One caption with its image, as LLaVA's record.

    number: of the record in the file, from 0 (records that cannot be used count).
    """

    number: int
    text: str
    record: dict[str, Any]


@dataclass(frozen=True)
class _Wrong:
    """A line that is no record."""

    detail: str


class CaptionFile:
    """A file of captions that can be read again and again.

    Args:
        path: the file.
        image_name: the image's file name where a line gives a URL: a pattern with {number}, the line's, from 0.

    Attributes:
        form: "array", "lines" or "tsv".
        size: bytes on disk.

    Raises:
        UserError: no such file, an empty one, of another form, or a pattern that gives no names.
    """

    def __init__(self, path: Path, image_name: str = DEFAULT_IMAGE_NAME) -> None:
        if not path.is_file():
            raise UserError(f"--captions={path}: there is no such file")
        _check_pattern(image_name)
        self.path, self._image_name = path, image_name
        self.size = path.stat().st_size
        self.form = self._find_form()

    def read(self, advance: Callable[[int], None] = lambda position: None) -> Iterator[Caption | Problem]:
        """All captions in the file's order, and the records that give none.

        Args:
            advance: told now and then how many bytes of the file have been read.

        Raises:
            UserError: the file is damaged: not whole, not UTF-8, not JSON.
        """
        with self._open() as (raw, stream):
            for number, record in self._records(stream):
                yield from self._captions(number, record)
                if number % 1000 == 0:
                    advance(raw.tell())
            advance(self.size)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        with self.path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            try:
                yield raw, gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[misc]
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{self.path}: the gzip file is damaged or not whole ({error})") from None

    def _find_form(self) -> str:
        with self._open() as (_, stream):
            start = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start:
            raise UserError(f"{self.path}: the file is empty; {_HINT}")
        suffixes = [suffix.lower() for suffix in self.path.suffixes if suffix.lower() != ".gz"]
        if suffixes[-1:] == [".tsv"]:
            return "tsv"
        if start[:1] in b"[{":
            return "array" if start[:1] == b"[" else "lines"
        if b"\t" in start.split(b"\n", 1)[0]:
            return "tsv"
        raise UserError(f"{self.path}: begins with {start[:30]!r}; {_HINT}")

    def _records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        """(place in the file, record or _Wrong)."""
        if self.form == "array":
            yield from enumerate(read_array(epath.Path(self.path), stream))
            return
        parse = _parse_line if self.form == "lines" else _split_line
        for number, line in enumerate(stream):
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.path}: not UTF-8 text in line {number + 1} ({error.reason})"
                ) from None
            if text.strip():
                yield number, parse(text)

    def _captions(self, number: int, record: Any) -> Iterator[Caption | Problem]:
        if isinstance(record, _Wrong):
            yield Problem(number, "", "", "", "broken_record", record.detail)
            return
        if self.form == "tsv":
            record = self._of_line(number, *record)
        found = _read_record(record)
        if isinstance(found, str):
            entry = record if isinstance(record, dict) else {}
            file = entry.get("image", "")
            yield Problem(number, str(entry.get("id", "")), "", str(file)[:300], "broken_record", found)
            return
        several = len(found) > 1
        for k, text in enumerate(found):
            yield Caption(number, text, _llava(record, text, number, f"_{k}" if several else ""))

    def _of_line(self, number: int, caption: str, image: str) -> dict[str, Any]:
        if "://" not in image:
            return {"image": image, "caption": caption}
        return {"image": self._image_name.format(number=number), "caption": caption, "url": image}


def write_array(path: Path, records: Iterator[Mapping[str, Any]]) -> None:
    """Write records as one JSON array, one a line."""
    # Half a UTF-16 pair, which JSON can spell and UTF-8 cannot, is written as JSON spells it.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as out:
        separator = "[\n"
        for record in records:
            out.write(separator + json.dumps(record, ensure_ascii=False))
            separator = ",\n"
        out.write("\n]\n")


def _check_pattern(pattern: str) -> None:
    """It must give another name for each number, and a path inside the image folder."""
    try:
        good = pattern.format(number=1) != pattern.format(number=2)
    except (IndexError, KeyError, ValueError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f"--image_name={pattern}: expected a pattern with {{number}}, such as {DEFAULT_IMAGE_NAME}"
        )


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Wrong(f"not valid JSON: {error}")


def _split_line(line: str) -> tuple[str, str] | _Wrong:
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 2:
        return _Wrong(f"expected CAPTION<TAB>URL, found {len(fields)} fields: {line.strip()[:60]!r}")
    caption, image = fields
    return caption.strip(), image.strip()


def _read_record(record: Any) -> list[str] | str:
    """The record's captions, or what is wrong with it."""
    if not isinstance(record, dict):
        return f"expected an object, found {repr(record)[:60]}"
    if not isinstance(record.get("image"), str) or not record["image"]:
        return "image: expected a file name"
    if not isinstance(record.get("id", ""), str | int):
        return "id: expected a text or a number"
    keys = [key for key in _CAPTION_KEYS if key in record]
    if not keys:
        return f"no caption: expected one of the keys {', '.join(_CAPTION_KEYS)}"
    value = record[keys[0]]
    if keys[0] == "conversations":
        value = _answers(value)
    captions = value if isinstance(value, list) and keys[0] != "caption" else [value]
    if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        return f"{keys[0]}: expected a caption that is not empty, found {repr(record[keys[0]])[:80]}"
    return captions


def _answers(conversations: Any) -> Any:
    """The one answer of a conversation, as a list; whatever else gives what is no caption."""
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        return None
    answers = [turn.get("value") for turn in conversations if turn.get("from") == "gpt"]
    return answers if len(answers) == 1 else None


def _llava(record: dict[str, Any], text: str, number: int, suffix: str) -> dict[str, Any]:
    """The record in LLaVA's form; one that has it already stays as it is."""
    name = {"id": f"{record.get('id', number)}{suffix}"}
    if "conversations" in record:
        return record if "id" in record else name | record
    rest = {key: value for key, value in record.items() if key in ("image", "url")}
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
    return name | rest | {"conversations": turns}
