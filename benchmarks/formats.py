"""What goes through: a release of every format, the real samples, and real captions and boxes, counted.

    VFLAX_SHARED_DATA=DIR python -m benchmarks.formats --out=benchmarks/results/formats.json

Converts a self-written release of each format with every fault that real ones have
(tests/data_pipeline/release_files.py), the real Vision-Flan samples as they are and with one photo cut in half, and
asks an endpoint on localhost about the real captions and boxes: every fifth request is first answered 429, every ninth
500, every thirteenth breaks off; by the place of the image in the file some replies leak and some are malformed. Exit
status 1 when a sample is neither written nor named. DIR holds vision-flan-samples/ and llava-gpt4/. Needs the test
extra.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import common
from data_pipeline.convert import convert
from data_pipeline.synthesize.__main__ import main as synthesize
from data_pipeline.synthesize.contexts import Context, read_contexts
from data_pipeline.synthesize.parsing import TYPES
from tests.data_pipeline.openai_server import REPLIES, Answer, Seen, completion, failure, kind, serving
from tests.data_pipeline.release_files import FORMAT_OF, KINDS, OPTIONS_OF, write_release

ROWS = 50


def counts(report: dict[str, Any]) -> dict[str, Any]:
    """What of a conversion's report is kept."""
    return {key: report[key] for key in ("read", "written", "quarantined", "reasons", "findings")}


def formats(work: Path) -> dict[str, Any]:
    """Every kind of release, ROWS rows each."""
    result = {}
    for release in KINDS:
        annotations, images, _ = write_release(work / release, release, ROWS)
        report = convert(
            FORMAT_OF[release],
            annotations,
            images,
            work / f"{release}-out",
            show_progress=False,
            **OPTIONS_OF[release],
        )
        result[release] = counts(report)
    return result


def real_samples(work: Path, folder: Path) -> dict[str, Any]:
    """The real samples as they are, and with the first JPEG cut in half."""
    annotations, images = folder / "annotation.json", work / "images"
    shutil.copytree(folder / "images", images)
    result = {
        "as_they_are": counts(
            convert("vision_flan", annotations, images, work / "whole", show_progress=False)
        )
    }
    victim = next(
        name for item in json.loads(annotations.read_text()) if (name := item["image"]).endswith(".jpg")
    )
    os.truncate(images / victim, (images / victim).stat().st_size // 2)
    result["one_cut"] = counts(convert("vision_flan", annotations, images, work / "cut", show_progress=False))
    return result


class Endpoint:
    """Replies about real contexts, with what goes wrong at a real endpoint."""

    def __init__(self, contexts: list[Context]) -> None:
        self._contexts = contexts
        self._places = {
            context.text(boxes): i for boxes in (False, True) for i, context in enumerate(contexts)
        }
        self._first = 0
        self.troubles: Counter[str] = Counter()

    def __call__(self, seen: Seen, before: int) -> Answer:
        if not before:
            self._first += 1
            for every, name, answer in (
                (13, "broken_off", Answer(body={"id": "x" * 100}, close_after=40)),
                (9, "500", failure(500)),
                (5, "429", failure(429, retry_after="0")),
            ):
                if self._first % every == 0:
                    self.troubles[name] += 1
                    return answer
        i, type = self._places[seen.query], kind(seen)
        text = REPLIES[type].format(id=self._contexts[i].image)
        if i % 7 == 0:
            text = text.replace("hing", "hing at [0.1, 0.2, 0.3, 0.4]")
        elif i % 11 == 0:
            text = "A picture." if type == "detail" else "Question:\nWhat is it?"
        return completion(text)


def synthesis(work: Path, path: Path) -> dict[str, Any]:
    """All three types for every real context."""
    contexts = list(read_contexts(path))
    endpoint = Endpoint(contexts)
    os.environ.setdefault("OPENAI_API_KEY", "none")
    with serving(endpoint) as server:
        began = time.monotonic()
        flags = [f"--contexts={path}", f"--out={work / 'out'}", f"--base_url={server.url}", "--model=m"]
        status = synthesize([*flags, "--concurrency=16", "--retry_wait=0.01"])
        seconds = time.monotonic() - began
    written = {type: len(json.loads((work / "out" / f"{type}.json").read_text())) for type in TYPES}
    return {
        "status": status,
        "contexts": len(contexts),
        "asked": len(contexts) * len(TYPES),
        "requests": len(server.seen),
        "answered_twice": sum(count > 1 for count in server.answered.values()),
        "troubles": dict(endpoint.troubles),
        "written": written,
        "rejects": json.loads((work / "out" / "manifest.json").read_text())["rejects"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    args = common.parser(__doc__).parse_args()
    shared = Path(os.environ["VFLAX_SHARED_DATA"])
    result: dict[str, Any] = {"command": "python -m benchmarks.formats", **common.made()}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        result["formats"] = formats(work / "formats")
        (work / "real").mkdir()
        result["real_samples"] = real_samples(work / "real", shared / "vision-flan-samples")
        result["synthesis"] = synthesis(work, shared / "llava-gpt4" / "caps_boxes_coco2014_val_80.jsonl")
    common.write(args.out, result)
    converted = [*result["formats"].values(), *result["real_samples"].values()]
    lost = [
        found for found in converted if found["read"] != found["written"] + sum(found["reasons"].values())
    ]
    made = result["synthesis"]
    unnamed = made["asked"] - sum(made["written"].values()) - sum(made["rejects"].values())
    if lost or unnamed or made["status"] or made["answered_twice"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
