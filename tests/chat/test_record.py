"""vflax.chat.record: a conversation that was saved can be read, and gone on with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat import small
from vflax.chat import pictures, record
from vflax.chat.session import Session
from vflax.errors import UserError
from vflax.generate.processor import Processor
from vflax.generate.request import Sampling


@pytest.fixture
def talk(tiny: Processor, tmp_path: Path) -> Session:
    """Two questions, the first one about a picture."""
    session = Session(small.engine(tiny), tiny, Sampling(max_tokens=500, stop=("END",)), "Be brief.")
    session.add([pictures.read(small.picture(tmp_path / "a.png"))])
    for question in ("What is 😀?", "Sure?"):
        session.ask(question, lambda text: None)
    return session


def saved(talk: Session, path: Path) -> dict[str, Any]:
    record.save(talk, path, "runs/tiny", replace=False)
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def test_the_file_says_what_was_asked_answered_and_how(talk: Session, tmp_path: Path) -> None:
    facts = saved(talk, tmp_path / "talk.json")
    picture = tmp_path / "a.png"
    asked, answered, *_ = facts["messages"]
    assert (facts["model"], facts["weights"], facts["system"]) == ("tiny", "runs/tiny", "Be brief.")
    assert facts["settings"]["max_tokens"] == 500 and facts["settings"]["stop"] == ["END"]
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    assert asked == {
        "role": "user", "content": "What is 😀?", "images": [{"path": str(picture), "sha256": digest}]
    }  # fmt: skip
    assert answered["content"] == "1 seen: What is 😀?" and answered["finish_reason"] == "stop"
    assert answered["usage"]["completion_tokens"] > 1


def test_a_conversation_that_is_read_goes_on_as_the_first_would(
    talk: Session, tiny: Processor, tmp_path: Path
) -> None:
    saved(talk, tmp_path / "talk.json")
    found = record.load(tmp_path / "talk.json")
    engine = small.engine(tiny)
    other = Session(engine, tiny, Sampling())
    other.restore(found.exchanges, found.system, found.sampling)
    other.ask("And?", lambda text: None)
    talk.ask("And?", lambda text: None)
    (mine, sampling), (theirs, wanted) = engine.submitted[-1], talk._engine.submitted[-1]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(mine.ids, theirs.ids)
    np.testing.assert_array_equal(mine.images, theirs.images)
    assert sampling == wanted


def test_markdown_is_for_reading(talk: Session, tmp_path: Path) -> None:
    record.save(talk, tmp_path / "talk.md", "runs/tiny", replace=False)
    text = (tmp_path / "talk.md").read_text(encoding="utf-8")
    lines = ["# A conversation with tiny", f"![picture](<{tmp_path}/a.png>)", "**You:** What is 😀?"]
    places = [text.index(line) for line in [*lines, "**tiny:** 1 seen: What is 😀?", "**You:** Sure?"]]
    assert places == sorted(places)


def test_a_file_that_is_there_is_not_written_over(talk: Session, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("precious")
    with pytest.raises(UserError, match=r"talk\.json: is there already; choose another name"):
        saved(talk, tmp_path / "talk.json")
    assert (tmp_path / "talk.json").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(talk: Session, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/talk\.json: cannot be written \(No such file"):
        saved(talk, tmp_path / "none" / "talk.json")


def test_a_picture_that_has_changed_since_is_named(talk: Session, tmp_path: Path) -> None:
    saved(talk, tmp_path / "talk.json")
    small.picture(tmp_path / "a.png", seed=5)
    with pytest.raises(UserError, match=r"a\.png: is another picture now"):
        record.load(tmp_path / "talk.json")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda facts: facts.pop("messages"), "messages is missing"),
        (lambda facts: facts.update(system=3), "system=3: expected text, or null"),
        (lambda facts: facts["messages"].pop(), "user and assistant by turns"),
        (
            lambda facts: facts["messages"][1].update(content=None),
            r"messages\[1\]\.content=None: expected text",
        ),
        (
            lambda facts: facts["messages"][0]["images"][0].pop("sha256"),
            r"messages\[0\]\.images\.sha256 is missing",
        ),
        (
            lambda facts: facts["messages"][1].update(finish_reason=[]),
            "finish_reason=.*expected stop or length",
        ),
        (lambda facts: facts["messages"][3]["usage"].pop("cached_tokens"), "cached_tokens is missing"),
        (lambda facts: facts["settings"].update(temperature=9), "temperature=9: from 0"),
    ],
)
def test_a_file_that_is_none_of_save_is_named_with_its_key(
    talk: Session, tmp_path: Path, spoil: Any, said: str
) -> None:
    facts = saved(talk, tmp_path / "talk.json")
    spoil(facts)
    (tmp_path / "bad.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=said) as caught:
        record.load(tmp_path / "bad.json")
    assert "bad.json: " in str(caught.value)


def test_a_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        record.load(tmp_path / "none.json")
    assert str(caught.value) == f"{tmp_path / 'none.json'}: not there"
