"""One request to an endpoint that speaks OpenAI's protocol: its tries, its waits, and what stops the run.

Transient, tried again: 408, 409, 429, 5xx, no connection, a connection or a body that breaks off, no answer in time, an
answer that is no chat completion. Permanent, for every request alike: any other 4xx (key, model, parameters) and a 429
that says the credit is used up. A 400 of the endpoint's content filter, or of a prompt that is longer than the model
reads, is a reply of its own kind, kept like one.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import tenacity

from vflax.endpoint.account import Account, BudgetReached, Tokens, estimate, estimate_text
from vflax.endpoint.responses import Responses, Stored, request_key
from vflax.tokenizer import replace_surrogates
from vflax.values import ID

LONGEST_WAIT = 60.0  # seconds, between two tries
LONGEST_RETRY_AFTER = 900.0  # seconds; a server that asks for more gets this
NO_KEY = (
    "none"  # what is sent where there is no key: servers on one's own machine ask for none, the client does
)
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
_FILTERED = ("content_filter", "content_policy")
# OpenAI's code for it, and the words of vLLM, the second where pictures make it too long, and of SGLang.
_TOO_LONG = (
    "context_length_exceeded", "maximum context length", "maximum model length", "model's context length"
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """retry counts from 0: how often this was asked before and rejected."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Any]
    retry: int

    @property
    def key(self) -> str:
        return request_key(self.model, self.messages, self.parameters, self.retry)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent, as JSON."""
        return {"messages": self.messages, "model": self.model, **self.parameters}

    @property
    def prompt_tokens(self) -> int:
        return estimate(self.messages)

    @property
    def most_tokens(self) -> int:
        """The limit of new tokens that is sent; 0 without one."""
        return max((self.parameters.get(name) or 0 for name in TOKEN_LIMITS), default=0)


@dataclass(frozen=True)
class Reply:
    """What an endpoint gave: the text, why it ended ("content_filter" or "too_long" where it refused the request), and
    its refusal where it says so in a field of its own."""

    text: str
    finish: str = "stop"
    refusal: str = ""


class Stop:
    """Says to all requests that no new one may be sent, and why; the first reason stays."""

    def __init__(self) -> None:
        self.reason = ""  # for a person; "" while the run goes on
        self.is_error = False  # running again as it is would not help
        self._event = asyncio.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str, is_error: bool = False) -> None:
        if not self:
            self.reason, self.is_error = reason, is_error
            self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Sleeps, but not past a stop.

        Raises:
            Stopped: the stop came.
        """
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped


class Stopped(Exception):
    """The run ends before this request was answered."""


