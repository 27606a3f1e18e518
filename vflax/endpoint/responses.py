"""Every reply that was paid for, in an SQLite file, on the disk before anything else happens with it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from vflax.endpoint.account import Tokens
from vflax.errors import UserError

_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    key TEXT PRIMARY KEY, status INTEGER, body TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, time REAL
);
CREATE TABLE IF NOT EXISTS lost (key TEXT, why TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, time REAL);
"""


def request_key(
    model: str, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], retry: int
) -> str:
    """sha256 of all that decides a reply; `retry` counts from 0 and tells two tries apart that send the same."""
    content: dict[str, Any] = {"model": model, "messages": messages, "parameters": parameters}
    if retry:
        content["retry"] = retry
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """status: 200, or 400 for a request that the endpoint refused for what is in it. body: all of the answer, as JSON.
    time: when it was kept, in seconds since 1970; 0 before that."""

    status: int
    body: str
    tokens: Tokens
    time: float = 0.0


_Row = tuple[str, tuple[Any, ...], asyncio.Future[None]]  # statement, values, done


class Responses:
    """The file; only one process has it open.

    Replies that come while an fsync goes on share the next one, and the event loop waits for none: a thread writes
    through a connection of its own. What is read is on the disk.
    """

    def __init__(self, path: Path, reader: sqlite3.Connection, writer: sqlite3.Connection) -> None:
        self._path, self._reader, self._writer = path, reader, writer
        self._rows: list[_Row] = []
        self._writing: asyncio.Task[None] | None = None

    def get(self, key: str) -> Stored | None:
        query = "SELECT status, body, prompt_tokens, completion_tokens, time FROM responses WHERE key = ?"
        with _telling(self._path):
            row = self._reader.execute(query, (key,)).fetchone()
        return None if row is None else Stored(row[0], row[1], Tokens(row[2], row[3]), row[4])

    async def put(self, key: str, stored: Stored) -> None:
        """Returns once it is on the disk; it gets there also where the caller is cancelled meanwhile.

        Raises:
            UserError: the disk is full or broken.
        """
        tokens = stored.tokens
        row = (key, stored.status, stored.body, tokens.prompt, tokens.completion, time.time())
        await self._add("INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)

    async def put_lost(self, key: str, why: str, bound: Tokens) -> None:
        """A request that was sent and not answered: it may have been billed, at most so much."""
        row = (key, why, bound.prompt, bound.completion, time.time())
        await self._add("INSERT INTO lost VALUES (?, ?, ?, ?, ?)", row)

    async def written(self) -> None:
        """Returns once nothing is on its way to the disk."""
        if self._writing is not None:
            await self._writing

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Of all replies in the file, and of all that were lost."""
        sums = []
        for table in ("responses", "lost"):
            query = (
                f"SELECT COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0) FROM {table}"
            )
            with _telling(self._path):
                sums.append(Tokens(*self._reader.execute(query).fetchone()))
        return sums[0], sums[1]

    async def _add(self, statement: str, values: tuple[Any, ...]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rows.append((statement, values, done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        await done

    async def _write_all(self) -> None:
        while self._rows:
            rows, self._rows = self._rows, []
            error: UserError | None = None
            try:
                await asyncio.to_thread(self._commit, rows)
            except UserError as raised:
                error = raised
            for _, _, done in rows:
                if done.cancelled():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    def _commit(self, rows: list[_Row]) -> None:
        with _telling(self._path), self._writer:
            for statement, values, _ in rows:
                self._writer.execute(statement, values)


@contextlib.contextmanager
def open_responses(path: Path) -> Iterator[Responses]:
    """Opens the file, or begins it.

    Raises:
        UserError: another process has it open, or it is something else.
    """
    with contextlib.ExitStack() as stack:
        with _telling(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{path}.lock", timeout=0)
            try:
                stack.enter_context(lock)
            except filelock.Timeout:
                raise UserError(
                    f"{path}: another run has it open, and both would pay for the same; wait for its end"
                ) from None
            connection = stack.enter_context(
                contextlib.closing(sqlite3.connect(path, check_same_thread=False))
            )
            # In write-ahead mode FULL means one fsync for each commit.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise UserError(
                    f"{path}: of version {version}, expected {_VERSION}; name another file with --cache"
                )
            connection.executescript(_TABLES)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            reader = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
        yield Responses(path, reader, connection)


@contextlib.contextmanager
def open_nothing() -> Iterator[Responses]:
    """An empty one in memory, for a dry run before the first run."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_TABLES)
        yield Responses(Path(":memory:"), connection, connection)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise UserError(
            f"{path}: the file of replies cannot be used ({error}); free the disk, or name another file with --cache"
        ) from None
