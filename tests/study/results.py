"""Results that tests make reports of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.study.grids import run
from vflax.study.grid import Arm, Cell, Claim, Difference, Metric, NoWorse, Study, Trend
from vflax.study.result import build

ODD = "a|b <script>alert(1)</script> $x_1$ \"*'`[l](m)\n\ud800"


def made(
    name: str = "small", seeds: tuple[int, ...] = (1, 2, 3), lost: int = 0, **changes: Any
) -> dict[str, Any]:
    """A result of three arms, four metrics (one with the paper's numbers, one that nobody measured), five claims.

    Args:
        name: of the study.
        seeds: of the cells.
        lost: so many cells are not finished.
        changes: of the study.
    """
    arms = changes.pop("arms", (Arm("0 tasks", 0), Arm("8 tasks", 8), Arm("34 tasks", 34)))
    few, many = arms[1].name, arms[2].name
    cells = tuple(Cell(arm.name, seed, run(seed)) for seed in seeds for arm in arms)
    grid = {
        "name": name,
        "variant": "tiny",
        "title": "more tasks",
        "question": "Few tasks or many?",
        "axis": "tasks",
        "arms": arms,
        "cells": cells,
        "metrics": (
            Metric("mme", "MME format, points", ("mme",), paper={few: 723.9, many: 1314.3},
                   paper_label="MME (Table 3)"),
            Metric("pope", "POPE format, F1 in %", ("pope",)),
            Metric("loss", "held-out loss, nats", ("loss",), better="lower"),
            Metric("llava_bench", "LLaVA-Bench", ("llava_bench",)),
        ),
        "claims": (
            Claim("Many tasks beat few.", "[VF] Table 3", Difference("mme", many, few)),
            Claim("The loss falls.", "[VF] Figure 1", Trend("loss", -1)),
            Claim("POPE stays.", "[VF] section 4", NoWorse("pope", many, few, 3.0)),
            Claim("People like it.", "[VF] section 5", Difference("llava_bench", many, few)),
            Claim("GPT-4 likes it.", "[VF] section 6", None, "a judge"),
        ),
        "notes": ("The miniature draws its own tasks.",),
    }  # fmt: skip
    study = Study(**(grid | changes))
    measures = {}
    for cell in cells[: len(cells) - lost]:
        place = [arm.name for arm in arms].index(cell.arm)
        measures[cell.arm, cell.seed] = {
            "mme": 400 + 50 * place + cell.seed, "pope": 70 + (cell.seed * 7 + place) % 3, "seconds": 100.0,
            "loss": 0.5 - 0.05 * place + 0.001 * (cell.seed - 2) ** 2,
        }  # fmt: skip
    return build(study, measures)


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, {path: content}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
