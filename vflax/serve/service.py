"""How a request becomes an answer: what is looked at, in which order, and what it holds meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar
from weakref import WeakSet

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vflax.errors import UserError
from vflax.generate.processor import Processor
from vflax.generate.request import Answering, Closed, Delta, Prompt, PromptTooLong, Sampling
from vflax.serve import messages
from vflax.serve.answers import Bundle, Mail
from vflax.serve.errors import ApiError, bad, draining, too_late
from vflax.serve.fetch import Fetcher
from vflax.serve.limits import Buffers, Keys, Places, RateLimit, read_body
from vflax.serve.log import LOG
from vflax.serve.metrics import Metrics, Pace
from vflax.serve.pictures import Pictures
from vflax.serve.protocol import Asked, ChatAsked, TextAsked, ignored, next_seed, parse, sampling
from vflax.serve.record import Record
from vflax.serve.settings import Settings
from vflax.serve.shapes import ChatShape, Choice, Shape, Spelling, TextShape, Usage
from vflax.serve.streaming import EventStream, unless_gone

State = Literal["ready", "draining", "failed"]
T = TypeVar("T")
# A token of common vocabularies is rarely longer than 16 characters. A text that would not fit at this many a token
# is refused before time goes into its tokens.
_MOST_CHARACTERS = 64
_TEXT_WORKERS = 4


class Service:
    """An engine, and everything that stands between it and strangers."""

    def __init__(self, engine: Answering, processor: Processor, settings: Settings) -> None:
        self.engine, self.processor, self.settings = engine, processor, settings
        self.names = settings.model_names or (processor.name,)
        self.state: State = "ready"
        self.active = 0
        self.keys = Keys(settings.api_keys)
        self.metrics = Metrics(engine.stats)
        self.created = int(time.time())
        self._rate = RateLimit(settings.rate_limit)
        self._places = Places(engine.stats().slots + settings.max_queue)
        self._buffers = Buffers(settings.max_buffered_bytes)
        self.fetcher: Fetcher | None = None
        # Two pools, so that texts do not wait for pictures. Neither is the event loop's own: there a slow name server,
        # asked for a remote picture, could take all threads.
        self._pictures = ThreadPoolExecutor(settings.image_workers, "vflax-pictures")
        self._texts = ThreadPoolExecutor(_TEXT_WORKERS, "vflax-texts")
        self._spelling = Spelling(processor.tokenizer)
        self._bundles: WeakSet[Bundle] = WeakSet()
        self._mail: Mail | None = None

    # ----------------------------------------------------------------------------------------------
    # Its state

    def drain(self) -> None:
        """Take no more requests. Of any thread, also of a signal's handler."""
        self.state = "draining"

    def stop(self) -> None:
        """End all answers. Of the event loop's thread."""
        for bundle in list(self._bundles):
            bundle.stop(draining())

    def close(self) -> None:
        """Give back the threads."""
        for pool in (self._pictures, self._texts):
            pool.shutdown(wait=False, cancel_futures=True)

    # ----------------------------------------------------------------------------------------------
    # A request

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatAsked)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, TextAsked)

    async def _answer(self, request: Request, kind: type[ChatAsked] | type[TextAsked]) -> Response:
        """Look at who asks; read, parse, make the prompts, submit; then answer at once or in pieces."""
        record: Record = request.state.record
        self._admit(request, record)
        end = record.start + self.settings.deadline
        with self._buffers.share() as take:
            most, seconds = self.settings.max_body_bytes, self.settings.body_timeout
            body = await read_body(
                request, most=most, seconds=min(seconds, end - time.monotonic()), take=take
            )
            asked = await _in(self._texts, parse, kind, body)
            end = min(end, record.start + (asked.deadline or math.inf))
            self._note(asked, record)
            bundle = await unless_gone(request.receive, _by(end, self._submitted(asked, take, record)))
        shape = self._shape(asked)
        if asked.stream:
            events = self._events(bundle, shape, asked, record)
            return EventStream(bundle, events, end - time.monotonic(), record.note)
        with bundle:
            whole = await unless_gone(request.receive, _by(end, self._whole(bundle, shape, asked, record)))
        return JSONResponse(whole)

    def _admit(self, request: Request, record: Record) -> None:
        if self.state == "draining":
            raise draining()
        key = self.keys.check(request.headers.get("authorization"))
        client = key or (request.client.host if request.client else "")
        record.facts["client"] = client
        self._rate.take(client)

    def _note(self, asked: Asked, record: Record) -> None:
        if asked.model is not None and asked.model not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"model: this server has {known}", param="model", code="model_not_found")
        record.facts |= {"stream": bool(asked.stream), "n": asked.choices}
        if names := ignored(asked):
            record.facts["ignored"] = names

    # ----------------------------------------------------------------------------------------------
    # From what was asked to the engine

    async def _submitted(
        self, asked: ChatAsked | TextAsked, take: Callable[[int], None], record: Record
    ) -> Bundle:
        """All choices, taken by the engine. They have their places before time goes into pictures."""
        with contextlib.ExitStack() as held:
            bundle = held.enter_context(self._bundle(asked, record))
            if isinstance(asked, ChatAsked):
                field, prompts = "messages", [await self._chat_prompt(asked, take)]
            else:
                field, prompts = "prompt", await self._text_prompts(asked)
            record.facts["images"] = sum(len(prompt.images) for prompt in prompts)
            try:
                bundle.submit(self.engine, self._requests(asked, prompts))
            except PromptTooLong as error:
                raise bad(f"{field}: {error}", field, "context_length_exceeded") from None
            except Closed:
                raise self._closed() from None
            held.pop_all()
        return bundle

    def _bundle(self, asked: ChatAsked | TextAsked, record: Record) -> Bundle:
        prompts = len(asked.prompts) if isinstance(asked, TextAsked) else 1
        number, most = prompts * asked.choices, min(self.settings.max_choices, self._places.most)
        if number > most:
            field = "prompt" if prompts > most else "n"
            raise bad(f"{field}: {number} answers to one request, and {most} are the most", field)
        if self._mail is None or self._mail.loop is not asyncio.get_running_loop():
            self._mail = Mail()
        bundle = Bundle(self._mail, self._places, number, Pace(self.metrics, record))
        self._bundles.add(bundle)
        return bundle

    def _requests(self, asked: Asked, prompts: Sequence[Prompt]) -> list[tuple[Prompt, Sampling]]:
        """Of each prompt `n` choices, whose seeds follow each other."""
        seed = secrets.randbits(62)
        found = []
        for prompt in prompts:
            room = self.engine.max_length - len(prompt.ids)
            first = sampling(asked, self.settings, room, seed)
            for step in range(asked.choices):
                found.append((prompt, dataclasses.replace(first, seed=next_seed(first.seed, step))))
        return found

    async def _chat_prompt(self, asked: ChatAsked, take: Callable[[int], None]) -> Prompt:
        limits = self.settings
        read = functools.partial(
            messages.read, asked.messages, max_images=limits.max_images,
            max_image_bytes=limits.max_image_bytes, remote=limits.allow_remote_images,
        )  # fmt: skip
        conversation, sources = await _in(self._texts, read)
        asked.messages.clear()  # an answer takes long, and its question's pictures are large
        self._check_characters(messages.num_characters(conversation), "messages")
        encoded = [
            (one.where, await self._fetch(one, take) if one.data is None else one.data) for one in sources
        ]

        def make() -> Prompt:
            return self.processor.chat(conversation, Pictures(encoded, limits.max_image_pixels))

        try:
            return await _in(self._pictures if encoded else self._texts, make)
        except UserError as error:  # a conversation that the model's template does not take
            raise bad(f"messages: {error}", "messages") from None

    async def _text_prompts(self, asked: TextAsked) -> list[Prompt]:
        if not asked.prompts or not all(asked.prompts):
            raise bad("prompt: is empty", "prompt")
        self._check_characters(max(map(len, asked.prompts)), "prompt")
        return [await _in(self._texts, self.processor.text, text) for text in asked.prompts]

    def _check_characters(self, number: int, field: str) -> None:
        most = self.engine.max_length * _MOST_CHARACTERS
        if number > most:
            raise bad(
                f"{field}: {number} characters are more than fit in the model's {self.engine.max_length} tokens",
                field,
                "context_length_exceeded",
            )

    async def _fetch(self, source: messages.Source, take: Callable[[int], None]) -> bytes:
        if self.fetcher is None:
            self.fetcher = Fetcher(self.settings.max_image_bytes, self.settings.fetch_timeout)
        return await self.fetcher.fetch(source.url, source.where, take)

    def _closed(self) -> ApiError:
        if self.state == "draining":
            return draining()
        self.state = "failed"
        LOG.error("the engine takes no more requests; restart the server")
        return ApiError(503, "the engine takes no more requests", code="engine_closed")

    # ----------------------------------------------------------------------------------------------
    # From the engine to the answer

    def _shape(self, asked: Asked) -> Shape:
        shape = ChatShape if isinstance(asked, ChatAsked) else TextShape
        return shape(
            asked.model or self.names[0],
            self._spelling,
            logprobs=asked.num_logprobs() is not None,
            with_usage=asked.with_usage,
        )

    async def _whole(self, bundle: Bundle, shape: Shape, asked: Asked, record: Record) -> dict[str, Any]:
        choices, usage = [Choice() for _ in bundle.tickets], Usage()
        async for index, delta in self._pieces(bundle, asked, usage, record):
            choice = choices[index]
            choice.text += delta.text
            choice.tokens += delta.tokens
            choice.finish = delta.finish
        return shape.whole(choices, usage)

    async def _events(
        self, bundle: Bundle, shape: Shape, asked: Asked, record: Record
    ) -> AsyncGenerator[dict[str, Any], None]:
        usage = Usage()
        for index in range(len(bundle.tickets)):
            if opening := shape.opening(index):
                yield opening
        async for index, delta in self._pieces(bundle, asked, usage, record):
            if chunk := shape.chunk(index, delta):
                yield chunk
        if asked.with_usage:
            yield shape.closing(usage)

    async def _pieces(
        self, bundle: Bundle, asked: Asked, usage: Usage, record: Record
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """What has come of each choice, as it is shown; `usage` is whole at the end. An end token is no text."""
        bare = asked.num_logprobs() is None
        hidden = () if asked.ignore_eos else self.processor.stops
        reasons = []
        async for arrivals in bundle.arrivals():
            for arrival in arrivals:
                index, delta = arrival.index, arrival.delta
                usage.answer += len(delta.tokens)
                if delta.finish:
                    reasons.append(delta.finish)
                tokens = () if bare else tuple(one for one in delta.tokens if one.id not in hidden)
                yield index, Delta(delta.text, tokens, delta.finish)
        asked_once = bundle.tickets[:: asked.choices]
        usage.prompt = sum(ticket.prompt_tokens for ticket in asked_once)
        usage.cached = sum(ticket.cached_tokens for ticket in asked_once)
        record.facts |= {
            "prompt_tokens": usage.prompt, "cached_tokens": usage.cached, "completion_tokens": usage.answer,
            "finish": reasons,
        }  # fmt: skip


async def _in(pool: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
    """What a function gives that would hold up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *args)


async def _by(end: float, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives before `end` (of time.monotonic); raises ApiError, 504, where it takes longer."""
    try:
        async with asyncio.timeout(end - time.monotonic()):
            return await work
    except TimeoutError:
        raise too_late() from None
