"""Questions of yes or no: reading one from an answer, by each rule that numbers were published with. None: neither.

Rules differ on what a person would call clear: "The answer is yes." is other for MME's tool, yes for POPE's (as is
everything without "no"), and yes for VLMEvalKit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vflax.evaluate.predictions import Said
from vflax.evaluate.question import Question
from vflax.evaluate.result import Verdict

WORDS = ("yes", "no")
Rule = Callable[[str], str | None]

# What VQA's evaluation takes for punctuation (Antol et al., 2015), which VLMEvalKit has taken over.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# VQA's code gives the flag re.UNICODE, which is 32, where the number of replacements belongs: no more are made.
_PERIODS = 32
_PERIOD = re.compile(r"\.(?!\d)")


def mme_tool(text: str) -> str | None:
    """MME's calculation.py: "yes", or else "no", within the first four characters, whatever the case. It reads one line
    for each answer, so only an answer's first line."""
    head = text.split("\n")[0].lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else None


def pope_tool(text: str) -> str:
    """POPE's evaluate.py, and LLaVA's: up to the first full stop and without commas, one of the words No, no and not,
    between spaces, is no; all else is yes, so that nothing is left unread."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def vlmevalkit(text: str) -> str | None:
    """VLMEvalKit's YOrN_Extraction: one of the words, and not the other."""
    words = without_punctuation(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def strict(text: str) -> str | None:
    """The word alone, whatever the case, with nothing but spaces, a full stop or emphasis around it."""
    word = text.strip().strip("*_\"'`.! \n").lower()
    return word if word in WORDS else None


def without_punctuation(text: str) -> str:
    """VQA's processPunctuation: marks become spaces; next to a space, or where a number has a comma, they go."""
    found = text
    for mark in _MARKS:
        goes = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        found = found.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", found, count=_PERIODS)


def verdict(question: Question, said: Said | None, rule: Rule) -> Verdict:
    """On an answer. VLMEvalKit's rule takes the word that VLMEvalKit itself has read, where the predictions have it:
    what its words do not tell is told there by its judge."""
    text = said.text if said else None
    parsed: str | None = None
    if said and rule is vlmevalkit and said.extracted:
        parsed = next((word for word in WORDS if word == said.extracted.lower()), None)
    elif said:
        parsed = rule(said.text)
    why = "no prediction" if text is None else "neither yes nor no" if parsed is None else f"read {parsed}"
    score = float(parsed == question.answer)
    return Verdict(question.key, question.unit, question.groups, question.answer, text, parsed, score, why)
