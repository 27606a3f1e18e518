"""The conversation at a terminal: questions, commands, and what is said between them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vflax.chat import pictures, record, settings
from vflax.chat.console import Console
from vflax.chat.session import Session
from vflax.chat.terminal import Arguments, Reader
from vflax.chat.writing import Answer, OnText
from vflax.errors import UserError
from vflax.generate.request import PromptTooLong
from vflax.tokenizer import replace_surrogates

_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)

KEYS = """\
A picture that is dragged into the terminal, or a line of nothing but paths of
pictures, goes with the next question. With a space in front, what looks like a
command is a question. Alt-Enter begins a new line of a question.
Ctrl-C stops an answer, or clears the line; twice on an empty one, it quits, as
Ctrl-D does."""


class Chat:
    """A person at a terminal and a model."""

    def __init__(self, session: Session, console: Console, model: str) -> None:
        """
        Args:
            session: to go on with.
            console: where answers and notes go.
            model: what the model was called on the command line.
        """
        self._session, self._console, self._model = session, console, model
        self._written: set[Path] = set()  # files that /save may write again

    def run(self, reader: Reader) -> None:
        """Until the person quits.

        Raises:
            BrokenPipeError: nobody reads the answers any more.
        """
        hinted = False
        while True:
            try:
                line = reader.read(self._prompt())
                hinted = False
                self.take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if hinted:
                    return
                hinted = True
                self._console.note("Ctrl-C again, or Ctrl-D, quits.")

    def take(self, line: str) -> None:
        """A line that was typed: pictures, a command or a question.

        Raises:
            EOFError: it was /quit.
        """
        try:
            if paths := pictures.dragged(line):
                self._add(paths)
            elif match := _COMMAND.fullmatch(line):
                self._command(match[1].lower(), (match[2] or "").strip())
            elif question := replace_surrogates(line).strip():
                self._answer(lambda on_text: self._session.ask(question, on_text))
        except UserError as error:
            self._console.error(error)
            if isinstance(error, PromptTooLong):
                self._console.note(f"[the question was taken back; {self._ways_out()}]")

    def _ways_out(self) -> str:
        """What makes room for a question that was too long."""
        ways = ["/reset begins anew"]
        if self._session.waiting:
            ways.append("/image - takes a picture back")
        if self._session.sampling.max_tokens is not None:
            ways.append("/set max_tokens=N allows a shorter answer")
        return ", ".join(ways)

    def _prompt(self) -> str:
        waiting = len(self._session.waiting)
        return f"[{waiting} picture{'s' if waiting > 1 else ''}] > " if waiting else "> "

    def _answer(self, ask: Callable[[OnText], Answer]) -> None:
        answer = ask(self._console.write)
        if answer.text:
            self._console.end()
        if answer.finish == "cancelled":
            how = "stopped" if answer.text else "stopped before it began: the conversation is as it was"
            self._console.note(f"[{how}]")
        elif answer.finish == "length":
            self._console.note(f"[cut after {answer.completion_tokens} tokens]")
        elif not answer.text:
            self._console.note("[an empty answer]")
        self._console.note()

    def _add(self, paths: list[Path]) -> None:
        """All of them, or none where one is broken."""
        found = [pictures.read(path) for path in paths]
        self._session.add(found)
        for picture in found:
            width, height = picture.size
            self._console.note(f"[{picture.path.name}, {width} x {height}: goes with the next question]")

    # --- commands -------------------------------------------------------------------------------------------------

    def _command(self, name: str, argument: str) -> None:
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f"did you mean /{close[0]}? " if close else ""
            raise UserError(
                f"/{name}: no such command; {meant}/help lists them. To ask this, put a space in front"
            )
        command = COMMANDS[name]
        if argument and not command.argument:
            raise UserError(
                f"/{name} {argument}: /{name} takes nothing after it. To ask this, put a space in front"
            )
        command.run(self, argument)

    def reset(self, argument: str) -> None:
        self._session.reset()
        self._console.note("[a new conversation; the model and the settings stay]")

    def image(self, argument: str) -> None:
        waiting = self._session.waiting
        if not argument:
            raise UserError("/image: name a picture, as in /image cat.png")
        if argument != "-":
            self._add(pictures.named(argument))
        elif waiting:
            self._console.note(f"[{waiting.pop().path.name} does not go with the next question]")
        else:
            raise UserError("/image -: no picture waits for a question; /reset forgets those of earlier ones")

    def images(self, argument: str) -> None:
        rows = [
            (picture, f"question {number}")
            for number, one in enumerate(self._session.exchanges, 1)
            for picture in one.pictures
        ]
        rows += [(picture, "goes with the next question") for picture in self._session.waiting]
        for number, (picture, where) in enumerate(rows, 1):
            width, height = picture.size
            self._console.note(f"{number}  {picture.path}  {width} x {height}  {where}")
        if not rows:
            self._console.note("[no pictures yet: /image PATH, or drag one here]")

    def system(self, argument: str) -> None:
        if argument:
            text = argument[1:-1] if re.fullmatch(r'"[^"]*"', argument) else argument
            self._session.system = None if argument == "-" else replace_surrogates(text)
        own = self._session.system is None
        text = self._session.own_system if self._session.system is None else self._session.system
        self._console.note(f"system text{' (of the template)' if own else ''}: {text or '(none)'}")

    def set(self, argument: str) -> None:
        if argument:
            self._session.sampling = settings.changed(self._session.sampling, argument)
        self._console.note(settings.shown(self._session.sampling))

    def retry(self, argument: str) -> None:
        if self._session.sampling.temperature == 0 and self._session.exchanges:
            self._console.note(
                "[temperature is 0: what is asked alike is answered alike; /set temperature=0.7]"
            )
        self._answer(self._session.retry)

    def save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save: name a file, as in /save talk.json or /save talk.md")
        path = pictures.file_of(argument).absolute()
        record.save(self._session, path, self._model, replace=path in self._written)
        self._written.add(path)
        self._console.note(f"[saved: {path}]")

    def load(self, argument: str) -> None:
        if not argument:
            raise UserError("/load: name a file that /save wrote, as in /load talk.json")
        saved = record.load(pictures.file_of(argument))
        self._session.restore(saved.exchanges, saved.system, saved.sampling)
        count = len(saved.exchanges)
        self._console.note(f"[{count} question{'' if count == 1 else 's'} and answers, and their settings]")
        for one in saved.exchanges[-1:]:
            self._console.note(f"> {one.question}\n{one.answer.text}\n")

    def help(self, argument: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"{command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
        self._console.note("\n".join(lines) + "\n\n" + KEYS)

    def quit(self, argument: str) -> None:
        raise EOFError


class Command(NamedTuple):
    """usage: name and argument as /help shows them; run: is given what follows the name."""

    usage: str
    help: str
    run: Callable[[Chat, str], None]

    @property
    def argument(self) -> bool:
        return " " in self.usage


COMMANDS = {
    "image": Command("/image PATH", "add a picture to the next question; /image - takes it back", Chat.image),
    "images": Command("/images", "list the pictures of the conversation", Chat.images),
    "system": Command(
        "/system TEXT", 'show or change the system text; - the model\'s own, "" none', Chat.system
    ),
    "set": Command("/set NAME=VALUE", "show or change how answers are chosen", Chat.set),
    "retry": Command("/retry", "another answer to the last question", Chat.retry),
    "reset": Command("/reset", "begin a new conversation", Chat.reset),
    "save": Command("/save FILE", "write the conversation: JSON, or Markdown to a .md", Chat.save),
    "load": Command("/load FILE", "go on with a conversation that was saved as JSON", Chat.load),
    "help": Command("/help", "this", Chat.help),
    "quit": Command("/quit", "end", Chat.quit),
}


def arguments() -> Arguments:
    """What Tab completes after each command."""
    words: dict[str, Callable[[], list[str]] | None] = {f"/{name}": (lambda: []) for name in COMMANDS}
    for name in ("image", "save", "load"):
        words[f"/{name}"] = None
    words["/set"] = lambda: [f"{name}=" for name in settings.SETTINGS]
    return words
