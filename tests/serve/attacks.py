"""Requests that nobody should send: each a function of its seed and number, so that one can be sent again alone.

Most are good but for one thing, so that they are looked at deep inside before they are refused.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from tests.serve.test_mutated import mutated

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What the server of these tests allows, so that attacks can be beyond it.
MAX_BODY, MAX_IMAGE, MAX_PIXELS, MAX_CHOICES = 1 << 20, 300_000, 4_000_000, 16

End = Literal["read", "half-close", "close", "reset", "close early"]
"""What the client does when it has sent all: it reads until the server closes; closes its sending half; closes; resets
the connection; reads a little of the answer and closes."""


@dataclass(frozen=True)
class Attack:
    """What goes over one connection.

    pieces: bytes, `pause` seconds after each other.
    whole: these are whole requests of HTTP, so there is an answer to read.
    late: a deadline was asked for, so that 504 is an answer.
    patience: seconds that the client waits for more of the answer; within a minute the server has to close.
    """

    pieces: tuple[bytes, ...]
    end: End
    whole: bool
    late: bool
    pause: float = 0.0
    patience: float = 60.0


def attack(seed: int, number: int) -> Attack:
    """The number-th attack of a seed."""
    draw = random.Random(f"{seed}/{number}")
    path, body = _body(draw)
    late = b"deadline" in body
    if draw.random() < 0.12:
        return Attack((_broken_http(draw, path, body),), "read", False, late, patience=0.3)
    request = _request(path, body, keep_alive=False)
    end: End = "read"
    pieces: tuple[bytes, ...] = (request,)
    whole, pause = True, 0.0
    kind = draw.random()
    if kind < 0.08:
        pieces = _cut(draw, request, draw.randint(2, 9))
    elif kind < 0.14:
        pieces, whole, end = (
            (request[: draw.randrange(len(request))],),
            False,
            draw.choice(["close", "reset"]),
        )
    elif kind < 0.18:
        pieces, whole, end = (request[: draw.randrange(1, len(request) + 1)],), False, "half-close"
    elif kind < 0.26:
        end, whole = draw.choice(["close", "reset", "close early", "close early"]), False
    elif kind < 0.30:
        first = _request(path, body, keep_alive=True)
        pieces = (first + _request(*_body(draw), keep_alive=True) * draw.randint(0, 3) + request,)
        late = True  # whose bodies they are does not matter
        whole = len(pieces[0]) < MAX_BODY  # beyond that the server cuts it off
        if draw.random() < 0.3:
            end, whole = draw.choice(["close", "reset", "half-close"]), False
    elif kind < 0.304:
        pieces, pause = _cut(draw, request, draw.randint(20, 60)), 0.1
        whole = False  # it may be cut off before it is
    return Attack(pieces, end, whole, late, pause)


def _cut(draw: random.Random, data: bytes, number: int) -> tuple[bytes, ...]:
    places = [0, *sorted(draw.randrange(len(data)) for _ in range(number - 1)), len(data)]
    return tuple(data[a:b] for a, b in itertools.pairwise(places) if a < b)


def _request(path: str, body: bytes, *, keep_alive: bool) -> bytes:
    close = "" if keep_alive else "connection: close\r\n"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{close}content-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


# ----------------------------------------------------------------------------------------------------------------------
# Bodies


def _body(draw: random.Random) -> tuple[str, bytes]:
    """(path, JSON or what stands for it)."""
    path, asked = (CHAT, _chat(draw)) if draw.random() < 0.75 else (TEXT, _text(draw))
    kind = draw.random()
    if kind < 0.2:
        return path, mutated(asked, draw)
    if kind < 0.27:
        return path, _broken_json(draw, asked)
    return path, json.dumps(asked, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _chat(draw: random.Random) -> dict[str, Any]:
    messages = [{"role": "system", "content": _words(draw)}] if draw.random() < 0.3 else []
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        messages += [
            {"role": "user", "content": _content(draw)},
            {"role": "assistant", "content": _words(draw)},
        ]
    messages.append({"role": "user", "content": _content(draw)})
    chosen = {"logprobs": True, "top_logprobs": draw.choice([0, 5, 20])} if draw.random() < 0.3 else {}
    return {"messages": messages, **chosen, **_sampling(draw)}


def _text(draw: random.Random) -> dict[str, Any]:
    prompts = [_words(draw) or "x" for _ in range(draw.choice([1, 1, 2, 4]))]
    chosen = {"logprobs": draw.choice([0, 5, 20])} if draw.random() < 0.3 else {}
    return {"prompt": prompts, **chosen, **_sampling(draw)}


def _sampling(draw: random.Random) -> dict[str, Any]:
    """Settings at the edge of what may be; one in ten is beyond it."""
    names = draw.sample(sorted(_SETTINGS), draw.choice([0, 1, 1, 2, 2, 3, 4]))
    chosen = {name: draw.choice(_SETTINGS[name][draw.random() < 0.1]) for name in names}
    return {"max_tokens": draw.choice([1, 2, 8, 8, 24, 24, 60]), "stream": draw.random() < 0.5, **chosen}


# name: (what may be, what may not, or is not served in time)
_SETTINGS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.7, 2, 1e-30, 5e-324], [2.1, -0.1]),
    "top_p": ([1, 0.5, 1e-300, 1 - 2**-53], [0, 1.1]),
    "top_k": ([0, 1, -1, 50, 2**31 - 1, 2**31, 2**63], [-2]),
    "repetition_penalty": ([1, 0.01, 100, 1.1], [1e-9]),
    "presence_penalty": ([0, 2, -2], [1e9]),
    "frequency_penalty": ([0, 2, -2, -1e-320], [-2.1]),
    "seed": ([0, -1, 2**63 - 1, -(2**63)], [2**64]),
    "stop": ([None, "e", ["a", "\N{REPLACEMENT CHARACTER}"], ["x" * 10_000], [" "] * 16], [[""], ["x"] * 17]),
    "n": ([1, 1, 2, 3, 16], [17, 0]),
    "max_tokens": ([None, 400], [2**31, 0]),
    "deadline": ([60.0, 1e300], [0.01, 1e-9]),
    "ignore_eos": ([True, False], [1]),
    "stream_options": ([{"include_usage": True}, None], [{"include_usage": 1}]),
    "user": (["\x00", "x" * 1000, "\U0001f600"], ["\ud800"]),
}


_TEMPLATE = [
    "</s>",
    "<s>",
    "<image>",
    "ASSISTANT:",
    "USER:",
    "<0x00>",
    "<unk>",
    "<|im_end|>",
    "[INST]",
    "{{7*7}}",
]


def _words(draw: random.Random) -> str:
    """Text: of common words, of a template's tokens, of any characters at all, and now and then a great deal of it."""
    kind, number = draw.random(), draw.choice([0, 1, 5, 5, 20, 60])
    if kind < 0.5:
        return " ".join(draw.choice(["dogs", "cats", "picture", "What is", "5", "\n"]) for _ in range(number))
    if kind < 0.7:
        return "".join(draw.choice([*_TEMPLATE, " ", "x"]) for _ in range(number))
    if kind < 0.97:
        number = min(number, 20)
        return "".join(
            chr(draw.choice([0, 10, 65, 0x300, 0x200F, 0xE000, 0xFFFD, 0x1F600])) for _ in range(number)
        )
    return draw.choice(["a", " ", "</s>", "\u0300", "\x00"]) * draw.choice([5_000, 40_000])


