"""What a check found, for a person and for a program."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.author.checks import Checked
from data_pipeline.author.instances import Fault

# Faults of a kind, records of a fault, and answers.
_SHOWN, _SHOWN_ANSWERS = 5, 12


def lines_of(found: Checked) -> Iterator[str]:
    """What `check` prints of a task."""
    facts = found.facts
    counts = (f"{facts[name]:,} {name}" for name in ("instances", "pictures", "records"))
    yield f"{found.task.name}: {', '.join(counts)}"
    if facts["answers"]:
        yield f"  answers   {_answers(facts)}"
    if facts["right_option"]:
        total = sum(facts["right_option"].values())
        places = (f"{at + 1}. {count / total:.0%}" for at, count in facts["right_option"].items())
        yield f"  options   the right one stands {', '.join(places)}"
    if facts["instances"]:
        spreads = (
            ("prompts", "prompt_words", "words"),
            ("", "prompt_characters", "characters"),
            ("replies", "answer_words", "words"),
        )
        for name, key, unit in spreads:
            low, middle, high = facts[key].values()
            yield f"  {name:<9} {low:,} to {high:,} {unit}, median {middle:g}"
    if "smallest" in facts:
        small, large = ("x".join(map(str, facts[key])) for key in ("smallest", "largest"))
        yield f"  pictures  {small}{'' if small == large else f' to {large}'}"
    for note in found.notes:
        yield f"  note      {note}"
    for kind, same in itertools.groupby(found.faults, key=lambda fault: fault.kind):
        yield from _of_kind(kind, list(same))
    yield "  fit for review" if found.is_fit else f"  {len(found.faults)} faults"


def _of_kind(kind: str, faults: Sequence[Fault]) -> Iterator[str]:
    for fault in faults[:_SHOWN]:
        yield f"  FAULT     {kind}: {fault.detail}"
        others = (
            f": {other}" if kind == "unreadable_picture" else f" (as {other})" for other in fault.others
        )
        shown = [key + next(others, "") for key in fault.keys]
        for key in shown[:_SHOWN]:
            yield f"              {key}"
        if len(shown) > _SHOWN:
            yield f"              ... {len(shown):,} in all; --report=FILE names them"
    if kind == "unreadable_picture":
        yield "              leave_out takes the keys of those that cannot be had"
    if len(faults) > _SHOWN:
        yield f"  FAULT     {kind}: ... {len(faults):,} different ones in all; --report=FILE names them"


def _answers(facts: dict[str, Any]) -> str:
    answers, total = facts["answers"], facts["instances"]
    shown = [
        f"{answer[:40]!r} {count / total:.1%}" for answer, count in list(answers.items())[:_SHOWN_ANSWERS]
    ]
    rest = len(answers) - len(shown)
    return f"{len(answers):,}: {', '.join(shown)}" + (f", ... {rest:,} more" if rest else "")


def as_json(found: Checked) -> dict[str, Any]:
    """The same for a program, with every key: {task, fit, faults: [{kind, detail, keys, others}], notes, figures}."""
    faults = [vars(fault) for fault in found.faults]
    return {
        "task": found.task.name,
        "fit": found.is_fit,
        "faults": faults,
        "notes": found.notes,
        **found.facts,
    }
