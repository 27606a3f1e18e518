"""`--prompt` and pipes: answers on stdout and nothing else there; what is wrong is said before the model is opened."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import pytest

from tests.chat import small, with_fake
from tests.generate.fake_engine import FakeEngine
from vflax.chat.__main__ import main


class Command:
    """The command line, in this process. engines: those that it opened."""

    def __init__(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._model, self._patch, self._capsys = model, monkeypatch, capsys
        self.engines: list[FakeEngine] = []
        self.out = self.err = ""

        def open_engine(args, say):  # type: ignore[no-untyped-def]
            engine, model = with_fake.open_engine(args, say)
            self.engines.append(engine)
            return engine, model

        monkeypatch.setitem(sys.modules, "vflax.generate.open", None)  # so that it is put back
        with_fake.install()
        monkeypatch.setattr(sys.modules["vflax.generate.open"], "open_engine", open_engine)

    def __call__(self, *flags: str, stdin: str | bytes = "") -> int:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        status = main([f"--model={self._model}", *flags])
        self.out, self.err = self._capsys.readouterr()
        return status

    def refused(self, *flags: str, stdin: str = "") -> str:
        """The last line of stderr of a command that must fail with nothing on stdout."""
        assert self(*flags, stdin=stdin) == 1 and self.out == ""
        line = self.err.splitlines()[-1]
        assert line.startswith("error: ")
        return line


@pytest.fixture
def command(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(model, monkeypatch, capsys)


@pytest.fixture
def shown(tmp_path: Path) -> list[Path]:
    return [small.picture(tmp_path / f"{number}.png", number) for number in range(2)]


def test_a_prompt_is_answered_about_all_its_pictures(command: Command, shown: list[Path]) -> None:
    assert command("--prompt=What?", *(f"--image={path}" for path in shown)) == 0
    assert command.out == "2 seen: What?\n"


def test_many_prompts_are_asked_at_once_and_answered_in_order(command: Command, shown: list[Path]) -> None:
    pairs = [flag for number, path in enumerate(shown) for flag in (f"--prompt=q{number}", f"--image={path}")]
    assert command(*pairs, "--system=Be brief.") == 0
    assert command.out == "1 seen: q0\n1 seen: q1\n"
    [engine] = command.engines
    prompts = [prompt for prompt, _ in engine.submitted]
    assert all(small.read_by(engine.processor, prompt).startswith("Be brief.") for prompt in prompts)
    assert prompts[0].images[0].tobytes() != prompts[1].images[0].tobytes()


def test_one_picture_serves_all_prompts(command: Command, shown: list[Path]) -> None:
    assert command("--prompt=a", "--prompt=b", "--prompt=c", f"--image={shown[0]}") == 0
    assert command.out == "1 seen: a\n1 seen: b\n1 seen: c\n"


def test_pictures_and_prompts_must_fit(command: Command, shown: list[Path]) -> None:
    three = ("--prompt=a", "--prompt=b", "--prompt=c")
    assert "3 --prompt and 2 --image" in command.refused(*three, *(f"--image={path}" for path in shown))
    assert not command.engines


def test_json_is_a_line_for_each_answer(command: Command, shown: list[Path]) -> None:
    assert command("--prompt=größer 😀?", "--prompt=b", f"--image={shown[0]}", "--json") == 0
    first, second = map(json.loads, command.out.splitlines())
    seconds = first.pop("seconds")
    tokens = first.pop("usage")
    digest = hashlib.sha256(shown[0].read_bytes()).hexdigest()
    assert first == {
        "prompt": "größer 😀?", "images": [{"path": str(shown[0]), "sha256": digest}],
        "answer": "1 seen: größer 😀?", "finish_reason": "stop", "seed": 0,
    }  # fmt: skip
    assert seconds >= 0 and set(tokens) == {"prompt_tokens", "cached_tokens", "completion_tokens"}
    assert second["prompt"] == "b" and second["answer"] == "1 seen: b"


def test_sampling_flags_reach_the_engine(command: Command) -> None:
    assert command("--prompt=What?", "--temperature=0.5", "--seed=3", "--max-tokens=5", "--stop=zzz") == 0
    _, sampling = command.engines[0].submitted[0]
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.5, 3, 5)
    assert sampling.stop == ("zzz",) and "cut after 5 tokens" in command.err


def test_each_line_of_a_pipe_is_a_question_of_one_conversation(command: Command, shown: list[Path]) -> None:
    assert command(f"--image={shown[0]}", stdin="one\n\n  two  \r\nthree") == 0
    assert command.out == "1 seen: one\n1 seen: two\n1 seen: three\n"
    last = small.read_by(command.engines[0].processor, command.engines[0].submitted[-1][0])
    assert "one ASSISTANT: 1 seen: one USER: two ASSISTANT: 1 seen: two USER: three" in last


def test_the_whole_input_is_one_question_when_asked_for(command: Command) -> None:
    assert command("--stdin=whole", stdin="one\ntwo\n") == 0
    assert command.out == "0 seen: one\ntwo\n"


def test_in_a_pipe_nothing_is_a_command_or_a_picture(command: Command, shown: list[Path]) -> None:
    assert command(stdin=f"/reset\n{shown[0]}\n") == 0
    assert command.out == f"0 seen: /reset\n0 seen: {shown[0]}\n"


def test_json_in_a_pipe_has_each_pictures_only_once(command: Command, shown: list[Path]) -> None:
    assert command("--json", f"--image={shown[0]}", stdin="one\ntwo\n") == 0
    assert [len(json.loads(line)["images"]) for line in command.out.splitlines()] == [1, 0]


def test_a_line_that_is_too_long_is_said_and_the_others_are_answered(command: Command) -> None:
    assert command("--max-length=250", stdin="one\n" + "long " * 200 + "\nthree\n") == 1
    assert command.out == "0 seen: one\n0 seen: three\n"
    assert "error: question 2, 'long long" in command.err and "more than 250" in command.err


def test_a_prompt_that_is_too_long_is_named_and_none_is_answered(command: Command) -> None:
    said = command.refused("--max-length=250", "--prompt=one", f"--prompt={'long ' * 200}")
    assert "question 2, 'long long" in said and "more than 250" in said and "--max-tokens" in said


def test_bytes_that_are_no_text_do_no_harm(command: Command) -> None:
    assert command(stdin=b"caf\xe9?\n") == 0
    assert command.out == "0 seen: caf\N{REPLACEMENT CHARACTER}?\n"


def test_a_pipe_without_a_question_is_an_error(command: Command) -> None:
    assert "no question came on stdin" in command.refused(stdin="\n \n")


def test_a_picture_that_is_not_there_is_named_before_the_model_is_opened(command: Command) -> None:
    assert "--image=none.png: cannot be read (No such file" in command.refused(
        "--image=none.png", "--prompt=a"
    )
    assert not command.engines


def test_a_setting_out_of_range_is_named_before_the_model_is_opened(command: Command) -> None:
    assert "temperature=9.0: from 0" in command.refused("--temperature=9", "--prompt=a")
    assert not command.engines


def test_a_model_that_is_not_there_is_named(command: Command) -> None:
    assert "--model=nowhere" in command.refused("--model=nowhere", "--prompt=a")


def test_questions_come_from_one_place(command: Command) -> None:
    assert "--stdin and --prompt do not go together" in command.refused("--prompt=a", "--stdin=lines")


def test_the_engine_is_closed_at_the_end(command: Command) -> None:
    command("--prompt=a")
    assert not command.engines[0]._open
