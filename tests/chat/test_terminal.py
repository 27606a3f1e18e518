"""The program at a real terminal, and in real pipes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from tests.chat import small

ROOT = Path(__file__).parents[2]
SECONDS = 60
ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[=>])")
COLOUR = re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
HELLO = "/help tells what you can do"


def command(model: Path, *flags: str) -> list[str]:
    """The program; see `small.engine` for what is answered."""
    runner = str(ROOT / "tests/chat/with_fake.py")
    return [sys.executable, runner, f"--model={model}", "--pace=0.001", *flags]


def environment(state: Path, **more: str) -> dict[str, str]:
    hiding = ("NO_COLOR", "PYTHONUNBUFFERED")  # what is never flushed would come all the same
    own = {key: value for key, value in os.environ.items() if key not in hiding}
    more = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), "TERM": "xterm"} | more
    return own | {"JAX_PLATFORMS": "cpu"} | more


class Terminal:
    """A program in a terminal of 200 columns. raw: all it has written so far."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.raw = ""
        self._seen = 0
        self.child = pexpect.spawn(
            argv[0], argv[1:], env=env, dimensions=(50, 200), encoding="utf-8", timeout=SECONDS
        )

    @property
    def text(self) -> str:
        """What it has written, without escape sequences."""
        return ESCAPE.sub("", self.raw)

    def types(self, text: str) -> None:
        self.child.send(text)

    def pastes(self, text: str) -> None:
        """As terminals paste, and as they tell of a file that is dragged in."""
        self.child.send(f"\x1b[200~{text}\x1b[201~")

    def sees(self, wanted: str) -> None:
        """Wait until something is written, after what was waited for before."""
        while (found := self.text.find(wanted, self._seen)) < 0:
            try:
                self.raw += self.child.read_nonblocking(4096, SECONDS)
            except (pexpect.EOF, pexpect.TIMEOUT):
                pytest.fail(
                    f"{wanted!r} was never written after {self.text[: self._seen]!r}, but {self.text!r}"
                )
        self._seen = found + len(wanted)

    def ends(self) -> int | None:
        """Wait for the program's end; returns its exit status."""
        try:
            while True:
                self.raw += self.child.read_nonblocking(4096, SECONDS)
        except pexpect.EOF:
            self.child.close()
        status: int | None = self.child.exitstatus
        return status


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    terminal = Terminal(command(model), environment(tmp_path_factory.mktemp("state")))
    terminal.sees(HELLO)
    terminal.sees("> ")
    yield terminal
    terminal.child.close(force=True)


@pytest.fixture
def terminal(running: Terminal) -> Terminal:
    """A terminal with a new conversation."""
    running.types("/reset\r")
    running.sees("[a new conversation")
    running.sees("> ")
    return running


def test_an_answer_appears_while_it_is_written(terminal: Terminal) -> None:
    terminal.types("go on\r")
    terminal.sees("word0 word1")
    terminal.types(CTRL_C)
    terminal.sees("> ")


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.types("go on\r")
    terminal.sees("word0 word1")
    terminal.types(CTRL_C)
    terminal.sees("[stopped]")
    terminal.types("Sure?\r")
    terminal.sees("0 seen: Sure?")


def test_ctrl_c_clears_a_line_that_was_begun(terminal: Terminal) -> None:
    terminal.types("nonsense")
    terminal.sees("nonsense")
    terminal.types(CTRL_C + "Hello.\r")
    terminal.sees("0 seen: Hello.")


def test_a_file_that_is_dragged_in_is_a_picture(terminal: Terminal, tmp_path: Path) -> None:
    terminal.pastes(f"'{small.picture(tmp_path / 'my cat.png')}' ")
    terminal.types("\r")
    terminal.sees("[my cat.png, 40 x 25: goes with the next question]")
    terminal.sees("[1 picture] > ")
    terminal.types("What is it?\r")
    terminal.sees("1 seen: What is it?")


def test_several_lines_that_are_pasted_are_one_question(terminal: Terminal) -> None:
    terminal.pastes("one\rtwo")
    terminal.types("\r")
    terminal.sees("0 seen: one\r\ntwo")


