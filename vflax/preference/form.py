"""The form of an answer: how long it is, whether it ends, repeats itself, and is what was asked for.

The rules are ours, for English. All look at form alone: an answer may follow what was asked for and be wrong, or be
right at the wrong length, which `is_right` is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise

from vflax.evaluate import yes_no
from vflax.preference.questions import ChatQuestion, Said

# Words of an answer where length or detail is asked for and no number of words is named.
LONG_WORDS = 40
# With so many words an answer is prose, which has to end with a mark.
_PROSE = 5
_ENDS = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]*_`]*$")
# What ends a sentence, and what is no end though it has a full stop: an abbreviation, an initial between or before
# names, the number of a list.
_BREAK = re.compile(r"(?<=[.!?\u2026])([\"'\u201d\u2019)\]]*)\s+|\n+")
_SHORT = re.compile(
    r"(?:\b(?i:e\.g|i\.e|vs|cf|mr|mrs|ms|dr|prof|st|fig|approx)|\b[A-Z](?:\.[A-Z])+|(?:^|\b[A-Z]\S*\s)[A-HJ-Z]|^\d{1,2})\.$"
)
_AROUND = " \t\r\n.,:;!?\"'`*_()[]\u201c\u201d\u2018\u2019"
_ASKED_WORDS = re.compile(r"\b(?:at least|more than|no fewer than|minimum of) (\d+) words\b", re.I)
_FIGURES = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?")
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
# Copies in a row, and words in all, from which a repetition is a loop; the longest part that is looked for.
_COPIES, _LOOP_WORDS, _LONGEST_PART = 3, 6, 60


def words(text: str) -> list[str]:
    """What spaces part."""
    return text.split()


def sentences(text: str) -> list[str]:
    """What ends with a full stop, an exclamation or question mark, or its line; not after an abbreviation or an
    initial, nor after the number of a list."""
    found: list[str] = []
    begin = 0
    for gap in [*_BREAK.finditer(text), None]:
        end = gap.start() + len(gap[1] or "") if gap else len(text)
        piece = text[begin:end].strip()
        if gap and "\n" not in gap[0] and _SHORT.search(piece):
            continue
        if piece:
            found.append(piece)
        begin = gap.end() if gap else end
    return found


def is_unfinished(said: Said) -> bool:
    """Cut at a limit of tokens, or prose of at least five words without a mark at its end."""
    return said.finish == "length" or (len(words(said.text)) >= _PROSE and not _ENDS.search(said.text))


def is_loop(text: str) -> bool:
    """Whether the same words come three times or more in a row, six words at least in all; or one sentence of at least
    three words three times."""
    found = [bare(word) for word in words(text)]
    for part in range(1, min(len(found) // _COPIES, _LONGEST_PART) + 1):
        run = 0
        for one, other in zip(found, found[part:], strict=False):
            run = run + 1 if one == other else 0
            if run >= (_COPIES - 1) * part and run + part >= _LOOP_WORDS:
                return True
    said = [tuple(map(bare, words(sentence))) for sentence in sentences(text)]
    return any(len(own) >= 3 and said.count(own) >= _COPIES for own in set(said))


def bare(text: str) -> str:
    """Without case, and without marks around it."""
    return text.strip(_AROUND).casefold()


def number(text: str) -> float | None:
    """The number that a text is, in figures or, up to ninety-nine, as a word; None: it is something else."""
    own = bare(text)
    if _FIGURES.fullmatch(text.strip(_AROUND)):
        return float(own.replace(",", "").removesuffix("%"))
    tens, _, unit = own.replace(" ", "-").partition("-")
    if tens in _TENS and (not unit or unit in _UNITS[1:10]):
        return float(_TENS[tens] + (_UNITS.index(unit) if unit else 0))
    return float(_UNITS.index(own)) if own in _UNITS else None


# --- is it what was asked for -----------------------------------------------------------------------------------------


def _is_word(question: ChatQuestion, text: str) -> bool:
    return len(words(bare(text))) == 1


def _is_number(question: ChatQuestion, text: str) -> bool:
    return number(text) is not None


def _is_yes_or_no(question: ChatQuestion, text: str) -> bool:
    return yes_no.strict(text) is not None


def _is_option(question: ChatQuestion, text: str) -> bool:
    return option(question, text) is not None


def _is_sentence(question: ChatQuestion, text: str) -> bool:
    """With a mark at its end; a word or two with a full stop are no sentence."""
    return len(sentences(text)) == 1 and len(words(text)) >= 3 and bool(_ENDS.search(text))


def _is_long(question: ChatQuestion, text: str) -> bool:
    return len(words(text)) >= wanted_words(question)


FOLLOWS: Mapping[str, Callable[[ChatQuestion, str], bool]] = {
    "word": _is_word,
    "number": _is_number,
    "yes_no": _is_yes_or_no,
    "option": _is_option,
    "sentence": _is_sentence,
    "long": _is_long,
}
"""{kind: whether an answer is what such a question asks for}."""


def wanted_words(question: ChatQuestion) -> int:
    """Of a long answer, at least: as many as the question names, else LONG_WORDS."""
    named = _ASKED_WORDS.search(question.text)
    return int(named[1]) if named else LONG_WORDS


def option(question: ChatQuestion, text: str) -> str | None:
    """The letter of the option that an answer is: its letter, its text, or both, with nothing else."""
    own = bare(text)
    for letter, listed in (question.options or {}).items():
        if own in (letter, bare(listed)):
            return letter
        if own.startswith(letter) and re.fullmatch(rf"{letter}[).:]?\s+{re.escape(bare(listed))}", own):
            return letter
    return None


# --- is it right ------------------------------------------------------------------------------------------------------


def is_right(question: ChatQuestion, text: str) -> bool | None:
    """Whether the reference of a question for a word, a number, yes or no, or an option stands in an answer as whole
    words, whatever is around it; of a choice also its letter alone. None: there is no such reference.

    Of a chat's longer answers this is a generous reading ("not red, but blue" has red in it).
    """
    if question.kind not in ("word", "number", "yes_no", "option") or not bare(question.reference):
        return None
    if question.kind == "option":
        right, read = option(question, question.reference), option(question, text)
        if read is not None:
            return read == right
        if right is not None:
            return _stands_in(bare((question.options or {})[right]), text)
    if question.kind == "number" and (wanted := number(question.reference)) is not None:
        said = [bare(word) for word in words(text)]
        return any(number(own) == wanted for own in [*said, *map(" ".join, pairwise(said))])
    if question.kind == "yes_no":
        read = next((own for own in map(bare, words(text)) if own in yes_no.WORDS), None)
        return read == bare(question.reference)
    return _stands_in(bare(question.reference), text)


def _stands_in(wanted: str, text: str) -> bool:
    """Whether words stand in a text one after the other."""
    said, own = [bare(word) for word in words(text)], [bare(word) for word in words(wanted)]
    return any(said[n : n + len(own)] == own for n in range(len(said) - len(own) + 1))
