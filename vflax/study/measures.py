"""What a finished run tells of itself: flat numbers, by name.

    loss, loss/TASK            of the held-out split, nats per token
    accuracy, accuracy/TASK    greedy answers to held-out questions, percent; blind, blind/TASK: to another picture
    words_short, words_long    median words of an answer to tasks with short answers and with long ones; words/TASK
    hallucinated               CHAIR_i of long held-out answers: percent of the things they mention (COCO's objects,
                               or those of the built-in data) that neither question nor reference does
    NAME, NAME/METRIC          of a benchmark, of the loop or of vflax.evaluate: its score and its other metrics
    NAME/unparsed              percent of its answers in which nothing that was asked for could be read
    seconds, samples           of the training, as its goodput has them

Names of tasks are the data's.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from vflax.errors import UserError
from vflax.preference import mentions
from vflax.study.grid import Metric


def read(workdir: epath.Path, evaluation: epath.Path | None = None) -> dict[str, float]:
    """All measures of a finished run.

    Args:
        workdir: of the launch.
        evaluation: what vflax.evaluate wrote; None: nothing.

    Raises:
        UserError: a file is not there or broken.
    """
    summary = _json(workdir / "summary.json")
    found: dict[str, float] = {"samples": float(summary["samples"])}
    found["seconds"] = float(summary["goodput"]["wall_seconds"])
    facts = summary["evaluation"] or {}
    for name in ("loss", "words_short", "words_long"):
        if facts.get(name) is not None:
            found[name] = float(facts[name])
    found |= {
        f"loss/{task}": float(value) for task, value in facts.get("losses", {}).items() if value is not None
    }
    for name in ("accuracy", "blind"):
        if facts.get(name) is not None:
            found[name] = 100.0 * facts[name]
    for task, own in facts.get("tasks", {}).items():
        found[f"words/{task}"] = float(own["words"])
        if own["short"]:
            found |= {f"{name}/{task}": 100.0 * own[name] for name in ("accuracy", "blind")}
    found |= _hallucinated(workdir, str(summary["steps"]), facts.get("tasks", {}))
    folders = [workdir / "eval" / str(summary["steps"]), *([evaluation] if evaluation is not None else [])]
    for folder in folders:
        for path in _scores(folder):
            found |= _score(_json(path))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _hallucinated(workdir: epath.Path, step: str, tasks: Mapping[str, Any]) -> dict[str, float]:
    """Rohrbach et al., 2018 (arXiv 1809.02156), of all answers to the tasks with long ones."""
    path = workdir / "eval" / step / "heldout" / "answers.jsonl"
    if all(own["short"] for own in tasks.values()) or not path.exists():
        return {}
    asked = _json(workdir / "config.json")["evaluate"]["sources"]
    built_in = bool(asked) and all(source["path"].startswith("mini:") for source in asked)
    vocabulary = mentions.load("mini" if built_in else "coco")
    there = invented = 0
    for line in filter(None, path.read_text().split("\n")):
        row = json.loads(line)
        if not tasks[row["task"]]["short"]:
            wrong, named = vocabulary.invented(row["answer"], (row["question"], row["reference"]))
            there, invented = there + named, invented + len(wrong)
    return {"hallucinated": 100.0 * invented / there} if there else {}


def _scores(folder: epath.Path) -> Iterator[epath.Path]:
    if folder.is_dir():
        for own in sorted(folder.iterdir()):
            if (own / "score.json").exists():
                yield own / "score.json"


def _score(score: Mapping[str, Any]) -> dict[str, float]:
    values = {score["task"]: score["score"]}
    values |= {f"{score['task']}/{name}": value for name, value in score["metrics"].items()}
    if score["n"]:
        values[f"{score['task']}/unparsed"] = 100.0 * score["unparsed"] / score["n"]
    return {name: float(value) for name, value in values.items() if value is not None}


def value_of(metric: Metric, measures: Mapping[str, float]) -> float | None:
    """The metric of a cell; None where none of its measures is there."""
    found = [
        value
        for name, value in measures.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in metric.read)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in metric.without)
    ]
    return sum(found) / len(found) if found else None


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not there; delete its folder and start the study again") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); delete its folder and start the study again"
        ) from None
