"""One request on its way through an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from vflax.constants import IMAGE_TOKEN_ID
from vflax.generate.pages import Key, chunk_keys, picture_hash
from vflax.generate.processor import Processor
from vflax.generate.request import Delta, Finish, OnDelta, Prompt, Sampling, Token
from vflax.generate.text import Detokenizer, StopFinder

log = logging.getLogger(__name__)

OnLogits = Callable[[np.ndarray], None]
"""Is given float32 [V] for each token of an answer, before penalties and temperature."""


class Run:
    """A request, from submit to its end. Its engine's thread alone changes it, but for `cancelled`.

    shard, slot: where it runs; -1 while it waits.
    pages: of its slot's table; the first chunks are shared, under the keys in `held`, the rest is its own.
    chunk: the next one of its prompt to read.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        most: int,
        processor: Processor,
        chunk: int,
        on_delta: OnDelta,
        on_logits: OnLogits | None,
    ) -> None:
        """
        Args:
            prompt, sampling: what was asked.
            most: tokens of the answer, at most.
            processor: of the model.
            chunk: tokens of a chunk.
            on_delta, on_logits: the owner's.
        """
        self.prompt, self.sampling, self.most = prompt, sampling, most
        self.on_logits = on_logits
        self.prompt_tokens, self.cached_tokens = len(prompt.ids), 0
        self.cancelled = False
        self.pictures = [picture_hash(image) for image in prompt.images]
        # The last token is read by decode.
        self.keys: Sequence[Key] = chunk_keys(
            prompt.ids, self.pictures, processor.image_tokens, chunk, self.prompt_tokens - 1
        )
        self.shard = self.slot = -1
        self.pages: list[int] = []
        self.held: list[Key] = []
        self.chunk = 0
        self._chunk_tokens = chunk
        # Of the prompt's image tokens, counted from 0: picture k // N, feature k % N.
        is_image = prompt.ids == IMAGE_TOKEN_ID
        picture, feature = np.divmod(np.cumsum(is_image) - 1, processor.image_tokens)
        self._picture, self._feature = np.where(is_image, picture, -1), np.where(is_image, feature, -1)
        self.looked_at: set[int] = set()  # pictures that were counted
        self._on_delta = on_delta
        self._ends = () if sampling.ignore_eos else processor.stops
        self.written = 0
        # Of a chat's answer: whether it has begun, and white space that belongs to it if more comes.
        self._begun, self._space = False, ""
        self._words = Detokenizer(processor.tokenizer)
        self._stops = StopFinder(sampling.stop)

    @property
    def is_read(self) -> bool:
        """Whether nothing of the prompt is left but its last token."""
        return self.chunk * self._chunk_tokens >= self.prompt_tokens - 1

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunk to read: ids, and of each token the picture and the feature of it that stands there, -1 for text;
        all int32 [n], n at most a chunk."""
        begin = self.chunk * self._chunk_tokens
        place = slice(begin, min(begin + self._chunk_tokens, self.prompt_tokens - 1))
        return self.prompt.ids[place], self._picture[place], self._feature[place]

    def grow(self, tokens: Sequence[Token]) -> tuple[Finish | None, int]:
        """The answer grows by tokens, up to an end; its owner is told.

        Returns:
            why it ended, None where it goes on; and how many of the tokens belong to it.
        """
        text, stopped = "", False
        finish: Finish | None = None
        for number, token in enumerate(tokens, 1):
            self.written += 1
            if token.id in self._ends:
                finish = "stop"
            else:
                piece, stopped = self._stops.feed(self._words.feed(token.id))
                text += piece
                finish = "stop" if stopped else "length" if self.written == self.most else None
            if finish:
                tokens = tokens[:number]
                break
        if finish and not stopped:
            text += self._rest()
        if tokens:
            self._tell(Delta(self._trimmed(text), tuple(tokens), finish))
        return finish, len(tokens)

    def end(self, finish: Finish) -> None:
        """The answer ends without further tokens."""
        self._tell(Delta(self._trimmed(self._rest()), (), finish))

    def _rest(self) -> str:
        """What was held back as the beginning of a character or of a stop string."""
        text, stopped = self._stops.feed(self._words.end())
        return text if stopped else text + self._stops.end()

    def _trimmed(self, text: str) -> str:
        """Text of a chat's answer without the white space around it, which is the template's, not the answer's."""
        if not self.prompt.chat:
            return text
        text = self._space + text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return kept

    def _tell(self, delta: Delta) -> None:
        try:
            self._on_delta(delta)
        except Exception:
            log.exception("on_delta of a request raised: the request is cancelled")
            self.cancelled = True
