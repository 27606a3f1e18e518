"""OpenAI's messages to a typed conversation: what is typed stays text, and only image parts are images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vflax import conversation as talk
from vflax.serve.errors import bad
from vflax.serve.protocol import ImagePart, Message, TextPart


@dataclass(frozen=True)
class Source:
    """Where a picture comes from.

    where: the field that names it.
    data: its encoded bytes; None: they are at `url`.
    """

    where: str
    data: bytes | None
    url: str = ""


def read(
    messages: Sequence[Message], *, max_images: int, max_image_bytes: int, remote: bool
) -> tuple[talk.Conversation, list[Source]]:
    """The conversation, and its pictures in order.

    remote: whether http(s) URLs may stand for pictures.

    Raises:
        ApiError: 400, naming the message that cannot be taken.
    """
    system, rest = None, list(enumerate(messages))
    if messages[0].role in ("system", "developer"):
        system = "".join(_texts(messages[0], "messages[0]"))
        rest = rest[1:]
    turns: list[talk.Turn] = []
    sources: list[Source] = []
    for number, message in rest:
        where = f"messages[{number}]"
        turns.append(talk.Turn(_role(message, where, turns), _parts(message, where, sources, remote)))
        if len(sources) > max_images:
            raise bad(
                f"{where}: more than {max_images} images in the request; send fewer", where, "too_many_images"
            )
    if not turns or turns[-1].role != "user":
        raise bad(
            "messages: the last message must be the user's, for it is the one that is answered", "messages"
        )
    read_sources = [_decoded(source, max_image_bytes) for source in sources]
    return talk.Conversation(tuple(turns), system), read_sources


def num_characters(conversation: talk.Conversation) -> int:
    return len(conversation.system or "") + sum(len(turn.text) for turn in conversation.turns)


def _role(message: Message, where: str, before: Sequence[talk.Turn]) -> Literal["user", "assistant"]:
    if message.role in ("system", "developer"):
        raise bad(f"{where}.role: a system message stands first, and there is one at most", f"{where}.role")
    expected: Literal["user", "assistant"] = "assistant" if len(before) % 2 else "user"
    if message.role != expected:
        raise bad(
            f"{where}.role: is {message.role}, expected {expected}: user and assistant take turns, the user first. "
            "Join messages of one role that follow each other",
            f"{where}.role",
        )
    return expected


def _parts(message: Message, where: str, sources: list[Source], remote: bool) -> tuple[talk.Part, ...]:
    if message.role == "assistant":
        return (talk.Text("".join(_texts(message, where))),)
    if not message.content:
        raise bad(f"{where}.content: is empty; a user's message says something", f"{where}.content")
    if isinstance(message.content, str):
        return (talk.Text(message.content),)
    parts: list[talk.Part] = []
    for number, part in enumerate(message.content):
        if isinstance(part, TextPart):
            parts.append(talk.Text(part.text))
            continue
        sources.append(_source(part, f"{where}.content[{number}].image_url", remote))
        parts.append(talk.Image())
    return tuple(parts)


def _texts(message: Message, where: str) -> list[str]:
    """Of a message that may hold no image."""
    if (message.model_extra or {}).get("tool_calls"):
        raise bad(f"{where}.tool_calls: this server knows no tools", f"{where}.tool_calls")
    if message.content is None or isinstance(message.content, str):
        return [message.content or ""]
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    if len(texts) < len(message.content):
        raise bad(f"{where}.content: only a user's message may hold images", f"{where}.content")
    return texts


def _source(part: ImagePart, where: str, remote: bool) -> Source:
    url = part.image_url.url
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        return Source(where, None, url)
    if scheme in ("http", "https"):
        if remote:
            return Source(where, None, url)
        raise bad(
            f"{where}: this server fetches no images (--allow-remote-images); send a data: URL",
            where,
            "invalid_image_url",
        )
    raise bad(f"{where}: expected data:image/TYPE;base64,...", where, "invalid_image_url")


def _decoded(source: Source, most: int) -> Source:
    """With the bytes of a data: URL; another stays as it is."""
    if source.url[:5].lower() != "data:":
        return source
    head, comma, content = source.url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise bad(f"{source.where}: expected data:image/TYPE;base64,...", source.where, "invalid_image_url")
    if len(content) * 3 // 4 > most + 3:
        raise bad(f"{source.where}: more than {most} bytes", source.where, "image_too_large")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"{source.where}: not base64 ({error})", source.where, "invalid_image_url") from None
    return Source(source.where, data)
