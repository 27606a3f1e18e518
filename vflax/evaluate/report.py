"""One page for a run, OUT/report.html, that needs nothing else; its numbers in report.json, its tables in report.md."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import vflax
from vflax.evaluate.files import json_lines, json_value
from vflax.evaluate.published import MEASURES, ROWS
from vflax.evaluate.question import Question
from vflax.evaluate.shown import OUTCOMES, Verdicts, browsed, confusions, outcome, yes_shares
from vflax.evaluate.tasks import TASKS
from vflax.whole_file import replace

# Of the page, at most about so much of questions and answers, and of pictures; its tasks share that.
_TEXT_BYTES = 16_000_000
_PICTURE_BYTES = 24_000_000
# A longer table of groups is folded.
_OPEN = 24

_Facts = dict[str, Any]


def write(
    out: Path, questions: Mapping[str, Sequence[Question]], prompts: Mapping[str, Mapping[str, str]]
) -> None:
    """Write report.html, report.json and report.md of tasks that are scored.

    Args:
        out: the run's folder.
        questions: {task: its questions}, for their pictures.
        prompts: {task: {key: what the model was asked}}.
    """
    run = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "vflax": vflax.__version__}
    verdicts = {name: json_lines(out / name / "verdicts.jsonl") for name in questions}
    tasks = {name: _facts(out / name, verdicts[name]) for name in questions}
    tables = {name: _tables(facts) for name, facts in tasks.items()}
    columns = _columns(tasks)
    models = list(_published(columns))
    facts = {
        "run": run,
        "scores": tasks,
        "published": [{"model": row.model, "cells": row.cells, "source": row.source} for row in ROWS],
    }
    _save(out / "report.json", json.dumps(facts, indent=1) + "\n")
    _save(out / "report.md", _markdown(tasks, tables, columns, models))
    shown = {
        name: _shown(tasks[name], tables[name], verdicts[name], own, prompts.get(name, {}), len(tasks))
        for name, own in questions.items()
    }
    model: Mapping[str, Any] = next((facts["run"]["model"] for facts in tasks.values() if facts["run"]), {})
    page = _page(
        run=run, model=dict(_flat(model)), notes=list(_notes(tasks)), tasks=tasks, shown=shown, columns=columns,
        models=models,
    )  # fmt: skip
    _save(out / "report.html", page)


def _save(path: Path, text: str) -> None:
    """Answers may hold halves of characters, which a page cannot."""
    replace(path, text.encode("utf-8", "replace").decode())


# --- facts ------------------------------------------------------------------------------------------------------------


def _facts(folder: Path, verdicts: Verdicts) -> _Facts:
    """A task's score file; how its questions ended; and what decided the predictions, what they took and who judged
    them, None where no file says."""
    score = json_value(folder / "score.json")
    score.pop("draws", None)
    ended = Counter(map(outcome, verdicts))
    paths = {name: folder / f"{name}.json" for name in ("run", "infer", "judge")}
    return {
        **score,
        "outcomes": {name: ended[name] for name in OUTCOMES if ended[name]},
        **{name: json_value(path) if path.exists() else None for name, path in paths.items()},
    }


def _columns(tasks: Mapping[str, _Facts]) -> list[_Facts]:
    """Of the table of models: the numbers of each task that papers quote, or else its own score."""
    found = []
    for name, facts in tasks.items():
        known = {key: label for key, label in MEASURES.get(name, {}).items() if key in facts["metrics"]}
        for metric, label in (known or {facts["headline"]: facts["headline"]}).items():
            value = facts["metrics"][metric]
            title = name if len(known) < 2 else f"{name}, {label}"
            found.append(
                {
                    "task": name, "metric": metric, "title": title, "label": label, "value": value,
                    "interval": _interval(facts, metric), "mode": facts["mode"],
                }
            )  # fmt: skip
    return found


def _published(columns: Sequence[_Facts]) -> Iterator[_Facts]:
    """The rows that have something in one of the columns."""
    for row in ROWS:
        cells = [row.cells.get(f"{column['task']}/{column['metric']}", "") for column in columns]
        if any(cells):
            yield {"model": row.model, "cells": cells, "source": row.source}


def _notes(tasks: Mapping[str, _Facts]) -> Iterator[str]:
    """What keeps numbers from being those of the published benchmark."""
    of: dict[str, list[str]] = {}  # {what is to be said: of which tasks}
    for name, facts in tasks.items():
        manifest, run, usual = facts["manifest"], facts["run"] or {}, TASKS[name].MAX_TOKENS
        if manifest.get("custom"):
            of.setdefault("Of one's own, and not the published benchmark's questions", []).append(name)
        if limit := manifest.get("limit"):
            of.setdefault(f"A part of the benchmark (--limit={limit})", []).append(name)
        if (style := run.get("style", "llava")) != "llava":
            of.setdefault(f"Asked in the wording of --style={style}, not as LLaVA was", []).append(name)
        if (most := run.get("max_tokens", usual)) < usual:
            of.setdefault(f"Answers of at most {most:,} tokens, where LLaVA had {usual:,}", []).append(name)
    for said, names in of.items():
        yield f"{said}: {', '.join(names)}."
    for name, facts in tasks.items():
        _, part, sets = str(facts["manifest"].get("score", "")).partition("mean of ")
        if part:
            yield f"Not the mean of the published four, but the mean of {sets}: {name}."
        if facts["missing"]:
            yield f"Without a prediction, and so counted as wrong: {facts['missing']:,} of {facts['n']:,} of {name}."


def _interval(facts: _Facts, metric: str) -> list[float] | None:
    ends = facts["intervals"].get(metric)
    return None if ends is None or None in ends else ends


def _tables(facts: _Facts) -> list[_Facts]:
    """Of the whole and of each kind of groups: rows of name and cells, a cell being value and interval; and which
    columns are shares in percent."""
    groups = facts["groups"]
    grouped = {name for own in groups.values() for name in own}
    whole = {
        name: [{"value": value, "interval": _interval(facts, name)}]
        for name, value in facts["metrics"].items()
        if name == facts["headline"] or ("/" not in name and name not in grouped)
    }
    found: list[_Facts] = [{"kind": "", "columns": [""], "rows": whole, "open": True, "shares": [False]}]
    for kind, own in groups.items():
        columns = list(dict.fromkeys(key for cells in own.values() for key in cells))
        rows = {
            name: [_cell(facts, kind, name, column, cells.get(column)) for column in columns]
            for name, cells in own.items()
        }
        shares = [_are_shares([cells.get(column) for cells in own.values()]) for column in columns]
        found.append(
            {"kind": kind, "columns": columns, "rows": rows, "open": len(rows) <= _OPEN, "shares": shares}
        )
    return found


def _are_shares(values: Sequence[Any]) -> bool:
    return all(value is None or (isinstance(value, float) and 0 <= value <= 100) for value in values)


def _cell(facts: _Facts, kind: str, name: str, column: str, value: Any) -> _Facts:
    """With the interval of the metric that is the same number, by whichever name a benchmark has for it."""
    if isinstance(value, float):
        for metric in (f"{kind}/{name}/{column}", f"{name}/{column}", f"{kind}/{name}", name):
            if facts["metrics"].get(metric) == value:
                return {"value": value, "interval": _interval(facts, metric)}
    return {"value": value, "interval": None}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of what a manifest holds; tables of confusion are shown elsewhere."""
    if isinstance(value, Mapping):
        for key, own in value.items():
            if key != "confusion":
                yield from _flat(own, f"{name}, {key}" if name else str(key))
    elif value not in (None, "", []):
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- what is written --------------------------------------------------------------------------------------------------


