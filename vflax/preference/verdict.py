"""What a judge is asked about two answers, and what its reply says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflax.endpoint.asking import Request, laid_over, stored_reply
from vflax.endpoint.responses import Stored
from vflax.errors import UserError
from vflax.preference.pictures import data_url, picture_path
from vflax.preference.questions import TIE, ChatQuestion

ATTEMPTS = 3  # at a reply that can be read; the second with some temperature, the third with more
_PIXELS = 1024  # of the longer side of a picture that is sent
_SYSTEM = (
    "You compare two answers to the same question about a picture, as the person would who asked it. You are fair: "
    "where an answer stands and how long it is do not matter by themselves."
)
_TASK = (
    "Which answer is better? Weigh whether it is right, whether it has the form and the length that the question asks "
    "for, and whether it is helpful. Explain it in a sentence, then end with your verdict on a line of its own: "
    "[[A]], [[B]], or [[tie]] where they are equally good."
)
_MARKED = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.I)
_BARE = re.compile(
    r"[\W_]*(?:(?:the )?(?:(?:better|best|final) )?(?:answer|verdict|winner)(?: is)?[\W_]+)?"
    r"(A|B|tie)(?: is better)?[\W_]*",
    re.I,
)


@dataclass(frozen=True)
class Exam:
    """What is asked of a judge.

    model: as its endpoint calls it. images: the folder of pictures; None: the judge is told reference and context in
    their place. parameters: laid over the temperature and the limit of tokens; None leaves one out.
    """

    model: str
    images: Path | None
    parameters: Mapping[str, Any]

    def attempts(self, question: ChatQuestion, first: str, second: str) -> Iterator[Request]:
        """What is sent for one verdict, one after the other until a reply can be read.

        Raises:
            UserError: the picture cannot be read.
        """
        content = self._content(question, first, second)
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": content},
        ]
        for attempt in range(ATTEMPTS):
            usual = {"temperature": 0.5 * attempt, "max_tokens": 512}
            yield Request(self.model, messages, laid_over(usual, self.parameters), attempt)

    def _content(self, question: ChatQuestion, first: str, second: str) -> str | list[dict[str, Any]]:
        parts = [("Question", question.text), ("Answer A", first), ("Answer B", second)]
        told = "\n".join(filter(None, (question.context, question.reference)))
        if self.images is None and told:
            parts.insert(0, ("What is known of the picture, and a right answer", told))
        text = "\n\n".join(f"[{name}]\n{own}\n[End]" for name, own in parts) + f"\n\n{_TASK}"
        if self.images is None or not question.image:
            return text
        url = data_url(picture_path(question, self.images), _PIXELS)
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]

    def read(self, question: ChatQuestion, stored: Stored) -> str | None:
        """See `read_verdict`.

        Raises:
            UserError: the request is longer than what the judge reads.
        """
        reply = stored_reply(stored)
        if reply.finish == "too_long":
            raise UserError(
                f"question {question.key}: longer with both answers than what the judge {self.model} reads; choose one "
                """that reads more, or leave more room with --judge-parameters='{"max_tokens": 100}'"""
            )
        return read_verdict(reply.text)


def read_verdict(text: str) -> str | None:
    """ "A", "B" or TIE: the last that stands in double brackets, or else the last line that says one of them and
    nothing beside; None: the reply says neither."""
    marked = _MARKED.findall(text)
    bare = (match[1] for line in reversed(text.splitlines()) if (match := _BARE.fullmatch(line.strip())))
    found = marked[-1] if marked else next(bare, None)
    if found is None:
        return None
    return found.upper() if found.upper() in ("A", "B") else TIE
