"""Every reply that was paid for, in an SQLite file, on the disk before anything else happens with it."""

from __future__ import annotations

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

from data_pipeline.synthesize.account import Tokens
from vflax.errors import UserError

_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    key TEXT PRIMARY KEY, status INTEGER, body TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, time REAL
);
CREATE TABLE IF NOT EXISTS lost (key TEXT, why TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, time REAL);
"""


def request_key(
    model: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], retry: int
) -> str:
    """sha256 of all that decides a reply; `retry` counts from 0 and tells two tries apart that send the same."""
    content: dict[str, Any] = {"model": model, "messages": messages, "parameters": parameters}
    if retry:
        content["retry"] = retry
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """status: 200, or 400 for a request that the endpoint's filter refused. body: all of the answer, as JSON."""

    status: int
    body: str
    tokens: Tokens


class Responses:
    """The file; only one process has it open."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    def get(self, key: str) -> Stored | None:
        query = "SELECT status, body, prompt_tokens, completion_tokens FROM responses WHERE key = ?"
        with _telling(self._path):
            row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else Stored(row[0], row[1], Tokens(row[2], row[3]))

    def put(self, key: str, stored: Stored) -> None:
        """Returns once it is on the disk.

        Raises:
            UserError: the disk is full or broken.
        """
        tokens = stored.tokens
        row = (key, stored.status, stored.body, tokens.prompt, tokens.completion, time.time())
        with _telling(self._path), self._connection:
            self._connection.execute("INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)

    def put_lost(self, key: str, why: str, bound: Tokens) -> None:
        """A request that was sent and not answered: it may have been billed, at most so much."""
        row = (key, why, bound.prompt, bound.completion, time.time())
        with _telling(self._path), self._connection:
            self._connection.execute("INSERT INTO lost VALUES (?, ?, ?, ?, ?)", row)

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Of all replies in the file, and of all that were lost."""
        sums = []
        for table in ("responses", "lost"):
            query = (
                f"SELECT COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0) FROM {table}"
            )
            with _telling(self._path):
                sums.append(Tokens(*self._connection.execute(query).fetchone()))
        return sums[0], sums[1]


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
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
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
        yield Responses(path, connection)


@contextlib.contextmanager
def open_nothing() -> Iterator[Responses]:
    """An empty one in memory, for a dry run before the first run."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_TABLES)
        yield Responses(Path(":memory:"), connection)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise UserError(
            f"{path}: the file of replies cannot be used ({error}); free the disk, or name another file with --cache"
        ) from None
