"""vflax.chat.interactive: lines become pictures, commands or questions; what goes wrong is said and nothing is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chat import small
from tests.generate.fake_engine import FakeEngine
from vflax.chat.console import Console
from vflax.chat.interactive import COMMANDS, Chat
from vflax.chat.session import Session
from vflax.generate.processor import Processor
from vflax.generate.request import Sampling


class Typist:
    """Types lines; KeyboardInterrupt among them is Ctrl-C. prompts: what it was shown."""

    def __init__(self, lines: Sequence[str | type[BaseException]]) -> None:
        self._lines = iter([*lines, EOFError])
        self.prompts: list[str] = []

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines)
        if isinstance(line, str):
            return line
        raise line


class Talk:
    """A chat with a model that tells what it was asked. out: answers; err: all else."""

    def __init__(self, model: Processor, capsys: pytest.CaptureFixture[str]) -> None:
        self.engine: FakeEngine = small.engine(model)
        self.session = Session(self.engine, model, Sampling())
        self._capsys = capsys
        self.out = self.err = ""
        self.prompts: list[str] = []

    def type(self, *lines: str | type[BaseException]) -> None:
        """Start, type all this, and quit."""
        typist = Typist(lines)
        Chat(self.session, Console(), "runs/tiny").run(typist)
        self.prompts = typist.prompts
        self.out, self.err = self._capsys.readouterr()


@pytest.fixture
def talk(tiny: Processor, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(tiny, capsys)


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    return small.picture(tmp_path / "cat.png")


def test_questions_are_answered_on_stdout(talk: Talk) -> None:
    talk.type("Hello.", "", "   ", "And you?")
    assert talk.out == "0 seen: Hello.\n0 seen: And you?\n"


def test_pictures_that_are_dragged_in_go_with_the_next_question(talk: Talk, cat: Path) -> None:
    talk.type(f"'{cat}' ", "What is it?", "Sure?")
    assert talk.out.splitlines()[0] == "1 seen: What is it?"
    assert talk.prompts[:3] == ["> ", "[1 picture] > ", "> "]
    assert "cat.png, 40 x 25" in talk.err


def test_image_adds_a_picture_at_any_turn(talk: Talk, cat: Path) -> None:
    talk.type("Hello.", f"/image {cat}", "What is it?")
    assert talk.out.splitlines()[1] == "1 seen: What is it?"


def test_a_picture_can_be_taken_back_before_it_is_asked_about(talk: Talk, cat: Path) -> None:
    talk.type(f"/image {cat}", "/image -", "Hello.", "/image -")
    assert talk.out == "0 seen: Hello.\n"
    assert "error: /image -: no picture waits" in talk.err


def test_a_broken_picture_is_said_and_those_before_stay(talk: Talk, cat: Path) -> None:
    (cat.parent / "broken.png").write_bytes(cat.read_bytes()[:100])
    talk.type(
        str(cat), f"{cat.parent}/broken.png", "/image none.png", f"/image {cat} none.png", "What is it?"
    )
    assert talk.out == "1 seen: What is it?\n"
    assert "broken.png: damaged image" in talk.err and "none.png: cannot be read (No such file" in talk.err


def test_images_lists_them_with_their_questions(talk: Talk, cat: Path) -> None:
    talk.type("/images", str(cat), "What is it?", str(cat), "/images")
    lines = talk.err.splitlines()
    assert any(line.startswith("[no pictures yet") for line in lines)
    assert f"1  {cat}  40 x 25  question 1" in lines
    assert f"2  {cat}  40 x 25  goes with the next question" in lines


def test_reset_forgets_conversation_and_pictures_but_no_settings(talk: Talk, cat: Path) -> None:
    talk.type("/set top_k=3", "Hello.", str(cat), "/reset", "Again.")
    prompt, sampling = talk.engine.submitted[-1]
    assert "Hello." not in small.read_by(talk.session.processor, prompt) and not prompt.images
    assert sampling == Sampling(top_k=3)


def test_set_without_anything_shows_the_settings(talk: Talk) -> None:
    talk.type("/set")
    assert "temperature=0.0" in talk.err and "seed=0" in talk.err


def test_a_setting_that_is_out_of_range_changes_nothing(talk: Talk) -> None:
    talk.type("/set top_k=3 temperature=9")
    assert "error: temperature=9.0: from 0" in talk.err and talk.session.sampling == Sampling()


def test_system_shows_and_changes_the_system_text(talk: Talk) -> None:
    talk.type("/system", "/system Be brief.", "Hello.", '/system ""', "Hello.", "/system -")
    assert "system text (of the template): A chat between" in talk.err and "system text: (none)" in talk.err
    first, second = [small.read_by(talk.session.processor, prompt) for prompt, _ in talk.engine.submitted]
    assert first.startswith("Be brief. USER:") and second.startswith("USER:")
    assert talk.session.system is None


def test_retry_asks_the_last_question_again(talk: Talk) -> None:
    talk.type("/retry", "Hello.", "/retry")
    assert talk.out == "0 seen: Hello.\n" * 2 and len(talk.session.exchanges) == 1
    assert "error: nothing was answered yet" in talk.err and "temperature is 0" in talk.err


def test_save_and_load_go_on_with_a_conversation(talk: Talk, cat: Path) -> None:
    file = cat.parent / "my talk.json"
    talk.type(
        str(cat), "What is it?", f"/save {file}", "More?", f"/save {file}", "/reset", f"/load {file}", "Sure?"
    )
    assert len(json.loads(file.read_text())["messages"]) == 4
    assert [one.question for one in talk.session.exchanges] == ["What is it?", "More?", "Sure?"]
    assert len(talk.engine.submitted[-1][0].images) == 1


@pytest.mark.parametrize("command", ["/image", "/save", "/load"])
def test_a_command_that_wants_something_says_so(talk: Talk, command: str) -> None:
    talk.type(command)
    assert f"error: {command}: name a " in talk.err


def test_help_names_every_command(talk: Talk) -> None:
    talk.type("/help")
    lines = talk.err.splitlines()
    assert all(any(line.startswith(f"/{name}") for line in lines) for name in COMMANDS)


def test_a_command_that_there_is_not_is_no_question(talk: Talk) -> None:
    talk.type("/rest", "/quit now", "/Reset")
    assert "error: /rest: no such command; did you mean /reset?" in talk.err
    assert "error: /quit now: /quit takes nothing after it" in talk.err
    assert not talk.engine.submitted


@pytest.mark.parametrize("line", [" /reset", "/usr/bin is what?", "/ is what?", "//"])
def test_a_slash_may_begin_a_question(talk: Talk, line: str) -> None:
    talk.type(line)
    assert talk.out == f"0 seen: {line.strip()}\n"


def test_quit_ends_it(talk: Talk) -> None:
    talk.type("/quit", "Hello.")
    assert not talk.engine.submitted


def test_an_interrupt_at_the_prompt_hints_and_a_second_one_ends_it(talk: Talk) -> None:
    talk.type(KeyboardInterrupt, "Hello.", KeyboardInterrupt, KeyboardInterrupt, "More?")
    assert talk.out == "0 seen: Hello.\n"
    assert talk.err.count("Ctrl-C again") == 2


def test_a_question_that_is_too_long_is_said_with_the_numbers(talk: Talk) -> None:
    talk.engine.max_length = 200
    talk.type("long " * 200, "Hello.")
    assert "error: the prompt is " in talk.err and "more than 200" in talk.err
    assert "[the question was taken back; /reset begins anew]" in talk.err
    assert talk.out == "0 seen: Hello.\n"


def test_a_question_that_is_too_long_comes_with_ways_out(talk: Talk, cat: Path) -> None:
    talk.engine.max_length = 200
    talk.type(str(cat), "/set max_tokens=150", "Hello.")
    assert "/image - takes a picture back, /set max_tokens=N allows a shorter answer" in talk.err


def test_an_answer_that_was_stopped_is_marked(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Console.write

    def write_and_interrupt(console: Console, text: str) -> None:
        if not console._in_line:  # at the first piece
            signal.raise_signal(signal.SIGINT)
        write(console, text)

    monkeypatch.setattr(Console, "write", write_and_interrupt)
    talk.type("go on")
    assert talk.out.startswith("w") and talk.out.endswith("\n") and "[stopped]" in talk.err


def test_an_answer_that_was_cut_is_marked(talk: Talk) -> None:
    talk.type("/set max_tokens=4", "Hello.")
    assert "[cut after 4 tokens]" in talk.err


def test_an_empty_answer_is_said(talk: Talk) -> None:
    talk.engine.answer = lambda prompt: ""
    talk.type("Hello.")
    assert "[an empty answer]" in talk.err


def test_half_a_character_that_was_pasted_does_no_harm(talk: Talk, tmp_path: Path) -> None:
    talk.type("caf\udce9?", "/system \udce9", f"/save {tmp_path / 'talk.json'}")
    assert talk.out == "0 seen: caf\N{REPLACEMENT CHARACTER}?\n" and "[saved: " in talk.err
