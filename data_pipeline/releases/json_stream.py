"""Reads JSON files of any length row by row: arrays, JSON lines, and objects member by member.

Rows are cut out and parsed by the standard library's decoder (json.JSONDecoder.raw_decode), which tells where a value
ends; so a value here means what json.loads would give, an error has its line and column, and half a surrogate pair,
which JSON can spell and UTF-8 cannot, becomes U+FFFD. No more is held than one chunk and one row. (ijson 3.6, the usual
choice, makes another character of such a half and what follows it, gives up a whole file for a NaN, and has no line.)
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Literal

from etils import epath

from vflax.errors import UserError
from vflax.tokenizer import replace_surrogates

Layout = Literal["array", "lines", "object"]

LINE_SUFFIXES = (".jsonl", ".ndjson")
# A row of more characters is damage, such as a quotation mark that is never closed, and would fill the memory.
MAX_ROW = 64 << 20
# As many lines that are no JSON, before any that is: the file is something else.
MAX_BAD_START = 10

_CHUNK = 1 << 20  # bytes
_EDGE = 16  # characters: longer than what of a number, a word or an escape can be misread when it is cut
_BLANKS = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode
_DOWNLOAD = "An interrupted download ends like this too: compare the file's size with the release's."


@dataclass(frozen=True)
class BadLine:
    """A line among JSON lines that is not JSON."""

    line: int  # from 1
    detail: str


class LongRowError(UserError):
    """A row is too long to be one."""


def find_layout(path: epath.Path) -> Layout:
    """How the file is laid out, by its first characters.

    "array" begins with a bracket. "lines" has a whole JSON object in its first line and more lines after it, or a name
    that ends so (LINE_SUFFIXES). Any other object is an "object".

    Raises:
        UserError: the file is empty, not UTF-8, or begins with something else.
    """
    with _open(path) as file:
        # Of the bytes: a line that is not UTF-8 may be one of many.
        start = file.readline(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        while not start and (line := file.readline(_CHUNK)):
            start = line.lstrip()
        if not start:
            raise UserError(f"{path}: the file is empty. {_DOWNLOAD}")
        if start[:1] == b"[":
            return "array"
        if path.suffix.lower() in LINE_SUFFIXES:
            return "lines"
        if start[:1] != b"{":
            file.seek(0)
            text = _Text(path, file)
            text.peek()
            raise UserError(f"{path}: expected a JSON array of samples, found {repr(text.value())[:40]}")
    return "lines" if _is_lines(path) else "object"


def read_rows(path: epath.Path, layout: Layout) -> Iterator[Any]:
    """The elements of an array, or the values of JSON lines (blank ones are passed over), in their order.

    A line that is not JSON comes as a BadLine.

    Raises:
        UserError: the array ends too early or is not JSON; none of the first lines is JSON, or the last one is cut off.
    """
    with _open(path) as file:
        yield from read_array(path, file) if layout == "array" else _lines(path, file)


def read_array(path: epath.Path, file: IO[bytes]) -> Iterator[Any]:
    """The elements of the array that an open file holds; `path` is what errors call it.

    Raises:
        UserError: it ends too early or is not JSON.
    """
    return _Text(path, file).elements()


def read_members(path: epath.Path, max_row: int = MAX_ROW) -> Iterator[tuple[str, Any]]:
    """The keys and values of the one object that the file holds, in their order.

    Raises:
        UserError: it ends too early or is not JSON.
        LongRowError: a value has more than max_row characters, about.
    """
    with _open(path) as file:
        yield from _Text(path, file, max_row).members()


def first_keys(path: epath.Path, count: int = 6) -> list[str]:
    """The first keys of the object that the file holds, as far as they can be read without reading much."""
    keys: list[str] = []
    with _open(path) as file:
        text = _Text(path, file, max_row=_CHUNK)
        try:
            for key, _ in islice(text.members(), count):
                keys.append(key)
        except UserError:  # a long value, or a broken one
            keys += [text.key] if text.key else []
    return keys


def _open(path: epath.Path) -> IO[bytes]:
    """A file on a bucket has no readline that stops at a length, unless it is buffered once more."""
    file: Any = path.open("rb")
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, _CHUNK)


# ---------------------------------------------------------------------------------------------------------
# JSON lines


def _is_lines(path: epath.Path) -> bool:
    """The first line that is not blank is a JSON object, and others follow."""
    with _open(path) as file:
        lines = (line for line in iter(lambda: file.readline(MAX_ROW), b"") if line.strip())
        first, second = next(lines, b"").removeprefix(codecs.BOM_UTF8), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: epath.Path, file: IO[bytes]) -> Iterator[Any]:
    bad: list[BadLine] = []  # those before the first line that is JSON
    good = False
    number = 0
    while raw := file.readline(MAX_ROW + 1):
        number += 1
        if len(raw) > MAX_ROW:
            raise UserError(f"{path}: line {number} is longer than {MAX_ROW >> 20} MiB. {_DOWNLOAD}")
        if not raw.strip():
            continue
        row = _line(number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
        if not isinstance(row, BadLine):
            good = True
            yield from bad
            bad = []
            yield row
        elif good:
            if not raw.endswith(b"\n"):
                raise UserError(f"{path}: the last line, {number}, is not whole: {row.detail}. {_DOWNLOAD}")
            yield row
        else:
            bad.append(row)
            if len(bad) == MAX_BAD_START:
                break
    if bad:
        raise UserError(f"{path}: not valid JSON lines: {bad[0].detail} in line {bad[0].line}. {_DOWNLOAD}")


def _line(number: int, raw: bytes) -> Any:
    try:
        text = raw.rstrip(b"\r\n").decode()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return BadLine(number, f"not UTF-8 text ({error.reason} at byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return BadLine(number, f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return BadLine(number, str(error))
    return clean(value) if "\\u" in text else value


# ---------------------------------------------------------------------------------------------------------
# One long text, a chunk at a time


class _Text:
    """A window on the text of a file, and the place reached in it."""

    def __init__(self, path: epath.Path, file: IO[bytes], max_row: int = MAX_ROW) -> None:
        self._path, self._file, self._max_row = path, file, max_row
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0  # read so far
        self._buffer, self._pos = "", 0
        self._line, self._column = 1, 1  # of the buffer's first character
        self._ended = False
        self.key = ""  # of the member that was begun last

    def peek(self) -> str:
        """Step over blanks; the next character, or "" at the end."""
        while True:
            blanks = _BLANKS.match(self._buffer, self._pos)
            self._pos = blanks.end() if blanks else self._pos
            if self._pos < len(self._buffer):
                return self._buffer[self._pos]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The value that begins here, of any type."""
        while True:
            try:
                value, end = _decode(self._buffer, self._pos)
            except RecursionError:
                raise self._error("brackets without end", self._pos) from None
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._more()):
                    raise self._error(error.msg, error.pos) from None
            except ValueError as error:  # a number of thousands of digits
                raise self._error(str(error), self._pos) from None
            else:
                # A number goes on beyond the edge, or seems to end before it: "1." of 1.5 is 1 and a full stop.
                if end <= len(self._buffer) - _EDGE or not self._more():
                    break
        if self._buffer.find("\\u", self._pos, end) >= 0:
            value = clean(value)
        self._pos = end
        return value

    def elements(self) -> Iterator[Any]:
        """The elements of the array that is the whole text."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            self._end()
            return
        while True:
            self.peek()
            yield self.value()
            if self.peek() == "]":
                break
            self._take(",")
        self._take("]")
        self._end()

    def members(self) -> Iterator[tuple[str, Any]]:
        """The members of the object that is the whole text."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            self._end()
            return
        while True:
            if self.peek() != '"':
                raise self._error("Expecting a key in double quotes", self._pos)
            self.key = self.value()
            self._take(":")
            self.peek()
            yield self.key, self.value()
            if self.peek() == "}":
                break
            self._take(",")
        self._take("}")
        self._end()

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._error(f"Expecting {character!r}", self._pos)
        self._pos += 1

    def _end(self) -> None:
        if self.peek():
            raise self._error("Extra data", self._pos)

    def _more(self) -> bool:
        """Forget what was read and append a chunk; False when there is no more, and then nothing has changed."""
        if self._ended:
            return False
        self._line, self._column = self._place(self._pos)
        self._buffer, self._pos = self._buffer[self._pos :], 0
        if len(self._buffer) > self._max_row:
            raise LongRowError(
                f"{self._path}: the row that begins in line {self._line} is longer than "
                f"{self._max_row >> 20} MiB: a quotation mark or bracket is not closed there"
            )
        # As much again as there is: a long row is parsed a few times, not once for each chunk of it.
        data = self._file.read(max(_CHUNK, len(self._buffer)))
        self._ended = not data
        self._bytes += len(data)
        try:
            self._buffer += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            place = self._bytes - len(error.object) + error.start
            raise UserError(f"{self._path}: not UTF-8 text ({error.reason} at byte {place})") from None
        return True

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be whole with more text: a string is open, or the error lies at the buffer's edge."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _EDGE

    def _place(self, pos: int) -> tuple[int, int]:
        """Line and column, from 1, of a character of the buffer."""
        newlines = self._buffer.count("\n", 0, pos)
        if not newlines:
            return self._line, self._column + pos
        return self._line + newlines, pos - self._buffer.rfind("\n", 0, pos)

    def _error(self, what: str, pos: int) -> UserError:
        line, column = self._place(pos)
        return UserError(f"{self._path}: not valid JSON: {what} in line {line}, column {column}. {_DOWNLOAD}")


def clean(value: Any) -> Any:
    """A JSON value whose texts can be written as UTF-8: lone surrogates become U+FFFD."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value
