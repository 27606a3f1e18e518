"""A conversation under way: what was asked and answered, what goes with the next question, how answers are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import PIL.Image

from vflax import conversation as talk
from vflax import images
from vflax.chat.pictures import Picture
from vflax.chat.writing import Answer, OnText, answer
from vflax.errors import UserError
from vflax.generate.processor import Processor
from vflax.generate.request import Answering, Prompt, Sampling
from vflax.templates import get_template


@dataclass(frozen=True)
class Exchange:
    """A question with its pictures, and the answer. tries: how often it was asked again."""

    question: str
    pictures: tuple[Picture, ...]
    answer: Answer
    tries: int = 0


def question_parts(question: str, pictures: int) -> tuple[talk.Part, ...]:
    """A user's turn: its pictures, each followed by a newline, then the text; LLaVA's order."""
    return talk.place_images((*[talk.Image()] * pictures, talk.Text(question)), "front")


class Session:
    """A conversation with a model.

    sampling: of the next answer. system: in place of the template's own text; None: that.
    exchanges: so far; waiting: pictures that go with the next question.
    """

    def __init__(
        self, engine: Answering, processor: Processor, sampling: Sampling, system: str | None = None
    ) -> None:
        self._engine, self.processor = engine, processor
        self.sampling, self.system = sampling, system
        self.exchanges: list[Exchange] = []
        self.waiting: list[Picture] = []

    @property
    def own_system(self) -> str:
        """The template's system text."""
        return get_template(self.processor.template).system

    def add(self, pictures: Iterable[Picture]) -> None:
        """Let pictures go with the next question."""
        self.waiting += map(self._small, pictures)

    def reset(self) -> None:
        """Forget the conversation; system text and sampling stay."""
        self.exchanges.clear()
        self.waiting.clear()

    def restore(self, exchanges: Iterable[Exchange], system: str | None, sampling: Sampling) -> None:
        """Go on with an earlier conversation in place of this one."""
        self.reset()
        self.system, self.sampling = system, sampling
        self.exchanges += [
            dataclasses.replace(old, pictures=tuple(map(self._small, old.pictures))) for old in exchanges
        ]

    def ask(self, question: str, on_text: OnText) -> Answer:
        """The answer to a question about the conversation so far and the pictures that wait.

        An answer that was stopped stays, as far as it was written, and is marked by its `finish`; one that was stopped
        before its first character leaves the conversation as it was.

        Raises:
            UserError: the prompt is too long, or the engine failed; the conversation is as it was.
        """
        pictures = tuple(self.waiting)
        prompt = self._prompt(self.exchanges, question, pictures)
        found = answer(self._engine, prompt, self.sampling, on_text)
        if found.text or found.finish != "cancelled":
            self.exchanges.append(Exchange(question, pictures, found))
            self.waiting.clear()
        return found

    def retry(self, on_text: OnText) -> Answer:
        """Another answer to the last question, in place of the last one, and drawn with another seed.

        Raises:
            UserError: nothing was asked yet, and as `ask` does.
        """
        if not self.exchanges:
            raise UserError("nothing was answered yet, so there is nothing to ask again")
        *before, last = self.exchanges
        tries = last.tries + 1
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + tries)
        prompt = self._prompt(before, last.question, last.pictures)
        found = answer(self._engine, prompt, sampling, on_text)
        if found.text or found.finish != "cancelled":
            self.exchanges[-1] = Exchange(last.question, last.pictures, found, tries)
        return found

    def _prompt(self, before: Sequence[Exchange], question: str, pictures: Sequence[Picture]) -> Prompt:
        turns: list[talk.Turn] = []
        for old in before:
            turns.append(talk.Turn("user", question_parts(old.question, len(old.pictures))))
            turns.append(talk.Turn("assistant", (talk.Text(old.answer.text),)))
        turns.append(talk.Turn("user", question_parts(question, len(pictures))))
        shown = [picture.image for old in before for picture in old.pictures]
        shown += [picture.image for picture in pictures]
        return self.processor.chat(talk.Conversation(tuple(turns), self.system), shown)

    def _small(self, picture: Picture) -> Picture:
        # Preprocessed again, this is what it was: every turn reads all pictures, and they may be large.
        pixels = images.preprocess(picture.image, self.processor.rules)
        return dataclasses.replace(picture, image=PIL.Image.fromarray(pixels))
