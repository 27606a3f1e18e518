"""A session with an endpoint: where it is, what may be spent, many requests at a time, Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vflax.endpoint.account import Account, Prices
from vflax.endpoint.asking import NO_KEY, Asker, Policy, Stop
from vflax.endpoint.responses import Responses
from vflax.errors import UserError

KEY_VARIABLE, URL_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
# Seconds to answer what it has.
_LOOK = 30.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Job = TypeVar("Job")


@dataclass(frozen=True)
class Endpoint:
    """model: as the endpoint calls it. base_url: None: as the environment says. timeout and retry_wait in seconds,
    prices per million tokens, budget in the prices' currency."""

    model: str
    base_url: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    retry_wait: float = 1.0
    max_failures: int = 10
    price_in: float | None = None
    price_out: float | None = None
    budget: float | None = None

    def wrong(self) -> list[str]:
        """All that is wrong with it, by flag."""
        found = [
            f"--{name}={value:g}: expected at least {least}"
            for name, value, least in (
                ("concurrency", self.concurrency, 1),
                ("max_failures", self.max_failures, 1),
                ("retries", self.retries, 0),
                ("price_in", self.price_in, 0),
                ("price_out", self.price_out, 0),
            )
            if value is not None and not least <= value < float("inf")
        ]
        found += [
            f"--{name}={value:g}: expected a number above 0"
            for name, value in (
                ("timeout", self.timeout), ("retry_wait", self.retry_wait), ("budget", self.budget)
            )
            if value is not None and not 0 < value < float("inf")
        ]  # fmt: skip
        if (self.price_in is None) != (self.price_out is None):
            found.append("--price_in and --price_out: expected both or none")
        if self.budget is not None and self.price_in is None:
            found.append("--budget: needs --price_in and --price_out")
        if not self.model:
            found.append("--model: expected a name that the endpoint knows")
        return found

    @property
    def prices(self) -> Prices | None:
        if self.price_in is None or self.price_out is None:
            return None
        return Prices(self.price_in, self.price_out)

    @property
    def url(self) -> str:
        """Where requests go.

        Raises:
            UserError: no address, or one that holds a password.
        """
        value = self.base_url or os.environ.get(URL_VARIABLE) or OPENAI_URL
        try:
            parts = urlsplit(value)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            fine = False
        if not fine:
            raise UserError(f"--base_url={value}: expected an address such as {OPENAI_URL}")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"--base_url: name, password or query in the address of {parts.hostname} would end up in files; "
                f"the key goes into the environment variable {KEY_VARIABLE}"
            )
        return value

    def client(self) -> openai.AsyncOpenAI:
        """The official client.

        Raises:
            UserError: no key, where one is needed, or something that is none.
        """
        return openai.AsyncOpenAI(api_key=self._key(), base_url=self.url, timeout=self.timeout, max_retries=0)

    def models(self) -> list[str] | None:
        """What models it says to have; None: it does not tell.

        Raises:
            UserError: it cannot be reached, or refuses the key.
        """
        with openai.OpenAI(api_key=self._key(), base_url=self.url, timeout=_LOOK, max_retries=1) as client:
            try:
                return [model.id for model in client.models.list()]
            except openai.AuthenticationError as error:
                raise UserError(
                    f"{self.url} refuses the key in {KEY_VARIABLE} ({error.message[:300]})"
                ) from None
            except openai.APIConnectionError as error:
                raise UserError(
                    f"{self.url} cannot be reached ({error.__cause__ or error}); start what serves it, or correct the "
                    "address"
                ) from None
            except (openai.OpenAIError, AttributeError):  # the second: something else than a list
                return None

    def check(self) -> None:
        """Ask whether it is there, as far as that costs nothing.

        Raises:
            UserError: it cannot be reached, refuses the key, or says that it does not have the model.
        """
        names = self.models()
        if not names or self.model in names:
            return
        # Some know more names than they list.
        with openai.OpenAI(api_key=self._key(), base_url=self.url, timeout=_LOOK, max_retries=1) as client:
            try:
                client.models.retrieve(self.model)
            except openai.NotFoundError:
                listed = ", ".join(names[:20])
                raise UserError(f"{self.url} has no model {self.model}; it has {listed}") from None
            except openai.OpenAIError:
                pass  # it does not tell

    def _key(self) -> str:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not all("!" <= letter <= "~" for letter in key):
            raise UserError(
                f"the environment variable {KEY_VARIABLE} holds something that is no key; set it again"
            )
        if not key and self.url == OPENAI_URL:
            raise UserError(f"the environment variable {KEY_VARIABLE} is not set; {self.url} needs a key")
        return key or NO_KEY


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a session, which `of_flags` reads; model and address have other names from tool to tool."""
    add = parser.add_argument_group("requests").add_argument
    add(
        "--concurrency",
        type=int,
        default=Endpoint.concurrency,
        help="requests at a time (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=Endpoint.timeout,
        help="of a request, in seconds (default: %(default)s)",
    )
    add("--retries", type=int, default=Endpoint.retries,
        help="further tries of a request that failed (default: %(default)s)")  # fmt: skip
    add("--retry_wait", type=float, default=Endpoint.retry_wait, metavar="SECONDS",
        help="before the second try; doubles with each (default: %(default)s)")  # fmt: skip
    add("--max_failures", type=int, default=Endpoint.max_failures, metavar="N",
        help="stop once N requests have no reply after all tries (default: %(default)s)")  # fmt: skip
    cost = parser.add_argument_group("cost").add_argument
    cost("--price_in", type=float, metavar="PRICE", help="of a million tokens of prompts, in any currency")
    cost("--price_out", type=float, metavar="PRICE", help="of a million tokens of replies")
    cost("--budget", type=float, metavar="COST",
         help="send nothing that could bring the cost of all replies above")  # fmt: skip


def of_flags(args: argparse.Namespace, model: str, base_url: str | None) -> Endpoint:
    """The endpoint that the flags of `add_flags` describe."""
    return Endpoint(
        model, base_url, args.concurrency, args.timeout, args.retries, args.retry_wait, args.max_failures,
        args.price_in, args.price_out, args.budget,
    )  # fmt: skip


def ask_all(
    endpoint: Endpoint,
    responses: Responses,
    account: Account,
    jobs: Iterable[Job],
    total: int,
    settle: Callable[[Asker, Job], Awaitable[str | None]],
    *,
    show_progress: bool = True,
) -> tuple[Asker, Stop, float]:
    """Settle all jobs, so many at a time, until they are done or something stops them.

    Args:
        endpoint: whom to ask.
        responses: where replies are kept.
        account: what may be spent.
        jobs: what `settle` is given one of each time, `total` in all.
        settle: asks for all that a job needs; returns facts for the progress line, None: the job was not settled.
        show_progress: on stderr.

    Returns:
        the asker, what stopped it (falsy: nothing), and seconds.

    Raises:
        UserError: there is no key.
    """
    return asyncio.run(_ask_all(endpoint, responses, account, jobs, total, settle, show_progress))


async def _ask_all(
    endpoint: Endpoint,
    responses: Responses,
    account: Account,
    jobs: Iterable[Job],
    total: int,
    settle: Callable[[Asker, Job], Awaitable[str | None]],
    show_progress: bool,
) -> tuple[Asker, Stop, float]:
    stop = Stop()
    policy = Policy(endpoint.timeout, endpoint.retries, endpoint.retry_wait, endpoint.max_failures)
    begun = time.monotonic()
    async with endpoint.client() as client:
        asker = Asker(client, responses, account, policy, stop)
        slots = asyncio.Semaphore(endpoint.concurrency)
        with _Line(total, account, asker, show_progress) as line, _signals(stop, line) as tasks:

            async def one(job: Job) -> None:
                try:
                    line.finished(await settle(asker, job))
                except UserError as error:  # the disk
                    stop.set(str(error), is_error=True)

            def ended(task: asyncio.Task[None]) -> None:
                tasks.discard(task)
                slots.release()

            try:
                async with asyncio.TaskGroup() as group:
                    for job in jobs:
                        await slots.acquire()
                        if stop:
                            break
                        task = group.create_task(one(job))
                        tasks.add(task)
                        task.add_done_callback(ended)
            finally:
                await responses.written()
    return asker, stop, time.monotonic() - begun


@contextlib.contextmanager
def _signals(stop: Stop, line: _Line) -> Iterator[set[asyncio.Task[None]]]:
    """The first Ctrl-C or SIGTERM lets what is in flight come home, the second cancels the tasks in the set."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def received() -> None:
        if stop:
            for task in tasks:
                task.cancel()
        else:
            stop.set("interrupted")
            line.say("interrupted: waiting for the requests in flight; Ctrl-C again gives them up")

    before = {}
    for number in _STOP_SIGNALS:
        handler = signal.getsignal(number)
        # Not on Windows and not outside the main thread.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, received)
            before[number] = handler
    try:
        yield tasks
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)  # the loop itself would leave SIGTERM to kill


class _Line:
    """The progress line on stderr: done, facts of the caller, new tokens per second, cost, time left."""

    def __init__(self, total: int, account: Account, asker: Asker, show: bool) -> None:
        self._account, self._asker = account, asker
        self._begun = time.monotonic()
        columns = (
            TextColumn("asking"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not show)
        self._bar = self._progress.add_task("", total=total, facts="")

    def __enter__(self) -> _Line:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, words: str) -> None:
        self._progress.console.print(words, highlight=False, soft_wrap=True)

    def finished(self, facts: str | None) -> None:
        if facts is None:
            return
        rate = self._asker.spent.completion / max(time.monotonic() - self._begun, 1e-3)
        cost = self._account.cost()
        told = [facts, f"{rate:.0f} tokens/s", "" if cost is None else f"cost {cost:.2f}"]
        self._progress.update(self._bar, advance=1, facts=" · ".join(filter(None, told)))
