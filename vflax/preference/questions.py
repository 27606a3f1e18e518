"""Questions in LLaVA's format, with what is wanted of their answers, and what models answered.

questions.jsonl has a JSON object in each line: question_id, text, image (a file in the image folder; without one the
question is of no picture), category; and, where it is known,

    kind         what kind of answer is asked for, one of KINDS
    reference    a right answer
    options      of a choice, as a list; without it they are read from the text: "(a) red (b) blue", "A. red", ...
    objects      what is in the picture, as a list
    context      what a judge that sees no picture is told of it

Answers are LLaVA's (question_id, text), those of vflax.evaluate (key, prediction) or what vflax.chat --json printed
(prompt, images, answer).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from vflax.errors import UserError
from vflax.evaluate.files import Row, as_text, json_lines, keyed, need
from vflax.tokenizer import replace_surrogates
from vflax.values import NAME, TEXT, Kind, wrong

KINDS = ("word", "number", "yes_no", "option", "sentence", "long")
_FIELDS = {
    "image": NAME.or_null(),
    "text": NAME,
    "category": TEXT.or_null(),
    "kind": Kind(f"one of {', '.join(KINDS)}", lambda value: value in KINDS).or_null(),
    "reference": TEXT.or_null(),
    "options": NAME.listed().or_null(),
    "objects": NAME.listed().or_null(),
    "context": TEXT.or_null(),
}
TIE = "tie"  # a verdict beside the names of models
_OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-Za-z])[).:][ \t]+")


@dataclass(frozen=True)
class ChatQuestion:
    """See the module's head; "" or () where a file says nothing. options: {letter from "a" on: text}."""

    key: str
    text: str
    image: str = ""
    category: str = ""
    kind: str = ""
    reference: str = ""
    options: Mapping[str, str] | None = None
    objects: tuple[str, ...] = ()
    context: str = ""


@dataclass(frozen=True)
class Said:
    """An answer. finish: why it ended ("length": it was cut), "" where a file does not tell."""

    text: str
    finish: str = ""


@dataclass(frozen=True)
class Model:
    """What one model answered. answers: in the questions' order; sha256: of them, whatever file they are in."""

    name: str
    answers: tuple[Said, ...]
    sha256: str


def read_questions(path: Path) -> list[ChatQuestion]:
    """All questions of a file, in its order.

    Raises:
        UserError: naming file, line and key, where it cannot be read, a key is missing, wrong, or there twice, or a
            choice has no options.
    """
    rows = json_lines(path)
    found = []
    for line, row in enumerate(rows, 1):
        where = f"{path}, line {line}"
        need(row, ("question_id", "text"), where)
        if problems := wrong(row, _FIELDS):
            raise UserError(f"{where}: {'; '.join(problems.values())}")
        found.append(_question(row, where))
    keyed(rows, lambda row: as_text(row["question_id"]), path)
    return found


def _question(row: Row, where: str) -> ChatQuestion:
    texts = {name: row.get(name) or "" for name in ("image", "category", "kind", "reference", "context")}
    options = None
    if texts["kind"] == "option":
        listed = row.get("options") or list(options_in(row["text"]))
        if len(listed) < 2:
            raise UserError(
                f'{where}: kind is option, and there are none in the text, such as "(a) red (b) blue"; list them '
                "under options"
            )
        options = {chr(ord("a") + number): text for number, text in enumerate(listed)}
    return ChatQuestion(
        as_text(row["question_id"]),
        row["text"],
        options=options,
        objects=tuple(row.get("objects") or ()),
        **texts,
    )


def options_in(text: str) -> Iterator[str]:
    """The texts of the options that a question lists with letters from A on, as "(a) red (b) blue" or as lines
    "A. red"; the last one ends with its line."""
    marks = list(_OPTION.finditer(text))
    first = next((n for n, mark in enumerate(marks) if mark[1] in "aA"), len(marks))
    run: list[re.Match[str]] = []
    for mark in marks[first:]:
        if mark[1].lower() != chr(ord("a") + len(run)):
            break
        run.append(mark)
    for mark, behind in zip_longest(run, run[1:]):
        end = behind.start() if behind else len(text)
        yield text[mark.end() : end].strip().split("\n")[0].strip()


