"""What a reply must be: questions and answers without a trace of how they were made, or the name of what is wrong.

A reply of type conversation or complex is made of blocks, a line `===` between them:

    Question:
    text
    ===
    Answer:
    text

The text may begin on the line of its label, and a `===` may close the last block. A reply of type detail is plain
paragraphs. Nothing is mended: a reply is taken as it is or rejected.

    whole reply     empty, refused, truncated, content_filter, thinking
    form            no_question, broken_alternation, missing_separator, several_questions, not_a_paragraph
    length          too_few_questions, too_many_questions, too_short, too_long
    leakage         mentions_caption, coordinates, as_an_ai, question_leaks_caption, image_marker
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vflax.endpoint.asking import Reply

QUESTION, ANSWER, SEPARATOR = "Question:", "Answer:", "==="
# A complex question must not tell what is to be seen; so many words in a row are no chance.
SHARED_WORDS = 5


@dataclass(frozen=True)
class Rules:
    """with_boxes: whether the model is told the boxes, too. Counts of pairs and words are (least, most)."""

    with_boxes: bool
    pairs: tuple[int, int]
    question_words: tuple[int, int]
    answer_words: tuple[int, int]


TYPES = {
    "conversation": Rules(False, (2, 12), (2, 60), (2, 300)),
    "detail": Rules(True, (1, 1), (0, 0), (40, 500)),
    "complex": Rules(True, (1, 1), (4, 60), (30, 500)),
}


@dataclass(frozen=True)
class Reject:
    reason: str  # one word for counting
    detail: str  # one line for a person


Pairs = list[tuple[str, str]]  # (question, answer); of detail the question is ""


def judge(type: str, captions: Sequence[str], reply: Reply) -> Pairs | Reject:
    """The questions and answers of a reply of type `type`, or why it is rejected; `captions` are what it was told."""
    pairs = _whole(reply) or (_paragraph(reply.text) if type == "detail" else _blocks(reply.text))
    if isinstance(pairs, Reject):
        return pairs
    return _lengths(type, pairs) or _leakage(type, captions, pairs) or pairs


# ---------------------------------------------------------------------------------------------------------
# The whole reply

_REFUSAL = re.compile(
    r"""^\W*(
        (i'?m|i\ am)\ (very\ |so\ |really\ |terribly\ )?sorry | sorry\b | my\ apologies | i\ apologi[sz]e
      | (unfortunately,?\ )?(but\ )?i\ (can\ ?not|can't|could\ not|am\ unable|am\ not\ able|won't)\b
      | (unfortunately,?\ )?i'm\ (unable|not\ able)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)


_THINKING = re.compile(r"</?think(ing)?>", re.IGNORECASE)


def _whole(reply: Reply) -> Reject | None:
    if reply.finish == "content_filter":
        return Reject("content_filter", "the endpoint's filter held it back")
    if reply.refusal:
        return Reject("refused", reply.refusal[:200])
    if reply.finish == "length":
        return Reject("truncated", "cut off at the limit of tokens; a larger --max_tokens asks all anew")
    if not reply.text.strip():
        return Reject("empty", f"no text (finish reason {reply.finish})")
    if found := _THINKING.search(reply.text):
        return Reject(
            "thinking", f"holds {found[0]!r}; let the server take such parts out, or switch them off"
        )
    return _refusal(reply.text)


def _refusal(text: str) -> Reject | None:
    found = _REFUSAL.search(_straight(text))
    return Reject("refused", f"begins with {found[0].strip()!r}") if found else None


def _straight(text: str) -> str:
    """With the typewriter's apostrophe, as the patterns have it."""
    return text.replace("\u2019", "'")


# ---------------------------------------------------------------------------------------------------------
# Form

_LABEL = re.compile(rf"^\s*({QUESTION}|{ANSWER})", re.MULTILINE)
_MARKUP = re.compile(r"^\s*(={3,}|```|#{1,6}\s|[-*•]\s|\d+[.)]\s)", re.MULTILINE)


def _blocks(text: str) -> Pairs | Reject:
    if not re.search(rf"^\s*{QUESTION}", text, re.MULTILINE):
        return Reject("no_question", f"no line begins with {QUESTION!r}")
    blocks = re.split(rf"^[ \t]*{SEPARATOR}[ \t]*$", text.strip(), flags=re.MULTILINE)
    if len(blocks) > 1 and not blocks[-1].strip():
        blocks.pop()
    pairs: Pairs = []
    question: str | None = None
    for number, block in enumerate(map(str.strip, blocks), 1):
        labels = _LABEL.findall(block)
        if len(labels) > 1:
            return Reject("missing_separator", f"block {number} holds {len(labels)} labels")
        expected = QUESTION if question is None else ANSWER
        if not block.startswith(expected):
            return Reject(
                "broken_alternation", f"block {number} should begin with {expected!r}: {block[:40]!r}"
            )
        body = block.removeprefix(expected).strip()
        if question is None:
            question = body
        else:
            pairs.append((question, body))
            question = None
    if question is not None:
        return Reject("broken_alternation", "the last question has no answer")
    return pairs


def _paragraph(text: str) -> Pairs | Reject:
    if found := _LABEL.search(text) or _MARKUP.search(text):
        return Reject("not_a_paragraph", f"a line begins with {found[0].strip()!r}")
    return [("", text.strip())]


# ---------------------------------------------------------------------------------------------------------
# Length


def _lengths(type: str, pairs: Pairs) -> Reject | None:
    rules = TYPES[type]
    least, most = rules.pairs
    if len(pairs) < least:
        return Reject("too_few_questions", f"{len(pairs)}, expected at least {least}")
    if len(pairs) > most:
        reason = "several_questions" if most == 1 else "too_many_questions"
        return Reject(reason, f"{len(pairs)}, expected at most {most}")
    for question, answer in pairs:
        for what, text, (fewest, highest) in (
            ("question", question, rules.question_words),
            ("answer", answer, rules.answer_words),
        ):
            words = len(text.split())
            if words < fewest:
                return Reject(
                    "too_short", f"{what} of {words} words, expected at least {fewest}: {text[:60]!r}"
                )
            if words > highest:
                return Reject("too_long", f"{what} of {words} words, expected at most {highest}")
    return None


# ---------------------------------------------------------------------------------------------------------
# Leakage: the sample must read as if the picture had been seen

_CAPTION_WORD = re.compile(r"\bcaption(s|ed|ing)?\b", re.IGNORECASE)
_SOURCE = re.compile(
    r"""\b(
        (given|provided|supplied)\ (\w+\ )?(sentences?|descriptions?|texts?|information|details?|annotations?|labels?
                                   |boxes|objects?|list|data|context)
      | (sentences?|descriptions?|annotations?|boxes|object\ list|list\ of\ objects)\ (\w+\ )?(provided|given)\b
      | (the|these|this|those|each|all|five|one\ of\ the)\ (descriptions?|sentences?|annotations?)\ (\w+\ )?
            (says?|states?|mentions?|describes?|indicates?|notes?|suggests?|tells?)
      | (according\ to|based\ on|as\ (\w+\ )?(in|by)|from)\ the\ (\w+\ )?(descriptions?|sentences?|annotations?)
      | (object|box)\ (annotations?|detections?|categories)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_DECIMAL = r"-?\d*\.\d+"
_COORDINATES = re.compile(
    rf"""\bbounding[\ -]?box(es)?\b
      | \[\s*-?\d*\.?\d+(\s*,\s*-?\d*\.?\d+)+\s*\]
      | \(\s*{_DECIMAL}(\s*,\s*{_DECIMAL})+\s*\)
      | (?<![\d.]){_DECIMAL}\s*,\s*{_DECIMAL}(?![\d])
      | \b(the|these|their|its|box|given|provided|normali[sz]ed|pixel|image|object)\ (\w+\ )?coordinates\b
      | \b[xy][12]\b\s*[=:,]
    """,
    re.IGNORECASE | re.VERBOSE,
)
_AS_AN_AI = re.compile(
    r"""\b(
        as\ an?\ (\w+\ )?(ai|language\ model|artificial\ intelligence|text-based|virtual\ assistant)
      | i('m|\ am)\ an?\ (\w+\ )?(ai|language\ model|artificial\ intelligence)
      | ai\ (language\ model|assistant)
      | i\ (can\ ?not|can't|do\ not|don't)\ (actually\ |directly\ )?(see|view|have\ access\ to)
            \ (the|any|this|images?|pictures?|photos?)
      | without\ (actually\ )?seeing\ the\ (image|picture|photo)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_IMAGE_MARKER = re.compile(r"<\s*/?\s*image\s*/?\s*>|<im_(start|end|patch)>", re.IGNORECASE)


def _leakage(type: str, captions: Sequence[str], pairs: Pairs) -> Reject | None:
    for question, answer in pairs:
        if found := _refusal(answer):
            return found
        for text in (question, answer):
            # A picture may show a caption: where those who saw it say so, the word is no leak.
            text = _straight(text)
            source = _SOURCE.search(text) or (
                None if any(map(_CAPTION_WORD.search, captions)) else _CAPTION_WORD.search(text)
            )
            for reason, match in (
                ("image_marker", _IMAGE_MARKER.search(text)),
                ("as_an_ai", _AS_AN_AI.search(text)),
                ("coordinates", _COORDINATES.search(text)),
                ("mentions_caption", source),
            ):
                if match:
                    around = text[max(0, match.start() - 30) : match.end() + 30]
                    return Reject(reason, f"{match[0]!r} in {around!r}")
        if type == "complex" and (shared := _shared(question, captions)):
            return Reject("question_leaks_caption", f"the question tells {shared!r}")
    return None


def _shared(question: str, captions: Sequence[str]) -> str:
    """The first SHARED_WORDS words in a row of the question that a caption has, too; "" if there are none."""
    told = {words for caption in captions for words in _runs(caption)}
    return next((" ".join(words) for words in _runs(question) if words in told), "")


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[\w'-]+", _straight(text).lower())
    return zip(*(words[start:] for start in range(SHARED_WORDS)), strict=False)
