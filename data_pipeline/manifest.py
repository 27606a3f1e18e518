"""OUT/manifest.json: what each split was made of, by what, and what was left out.

    {"splits": {SPLIT: {
        format, tool {vflax: version, code: hash of the code that makes shards}, options {name: value},
        sources [{file, bytes, sha256}]     the annotation files
        images [{path, kind, entries, skipped}]     folders and archives; of an archive how many files it holds, and how
                                            many members were passed over (absent: none; data_pipeline.archives)
        read, written, quarantined          samples; read = written + quarantined
        reasons {reason: count}             of those left out: data_pipeline.hygiene, data_pipeline.releases
        findings {kind: count}              of those written
        tasks {task: count}
        quarantine_file, findings_file      one JSON line for each: {number, id, task, file, reason or kind, detail}
    }}}

It holds names of files, not where they lay: the same release gives the same manifest everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

import vflax
from data_pipeline.remote import reaching
from data_pipeline.shard import Result, code_version
from data_pipeline.tfds_writer import Stage

MANIFEST_FILE = "manifest.json"
SHOWN = 20  # of the samples left out, in what `convert` returns


def split_report(
    format: str,
    sources: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    split: str,
    options: Mapping[str, Any],
    results: Sequence[Result],
) -> dict[str, Any]:
    """A split's part of the manifest; sources are those of `sources`, images those of ImageStore.report."""
    rows, written = (sum(getattr(result, name) for result in results) for name in ("rows", "samples"))
    return {
        "format": format,
        "tool": {"vflax": vflax.__version__, "code": code_version()[:12]},
        "options": dict(options),
        "sources": list(sources),
        "images": list(images),
        "read": rows,
        "written": written,
        "quarantined": rows - written,
        "reasons": dict(_sum(result.reasons for result in results).most_common()),
        "findings": dict(sorted(_sum(result.findings for result in results).items())),
        "tasks": dict(sorted(_sum(result.tasks for result in results).items())),
        "quarantine_file": f"quarantine/{split}.jsonl",
        "findings_file": f"findings/{split}.jsonl",
    }


def add_to(stage: Stage, split: str, report: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Put the split's part, and the two lists that it names, into the dataset."""
    stage.add_file(report["quarantine_file"], [result.quarantine_path for result in results])
    stage.add_file(report["findings_file"], [result.findings_path for result in results])
    splits = (stage.read_json(MANIFEST_FILE) or {"splits": {}})["splits"] | {split: report}
    stage.write_json(MANIFEST_FILE, {"splits": dict(sorted(splits.items()))})


def first_problems(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The first SHOWN of the samples left out."""

    def lines() -> Iterable[str]:
        for result in results:
            if result.reasons:
                with open(result.quarantine_path, encoding="utf-8") as file:
                    yield from itertools.islice(file, SHOWN)

    return [json.loads(line) for line in itertools.islice(lines(), SHOWN)]


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def sources(files: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """[{file: name, bytes, sha256}] of annotation files, local or on a bucket."""
    return [_source(epath.Path(file)) for file in files]


def _source(file: epath.Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with reaching(file), file.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"file": file.name, "bytes": size, "sha256": digest.hexdigest()}
