"""vflax.chat.pictures: which lines are pictures that were dragged in, and which are text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.chat.small import picture
from vflax.chat import pictures
from vflax.errors import UserError


@pytest.fixture
def cat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`my cat.png` in the home directory, which is the current one, beside dog.jpg and a text file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "dog.jpg")
    (tmp_path / "notes.txt").write_text("notes")
    return picture(tmp_path / "my cat.png")


@pytest.mark.parametrize(
    "line",
    [
        "'{home}/my cat.png'",
        '"{home}/my cat.png"',
        "{home}/my\\ cat.png",
        "{home}/my cat.png",
        "file://{home}/my%20cat.png",
        "file://localhost{home}/my%20cat.png",
        "~/my\\ cat.png",
        "my cat.png",
        "  '{home}/my cat.png' ",
        "{home}/my cat.png\n",
    ],
)
def test_a_dragged_file_is_found_however_the_terminal_spells_it(cat: Path, line: str) -> None:
    [found] = pictures.dragged(line.format(home=cat.parent))
    assert found.absolute() == cat


@pytest.mark.parametrize("between", [" ", "\n", "  \n "])
def test_several_dragged_files_are_several_pictures(cat: Path, between: str) -> None:
    line = f"'{cat}'{between}{cat.parent}/dog.jpg "
    assert pictures.dragged(line) == [cat, cat.parent / "dog.jpg"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "what is in {home}/dog.jpg",
        "{home}/dog.jpg what is this?",
        "dog.jpg is what?",
        "missing.png",
        "{home}/notes.txt",
        "notes.txt",
        "What's this?",
        "/image {home}/dog.jpg",
        "/help",
        "file://[",
        "\x00.png",
        "x" * 5000 + ".png",
    ],
)
def test_text_stays_text(cat: Path, line: str) -> None:
    assert pictures.dragged(line.format(home=cat.parent)) == []


def test_a_dragged_picture_that_is_gone_is_named_and_not_asked_about(cat: Path) -> None:
    [path] = pictures.dragged(f"{cat.parent}/gone.png")
    with pytest.raises(UserError, match=r"gone\.png: cannot be read \(No such file"):
        pictures.read(path)


def test_a_name_with_url_marks_in_it_is_found(cat: Path) -> None:
    odd = picture(cat.parent / "50% #1?.png")
    assert pictures.dragged(f"file://{cat.parent}/50%25%20%231%3F.png") == [odd]
    assert pictures.dragged(f"file://{cat.parent}/50%25%20#1?.png") == [odd]


def test_image_takes_a_name_with_spaces_and_several_names(cat: Path) -> None:
    assert pictures.named("my cat.png") == [Path("my cat.png")]
    assert pictures.named("'my cat.png' ~/dog.jpg") == [Path("my cat.png"), cat.parent / "dog.jpg"]
    with pytest.raises(UserError, match="quotation mark has no other half"):
        pictures.named("'my cat")


def test_a_picture_is_known_by_its_files_hash_and_stored_size(cat: Path) -> None:
    found = pictures.read(cat)
    assert found.sha256 == hashlib.sha256(cat.read_bytes()).hexdigest() and found.size == (40, 25)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("notes.txt", "not an image"),
        ("gone.png", "No such file"),
        (".", "directory"),
        ("a\0.png", "cannot be read"),
    ],
)
def test_a_file_that_is_no_picture_is_named(cat: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        pictures.read(Path(name), called=f"--image={name}")
    assert f"--image={name}: " in str(caught.value)
