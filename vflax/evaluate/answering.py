"""Who answers a benchmark's questions: a model on this host's devices, or one behind an address."""

from __future__ import annotations

import base64
import io
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import PIL.Image

from vflax.errors import UserError
from vflax.evaluate.infer import Ask, OnAnswer
from vflax.evaluate.question import UNREADABLE, reading

# Imported where they are used: a model behind an address needs no JAX.
if TYPE_CHECKING:
    from vflax.endpoint.session import Endpoint
    from vflax.generate.engine import Engine
    from vflax.generate.processor import Processor
    from vflax.generate.request import Delta, Prompt

_UNREADABLE = (*UNREADABLE, PIL.Image.DecompressionBombError)


class Local:
    """An engine on this host's devices. Nothing is ever cut: what is too long for the model has no prediction."""

    def __init__(self, engine: Engine, processor: Processor, identity: Mapping[str, Any]) -> None:
        self._engine, self._processor, self.identity = engine, processor, identity

    def answer(self, asked: Sequence[Ask], on_answer: OnAnswer) -> str:
        """See `Model`. Pictures are decoded ahead by threads, only as many as the engine will soon take."""
        from vflax.generate.request import PromptTooLong

        slots = self._engine.layout.shards * self._engine.layout.slots
        window = threading.Semaphore(2 * slots)
        ended: queue.SimpleQueue[tuple[str, str, int, str]] = queue.SimpleQueue()
        tickets: dict[str, Any] = {}

        def take() -> None:
            key, text, tokens, finish = ended.get()
            ticket = tickets.pop(key)
            if finish in ("cancelled", "failed"):
                raise UserError("the engine failed while it answered; run the same command again to go on")
            on_answer(key, text, finish, (ticket.prompt_tokens, tokens))

        def end(key: str, text: str, tokens: int, finish: str) -> None:
            ended.put((key, text, tokens, finish))
            window.release()

        try:
            with ThreadPoolExecutor(2) as pool:
                prompts = _ahead(pool, partial(prompt_of, processor=self._processor), asked, 2 * slots)
                for ask, prompt in zip(asked, prompts, strict=True):
                    window.acquire()
                    while not ended.empty():
                        take()
                    try:
                        tickets[ask.key] = self._submit(ask, prompt, end)
                    except PromptTooLong as error:
                        window.release()
                        on_answer(ask.key, None, "too_long", (error.tokens, 0))
            while tickets:
                take()
        except BaseException:
            for ticket in list(tickets.values()):
                ticket.cancel()
            raise
        return ""

    def _submit(self, ask: Ask, prompt: Prompt, end: Callable[[str, str, int, str], None]) -> Any:
        from vflax.generate.request import Sampling

        pieces: list[Delta] = []

        def on_delta(delta: Delta) -> None:
            pieces.append(delta)
            if delta.finish:
                text = "".join(piece.text for piece in pieces)
                end(ask.key, text, sum(len(piece.tokens) for piece in pieces), delta.finish)

        return self._engine.submit(prompt, Sampling(max_tokens=ask.max_tokens), on_delta)


def prompt_of(ask: Ask, processor: Processor) -> Prompt:
    """A question as the model reads it: one turn, its pictures before its text.

    Raises:
        UserError: a picture cannot be read.
    """
    from vflax import conversation as talk
    from vflax import images

    pictures = []
    for picture in ask.pictures:
        with reading(ask.key, picture, _UNREADABLE):
            pictures.append(images.decode(picture.read()))
    parts: list[talk.Part] = [talk.Image()] * len(pictures)
    turn = talk.Turn("user", (*parts, talk.Text(ask.text)))
    return processor.chat(talk.Conversation((turn,)), pictures)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Ask], Prompt], asked: Sequence[Ask], most: int
) -> Iterator[Prompt]:
    """function of each, in order, computed up to `most` ahead."""
    waiting: list[Any] = []
    for ask in asked:
        waiting.append(pool.submit(function, ask))
        if len(waiting) >= most:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


class Remote:
    """A model that an endpoint serves; replies are kept in a file, so none is asked for twice."""

    def __init__(
        self, endpoint: Endpoint, cache: Path, parameters: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """
        Args:
            endpoint: where, and which.
            cache: the file of replies.
            parameters: laid over temperature 0 and max_tokens; None leaves one out.
        """
        self._endpoint, self._cache, self._parameters = endpoint, cache, parameters
        self.identity: Mapping[str, Any] = {"served as": endpoint.model, "parameters": dict(parameters)}

    def answer(self, asked: Sequence[Ask], on_answer: OnAnswer) -> str:
        """See `Model`."""
        from vflax.endpoint.account import Account
        from vflax.endpoint.asking import Asker, stored_reply
        from vflax.endpoint.responses import open_responses
        from vflax.endpoint.session import ask_all

        async def settle(asker: Asker, ask: Ask) -> str | None:
            stored = await asker.ask(self._request(ask))
            if stored is None:
                return None
            reply, tokens = stored_reply(stored), stored.tokens
            text = None if reply.finish == "too_long" else reply.text
            on_answer(ask.key, text, reply.finish, (tokens.prompt, tokens.completion))
            return ""

        with open_responses(self._cache) as responses:
            account = Account(self._endpoint.prices, self._endpoint.budget, *responses.tokens())
            asker, stop, _ = ask_all(
                self._endpoint, responses, account, asked, len(asked), settle, show_progress=False
            )
        if stop.is_error:
            raise UserError(f"{stop.reason}. Predictions that came are kept")
        failed = next(iter(asker.failures.values()), "")
        return stop.reason or (
            f"{len(asker.failures)} without a reply, the first: {failed}" if failed else ""
        )

    def _request(self, ask: Ask) -> Any:
        from vflax.endpoint.asking import Request, laid_over

        content: list[dict[str, Any]] = []
        for picture in ask.pictures:
            with reading(ask.key, picture, _UNREADABLE):
                content.append({"type": "image_url", "image_url": {"url": _data_url(picture.read())}})
        content.append({"type": "text", "text": ask.text})
        parameters = laid_over({"temperature": 0, "max_tokens": ask.max_tokens}, self._parameters)
        return Request(self._endpoint.model, [{"role": "user", "content": content}], parameters, 0)


def _data_url(data: bytes) -> str:
    image = PIL.Image.open(io.BytesIO(data))
    # A camera's several JPEGs in one file, of which the first is read as any JPEG; few endpoints know its own name.
    kind = "image/jpeg" if image.format == "MPO" else image.get_format_mimetype()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
