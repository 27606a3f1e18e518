"""From ids to text as it is written: whole characters only, and an end where a stop string comes."""

from __future__ import annotations

from collections.abc import Sequence

from vflax.tokenizer import Tokenizer

# What a decoder gives for bytes that are no character, or not yet a whole one.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes, and byte tokens hold one each: what is broken for longer stays so.
_LONGEST = 4


class Detokenizer:
    """Text of ids that come one by one.

    Decoders look at neighbours (a space before a word, bytes that make a character together), so a token is decoded
    with those before it, back to the last that surely began a new piece of text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # of the ids that are decoded together
        self._given = 0  # ids whose text was given

    def feed(self, token: int) -> str:
        """The text that is whole with this token; "" where a character is still open."""
        self._ids.append(int(token))
        before = self._tokenizer.decode(self._ids[self._begin : self._given])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith(_BROKEN) and len(self._ids) - self._given < _LONGEST:
            return ""
        if len(text) > len(before):  # a special token has no text, and what follows one would lose its space
            self._begin = self._given
        self._given = len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """What is left where no more tokens come: an open character's bytes as U+FFFD."""
        before = self._tokenizer.decode(self._ids[self._begin : self._given])
        text = self._tokenizer.decode(self._ids[self._begin :])
        self._given = len(self._ids)
        return text[len(before) :]


class StopFinder:
    """Text up to the first stop string; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that can be given, whether a stop string came)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that was whole first, so that it does not matter in which pieces the text comes
            text, self._held = self._held[: min(found)[1]], ""
            return text, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False

    def end(self) -> str:
        """What was held back, where no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