class _Transient(Exception):
    """kind: for counting. billed: the endpoint may have done the work. retry_after: the seconds it asks for, if any."""

    def __init__(self, kind: str, detail: str, billed: bool, retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.billed, self.retry_after = kind, billed, retry_after


@dataclass(frozen=True)
class Policy:
    """timeout and first_wait are in seconds; a request is tried 1 + retries times."""

    timeout: float
    retries: int
    first_wait: float
    max_failures: int


class Asker:
    """Asks for replies that are not on the disk yet, each key once."""

    def __init__(
        self, client: openai.AsyncOpenAI, responses: Responses, account: Account, policy: Policy, stop: Stop
    ) -> None:
        self._client, self._responses, self._account = client, responses, account
        self._policy, self._stop = policy, stop
        self._pending: dict[str, asyncio.Future[None]] = {}
        self._not_before = 0.0  # on the loop's clock: a server that wants a pause wants it of all requests
        self._backoff = tenacity.wait_exponential_jitter(
            initial=policy.first_wait, max=LONGEST_WAIT, jitter=policy.first_wait
        )
        self.attempts = 0  # requests sent
        self.answered = 0  # replies that came in this run
        self.spent = Tokens()  # in this run
        self.transient: Counter[str] = Counter()
        self.estimated_usage = 0  # replies that did not say how many tokens they took
        self.failures: dict[str, str] = {}  # key -> why there is no reply after all tries

    async def ask(self, request: Request) -> Stored | None:
        """The reply, on the disk when this returns; None: there is none after all tries, or the run stops."""
        key = request.key
        while key in self._pending:
            await asyncio.wait([self._pending[key]])
        if (stored := self._responses.get(key)) is not None:
            return stored
        if self._stop or key in self.failures:
            return None
        self._pending[key] = asyncio.get_running_loop().create_future()
        try:
            return await self._with_retries(key, request)
        finally:
            self._pending.pop(key).set_result(None)

    async def _with_retries(self, key: str, request: Request) -> Stored | None:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            stop=tenacity.stop_after_attempt(1 + self._policy.retries),
            wait=self._wait,
            sleep=self._stop.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, key, request)
        except _Transient as error:
            self.failures[key] = f"{error} (tried {1 + self._policy.retries} times)"
            if len(self.failures) >= self._policy.max_failures:
                self._stop.set(
                    f"{len(self.failures)} requests without a reply (--max_failures), the last: {self.failures[key]}"
                )
        except BudgetReached:
            self._stop.set("the next request could exceed --budget")
        except openai.APIStatusError as error:
            self._stop.set(self._permanent(error), is_error=True)
        except Stopped:
            pass
        return None

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wanted = error.retry_after if isinstance(error, _Transient) else None
        if wanted is None:
            return self._backoff(state)
        return wanted + random.uniform(0, self._policy.first_wait)

    async def _attempt(self, key: str, request: Request) -> Stored:
        loop = asyncio.get_running_loop()
        while (pause := self._not_before - loop.time()) > 0:
            await self._stop.sleep(pause)
        prompt = request.prompt_tokens
        bound = self._account.bound(prompt, request.most_tokens)
        await self._account.reserve(bound)
        spent, lost = Tokens(), bound  # until it is known better: cancelled, or an error nobody thought of
        try:
            if self._stop:
                lost = Tokens()
                raise Stopped
            self.attempts += 1
            stored = await self._send(request)
            spent, lost = stored.tokens, Tokens()
            await self._responses.put(key, stored)
            self.answered += 1
            self.spent += spent
            return stored
        except _Transient as error:
            self.transient[error.kind] += 1
            if error.retry_after is not None:
                self._not_before = max(self._not_before, loop.time() + error.retry_after)
            if not error.billed:
                lost = Tokens()
            raise
        except openai.APIStatusError:
            lost = Tokens()
            raise
        finally:
            try:
                if lost != Tokens():
                    await self._responses.put_lost(key, "no reply", lost)
            finally:  # or those that wait for room in the budget wait for ever
                await self._account.settle(bound, prompt, spent, lost)

    async def _send(self, request: Request) -> Stored:
        try:
            # The client's own limit holds for each read; this one for the whole.
            async with asyncio.timeout(self._policy.timeout):
                # The body as it is: the client takes longer to look through messages than all else together.
                raw = await self._client.chat.completions.with_raw_response.create(
                    messages=[], model=request.model, extra_body=request.body
                )
            return self._read(request, raw.http_response.content)
        except (TimeoutError, openai.APITimeoutError) as error:
            # Not billed: the time went by before anything was sent.
            early = type(error.__cause__).__name__ in ("ConnectTimeout", "PoolTimeout")
            raise _Transient("timeout", f"no answer in {self._policy.timeout:g} s", not early) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            name = type(cause).__name__
            raise _Transient("connection", f"{name} {cause}".strip(), name != "ConnectError") from None
        except openai.APIStatusError as error:
            code = str(error.code or "")
            if error.status_code == 400 and (code.startswith(_FILTERED) or _too_long(error.response.text)):
                return Stored(400, replace_surrogates(error.response.text), Tokens())
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                if "insufficient_quota" in (code, error.type):
                    raise
                wanted = _retry_after(error.response.headers)
                # A proxy that waited too long says nothing of the model behind it, which may have worked.
                billed = error.status_code in (408, 504, 524)
                raise _Transient(str(error.status_code), self._said(error), billed, wanted) from None
            raise

    def _read(self, request: Request, content: bytes) -> Stored:
        try:
            body = json.loads(content)
            reply = read_reply(body)
        except (ValueError, RecursionError) as error:
            raise _Transient("malformed", str(error)[:200], True) from None
        tokens = _usage(body.get("usage"))
        if tokens is None:
            self.estimated_usage += 1
            tokens = Tokens(request.prompt_tokens, estimate_text(reply.text))
        return Stored(200, json.dumps(body, ensure_ascii=True), tokens)

    def _permanent(self, error: openai.APIStatusError) -> str:
        said = f"{error.status_code}: {self._said(error)}"
        where = f"the endpoint {self._client.base_url}"
        match error.status_code:
            case 401 | 403:
                return f"{where} refuses the key in OPENAI_API_KEY ({said})"
            case 404:
                return (
                    f"{where} does not know the model or the path ({said}); check --model and --base_url, of a judge "
                    "--judge-model and --judge"
                )
            case 400 | 422:
                return (
                    f"{where} refuses the request ({said}); a parameter is changed or, with null, left out by "
                    """--parameters, of a judge by --judge-parameters, e.g. '{"seed": null}'"""
                )
            case 429:
                return f"the credit at {self._client.base_url} is used up ({said})"
        return f"{where} refuses the request ({said})"

    def _said(self, error: openai.APIStatusError) -> str:
        """The server's words on one line; some repeat the key."""
        words = " ".join(error.message.split())
        key = self._client.api_key
        return (words if key == NO_KEY else words.replace(key, "***"))[:300]


def read_reply(body: Any) -> Reply:
    """Reads a chat completion.

    Raises:
        ValueError: it is none: the line says what is missing.
    """
    if not isinstance(body, dict):
        raise ValueError(f"expected a chat completion, found {repr(body)[:80]}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"a chat completion without choices: {json.dumps(body)[:160]}")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise ValueError(f"a choice without a message: {json.dumps(choices[0])[:160]}")
    text, refusal = message.get("content"), message.get("refusal")
    if not isinstance(text, str | None):
        raise ValueError(f"a message whose content is not text: {json.dumps(text)[:160]}")
    finish = choices[0].get("finish_reason")
    return Reply(
        replace_surrogates(text or ""),
        finish if isinstance(finish, str) else "stop",
        replace_surrogates(refusal) if isinstance(refusal, str) else "",
    )


def _usage(usage: Any) -> Tokens | None:
    """What a chat completion says of its tokens, if it does."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if (
        not isinstance(prompt, int)
        or not isinstance(completion, int)
        or not (ID.holds(prompt) and ID.holds(completion))
    ):
        return None
    return Tokens(prompt, completion)


def laid_over(usual: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, with a user's own over them; null leaves one out."""
    return {name: value for name, value in {**usual, **own}.items() if value is not None}


def _too_long(body: str) -> bool:
    return any(words in body for words in _TOO_LONG)


def stored_reply(stored: Stored) -> Reply:
    """The reply of a kept body."""
    if stored.status == 400:
        return Reply("", "too_long" if _too_long(stored.body) else "content_filter")
    return read_reply(json.loads(stored.body))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the header Retry-After asks for: a number or a date (RFC 9110, 10.2.3); None without one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    if not seconds < float("inf"):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
