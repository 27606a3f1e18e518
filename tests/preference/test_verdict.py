"""What a judge is asked, and what is read from its reply."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from tests.preference.question_files import question
from vflax.errors import UserError
from vflax.preference.pictures import data_url
from vflax.preference.verdict import Exam, read_verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Both are fine, but the first is right.\n[[A]]", "A"),
        ("[[A]]? No: [[b]]", "B"),
        ("They say the same.\n[[ tie ]]", "tie"),
        ("[[C]]", "tie"),
        ("B", "B"),
        ("**Answer A**", "A"),
        ("The first is wrong.\nVerdict: B.", "B"),
        ("The better answer is A.", "A"),
        ("A cat is in the picture.", None),
        ("Answer B says more, answer A less.", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_only_where_a_reply_gives_one(reply: str, verdict: str | None) -> None:
    assert read_verdict(reply) == verdict


def test_a_judge_sees_the_picture_or_is_told_reference_and_context(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = question(image="a.png", reference="A dog.", context="A park.")
    seeing = next(Exam("j", tmp_path, {}).attempts(asked, "one", "two")).messages[1]["content"]
    assert seeing[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "A dog." not in seeing[1]["text"]
    told = next(Exam("j", None, {}).attempts(asked, "one", "two")).messages[1]["content"]
    assert "A park.\nA dog." in told
    assert told.index("one") < told.index("two")


def test_parameters_are_laid_over_and_further_attempts_are_warmer() -> None:
    own = [
        request.parameters for request in Exam("j", None, {"max_tokens": 9}).attempts(question(), "a", "b")
    ]
    assert own == [{"temperature": at, "max_tokens": 9} for at in (0, 0.5, 1)]
    fixed = [request.key for request in Exam("j", None, {"temperature": 0}).attempts(question(), "a", "b")]
    assert len(set(fixed)) == 3


def test_a_large_picture_is_sent_smaller_and_a_small_one_as_it_is(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (300, 100)).save(tmp_path / "a.png")
    PIL.Image.new("RGB", (300, 100)).save(tmp_path / "a.bmp")
    assert data_url(tmp_path / "a.png", 300).startswith("data:image/png")
    assert data_url(tmp_path / "a.png", 200).startswith("data:image/webp")
    assert data_url(tmp_path / "a.bmp").startswith("data:image/webp")


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as a picture"):
        data_url(tmp_path / "a.png")
