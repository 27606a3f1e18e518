"""Which things an answer speaks of that are not there, in the sense of CHAIR (Rohrbach et al., 2018, arXiv 1809.02156).

CHAIR counts mentions of objects of a vocabulary, and calls those hallucinated that neither the picture's annotation nor
its reference captions have: per mention (CHAIR_i) and per answer (CHAIR_s). Here the annotation is a question's
`objects`, the reference its `reference`; what the question itself names is no invention of the answer's either.

A vocabulary file has an object in each line: its name and after commas other words for it, which stand for it in the
singular and with s or es; a line that begins with "-" has phrases that speak of none ("- hot dog stand"); "#" begins a
comment. At each place the longest words win, whatever the case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

from vflax.errors import UserError
from vflax.preference.questions import ChatQuestion
from vflax.small_files import read_text

BUILT_IN = ("coco", "mini")


class Vocabulary:
    """Finds objects in texts.

    Args:
        names: {object: all words for it}.
        others: phrases that speak of no object though words of one are in them.
    """

    def __init__(self, names: dict[str, Sequence[str]], others: Iterable[str] = ()) -> None:
        self._meant: dict[str, str | None] = {_folded(phrase): None for phrase in others}
        for name, own in names.items():
            self._meant |= {_folded(word): name for word in own}
        longest_first = sorted(self._meant, key=lambda words: (-len(words), words))
        either = "|".join(re.escape(words).replace(r"\ ", r"[\s-]+") for words in longest_first)
        self._pattern = re.compile(rf"(?<!\w)({either})(?:e?s)?(?!\w)")

    def mentions(self, text: str) -> list[str]:
        """Objects in the order in which they are mentioned, each as often as it is."""
        found = (self._meant[_folded(match[1])] for match in self._pattern.finditer(text.casefold()))
        return [name for name in found if name is not None]

    def hallucinated(self, question: ChatQuestion, text: str) -> tuple[list[str], int] | None:
        """The mentions in an answer of what is not there, and how many mentions there are; None: nobody says what is
        there."""
        if not (question.reference or question.objects):
            return None
        return self.invented(text, (question.text, question.reference, *question.objects))

    def invented(self, text: str, known: Iterable[str]) -> tuple[list[str], int]:
        """The mentions in a text of what none of the known texts mentions, and how many mentions there are."""
        there = {name for own in known for name in self.mentions(own)}
        said = self.mentions(text)
        return [name for name in said if name not in there], len(said)


def load(given: str) -> Vocabulary:
    """The vocabulary that --vocabulary names: coco, mini, or a file.

    Raises:
        UserError: naming the file, where it is missing, or has no object or a word for two.
    """
    if given == "mini":
        return _mini()
    if given == "coco":
        text, where = resources.files("vflax.preference").joinpath("coco.txt").read_text("utf-8"), "coco.txt"
    else:
        text, where = read_text(Path(given)), given
    names: dict[str, Sequence[str]] = {}
    meant: dict[str, str] = {}
    others: list[str] = []
    for line, own in _lines(text):
        if own[0].startswith("-"):
            others += [own[0].removeprefix("-").strip(), *own[1:]]
            continue
        for word in own:
            if meant.setdefault(_folded(word), own[0]) != own[0]:
                raise UserError(
                    f"{where}, line {line}: {word} stands for {meant[_folded(word)]} already; keep one"
                )
        names[own[0]] = own
    if not names:
        raise UserError(
            f"{where}: no objects; expected one in each line, with other words for it after commas"
        )
    return Vocabulary(names, others)


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    for line, content in enumerate(text.splitlines(), 1):
        own = [word.strip() for word in content.partition("#")[0].split(",") if word.strip()]
        if own:
            yield line, own


def _mini() -> Vocabulary:
    """Shapes, colours, digits, words and directions of the mini dataset."""
    from data_pipeline.mini import scenes  # the offline side, which nothing else here needs
    from data_pipeline.mini.draw import SHAPES

    kinds = (
        SHAPES,
        scenes.COLOR_NAMES,
        scenes.BACKGROUND_NAMES,
        scenes.DIGITS,
        scenes.WORDS,
        scenes.DIRECTIONS,
    )
    # How its answers tell a handwritten 4.
    return Vocabulary({name: [name] for names in kinds for name in names}, ["line crosses"])


def _folded(words: str) -> str:
    return re.sub(r"[\s-]+", " ", words.strip().casefold())