def read_models(given: Sequence[str], questions: Sequence[ChatQuestion], *, least: int = 1) -> list[Model]:
    """The models of NAME=FILE arguments.

    Args:
        given: the arguments.
        questions: which all of them must have answered.
        least: how many models are wanted, at least.

    Raises:
        UserError: an argument, a file or an answer in it is not as expected, or one is missing.
    """
    paths: dict[str, Path] = {}
    for argument in given:
        name, sign, file = argument.partition("=")
        if not (sign and name and file):
            raise UserError(f"{argument}: expected NAME=FILE, a model's name and the file of its answers")
        if name == TIE:
            raise UserError(f"{argument}: {TIE} is what an equal pair is called; give the model another name")
        if name in paths:
            raise UserError(f"{argument}: {name} is there twice; give each model a name of its own")
        paths[name] = Path(file)
    if len(paths) < least:
        raise UserError(f"expected at least {least} models as NAME=FILE, found {len(paths)}")
    return [_model(name, read_answers(path, questions), questions) for name, path in paths.items()]


def _model(name: str, answers: Sequence[Said], questions: Sequence[ChatQuestion]) -> Model:
    said = [(question.key, own.text) for question, own in zip(questions, answers, strict=True)]
    return Model(name, tuple(answers), hashlib.sha256(repr(said).encode()).hexdigest())


def read_answers(path: Path, questions: Sequence[ChatQuestion]) -> list[Said]:
    """A model's answers in the questions' order; joined by id, or of vflax.chat's by prompt and picture.

    Raises:
        UserError: naming the file, where it is of no known format, answers another question, one twice, or not all.
    """
    rows = json_lines(path)
    known = {question.key: question for question in questions}
    key_of, text_name, finish_name = _format(rows[0], questions, path)
    found: dict[str, Said] = {}
    for line, row in enumerate(rows, 1):
        where = f"{path}, line {line}"
        key = key_of(row, where)
        need(row, (text_name,), where)
        if key not in known:
            raise UserError(f"{where}: {key} is none of the questions; answers of another file?")
        if key in found:
            raise UserError(f"{where}: {key} is answered twice; answers of two runs? Keep one of them")
        if row[text_name] is None:  # too long for the model, as vflax.evaluate notes it
            continue
        if not isinstance(row[text_name], str):
            raise UserError(f"{where}: {TEXT.problem(text_name, row[text_name])}")
        found[key] = Said(replace_surrogates(row[text_name]).strip(), as_text(row.get(finish_name)))
    if missing := [question.key for question in questions if question.key not in found]:
        raise UserError(
            f"{path}: {len(missing):,} of {len(questions):,} questions have no answer, the first: {missing[0]}; "
            "answer them too, or name a file of fewer questions"
        )
    return [found[question.key] for question in questions]


_KeyOf = Callable[[Row, str], str]


def _format(first: Row, questions: Sequence[ChatQuestion], path: Path) -> tuple[_KeyOf, str, str]:
    """What gives a row's key, and the names of its text and of why it ended."""
    if "question_id" in first:
        return _by("question_id"), "text", "finish"
    if "key" in first:
        return _by("key"), "prediction", "finish"
    if "prompt" in first and "answer" in first:
        return _by_picture(questions), "answer", "finish_reason"
    raise UserError(
        f"{path}: expected LLaVA's answers (question_id, text), those of vflax.evaluate (key, prediction) or of "
        f"vflax.chat --json (prompt, images, answer); it has {', '.join(first) or 'nothing'}"
    )


def _by(name: str) -> _KeyOf:
    def key_of(row: Row, where: str) -> str:
        need(row, (name,), where)
        return as_text(row[name])

    return key_of


def _by_picture(questions: Sequence[ChatQuestion]) -> _KeyOf:
    """Of vflax.chat's lines: the question with that text whose image the picture's path ends in."""
    by_text: dict[str, list[ChatQuestion]] = {}
    for question in questions:
        by_text.setdefault(question.text.strip(), []).append(question)

    def key_of(row: Row, where: str) -> str:
        need(row, ("prompt", "images"), where)
        shown = [PurePath(picture["path"]).parts for picture in _pictures(row, where)]
        fitting = [
            question.key
            for question in by_text.get(str(row["prompt"]).strip(), ())
            if [parts[-len(PurePath(question.image).parts) :] for parts in shown]
            == ([PurePath(question.image).parts] if question.image else [])
        ]
        if len(fitting) != 1:
            raise UserError(
                f"{where}: {len(fitting)} of the questions have this prompt and picture, expected one; where questions "
                "are alike, answer them with python -m vflax.preference answer, which writes their ids"
            )
        return fitting[0]

    return key_of


def _pictures(row: Row, where: str) -> list[dict[str, Any]]:
    pictures = row["images"]
    if not isinstance(pictures, list) or not all(isinstance(one, dict) and "path" in one for one in pictures):
        raise UserError(f"{where}: images is not as vflax.chat --json prints it; print it again")
    return pictures
