"""Who answers a benchmark's questions: a model on this host's devices, or one behind an address."""

from __future__ import annotations

import base64
import io
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from vflax.errors import UserError
from vflax.evaluate.infer import Ask, OnAnswer
from vflax.evaluate.question import Picture

# Imported where they are used: a model behind an address needs no JAX.
if TYPE_CHECKING:
    from vflax.endpoint.session import Endpoint
    from vflax.generate.engine import Engine
    from vflax.generate.processor import Processor
    from vflax.generate.request import Delta, Prompt


class Local:
    """An engine on this host's devices. Nothing is ever cut: what is too long for the model has no prediction."""

    def __init__(self, engine: Engine, processor: Processor, identity: Mapping[str, Any]) -> None:
        self._engine, self._processor, self.identity = engine, processor, identity

    def answer(self, asked: Sequence[Ask], on_answer: OnAnswer) -> str:
        """See `Model`. Pictures are decoded ahead by threads, only as many as the engine will soon take."""
        from vflax.generate.request import PromptTooLong

        slots = self._engine.layout.shards * self._engine.layout.slots
        window = threading.Semaphore(2 * slots)
        ended: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        tickets: dict[str, Any] = {}

        def drain() -> None:
            while not ended.empty():
                key, text, finish = ended.get()
                del tickets[key]
                if finish in ("cancelled", "failed"):
                    raise RuntimeError("the engine ended before all questions were answered")
                on_answer(key, text, finish)

        def end(key: str, text: str, finish: str) -> None:
            ended.put((key, text, finish))
            window.release()

        try:
            with ThreadPoolExecutor(2) as pool:
                for ask, prompt in zip(asked, _ahead(pool, self._prompt, asked, 2 * slots), strict=True):
                    window.acquire()
                    drain()
                    try:
                        tickets[ask.key] = self._submit(ask, prompt, end)
                    except PromptTooLong:
                        window.release()
                        on_answer(ask.key, None, "too_long")
            while tickets:
                key, text, finish = ended.get()
                ended.put((key, text, finish))
                drain()
        except BaseException:
            for ticket in list(tickets.values()):
                ticket.cancel()
            raise
        return ""

    def _prompt(self, ask: Ask) -> Prompt:
        from vflax import conversation as talk
        from vflax import images

        pictures = []
        for picture in ask.pictures:
            try:
                pictures.append(images.decode(picture.read()))
            except (OSError, ValueError) as error:
                raise UserError(f"{ask.key}: picture {picture.name}: {error}; fetch it again") from None
        parts: list[talk.Part] = [talk.Image()] * len(pictures)
        turn = talk.Turn("user", (*parts, talk.Text(ask.text)))
        return self._processor.chat(talk.Conversation((turn,)), pictures)

    def _submit(self, ask: Ask, prompt: Prompt, end: Callable[[str, str, str], None]) -> Any:
        from vflax.generate.request import Sampling

        pieces: list[str] = []

        def on_delta(delta: Delta) -> None:
            pieces.append(delta.text)
            if delta.finish:
                end(ask.key, "".join(pieces), delta.finish)

        return self._engine.submit(prompt, Sampling(max_tokens=ask.max_tokens), on_delta)


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

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        """
        Args:
            endpoint: where, and which.
            cache: the file of replies.
        """
        self._endpoint, self._cache = endpoint, cache
        self.identity: Mapping[str, Any] = {"served as": endpoint.model}

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
            reply = stored_reply(stored)
            on_answer(ask.key, reply.text, reply.finish)
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
        from vflax.endpoint.asking import Request

        pictures = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in ask.pictures
        ]
        content = [*pictures, {"type": "text", "text": ask.text}]
        parameters = {"temperature": 0, "max_tokens": ask.max_tokens}
        return Request(self._endpoint.model, [{"role": "user", "content": content}], parameters, 0)


def _data_url(picture: Picture) -> str:
    data = picture.read()
    try:
        kind = PIL.Image.open(io.BytesIO(data)).get_format_mimetype()
    except (OSError, ValueError) as error:
        raise UserError(f"picture {picture.name}: {error}; fetch it again") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def served_name(url: str) -> str:
    """What the only model of an endpoint is called.

    Raises:
        UserError: it cannot be reached, or has several.
    """
    import openai

    from vflax.endpoint.asking import NO_KEY
    from vflax.endpoint.session import KEY_VARIABLE

    client = openai.OpenAI(base_url=url, api_key=os.environ.get(KEY_VARIABLE) or NO_KEY, timeout=60)
    try:
        names = [model.id for model in client.models.list().data]
    except openai.OpenAIError as error:
        raise UserError(
            f"--model={url}: tells no models ({error}); check the address, or say --served-as=NAME"
        ) from None
    if len(names) != 1:
        raise UserError(f"--model={url}: has {', '.join(names) or 'no models'}; say --served-as=NAME")
    return names[0]