def _content(draw: random.Random) -> Any:
    if draw.random() < 0.3:
        return _words(draw) or "x"
    images = [_image_part(draw) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))]
    parts = [*images, {"type": "text", "text": _words(draw)}]
    draw.shuffle(parts)
    return parts


def _broken_json(draw: random.Random, asked: dict[str, Any]) -> bytes:
    good = json.dumps(asked).encode()
    at = draw.randrange(len(good))
    depth = draw.choice([50, 199, 300, 5_000, 90_000])
    kinds: list[Callable[[], bytes]] = [
        lambda: good[:at],
        lambda: good[:at] + draw.randbytes(draw.randint(1, 20)) + good[at:],
        lambda: good[:at] + b"\x00" + good[at:],
        lambda: good + good,
        lambda: b"\xef\xbb\xbf" + good,
        lambda: json.dumps(asked).encode("utf-16"),
        lambda: zlib.compress(good),
        lambda: good[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}",
        lambda: good[:-1] + b',"x":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
        lambda: good[:-1] + b',"seed":' + b"9" * draw.choice([25, 4_301, 200_000]) + b"}",
        lambda: (
            good[:-1]
            + b',"temperature":'
            + draw.choice([b"1e999", b"-1e999", b"NaN", b"Infinity", b"1e-999"])
            + b"}"
        ),
        lambda: good[:-1] + b',"temperature":0.' + b"1" * 100_000 + b"}",
        lambda: good[:-1] + b',"n":1,"n":2,"model":null,"messages":[],"prompt":""}',
        lambda: good[:-1] + b',"user":"\\ud800\\udc00\\udc00\\u0000"}',
        lambda: b'{"messages":[' + b'{"role":"user","content":"x"},' * draw.choice([1_023, 1_025]) + b"0]}",
        lambda: b'{"prompt":[' + b'"x",' * draw.choice([15, 16, 20_000]) + b'"x"]}',
        lambda: good + b" " * draw.choice([100, MAX_BODY]),
        lambda: draw.randbytes(draw.randint(0, 300)),
        lambda: draw.choice([b"", b"null", b"[]", b"0", b'""', b"{}", b"\xff\xfe", b"true", b"-"]),
    ]
    return draw.choice(kinds)()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def _image_part(draw: random.Random) -> dict[str, Any]:
    data = _picture(draw) if draw.random() < 0.7 else _broken_picture(draw)
    content = base64.b64encode(data).decode()
    kind = draw.random()
    if kind < 0.88:
        url = f"data:image/{draw.choice(['png', 'jpeg', 'x'])};base64,{content}"
    elif kind < 0.95:
        at = draw.randrange(len(content) + 1)
        broken = [
            content[:at],
            content[:at] + draw.choice(["=", "\n", "-_", "\x00", "é", "%3D"]) + content[at:],
        ]
        url = "DATA:image/png;base64," + draw.choice(broken)
    else:
        url = draw.choice(
            ["", "data:", "data:,", "data:image/png,x", f"data:{content}", "http://127.0.0.1/x", "file:///etc/passwd",
             "data:;base64,", "data:image/svg+xml;base64,PHN2Zy8+", "javascript:1", f"data:image/png;base64;{content}"]
        )  # fmt: skip
    return {"type": "image_url", "image_url": {"url": url}}


