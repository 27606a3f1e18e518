"""From a conversation and its pictures to what the model reads, by the rules that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vflax import conversation as talk
from vflax import images
from vflax.errors import UserError
from vflax.generate.request import Prompt
from vflax.images import ImageRules
from vflax.templates import Position
from vflax.tokenizer import Tokenizer
from vflax.weights.hf_chat import check_tokenizer
from vflax.weights.open import Opened, template_of
from vflax.workdir import ModelFiles


@dataclass(frozen=True)
class Processor:
    """Tokenizer, template and image rules of a model.

    name: what clients call the model.
    stops: ids that end an answer.
    image_tokens: N, the tokens of an image.
    """

    name: str
    tokenizer: Tokenizer
    template: str
    position: Position
    rules: ImageRules
    stops: tuple[int, ...]
    image_tokens: int

    @classmethod
    def of(cls, opened: Opened) -> Processor:
        """Those of a model that was opened.

        Raises:
            UserError: the weights bring no conversation template of vflax's, or a tokenizer that is not theirs.
        """
        files = opened.files
        template, position = template_of(opened)
        check_tokenizer(
            files.tokenizer, files.config.decoder, str(opened.place), "put that of these weights there"
        )
        own = () if isinstance(files, ModelFiles) else files.stops
        stops = tuple(dict.fromkeys((*talk.stop_ids(template, files.tokenizer), *own)))
        return cls(
            opened.place.resolve().name,
            files.tokenizer,
            template,
            position,
            files.rules,
            stops,
            files.config.vision.num_tokens,
        )

    def chat(self, conversation: talk.Conversation, pictures: Sequence[Image.Image] = ()) -> Prompt:
        """A conversation up to where the next answer begins.

        Args:
            conversation: typed parts; a user's turn has its images where they were put, and the template's rule
                (`position`) moves them.
            pictures: one for each Image part, in order.

        Raises:
            UserError: there are more or fewer pictures than places, or roles do not take turns.
        """
        turns = [
            talk.Turn(turn.role, talk.place_images(turn.parts, self.position))
            if turn.role == "user"
            else turn
            for turn in conversation.turns
        ]
        places = sum(turn.num_images for turn in turns)
        if places != len(pictures):
            raise UserError(f"the conversation has {places} places for images, but there are {len(pictures)}")
        rendered = talk.render(
            talk.Conversation(tuple(turns), conversation.system),
            self.template,
            self.tokenizer,
            generation_prompt=True,
        )
        ids = talk.expand(rendered, self.image_tokens)[0]
        pixels = tuple(images.preprocess(picture, self.rules) for picture in pictures)
        return Prompt(ids, pixels, chat=True)

    def text(self, text: str) -> Prompt:
        """Plain text that the model goes on with: no template, no images; BOS where the tokenizer has it in front."""
        tokenizer = self.tokenizer
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return Prompt(np.array([*begin, *tokenizer.encode(text)], np.int32))