def _shown(
    facts: _Facts, tables: Sequence[_Facts], verdicts: Verdicts, questions: Sequence[Question],
    prompts: Mapping[str, str], tasks: int,
) -> _Facts:  # fmt: skip
    """What the page has of a task beside its facts; `tasks`: how many share it."""
    made = {
        "the score": facts["manifest"], "predictions": facts["run"], "what these took": facts["infer"],
        "the judge": facts["judge"],
    }  # fmt: skip
    return {
        "tables": tables,
        "confusions": confusions(verdicts, facts["manifest"]),
        "yes": yes_shares(verdicts),
        "made": {name: dict(_flat(own)) for name, own in made.items() if own},
        "prompt": next(iter(prompts.values()), ""),
        "data": browsed(
            verdicts,
            questions,
            prompts,
            text_bytes=_TEXT_BYTES // tasks,
            picture_bytes=_PICTURE_BYTES // tasks,
        ),
    }


def _page(**facts: Any) -> str:
    """The page may run its own script and no other, and ask no one for anything."""
    loader = jinja2.PackageLoader("vflax.evaluate", ".")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "interval": _between}
    style, script = (loader.get_source(environment, f"report.{kind}.j2")[0] for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        style=Markup(style), script=Markup(script), digest=digest, outcomes=OUTCOMES, **facts
    )


def _markdown(
    tasks: Mapping[str, _Facts], tables: Mapping[str, Sequence[_Facts]], columns: Sequence[_Facts],
    models: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    lines = [_row("model", *(column["title"] for column in columns)), "|---" * (len(columns) + 1) + "|"]
    lines.append(_row("this run", *(_with_interval(column) for column in columns)))
    lines += [_row(row["model"], *row["cells"]) for row in models]
    for name, facts in tasks.items():
        lines += ["", f"## {name}", "", f"{facts['mode']} rule, {facts['n']:,} questions, {facts['missing']:,} "
                  f"missing, {facts['unparsed']:,} unparsed."]  # fmt: skip
        for table in tables[name]:
            lines += ["", _row(table["kind"], *table["columns"]), "|---" * (len(table["columns"]) + 1) + "|"]
            lines += [_row(key, *map(_with_interval, cells)) for key, cells in table["rows"].items()]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    """Of a table; whatever a cell holds, it stays one cell of one line."""
    return f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |"


def _with_interval(cell: Mapping[str, Any]) -> str:
    within = _between(cell["interval"])
    return _number(cell["value"]) + (f" ({within})" if within else "")


def _number(value: Any) -> str:
    """As in a table: whole numbers whole, others to two places, text as it is."""
    if value is None:
        return ""
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)
    )


def _between(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else ""
