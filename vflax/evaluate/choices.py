"""Reading the letter of an option from an answer to a multiple choice, by each rule that numbers were published with.
None: no letter was read. None of the rules guesses, where the tools that they are taken from may draw one at random.

Rules differ on what a person would call clear: "A. a cat" is A for all but `strict`, and a text that ends in "The
answer is A" is A for VLMEvalKit and nothing for LLaVA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# What VLMEvalKit has in place of a letter where an answer is a refusal, or says that no option fits.
NONE_FITS = "Z"

# pandas 2 and 3 read these cells of a table as missing (io.parsers.readers, STR_NA_VALUES), unless told otherwise.
PANDAS_MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip

_NO_ANSWER = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
# No end of a word is asked for: "the answer is black" is B.
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LLAVA_LETTERS = tuple("ABCDE")
# The full stop is not escaped there: any one character has to follow the letter.
_NAMED = re.compile(r"The answer is ([A-Z]).")


def vlmevalkit(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's can_infer: a letter among the last words, else the one option whose text is in the answer.

    Args:
        text: the answer.
        options: {letter: its text}.

    Returns:
        A letter of `options`; NONE_FITS for a refusal; None, for which VLMEvalKit would ask its judge.
    """
    return _letter(text, options) or _option_in(text, options)


def strict(text: str, options: Mapping[str, str]) -> str | None:
    """A capital letter alone, with nothing but spaces, brackets, a full stop, a colon or emphasis around it."""
    letter = text.strip(" \t\r\n*_\"'`()[].:")
    return letter if letter in options else None


def llava(text: str) -> str | None:
    """LLaVA's eval_science_qa.py: the letter alone; or in front, with a full stop and a space; or the only "The answer
    is X" with something behind it (`named`). It may be a letter that no option has, which is then wrong."""
    if text in _LLAVA_LETTERS:
        return text
    if text[:1] in _LLAVA_LETTERS and text[1:3] == ". ":
        return text[0]
    return named(text)


def named(text: str) -> str | None:
    """The X of "The answer is X.", where that stands exactly once (run_gpt3.py of ScienceQA). The full stop may be any
    character, as there, but one must follow."""
    found = _NAMED.findall(text)
    return found[0] if len(found) == 1 else None


def vlmevalkit_table(text: str, options: Mapping[str, str]) -> str | None:
    """`vlmevalkit` of a table's row, as its tools have it: pandas has read it first, an answer that counts as missing
    is "nan", and an option whose text does is lost."""
    return vlmevalkit("nan" if text in PANDAS_MISSING else text, pandas_options(options))


def pandas_options(options: Mapping[str, str]) -> dict[str, str]:
    """Those that are left when pandas has read them: an option whose text is "None" or "NA" is lost."""
    return {letter: text for letter, text in options.items() if text not in PANDAS_MISSING}


def _letter(text: str, options: Mapping[str, str]) -> str | None:
    """can_infer_option: a refusal; the only letter among the words, where it first stands within the last four; "Z"
    where there is no other; "answer is X"."""
    if _NO_ANSWER in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return NONE_FITS
    words = text.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
        return letters[0]
    if not letters and NONE_FITS in words:
        return NONE_FITS
    match = _ANSWER_IS.search(text)
    return match[1].upper() if match and match[1].upper() in options else None


def _option_in(text: str, options: Mapping[str, str]) -> str | None:
    """can_infer_text: the only option that the answer has in it, whatever the case. An answer more than twice as long
    as all options together is not searched."""
    answer = text.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, option in options.items() if option.lower() in answer]
    return found[0] if len(found) == 1 else None
