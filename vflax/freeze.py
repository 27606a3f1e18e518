"""Which parameters learn: one table of path rules, used by gradients, Optax and checkpoints alike.

A stage's config holds the table, for example

    freeze = (("vision/.*", "frozen"), ("bridge/.*", "trainable"), ("decoder/.*", "trainable"))

Each parameter takes the verdict of the first rule whose pattern matches its whole path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vflax.errors import UserError

TRAINABLE, FROZEN = "trainable", "frozen"


def verdicts(paths: Iterable[str], rules: Sequence[Sequence[str]]) -> dict[str, str]:
    """Decide for each parameter path whether it learns.

    Args:
        paths: all parameter paths of the model, for example "decoder/layers/mlp/up/kernel".
        rules: (pattern, "trainable" | "frozen") pairs; a pattern is a regular expression for the whole path.

    Returns:
        {path: "trainable" | "frozen"}, in the order of `paths`.

    Raises:
        UserError: for every rule that matches nothing or is unreachable, every path that no rule covers,
            and every unknown verdict, all at once; and where nothing at all would learn.
    """
    problems = [
        f"rule {tuple(rule)!r} is not (pattern, {TRAINABLE!r} | {FROZEN!r})"
        for rule in rules
        if len(rule) != 2 or rule[1] not in (TRAINABLE, FROZEN)
    ]
    if problems:
        raise UserError("config.freeze is wrong:\n  " + "\n  ".join(problems))
    used = [False] * len(rules)
    result: dict[str, str] = {}
    for path in paths:
        for i, (pattern, verdict) in enumerate(rules):
            if re.fullmatch(pattern, path):
                used[i] = True
                result[path] = verdict
                break
        else:
            problems.append(f"no rule covers the parameter {path!r}")
    problems += [
        f"the rule {rules[i][0]!r} decides nothing: no parameter matches it that an earlier rule has not taken"
        for i, hit in enumerate(used)
        if not hit
    ]
    if not problems and TRAINABLE not in result.values():
        problems.append("every parameter is frozen: nothing would learn")
    if problems:
        raise UserError("config.freeze is wrong:\n  " + "\n  ".join(problems))
    return result


def split(params: Mapping[str, Any], verdict: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a flat parameter dict into (trainable, frozen)."""
    trainable = {path: leaf for path, leaf in params.items() if verdict[path] == TRAINABLE}
    frozen = {path: leaf for path, leaf in params.items() if verdict[path] == FROZEN}
    return trainable, frozen


def summary(params: Mapping[str, Any], verdict: Mapping[str, str]) -> list[dict[str, Any]]:
    """Counts and bytes per part (vision, bridge, decoder) and verdict, for the table at the start of a run.

    Args:
        params: {path: anything with .shape and .dtype}.

    Returns:
        One dict per non-empty group: part, verdict, leaves, parameters, bytes (as held on the devices, unsharded).
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for path, leaf in params.items():
        key = (path.split("/")[0], verdict[path])
        group = groups.setdefault(
            key, {"part": key[0], "verdict": key[1], "leaves": 0, "parameters": 0, "bytes": 0}
        )
        count = math.prod(leaf.shape)
        group["leaves"] += 1
        group["parameters"] += count
        group["bytes"] += count * leaf.dtype.itemsize
    return list(groups.values())
