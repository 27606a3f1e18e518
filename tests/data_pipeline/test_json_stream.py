"""data_pipeline/releases/json_stream.py: rows out of JSON files, wherever a chunk ends, with a place for each error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from data_pipeline.releases import json_stream
from data_pipeline.releases.json_stream import BadLine, find_layout, first_keys, read_members, read_rows
from vflax.errors import UserError

# Each row by itself is something that a reader may get wrong at the edge of a chunk.
ROWS = [
    r'{"id": 1, "text": "a \" quoted, [bracketed] {braced} \\"}',
    r'"\ud83d\ude00 is a pair, \\ud83d is none"',
    '"Zürich, 猫, 😀"',
    "123456789012345678901234567890",
    "-0.5e-3",
    "1.5",
    "2E+10",
    "true",
    "null",
    "[]",
    '{"nested": [[1, [2, {"deep": [3]}]], "\\u0000"]}',
    "NaN",
    '""',
]
DOCUMENT = "[\n " + ",\r\n\t".join(ROWS) + "\n]\n"


def write(folder: Path, content: str | bytes, name: str = "rows.json") -> epath.Path:
    path = epath.Path(folder) / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: epath.Path) -> list[Any]:
    layout = find_layout(path)
    return list(read_members(path)) if layout == "object" else list(read_rows(path, layout))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_an_array_gives_what_the_standard_library_gives_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    expected = json.loads(DOCUMENT)
    assert repr(read(write(tmp_path, DOCUMENT))) == repr(expected)  # repr: NaN is not equal to itself


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_the_members_of_an_object_come_in_their_order(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    text = '{\n "b": [1, 2],\n "a\\u00fc": {"x": "}"}, "b": 3\n}'
    assert read(write(tmp_path, text)) == [("b", [1, 2]), ("aü", {"x": "}"}), ("b", 3)]


@pytest.mark.parametrize(
    ("spelt", "read_as"),
    [
        (r"x\ud83dy", "x\ufffdy"),
        (r"\ud83dA", "\ufffdA"),
        (r"\ude00a", "\ufffda"),
        (r"\ud83d\ud83d\ude00", "\ufffd😀"),
        (r"\\ud83d", "\\ud83d"),
        (r"\uD83D\uDE00", "😀"),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_half_a_surrogate_pair_alone_becomes_a_replacement_character(tmp_path, name, spelt, read_as):
    row = f'{{"{spelt}": ["{spelt}"]}}'
    content = row if name == "rows.jsonl" else f"[{row}]"
    assert read(write(tmp_path, content, name)) == [{read_as: [read_as]}]


@pytest.mark.parametrize("content", ['[{"a": 1}]', '{"a": 1}\n{"a": 2}', '{"a": 1}'])
def test_the_mark_in_front_of_utf_8_is_passed_over(tmp_path, content):
    assert read(write(tmp_path, b"\xef\xbb\xbf" + content.encode())) == read(write(tmp_path, content, "b"))


@pytest.mark.parametrize(
    ("name", "content", "layout"),
    [
        ("a.json", '[{"a": 1}]', "array"),
        ("a.jsonl", ' [{"a": 1}]', "array"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "lines"),
        ("a.json", '\n\n{"a": 1}\r\n\r\n{"a": 2}', "lines"),
        ("a.jsonl", '{"a": 1}', "lines"),
        ("a.NDJSON", '{"a": 1}', "lines"),
        ("a.json", '{"a": 1}', "object"),
        ("a.json", '{\n"a": 1\n}', "object"),
        ("a.json", '{"a":\n1}', "object"),
    ],
)
def test_a_file_is_told_by_its_content(tmp_path, name, content, layout):
    assert find_layout(write(tmp_path, content, name)) == layout


@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    whole = DOCUMENT.rstrip().encode()
    for length in range(1, len(whole)):
        path = write(tmp_path, whole[:length])
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: not (valid JSON|UTF-8)"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        '[{"id": 1},',
        '[1 2]',
        '[\n  {"a": 1,\n   "b": tru},\n  {}\n]' + " " * 100,
        '[{"a": 1}]\n[2]',
        '[{"a" 1}, 2, 3, 4, 5, 6, 7, 8, 9]',
        '["x\ny"]',
        '["unclosed',
        r'["\x"]' + " " * 50,
        "<html>not found</html>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_an_error_has_the_line_and_column_that_the_standard_library_tells(
    tmp_path, monkeypatch, content, chunk
):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(content)
    place = f"in line {expected.value.lineno}, column {expected.value.colno}. "
    with pytest.raises(UserError, match=f"not valid JSON: .*{place}.*interrupted download"):
        read(write(tmp_path, content))


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf_8_is_told_with_its_byte(tmp_path, monkeypatch, chunk, mark):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    content = mark + '["Zürich", "'.encode() + b"Z\xfcrich" + b'"]'
    with pytest.raises(
        UserError, match=rf"not UTF-8 text \(invalid start byte at byte {content.index(0xFC)}\)"
    ):
        read(write(tmp_path, content))


@pytest.mark.parametrize("content", ["", " \n ", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="the file is empty"):
        find_layout(write(tmp_path, content))


@pytest.mark.parametrize("content", ["[" * 200_000, "[" + "9" * 5000 + "]", '{"a": ' + "[" * 200_000])
def test_brackets_and_digits_without_end_are_no_crash(tmp_path, content):
    with pytest.raises(UserError, match="not valid JSON"):
        read(write(tmp_path, content))


@pytest.mark.parametrize("content", ['["' + "x" * 5000, '["' + "x" * 5000 + '"]', '{"a": "' + "x" * 5000])
def test_a_row_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, content):
    monkeypatch.setattr(json_stream, "_CHUNK", 64)
    monkeypatch.setattr(json_stream, "MAX_ROW", 1000)
    path = write(tmp_path, content)
    with path.open("rb") as file, pytest.raises(UserError, match="begins in line 1 is longer than"):
        text = json_stream._Text(path, file, max_row=1000)
        list(text.elements() if content[0] == "[" else text.members())
    with pytest.raises(UserError, match="line 1 is longer than"):
        list(read_rows(path, "lines"))


def test_a_bad_line_among_good_ones_is_told_by_its_number(tmp_path):
    content = b'\n{"a": 1}\n{"a": \n\r\n{"b": "\xff"}\n{"a": 3}'
    first, second, third, fourth = read(write(tmp_path, content, "a.jsonl"))
    assert (first, fourth) == ({"a": 1}, {"a": 3})
    assert second == BadLine(3, "Expecting value at column 7")
    assert isinstance(third, BadLine) and third.line == 5 and "not UTF-8" in third.detail


def test_a_bad_line_at_the_start_keeps_its_place(tmp_path):
    first, second = read(write(tmp_path, 'oops\n{"a": 1}\n', "a.jsonl"))
    assert isinstance(first, BadLine) and first.line == 1
    assert second == {"a": 1}


@pytest.mark.parametrize("content", ["oops\n", "oops\n" * 11 + '{"a": 1}', "<html>\n<body>\n"])
def test_lines_of_which_none_at_the_start_is_json_are_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.jsonl: not valid JSON lines: Expecting value .* in line 1\."):
        read(write(tmp_path, content, "a.jsonl"))


def test_a_last_line_that_is_cut_off_is_an_interrupted_download(tmp_path):
    rows = read_rows(write(tmp_path, '{"a": 1}\n{"a": 2}\n{"a": ', "a.jsonl"), "lines")
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"the last line, 3, is not whole.*interrupted download"):
        next(rows)


def test_the_first_keys_of_an_object_are_found_before_a_value_without_end(tmp_path):
    path = write(tmp_path, '{"a": 1, "data": [' + '"' + "x" * (3 << 20) + '"]}')
    assert first_keys(path) == ["a", "data"]
