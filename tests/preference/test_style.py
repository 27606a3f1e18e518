"""python -m vflax.preference style: files with every number."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest

from tests.preference.question_files import lines, model, named, question, write_set
from vflax.preference import mentions
from vflax.preference.__main__ import main
from vflax.preference.style import style

QUESTIONS = [
    question("w", kind="word", reference="red"),
    question("s", kind="sentence", reference="A dog sits."),
    question("l", kind="long", objects=("dog",)),
    question("n", kind="number", reference="3"),
]
SHORT = model("short", "red", "A dog sits there.", "A dog.", "3")
CHATTY = model("chatty", "It is red.", "A dog. A cat.", "A dog and a cat. " * 20, "three")


def test_each_kind_has_its_numbers() -> None:
    found = style(QUESTIONS, [SHORT, CHATTY], mentions.load("coco"))
    assert found["groups"] == {"all": 4, "word": 1, "number": 1, "sentence": 1, "long": 1}
    follows = {
        name: {group: cells["measures"]["follows"]["count"] for group, cells in own["groups"].items()}
        for name, own in found["models"].items()
    }
    assert follows == {
        "short": {"all": 3, "word": 1, "number": 1, "sentence": 1, "long": 0},
        "chatty": {"all": 2, "word": 0, "number": 1, "sentence": 0, "long": 1},
    }
    chatty = found["models"]["chatty"]["groups"]
    assert chatty["long"]["lengths"]["words"]["median"] == 100
    assert chatty["all"]["measures"]["right"]["value"] == 1
    assert chatty["all"]["measures"]["loops"]["count"] == 1
    assert chatty["all"]["measures"]["hallucinated_mentions"]["value"] == 21 / 42
    assert chatty["all"]["measures"]["hallucinated_answers"]["value"] == 1
    assert found["models"]["chatty"]["hallucinated"] == {"cat": 21}
    assert "hallucinated_mentions" not in chatty["word"]["measures"]


def test_the_histogram_counts_every_answer_once() -> None:
    found = style(QUESTIONS, [CHATTY], mentions.load("coco"))
    bins = found["models"]["chatty"]["groups"]["all"]["lengths"]["words"]["histogram"]
    assert {(low, high): count for low, high, count in bins if count} == {
        (1, 1): 1, (3, 4): 2, (65, 128): 1,
    }  # fmt: skip
    assert bins[-1] == [257, None, 0]


def test_differences_are_of_the_second_model_to_the_first() -> None:
    [found] = style(QUESTIONS, [SHORT, CHATTY], mentions.load("coco"))["differences"]
    assert (found["a"], found["b"]) == ("short", "chatty")
    assert found["groups"]["long"]["words"]["value"] == 98
    assert found["groups"]["all"]["follows"]["value"] == pytest.approx(-0.25)


def test_questions_without_kinds_are_grouped_by_category() -> None:
    asked = [question("0", category="conv"), question("1", category="detail")]
    found = style(asked, [model("m", "a", "b")], mentions.load("coco"))
    assert (found["by"], list(found["groups"])) == ("category", ["all", "conv", "detail"])
    assert "follows" not in found["models"]["m"]["groups"]["all"]["measures"]


def test_the_command_writes_numbers_tables_plots_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "set")
    assert main(["style", *named(folder), f"--out={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().out
    assert "short words" in told and "0.0 %" in told
    facts = json.loads((tmp_path / "out" / "style.json").read_text())
    assert facts["models"]["chatty"]["groups"]["all"]["measures"]["follows"]["value"] == 1
    assert facts["models"]["chatty"]["hallucinated"] == {"cat": 48}
    text = (tmp_path / "out" / "style.md").read_text()
    assert "| all | 6 | 3 (3 to 3) | 64 (64 to 64) |" in text
    page = (tmp_path / "out" / "style.html").read_text()
    assert "Difference, chatty to short" in page and "<script" not in page
    for name in ("lengths.png", "follows.png"):
        assert PIL.Image.open(tmp_path / "out" / name).size[0] > 500


def test_the_same_answers_give_the_same_bytes(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    for out in ("one", "two"):
        assert main(["style", *named(folder), f"--out={tmp_path / out}"]) == 0
    for name in ("style.json", "style.md", "style.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_hostile_answers_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | $x$ \ud800"
    lines(
        tmp_path / "q.jsonl", [{"question_id": 0, "text": hostile, "reference": hostile, "category": "$|<b>"}]
    )
    lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": hostile}])
    arguments = [f"$<b>|={tmp_path / 'a.jsonl'}", f"--questions={tmp_path / 'q.jsonl'}", f"--out={tmp_path}"]
    assert main(["style", *arguments]) == 0
    page = (tmp_path / "style.html").read_text()
    assert "<script" not in page and "<b>|" not in page and "&lt;script&gt;" in page


def test_an_error_is_told_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_set(tmp_path / "set")
    lines(folder / "short.jsonl", [{"question_id": 0, "text": "a"}])
    assert main(["style", *named(folder), f"--out={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: {folder / 'short.jsonl'}: 5 of 6 questions have no answer"
    )
    assert not (tmp_path / "out").exists()
