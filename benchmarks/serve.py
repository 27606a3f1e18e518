"""The server under load: 32 streams at a time, beside its own engine without a server.

    python -m benchmarks.serve --out=benchmarks/results/serve.json

Each of the streams asks one question after another, with a picture of its own, and takes 64 tokens of each. Told are
requests and tokens per second, the time to the first token and between tokens, as the client sees them (a piece may
hold several tokens, so the time between pieces is told with the number of tokens in one), and what is lost of the
tokens per second of the engine when the same requests are given to it without a server. Client, server and engine share
the cores of this machine. The model is that of benchmarks.generate, with random weights; no answer ends by itself.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common, random_model
from benchmarks.generate import Ours
from vflax import conversation as talk
from vflax.generate.open import engine_of
from vflax.generate.processor import Processor
from vflax.generate.request import Prompt
from vflax.generate.sizes import EngineSettings
from vflax.weights.export import with_template
from vflax.weights.open import open_checkpoint

STREAMS, NEW = 32, 64
SIZES = ("tiny", "100m")
# Of the engine's tokens per second; the mark is for a model whose time goes into the model.
MOST_LOST = {"100m": 0.05}
QUESTION = "What is in this picture, and where does it stand?"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; status 1 where a mark is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument(
        "--requests", type=int, default=4, help="of each stream, one after the other (default: 4)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    result: dict[str, Any] = {
        **common.made(),
        "versions": common.versions("jax", "fastapi", "uvicorn"),
        "sizes": {},
        "marks": [],
    }
    for size in args.size or SIZES:
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name), size, args.requests, args.rounds)
        result["sizes"][size] = found
        if size in MOST_LOST:
            lost = found["lost of the engine's tokens per second"]["median"]
            result["marks"].append(common.mark(f"{size}, lost in the server", lost, at_most=MOST_LOST[size]))
        common.save(args.out, result)
    common.write(args.out, result)
    return 0 if all(found["met"] for found in result["marks"]) else 1


def measure(folder: Path, size: str, requests: int, rounds: int) -> dict[str, Any]:
    """Server and engine by turns."""
    random_model.write(folder, size)
    opened = with_template(open_checkpoint(folder), "vicuna_v1")
    processor = Processor.of(opened)
    engine = Ours(engine_of(opened, processor, EngineSettings(slots=STREAMS), "float32"))
    pictures = [picture(number) for number in range(STREAMS * requests)]
    prompts = [prompt(processor, own) for own in pictures]
    bodies = [body(own) for own in pictures]
    with Server(folder) as server:
        engine(prompts[:STREAMS], NEW)  # what is compiled, and caches, of both
        server.load(bodies[:STREAMS])
        seen, lost, seconds = [], [], {"engine": [], "server": []}
        for _ in range(rounds):
            seconds["engine"].append(engine(prompts, NEW))
            began = time.perf_counter()
            seen += server.load(bodies)
            seconds["server"].append(time.perf_counter() - began)
            lost.append(1 - seconds["engine"][-1] / seconds["server"][-1])
    engine.engine.close()
    tokens = len(bodies) * NEW
    first = [own.first for own in seen]
    between = [gap for own in seen for gap in own.gaps]
    return {
        "streams": STREAMS,
        "requests": len(bodies),
        "tokens of each": NEW,
        "requests per second": round(len(bodies) / statistics.median(seconds["server"]), 2),
        "tokens per second": {
            side: round(tokens / statistics.median(own), 1) for side, own in seconds.items()
        },
        "lost of the engine's tokens per second": {
            "median": round(statistics.median(lost), 4), "least": round(min(lost), 4), "most": round(max(lost), 4)
        },
        "milliseconds to the first token": percentiles(first),
        "milliseconds between pieces": percentiles(between),
        "tokens of a piece": round(NEW * len(seen) / (len(between) + len(seen)), 2),
    }  # fmt: skip


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def prompt(processor: Processor, own: Image.Image) -> Prompt:
    turn = talk.Turn("user", (talk.Image(), talk.Text(QUESTION)))
    return processor.chat(talk.Conversation((turn,)), [own])


def body(own: Image.Image) -> bytes:
    encoded = io.BytesIO()
    own.save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return json.dumps(
        {"messages": [{"role": "user", "content": parts}], "stream": True, "temperature": 0, "max_tokens": NEW,
         "ignore_eos": True}
    ).encode()  # fmt: skip


@dataclasses.dataclass
class Seen:
    """What a client saw of one answer: seconds to its first piece, and between pieces."""

    first: float
    gaps: list[float]


class Server:
    """`python -m vflax.serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "vflax.serve", f"--model={folder}", "--template=vicuna_v1", "--port=0",
                f"--slots={STREAMS}", "--max-queue=1000", "--no-page",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __enter__(self) -> Server:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._port = int(line.rsplit(":", 1)[1])
        return self

    def __exit__(self, *args: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def load(self, bodies: Sequence[bytes]) -> list[Seen]:
        """All requests, STREAMS at a time."""
        return asyncio.run(self._load(bodies))

    async def _load(self, bodies: Sequence[bytes]) -> list[Seen]:
        streams = [self._stream(bodies[number::STREAMS]) for number in range(STREAMS)]
        return [seen for own in await asyncio.gather(*streams) for seen in own]

    async def _stream(self, bodies: Sequence[bytes]) -> list[Seen]:
        return [await self._ask(own) for own in bodies]

    async def _ask(self, own: bytes) -> Seen:
        """A request over a connection of its own, by hand: a client's library would take more time than the server."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(own)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + own)
        status = await reader.readline()
        assert b"200" in status, status
        times = []
        while line := await reader.readline():
            if line.startswith(b"data: {") and b'"content":' in line and b'"content":""' not in line:
                times.append(time.perf_counter())
        writer.close()
        return Seen(times[0] - began, [b - a for a, b in itertools.pairwise(times)])


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    found = np.percentile(np.array(seconds) * 1000, [50, 95, 99])
    return {name: round(float(value), 2) for name, value in zip(("p50", "p95", "p99"), found, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