def _picture(draw: random.Random) -> bytes:
    """A whole one, of few kinds and colours, so that some are known from before."""
    mode, kind = draw.choice(
        [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("P", "GIF"), ("RGB", "BMP"), ("RGBA", "PNG"), ("1", "PNG"),
         ("I;16", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("RGBA", "WEBP")]
    )  # fmt: skip
    size = draw.choice([(1, 1), (40, 30), (30, 40), (1, 300), (200, 7)])
    return encoded(Image.new(mode, size, draw.randrange(3)), kind)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _broken_picture(draw: random.Random) -> bytes:
    good = _picture(draw)
    at = draw.randrange(len(good))
    kinds: list[Callable[[], bytes]] = [
        lambda: good[:at],
        lambda: good[:at] + draw.randbytes(draw.randint(1, 8)) + good[at + draw.randint(0, 8) :],
        lambda: good + draw.randbytes(100),
        lambda: draw.choice([_huge_png, _huge_gif, _huge_bmp, _huge_webp, _huge_jpeg])(draw),
        lambda: draw.choice([_inflating_png, _inflating_text, _limit_png, _animation])(draw),
        lambda: encoded(
            Image.new("RGB", (9, 9)), draw.choice(["TIFF", "ICO", "PPM", "TGA", "ICNS", "EPS", "PDF"])
        ),
        lambda: draw.choice(
            [b"", b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP", b"\xff\xd8\xff"]
        ),
        lambda: draw.randbytes(draw.choice([1, 100, 10_000])),
        lambda: bytes(MAX_IMAGE + draw.choice([-1, 0, 1, 1000])),
    ]
    return draw.choice(kinds)()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IEND", b"")


@functools.cache
def _zeros(number: int) -> bytes:
    """So many, compressed."""
    return zlib.compress(bytes(number))


def _huge_png(draw: random.Random) -> bytes:
    """One that says it is large, and is not."""
    side = draw.choice([2_001, 13_000, 100_000, 2**31 - 1, 2**32 - 1, 0])
    return _png(side, draw.choice([side, 1]), _chunk(b"IDAT", _zeros(99)))


def _inflating_png(draw: random.Random) -> bytes:
    """A few rows whose data inflates to much more than they take."""
    return _png(30, 30, _chunk(b"IDAT", _zeros(draw.choice([10_000, 50_000_000]))))


def _inflating_text(draw: random.Random) -> bytes:
    """Compressed texts and profiles that inflate to 50 MB."""
    name = draw.choice([b"zTXt", b"iCCP", b"iTXt"])
    key = b"a\0\1\0\0\0" if name == b"iTXt" else b"a\0\0"
    inflating = _chunk(name, key + _zeros(50_000_000))
    return _png(9, 9, inflating * draw.choice([1, 3]), _chunk(b"IDAT", _zeros(9 * 28)))


def _limit_png(draw: random.Random) -> bytes:
    """As many pixels as may be, or one row more, in a few bytes."""
    height = MAX_PIXELS // 2_000 + draw.choice([0, 0, 1])
    return _png(2_000, height, _chunk(b"IDAT", _zeros(height * 251)), depth=1, colour=0)


def _animation(draw: random.Random) -> bytes:
    frames = [Image.new("P", (60, 60), n) for n in range(30)]
    return encoded(frames[0], draw.choice(["GIF", "WEBP", "PNG"]), save_all=True, append_images=frames[1:])


def _huge_gif(draw: random.Random) -> bytes:
    good = bytearray(encoded(Image.new("P", (9, 9)), "GIF"))
    good[6:10] = struct.pack("<HH", 65_535, draw.choice([1, 65_535]))
    return bytes(good)


def _huge_bmp(draw: random.Random) -> bytes:
    good = bytearray(encoded(Image.new("RGB", (9, 9)), "BMP"))
    good[18:26] = struct.pack(
        "<ii", draw.choice([9, -9, 2**31 - 1, 1_999]), draw.choice([-9, -(2**31), 2**31 - 1, 1_999])
    )
    good[28:34] = struct.pack("<HI", draw.choice([1, 8, 24, 32, 77]), draw.choice([0, 1, 2, 3, 99]))
    return bytes(good)


def _huge_webp(draw: random.Random) -> bytes:
    good = encoded(Image.new("RGB", (9, 9)), "WEBP")
    canvas = (
        b"VP8X" + struct.pack("<I", 10) + draw.choice([b"\x00", b"\x02", b"\x3e"]) + bytes(3) + b"\xff" * 6
    )
    data = b"WEBP" + canvas + good[12:]
    return b"RIFF" + struct.pack("<I", len(data)) + data


def _huge_jpeg(draw: random.Random) -> bytes:
    good = bytearray(encoded(Image.new("RGB", (9, 9)), "JPEG"))
    at = good.index(b"\xff\xc0") + 5
    good[at : at + 4] = struct.pack(">HH", draw.choice([1_999, 65_535, 0]), draw.choice([1_999, 65_535, 0]))
    return bytes(good)


# ----------------------------------------------------------------------------------------------------------------------
# HTTP


def _broken_http(draw: random.Random, path: str, body: bytes) -> bytes:
    """Heads that are wrong, bodies that do not fit them, other protocols, and all other paths and methods."""
    request, length = _request(path, body, keep_alive=False), len(body)
    at = draw.randrange(min(len(request), 200))
    start = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n".encode()
    )
    sized = b"content-length: %d\r\n" % length
    big = draw.choice([8_000, 60_000, 66_000, 300_000])
    kinds: list[Callable[[], bytes]] = [
        lambda: request[:at] + draw.randbytes(draw.randint(1, 4)) + request[at + draw.randint(0, 4) :],
        lambda: start + b"content-length: %d\r\n\r\n" % max(0, length + draw.choice([-7, -1, 1])) + body,
        lambda: (
            start
            + b"content-length: "
            + draw.choice([b"-1", b"9" * 40, b"x", b"", b"0x9", b"1, 1"])
            + b"\r\n\r\n"
        ),
        lambda: start + sized + sized + b"\r\n" + body,
        lambda: start + sized + b"transfer-encoding: chunked\r\n\r\n" + body,
        lambda: start + b"transfer-encoding: chunked\r\n\r\n" + _chunked(draw, body),
        lambda: (
            start
            + b"transfer-encoding: "
            + draw.choice([b"gzip", b"x, chunked", b"chunked, x"])
            + b"\r\n\r\n"
            + body
        ),
        lambda: start + b"x: " + b"a" * big + b"\r\n" + sized + b"\r\n" + body,
        lambda: start + b"x: y\r\n" * (big // 10) + sized + b"\r\n" + body,
        lambda: b"GET /" + b"a" * big + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        lambda: start + draw.choice(_ODD_HEADERS) + sized + b"\r\n" + body,
        lambda: request.replace(
            b"HTTP/1.1", draw.choice([b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"http"]), 1
        ),
        lambda: request.replace(
            b"application/json", draw.choice([b"text/plain", b"", b"\xff", b"application/x"]), 1
        ),
        lambda: request.replace(b"\r\n", b"\n"),
        lambda: draw.choice(_OTHER_PROTOCOLS) + draw.randbytes(20) + b"\r\n\r\n",
        lambda: (
            b"%b %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            % (draw.choice(_METHODS), draw.choice(_PATHS))
        ),
        lambda: (
            b"%b %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%b\r\n%b"
            % (draw.choice(_METHODS), draw.choice(_PATHS), sized, body)
        ),
    ]
    return draw.choice(kinds)()


_METHODS = [
    b"GET",
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"get",
    b"\xff",
]
_PATHS = [
    b"/", b"/health", b"/metrics", b"/v1/models", b"/v1/models/x", b"/v1/models/%00%ff/../x", b"/page/../../etc/passwd",
    b"/page/%2e%2e/%2e%2e/etc/passwd", b"/page/\x00", b"/page/%00", b"/page/config.json", b"*", b"//x//", b"http://x/health",
    b"/v1/chat/completions?a=%ff", b"/%ed%a0%80", b"x:1", b"/health#x", b"?", b"/\xff", b"/docs", b"/openapi.json",
]  # fmt: skip
_ODD_HEADERS = [
    b"expect: 100-continue\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"content-encoding: gzip\r\n",
    b"x-request-id: \x01\r\n", b"x-request-id: " + b"a" * 200 + b"\r\n", b"authorization: Bearer \xff\xfe\r\n",
    b"authorization: Basic\r\n", b"x-forwarded-for: ::1, x\r\n", b"origin: null\r\n", b"host: y\r\n", b": x\r\n",
    b"a b: c\r\n", b"x: \x00\r\n", b"x:\r\n y\r\n", b"accept: application/openmetrics-text;q=x\r\n",
    b"x\xff: y\r\n", b"range: bytes=0-1\r\n", b"cookie: " + b"a=b;" * 500 + b"\r\n",
]  # fmt: skip
_OTHER_PROTOCOLS = [
    b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"SSH-2.0-x\r\n", b"\x00" * 50,
    b"*1\r\n$4\r\nPING\r\n", b"GET /\r\n\r\n", b"\r\n" * 100, b"{}", b"EHLO x\r\n",
]  # fmt: skip


def _chunked(draw: random.Random, body: bytes) -> bytes:
    """In chunks, half of the time with something wrong."""
    pieces = [b"%x\r\n%b\r\n" % (len(one), one) for one in _cut(draw, body, 4)] if body else []
    good = b"".join(pieces) + b"0\r\n\r\n"
    at = draw.randrange(len(good))
    broken = [
        good[:at] + draw.randbytes(1) + good[at + 1 :],
        b"ffffffffffffffffff\r\n" + body,
        b"-1\r\n" + body,
        b"1;" + b"a" * draw.choice([100, 70_000]) + b"\r\nx\r\n0\r\n\r\n",
        good[:-2] + b"x: " + b"y" * draw.choice([10, 70_000]) + b"\r\n\r\n",
        b"1\r\n \r\n" * 3_000 + good,
    ]
    return good if draw.random() < 0.5 else draw.choice(broken)
