"""Reading answers to MMMU's questions, by each rule that numbers were published with: that of its eval_utils.py, which
draws an option where it finds none; that of its main_eval_only.py; VLMEvalKit's; and one without mercy.
"""

from __future__ import annotations

import ast
import random
import re
import string
from collections.abc import Iterable, Mapping

from vflax.evaluate import choices
from vflax.evaluate.predictions import Said
from vflax.evaluate.question import Question

Found = str | float
Read = tuple[str | None, bool, str]
"""What was read from an answer, None where that is nothing; whether it is right; and why, in a few words."""

_LETTERS = dict.fromkeys(string.ascii_uppercase, "")

# Stripped one after the other, so that "B.'" keeps its full stop.
_MARKS = ",.!?;:'"
_BRACKETS, _SPACES = "({})", " {} "
# The text of an option counts in answers of more words than this.
_WORDS = 5

_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_LAST_SIGN = "="  # in the last line alone
_NO_ANSWER = frozenset(":,.!?;'")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_DECIMALS = 2


def choice(text: str, options: Mapping[str, str]) -> str | None:
    """The option that is named last: as "(A)"; or else as A between spaces; or else, in an answer of more than five
    words, by its text.

    Args:
        text: the answer.
        options: {letter: its text}.
    """
    for mark in _MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form in (_BRACKETS, _SPACES):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) > _WORDS:
        places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    return None


def open_answers(text: str) -> list[Found]:
    """All that an answer to an open question may mean: what follows the last of words like "is" in each line, and the
    numbers in there; the whole of it where no line has such a word. Strings are in lower case."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    tails = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for sign in (*_SIGNS, _LAST_SIGN) if number == len(lines) else _SIGNS:
            if sign in line:
                tail = line.split(sign)[-1].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in _NO_ANSWER:
            tails.append(shortest)
    tails = tails or [text]
    numbers = [found for tail in tails for pattern in _NUMBERS for found in re.findall(pattern, tail)]
    return list(dict.fromkeys(value for part in (*tails, *numbers) for value in normalised(part)))


def normalised(text: str) -> list[Found]:
    """A number to two decimals; or the text in lower case, which a single letter has with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), _DECIMALS)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def right(found: Iterable[Found], answers: Iterable[str]) -> bool:
    """Whether one of the found strings has a right answer in it, or one of the found numbers is one."""
    wanted = [value for answer in answers for value in normalised(answer)]
    strings = [value for value in wanted if isinstance(value, str)]
    return any(
        any(string in one for string in strings) if isinstance(one, str) else one in wanted for one in found
    )


def strictly_right(text: str, answers: Iterable[str]) -> bool:
    """Whether an answer to an open question is one of the right ones and nothing else, but for a full stop."""
    found = normalised(text.strip().removesuffix("."))
    return any(found == normalised(answer) for answer in answers)


def literal_list(text: str) -> list[str]:
    """The texts of a list that is written as Python does; none where it is something else."""
    try:
        value = ast.literal_eval(text) if text.startswith("[") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return []
    return [str(part) for part in value] if isinstance(value, list) else []


def right_answers(answer: str) -> list[str]:
    """One, or several, which the release writes as a list."""
    return literal_list(answer) or [answer]


# --- rules; options are {} where they are not known, and None of an open question ------------------------------------


def official(question: Question, said: Said, draws: random.Random) -> Read:
    """main_parse_and_eval.py. What it has read before, as parsed_output.json tells, stands."""
    answers = right_answers(question.answer)
    if question.options is None:
        found = open_answers(said.text)
        parsed = "; ".join(map(str, found)) or None
        return parsed, right(found, answers), f"read {parsed}"
    read = choice(said.text, question.options)
    before = said.extracted if said.extracted in question.options else None
    if read is None:
        drawn = before or draws.choice(list(question.options))
        return None, drawn in answers, f"no option; drew {drawn}"
    read = before or read
    return read, read in answers, f"read {read}"


def letters_alone(question: Question, said: Said, draws: random.Random) -> Read:
    """main_eval_only.py: answers to multiple choices are taken as they stand, letters or not; open ones are read."""
    if question.options is None:
        return official(question, said, draws)
    if said.text not in (question.options or _LETTERS):
        return None, False, "no letter of an option"
    return said.text, said.text in right_answers(question.answer), f"read {said.text}"


def strict(question: Question, said: Said, draws: random.Random) -> Read:
    """A letter alone, or a right answer alone."""
    answers = right_answers(question.answer)
    if question.options is None:
        text = said.text.strip()
        return text or None, strictly_right(text, answers), f"read {text}"
    letter = choices.strict(said.text, question.options or _LETTERS)
    return letter, letter in answers, f"read {letter}" if letter else "no letter alone"


def vlmevalkit(question: Question, said: Said, draws: random.Random) -> Read:
    """can_infer, or what VLMEvalKit found where the file says so. Once answered, an open question is made a choice
    between its right answer, which is A, and others; if that answer is itself a letter, it is this one that is looked
    for, which no option has unless it is A or B (multiple_choice.py, MMMU_preproc and mcq_vanilla_eval)."""
    options, answer = choices.pandas_options(question.options or {}), question.answer
    if "A" not in options:
        options = {**options, "A": answer, "B": "Other Answers"}
    answer = answer if answer in _LETTERS else "A"
    letter = choices.vlmevalkit_table(said.text, dict(sorted(options.items())))
    why = f"read {letter}" if letter else "no option"
    if said.extracted not in ("0", "1"):
        return letter, letter == answer, why
    hit = said.extracted == "1"
    return letter or (answer if hit else None), hit, f"{why}; hit {said.extracted} in the file"
