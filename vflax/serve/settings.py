"""What a server can be told, and the flags that tell it."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.images import MAX_PIXELS

MIB = 2**20
KEYS_VARIABLE = "VFLAX_API_KEYS"


@dataclass(frozen=True)
class Settings:
    """All limits of a server and its defaults; sizes in bytes, times in seconds.

    model_names: what clients call the model, the first for all that is told them; empty: the processor's name.
    api_keys: one of them must come with a request; empty: none need.
    max_body_bytes: of a request; max_buffered_bytes: of all requests that are being read, with fetched pictures.
    max_image_bytes, max_image_pixels: of a picture as it comes, and decoded.
    image_workers: threads that decode pictures and make prompts.
    fetch_timeout: of a remote picture, all redirects included.
    max_choices: answers to one request: prompts times n.
    max_queue: requests that may wait beside those that the engine's slots run.
    rate_limit: requests a minute of a key, or of an address where there are no keys; 0: any number.
    deadline: of a request, from its first byte to the end of its answer.
    header_timeout, body_timeout: in which a request's headers and its body must come.
    write_timeout: in which a client must take what was sent to it.
    drain_timeout: in which running requests may end when the server is told to.
    trusted_proxies: addresses whose X-Forwarded-For is believed.
    """

    model_names: tuple[str, ...] = ()
    default_temperature: float = 0.2
    default_top_p: float = 1.0
    default_max_tokens: int = 1024
    api_keys: tuple[str, ...] = ()
    protect_metrics: bool = False
    max_body_bytes: int = 32 * MIB
    max_buffered_bytes: int = 256 * MIB
    max_images: int = 16
    max_image_bytes: int = 20 * MIB
    max_image_pixels: int = 50_000_000
    image_workers: int = 2
    allow_remote_images: bool = False
    fetch_timeout: float = 10.0
    max_choices: int = 16
    max_queue: int = 64
    rate_limit: int = 0
    max_connections: int = 1024
    deadline: float = 600.0
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    write_timeout: float = 30.0
    drain_timeout: float = 30.0
    cors_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    page: bool = True

    def __post_init__(self) -> None:
        zero = {"max_images", "max_queue", "rate_limit", "drain_timeout", "default_temperature"}
        problems = []
        for field in fields(self):
            value, low = getattr(self, field.name), 0 if field.name in zero else None
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and low is None):
                problems.append(f"{_flag(field.name)}={value}: {'0 or more' if low == 0 else 'more than 0'}")
        if self.default_temperature > 2:
            problems.append(f"--default-temperature={self.default_temperature}: at most 2")
        if self.default_top_p > 1:
            problems.append(f"--default-top-p={self.default_top_p}: at most 1")
        if self.max_image_pixels > MAX_PIXELS:
            problems.append(f"--max-image-pixels={self.max_image_pixels}: at most {MAX_PIXELS}")
        if self.max_buffered_bytes < self.max_body_bytes:
            problems.append(
                f"--max-buffered-bytes={self.max_buffered_bytes}: at least --max-body-bytes={self.max_body_bytes}"
            )
        if problems:
            raise UserError("; ".join(problems))


# Flags that a field's value makes: (field, what --help says).
_NUMBERS = {
    "model and answers": [
        ("default_temperature", "where a request says none; 0 is greedy"),
        ("default_top_p", "where a request says none"),
        ("default_max_tokens", "of an answer where a request says none; less where there is less room"),
    ],
    "limits": [
        ("max_body_bytes", "of a request"),
        ("max_buffered_bytes", "of all requests that are being read"),
        ("max_images", "of a request"),
        ("max_image_bytes", "of a picture as it comes"),
        ("max_image_pixels", "of a picture"),
        ("image_workers", "threads that decode pictures"),
        ("fetch_timeout", "seconds for a remote picture"),
        ("max_choices", "answers to one request (n, times its prompts)"),
        ("max_queue", "requests that wait for a slot"),
        ("rate_limit", "requests a minute of a key, or of an address without keys; 0: any number"),
        ("max_connections", "at a time"),
        ("deadline", "seconds for a request and its answer"),
        ("header_timeout", "seconds for a request's headers"),
        ("body_timeout", "seconds for a request's body"),
        ("write_timeout", "seconds in which a client must take what was sent"),
        ("drain_timeout", "seconds for running requests when the server is told to end"),
    ],
}


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `from_flags` reads."""
    parser.add_argument(
        "--model-name", dest="model_names", action="append", default=[], metavar="NAME",
        help="what clients call the model; may be given several times (default: the folder's name)",
    )  # fmt: skip
    for title, numbers in _NUMBERS.items():
        group = parser.add_argument_group(title)
        for name, text in numbers:
            default = getattr(Settings, name)
            group.add_argument(
                _flag(name),
                type=type(default),
                default=default,
                metavar="N",
                help=f"{text} (default: {default})",
            )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", dest="api_keys", action="append", default=[], metavar="KEY",
        help=f"a key that clients may come with; may be given several times. Others see a command line: "
        f"prefer --api-keys-file or {KEYS_VARIABLE}",
    )  # fmt: skip
    access.add_argument("--api-keys-file", type=Path, help="a file with a key on each line")
    access.add_argument("--protect-metrics", action="store_true", help="/metrics wants a key, too")
    access.add_argument(
        "--allow-remote-images", action="store_true", help="fetch pictures that http(s) URLs name"
    )
    access.add_argument(
        "--cors-origin", dest="cors_origins", action="append", default=[], metavar="ORIGIN",
        help="whose pages may ask from a browser, as https://example.org",
    )  # fmt: skip
    access.add_argument(
        "--trusted-proxy", dest="trusted_proxies", action="append", default=[], metavar="ADDRESS",
        help="a proxy whose X-Forwarded-For is believed",
    )  # fmt: skip
    access.add_argument("--no-page", dest="page", action="store_false", help="no chat page at /")


def from_flags(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings that flags and environment give.

    Raises:
        UserError: a value out of its range, or a file of keys that cannot be read or holds none.
    """
    values = {field.name: getattr(args, field.name) for field in fields(Settings)}
    keys = [*values["api_keys"], *environment.get(KEYS_VARIABLE, "").replace(",", " ").split()]
    if args.api_keys_file:
        keys += _read_keys(args.api_keys_file)
    if any(not key.strip() for key in keys):
        raise UserError("--api-key: is empty; give a key, or leave the flag out")
    values["api_keys"] = tuple(keys)
    made: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Settings(**made)


def _read_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--api-keys-file={path}: cannot be read ({reason})") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api-keys-file={path}: holds no key; write one on each line")
    return keys


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