def test_tab_completes_commands_and_paths(terminal: Terminal, tmp_path: Path) -> None:
    small.picture(tmp_path / "my cat.png")
    terminal.types("/he\t\r")
    terminal.sees("Ctrl-C stops an answer")
    terminal.types(f"/image {tmp_path}/my\t\r")
    terminal.sees("[my cat.png, 40 x 25")


def test_arrow_up_brings_back_what_was_typed(terminal: Terminal) -> None:
    terminal.types("Hello.\r")
    terminal.sees("0 seen: Hello.")
    terminal.sees("> ")
    terminal.types(f"{UP}\r")
    terminal.sees("0 seen: Hello.")


def test_wide_characters_are_typed_and_shown(terminal: Terminal) -> None:
    terminal.types("größer 日本 😀?\r")
    terminal.sees("0 seen: größer 日本 😀?")


def test_ctrl_d_quits(model: Path, tmp_path: Path) -> None:
    terminal = Terminal(command(model, "--no-history"), environment(tmp_path, NO_COLOR="1"))
    terminal.sees(HELLO)
    terminal.types("Hello.\r")
    terminal.sees("0 seen: Hello.")
    terminal.sees(">")
    terminal.types(CTRL_D)
    assert terminal.ends() == 0
    assert not list(tmp_path.iterdir()), "--no-history keeps none"
    assert not COLOUR.search(terminal.raw), "NO_COLOR is obeyed"
    assert "\x1b[6n" not in terminal.raw, "what the terminal answers would be taken for typing"


def test_a_terminal_without_line_editing_will_do(model: Path, tmp_path: Path) -> None:
    terminal = Terminal(command(model), environment(tmp_path, TERM="dumb"))
    terminal.sees("> ")
    terminal.types("Hello.\n")
    terminal.sees("0 seen: Hello.")
    terminal.types("go on\n")
    terminal.sees("word0 word1")
    terminal.types(CTRL_C)
    terminal.sees("[stopped]")
    terminal.sees("> ")
    terminal.types(CTRL_C)
    terminal.sees("Ctrl-C again")
    terminal.sees("> ")
    terminal.types(CTRL_C)
    assert terminal.ends() == 0
    assert "\x1b" not in terminal.raw


def test_answers_may_go_to_a_file_while_questions_are_typed(model: Path, tmp_path: Path) -> None:
    script = f'"$@" > {tmp_path}/answers'
    terminal = Terminal(["/bin/sh", "-c", script, "sh", *command(model)], environment(tmp_path))
    terminal.sees("> ")
    terminal.types("Hello.\n")
    terminal.sees("> ")
    terminal.types(CTRL_D)
    assert terminal.ends() == 0
    assert (tmp_path / "answers").read_text() == "0 seen: Hello.\n"


# --- pipes ------------------------------------------------------------------------------------------------------------


@contextmanager
def started(model: Path, state: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """The program with pipes; killed when it is still there after SECONDS, so that no test waits for ever."""
    process = subprocess.Popen(
        command(model, *flags), env=environment(state), text=True, bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    watch = threading.Timer(SECONDS, process.kill)
    watch.start()
    try:
        with process:
            yield process
    finally:
        watch.cancel()
        process.kill()


def test_in_a_pipe_a_question_is_answered_before_the_next_one_comes(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path) as process:
        assert process.stdin and process.stdout and process.stderr
        for question in ("one", "two"):
            process.stdin.write(f"{question}\n")
            assert process.stdout.readline() == f"0 seen: {question}\n"
        process.stdin.close()
        assert process.wait(SECONDS) == 0
        assert "\x1b" not in process.stderr.read()


def test_interrupted_in_a_pipe_it_ends_with_status_130(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path, "--prompt=go on") as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(5) == "word0"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert process.stdout.read().endswith("\n")
        assert "Traceback" not in process.stderr.read()


def test_it_ends_quietly_when_nobody_reads_any_more(model: Path, tmp_path: Path) -> None:
    with started(model, tmp_path, "--prompt=on and on") as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(5) == "word0"
        process.stdout.close()
        assert process.wait(SECONDS) == 0
        assert process.stderr.read() == "0 programs compiled\n"
