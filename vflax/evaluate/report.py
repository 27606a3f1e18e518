"""One page for a run, OUT/report.html, that needs nothing else; its numbers in report.json, its tables in report.md."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image

import vflax
from vflax.evaluate.files import json_lines, json_value
from vflax.evaluate.published import MEASURES, ROWS
from vflax.evaluate.question import Question

# Shown of a task: so many wrong ones and so many right ones, evenly out of all.
_SHOWN = 60
_THUMBNAIL = 160  # pixels
# A table of right answers by what was read is shown for so many different answers at most.
_ANSWERS = 12
_MISSING, _UNPARSED = "(missing)", "(unparsed)"


def write(
    out: Path, questions: Mapping[str, Sequence[Question]], prompts: Mapping[str, Mapping[str, str]]
) -> None:
    """Write report.html, report.json and report.md of all tasks that have a score.

    Args:
        out: the run's folder.
        questions: {task: its questions}, for their pictures.
        prompts: {task: {key: what the model was asked}}.
    """
    tasks = [_task(out / name, own, prompts.get(name, {})) for name, own in questions.items()]
    run = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "vflax": vflax.__version__}
    models = [
        ("this run", {task["name"]: task["score"]["score"] for task in tasks}, ""),
        *((row.model, row.scores, row.source) for row in ROWS),
    ]
    facts = {
        "run": run,
        "scores": {task["name"]: task["score"] for task in tasks},
        "published": [{"model": row.model, "scores": row.scores, "source": row.source} for row in ROWS],
    }
    (out / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(_markdown(tasks, models), encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vflax.evaluate", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        tasks=tasks, models=models, run=run, measures=MEASURES, missing=_MISSING, unparsed=_UNPARSED
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def _task(folder: Path, questions: Sequence[Question], prompts: Mapping[str, str]) -> dict[str, Any]:
    verdicts = json_lines(folder / "verdicts.jsonl")
    of_key = {question.key: question for question in questions}
    shown = [
        {
            **row,
            "prompt": prompts.get(row["key"], ""),
            "outcome": _outcome(row),
            "pictures": [_thumbnail(p.read()) for p in of_key[row["key"]].pictures]
            if row["key"] in of_key
            else [],
        }
        for row in _chosen(verdicts)
    ]
    return {
        "name": folder.name,
        "score": json_value(folder / "score.json"),
        "run": _json(folder / "run.json"),
        "judge": _json(folder / "judge.json"),
        "outcomes": Counter(_outcome(row) for row in verdicts),
        "confusion": _confusion(verdicts),
        "yes": _yes_ratios(verdicts),
        "samples": shown,
    }


def _json(path: Path) -> Any:
    return json_value(path) if path.exists() else None


def _outcome(row: Mapping[str, Any]) -> str:
    if row["prediction"] is None:
        return "missing"
    if row["parsed"] is None:
        return "unparsed"
    return "right" if row["score"] == 1 else "wrong" if row["score"] == 0 else "partly"


def _chosen(verdicts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Evenly out of those that are right and out of the others, in the benchmark's order."""
    sides = ([n for n, row in enumerate(verdicts) if (row["score"] == 1) is right] for right in (True, False))
    kept = sorted(
        number
        for own in sides
        for number in {own[len(own) * k // _SHOWN] for k in range(min(_SHOWN, len(own)))}
    )
    return [verdicts[number] for number in kept]


def _thumbnail(data: bytes) -> str:
    """As a data: URL; "" for what cannot be decoded."""
    try:
        image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError):
        return ""
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _confusion(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows: right answers, columns: what was read; None where there are too many different answers."""
    rights = list(dict.fromkeys(row["answer"] for row in verdicts))
    if not 2 <= len(rights) <= _ANSWERS:
        return None
    counts = Counter((row["answer"], _read(row)) for row in verdicts)
    columns = [*rights, *(name for name in dict.fromkeys(read for _, read in counts) if name not in rights)]
    if len(columns) > 2 * _ANSWERS:
        return None
    rows = [
        {"name": right, "n": sum(counts[right, column] for column in columns),
         "cells": [counts[right, column] for column in columns]}
        for right in rights
    ]  # fmt: skip
    return {"columns": columns, "rows": rows}


def _read(row: Mapping[str, Any]) -> str:
    if row["prediction"] is None:
        return _MISSING
    return _UNPARSED if row["parsed"] is None else row["parsed"]


def _yes_ratios(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of yes-or-no questions, by group: the share of yes among answers, and among right ones, in percent."""
    if {row["answer"] for row in verdicts} != {"yes", "no"}:
        return []
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in verdicts:
        found.setdefault(next(iter(row["groups"].values()), "all"), []).append(row)
    return [
        {
            "name": name,
            "said": 100 * sum(row["parsed"] == "yes" for row in own) / len(own),
            "true": 100 * sum(row["answer"] == "yes" for row in own) / len(own),
        }
        for name, own in found.items()
    ]


def _markdown(
    tasks: Sequence[Mapping[str, Any]], models: Sequence[tuple[str, Mapping[str, Any], str]]
) -> str:
    names = [task["name"] for task in tasks]
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for model, scores, _ in models:
        cells = [_number(scores[name]) if name in scores else "" for name in names]
        if any(cells):
            lines.append(f"| {model} | {' | '.join(cells)} |")
    for task in tasks:
        score = task["score"]
        lines += ["", f"## {task['name']}", "", f"{score['mode']} rule, {score['n']:,} questions, {score['missing']:,} "
                  f"missing, {score['unparsed']:,} unparsed."]  # fmt: skip
        for kind, groups in score["groups"].items():
            columns = list(dict.fromkeys(key for own in groups.values() for key in own))
            lines += ["", f"| {kind} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            lines += [
                f"| {name} | {' | '.join(_number(own.get(key)) for key in columns)} |"
                for name, own in groups.items()
            ]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    """As in a table: published ones as printed, whole numbers whole, others to two places."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
