"""A sample as the pieces that the page shows: a token each, or where there is no tokenizer a segment of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.browse.view import View
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.conversation import ConversationError, Image, Special, expand, read_llava, segments
from vflax.data.lengths import judge
from vflax.data.rows import RowFormat, render_sample
from vflax.tokenizer import TURN_MARKERS, Tokenizer

# The kinds of a piece, as the page's script knows them.
TEXT, SPECIAL, IMAGE = 0, 1, 2
# Flags that are added to the kind.
SUPERVISED, CUT = 4, 8
# So many tokens are decoded together at least, so that spaces and characters of several tokens come out right.
_CONTEXT = 8
_HALF = "\N{REPLACEMENT CHARACTER}"
# What a verdict of lengths.judge means.
_WHY = {
    "nothing_supervised": ": there is no answer to learn from",
    "too_long": ": {length} tokens, and cutting them to {limit} loses an image or the answer",
}


@dataclass
class Pieces:
    """texts, kinds (with flags) and ids, as long as each other; ids are empty where there is no tokenizer.

    An image is one piece; its text is "". tokens and supervised count tokens after the cut, images' included, and are
    None where there is no tokenizer. findings: what was odd; problem: why training would drop the sample, or "".
    """

    texts: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    tokens: int | None = None
    supervised: int | None = None
    findings: list[str] = field(default_factory=list)
    problem: str = ""


def pieces(conversations: list[dict[str, Any]], num_images: int, view: View, name: str) -> Pieces:
    """What the page shows of a conversation. One that cannot be rendered has a problem and no pieces."""
    try:
        if view.format is None:
            return _of_segments(conversations, num_images, view, name)
        return _of_tokens(conversations, num_images, view.format, name)
    except ConversationError as error:
        return Pieces(problem=f"{error.kind}: {error}")


def _of_segments(conversations: list[dict[str, Any]], num_images: int, view: View, name: str) -> Pieces:
    read, findings = read_llava(conversations, num_images, view.position, name)
    found = Pieces(findings=findings)
    for content, supervised in segments(read, view.template):
        kind = IMAGE if isinstance(content, Image) else SPECIAL if isinstance(content, Special) else TEXT
        text = (
            content
            if isinstance(content, str)
            else ""
            if isinstance(content, Image)
            else _spelled(content.name)
        )
        found.texts.append(text)
        found.kinds.append(kind | (SUPERVISED if supervised else 0))
    if not any(kind & SUPERVISED for kind in found.kinds):
        found.problem = "nothing_supervised" + _WHY["nothing_supervised"]
    return found


def _of_tokens(conversations: list[dict[str, Any]], num_images: int, format: RowFormat, name: str) -> Pieces:
    rendered, findings = render_sample(conversations, num_images, format, name)
    ids, labels = expand(rendered, format.num_image_tokens)
    supervised = labels != IGNORE_LABEL
    limit = format.max_length or len(ids)
    special = _specials(format.tokenizer)
    places = list(_places(ids, format.num_image_tokens))
    texts = _texts([int(ids[at]) for at, _ in places], special, format.tokenizer)
    found = Pieces(findings=findings, tokens=min(limit, len(ids)))
    for (at, length), text in zip(places, texts, strict=True):
        token = int(ids[at])
        kind = IMAGE if token == IMAGE_TOKEN_ID else SPECIAL if token in special else TEXT
        flags = (SUPERVISED if supervised[at] else 0) | (CUT if at + length > limit else 0)
        found.texts.append(text)
        found.kinds.append(kind | flags)
        found.ids.append(token)
    found.supervised, verdict = judge(rendered, len(ids), format, limit)
    if verdict == "truncated":
        found.findings.append(verdict)
    elif verdict is not None:
        found.problem = verdict + _WHY[verdict].format(length=len(ids), limit=limit)
    return found


def _places(ids: np.ndarray, num_image_tokens: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each piece: an image's tokens are one."""
    at = 0
    while at < len(ids):
        length = num_image_tokens if ids[at] == IMAGE_TOKEN_ID else 1
        yield at, length
        at += length


def _specials(tokenizer: Tokenizer) -> dict[int, str]:
    """{id: spelling} of the tokens that no text becomes."""
    named = {tokenizer.special_id(name): name for name in TURN_MARKERS}
    named |= {tokenizer.bos_id: _spelled("bos"), tokenizer.eos_id: _spelled("eos")}
    return {token: name for token, name in named.items() if token is not None}


def _texts(ids: Sequence[int], special: dict[int, str], tokenizer: Tokenizer) -> list[str]:
    """The text of each token: what it adds to that of those before it.

    The first token of a character that is spelled in several bytes gives "", the last the character.
    """
    texts: list[str] = []
    before: list[int] = []
    for token in ids:
        if token == IMAGE_TOKEN_ID or token in special:
            texts.append(special.get(token, ""))
            continue
        known = tokenizer.decode(before).rstrip(_HALF)
        before.append(token)
        texts.append(tokenizer.decode(before).rstrip(_HALF)[len(known) :])
        # At a border of words only: decoded without the tokens before it, a part of a character is none.
        if len(before) > _CONTEXT and texts[-1].startswith((" ", "\n")):
            before = before[-1:]
    return texts


def _spelled(name: str) -> str:
    return name.upper() if name in ("bos", "eos") else name
