"""Files of others: what they hold, and what is told of broken ones."""

from __future__ import annotations

import zipfile
from pathlib import Path

import openpyxl
import pytest

from vflax.errors import UserError
from vflax.evaluate import files


def workbook(path: Path, rows: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def test_a_table_keeps_what_stands_in_it(tmp_path: Path) -> None:
    rows = [["index", "A", "prediction"], [1, "None", "NA"], [2, "", 3], [3, "=1+1", True]]
    expected = [
        {"index": "1", "A": "None", "prediction": "NA"},
        {"index": "2", "A": "", "prediction": "3"},
        {"index": "3", "A": "=1+1", "prediction": "True"},
    ]
    assert files.table(workbook(tmp_path / "a.xlsx", rows)) == expected
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        text = "\n".join(separator.join(map(str, row)) for row in rows)
        (tmp_path / name).write_text(text)
        assert files.table(tmp_path / name) == expected


def test_a_table_may_be_json(tmp_path: Path) -> None:
    rows = '[{"index": 1, "hit": true, "prediction": NaN},\n {"prediction": "NA", "hit": null, "index": 2.0}]'
    (tmp_path / "a.json").write_text(rows)
    assert files.table(tmp_path / "a.json") == [
        {"index": "1", "hit": "True", "prediction": ""}, {"index": "2", "hit": "", "prediction": "NA"}
    ]  # fmt: skip


def test_a_workbook_that_notes_a_wrong_size_is_read_whole(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [["index", "prediction"], [1.0, "Yes"]])
    with zipfile.ZipFile(path) as book:
        members = {name: book.read(name) for name in book.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    assert b'<dimension ref="A1:B2"' in members[sheet]
    members[sheet] = members[sheet].replace(b'ref="A1:B2"', b'ref="A1"', 1)
    with zipfile.ZipFile(path, "w") as book:
        for name, content in members.items():
            book.writestr(name, content)
    assert files.table(path) == [{"index": "1", "prediction": "Yes"}]


def test_cells_may_hold_lines_quotes_and_large_pictures(tmp_path: Path) -> None:
    large = "A" * 500_000
    (tmp_path / "a.tsv").write_text(f'index\tquestion\timage\n1\t"two\nlines and ""quotes"""\t{large}\n')
    assert files.table(tmp_path / "a.tsv") == [
        {"index": "1", "question": 'two\nlines and "quotes"', "image": large}
    ]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert [row["text"] for row in files.json_lines(tmp_path / "a.jsonl")] == ["a\u2028b", "c"]


def test_a_list_is_as_good_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1},\n {"a": 2}]')
    assert files.json_lines(tmp_path / "a.json") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "a.jsonl, line 2: not readable as JSON"),
        ("a.jsonl", b"[1, 2]", "expected a list of JSON objects"),
        ("a.jsonl", b"\xff\xfe", "not readable as text"),
        ("a.tsv", b"a\tb\n", "empty"),
        ("a.tsv", b"a\tb\n1\n", "row 2: 1 columns, the first row names 2"),
        ("a.tsv", b"a\tb\n1\t2\t3\n", "row 2: 3 columns, the first row names 2"),
        ("a.tsv", b"a\tb\ta\n1\t2\t3\n", "a is there twice in its first row"),
        ("a.json", b'[{"a": 1}, {"b": 2}]', "row 2: it has b, but the first row a"),
        ("a.txt", b"a\tb\n1\t2\n", "expected a table"),
        ("a.xlsx", b"PK not a workbook", "not readable as a workbook"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    read = files.json_lines if name.endswith("jsonl") else files.table
    with pytest.raises(UserError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "a is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "b is there twice"),
        (b"[1]", "expected a JSON object with something in it"),
        (b"{}", "expected a JSON object with something in it"),
        (b"{", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"\xff", "not readable as text in UTF-8"),
    ],
)
def test_an_object_that_is_broken_or_names_something_twice_is_refused(
    content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.json: {said}"):
        files.json_object(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name, read in (("a.jsonl", files.json_lines), ("a.tsv", files.table), ("a.xlsx", files.table)):
        with pytest.raises(UserError, match=f"{name}: not there"):
            read(tmp_path / name)


def test_two_rows_of_a_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="7 is there twice"):
        files.keyed([{"id": 7}, {"id": 7}], lambda row: row["id"], tmp_path)


def test_a_digest_is_of_contents_and_not_of_their_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    assert files.digest([a, b]) == files.digest([b, a])
    before = files.digest([a, b])
    b.write_text("3")
    assert files.digest([a, b]) != before
