"""Questions from the command line or from a pipe; answers, and nothing else, on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vflax import conversation as talk
from vflax.chat.console import Console
from vflax.chat.pictures import Picture
from vflax.chat.session import Session, question_parts
from vflax.chat.writing import Answer, OnText, Writing
from vflax.errors import UserError
from vflax.generate.processor import Processor
from vflax.generate.request import Answering, PromptTooLong, Sampling


@dataclass(frozen=True)
class Asked:
    """A question and its pictures."""

    question: str
    pictures: tuple[Picture, ...] = ()


def paired(questions: Sequence[str], pictures: Sequence[Picture]) -> list[Asked]:
    """The questions of --prompt with the pictures of --image.

    All pictures are of the only question; or each is of the question at its place; or the only one is of them all.

    Raises:
        UserError: the numbers do not fit.
    """
    if len(questions) == 1:
        return [Asked(questions[0], tuple(pictures))]
    if len(pictures) not in (0, 1, len(questions)):
        raise UserError(
            f"{len(questions)} --prompt and {len(pictures)} --image: give as many of each, or one --image for all, or "
            "none"
        )
    each = (
        [()] * len(questions)
        if not pictures
        else [(one,) for one in pictures] * (len(questions) // len(pictures))
    )
    return [Asked(question, own) for question, own in zip(questions, each, strict=True)]


class Printer:
    """Answers on stdout: their text as it comes, or a line of JSON for each."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        self._console, self._json = console, as_json
        self.on_text: OnText = (lambda text: None) if as_json else console.write

    def end(self, asked: Asked, answer: Answer) -> None:
        """An answer has ended."""
        if self._json:
            shown = [picture.facts() for picture in asked.pictures]
            facts = {"prompt": asked.question, "images": shown, "answer": answer.text, **answer.facts()}
            self._console.write(json.dumps(facts, ensure_ascii=False))
        self._console.end()
        if answer.finish == "length" and not self._json:
            self._console.note(f"note: the answer was cut after {answer.completion_tokens} tokens")


def one_shot(
    engine: Answering,
    processor: Processor,
    asked: Sequence[Asked],
    sampling: Sampling,
    system: str | None,
    printer: Printer,
) -> None:
    """Answer questions that know nothing of each other, all at once; printed in their order, each as it comes.

    Raises:
        UserError: one of them is too long, and none is answered; or the engine failed.
        KeyboardInterrupt: Ctrl-C.
        BrokenPipeError: nobody reads any more.
    """
    on_way: list[Writing] = []
    try:
        for number, one in enumerate(asked, 1):
            turn = talk.Turn("user", question_parts(one.question, len(one.pictures)))
            shown = [picture.image for picture in one.pictures]
            writing = Writing(processor.chat(talk.Conversation((turn,), system), shown), sampling)
            try:
                writing.begin(engine)
            except UserError as error:
                raise UserError(_said(number, one.question, error)) from None
            on_way.append(writing)
        for one, writing in zip(asked, on_way, strict=True):
            printer.end(one, writing.read(printer.on_text))
    except BaseException:
        for writing in on_way:
            writing.cancel()
        raise


def piped(session: Session, questions: Iterable[str], printer: Printer, console: Console) -> int:
    """Answer the questions of one conversation, each as it comes in.

    What is wrong with one is said on stderr; the next ones are asked all the same.

    Returns:
        the exit status: 0 when all were answered.

    Raises:
        UserError: there was no question.
        KeyboardInterrupt: Ctrl-C.
        BrokenPipeError: nobody reads any more.
    """
    status, number = 0, 0
    for question in map(str.strip, questions):
        if not question:
            continue
        number += 1
        asked = Asked(question, tuple(session.waiting))
        try:
            answer = session.ask(question, printer.on_text)
        except UserError as error:
            console.end_line()
            console.error(_said(number, question, error))
            status = 1
            continue
        if answer.finish == "cancelled":
            raise KeyboardInterrupt
        printer.end(asked, answer)
    if not number:
        raise UserError("no question came on stdin; give one there, or with --prompt")
    return status


def _said(number: int, question: str, error: UserError) -> str:
    remedy = (
        "; ask for less, or for a shorter answer (--max-tokens)" if isinstance(error, PromptTooLong) else ""
    )
    return f"question {number}, {question[:60]!r}: {error}{remedy}"
