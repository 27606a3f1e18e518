"""Small studies for tests."""

from __future__ import annotations

from vflax.study.grid import Arm, Cell, Claim, Difference, Metric, Run, Study

STAGE1 = "configs/stage1.py:tiny"


def run(seed: int = 1, **changes: object) -> Run:
    """A launch of the tiny stage 1; "__" stands for "." in keys."""
    return Run(STAGE1, {"seed": seed, **{key.replace("__", "."): value for key, value in changes.items()}})


def study(**changes: object) -> Study:
    """Two arms, two seeds."""
    arms = (Arm("few", 8), Arm("many", 34))
    values: dict[str, object] = {
        "name": "small", "variant": "tiny", "title": "few or many", "question": "Few or many?", "axis": "tasks",
        "arms": arms,
        "cells": tuple(Cell(arm.name, seed, run(seed, data__tasks=int(arm.x or 0))) for seed in (1, 2) for arm in arms),
        "metrics": (Metric("accuracy", "accuracy, %", ("accuracy",)),),
        "claims": (Claim("Many beat few.", "nowhere", Difference("accuracy", "many", "few")),),
    }  # fmt: skip
    return Study(**(values | changes))  # type: ignore[arg-type]
