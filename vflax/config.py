"""Configs: find the file, and what may change when a run is continued."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vflax.errors import UserError
from vflax.guard import ACTIONS
from vflax.values import SHARE

# What a continued run may change. Every other key is part of the run's identity.
ELASTIC = (
    "mesh.*", "remat", "attention", "checkpoint.*", "evaluate.*", "logging.*", "export", "data.threads", "compiled",
    "cluster.*", "watchdog.*",
    # Where things lay: a continued run reads WORKDIR, and data must match its fingerprint wherever it lies.
    "init.*", "tokenizer", "data.sources.*.path",
    # What is refused, not what is learned.
    "data.max_problem_share", "data.max_duplicate_share", "data.duplicate_distance", "data.sources.*.strict",
    # Whether a step changes anything is for the step to say; this, whether the run then stops.
    "guard.*", "profile.*",
)  # fmt: skip
EXTEND_ONLY = ("steps", "epochs")


def find_config(flag: str) -> str:
    """The value for --config: the file on disk, else the one of that name that is installed with vflax.

    Args:
        flag: "configs/stage1.py" or "configs/stage1.py:variant".

    Raises:
        UserError: there is no such file; the installed ones are listed.
    """
    path, colon, variant = flag.partition(":")
    return find_file(path, "--config", "*.py") + colon + variant


def find_file(path: str, flag: str, known: str) -> str:
    """A file of configs/: the one on disk, else the one of that name that is installed with vflax.

    Args:
        path: "configs/stage1.py".
        flag: that it was given with, for the error.
        known: a glob under configs/; what it finds is listed in the error.

    Raises:
        UserError: there is no such file.
    """
    if Path(path).is_file():
        return path
    spec = importlib.util.find_spec("configs")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    for folder in folders:
        candidate = folder.parent / path
        if path.startswith("configs/") and candidate.is_file():
            return str(candidate)
    there = sorted(
        f"configs/{file.relative_to(folder)}"
        for folder in folders
        for file in folder.glob(known)
        if file.name not in ("__init__.py", "common.py")
    )
    raise UserError(f"{flag}={path}: there is no file {path}. Installed with vflax: {', '.join(there)}")


def load_config(flag: str) -> ConfigDict:
    """Build the config that a --config value names, without command-line overrides."""
    path, _, variant = find_config(flag).partition(":")
    spec = importlib.util.spec_from_file_location("vflax_config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def plain(value: Any) -> Any:
    """A config as JSON types: ConfigDict -> dict, tuple -> list."""
    if isinstance(value, ConfigDict):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf} of a plain config; list entries are numbered."""
    if isinstance(value, dict) and value:
        pairs = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        pairs = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, item in pairs:
        result |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return result


# Keys that count something, with the least that makes sense.
_LEAST = {
    "guard.max_skips": 1, "profile.start": 0, "profile.steps": 1,
    "batch.samples": 1, "batch.accumulation": 1, "logging.every": 1, "data.max_length": 1, "data.slots": 0,
    "data.supervised": 0, "data.threads": 1, "data.tasks": 0, "data.budget": 0, "checkpoint.every": 0,
    "checkpoint.keep": 1, "evaluate.every": 0, "evaluate.samples_per_task": 1, "evaluate.max_new_tokens": 1,
    "evaluate.limit": 0,
    "epochs": 0, "steps": 0, "seed": 0, "cluster.join": 1, "cluster.heartbeat": 0, "watchdog.factor": 0,
    "watchdog.least": 0, "watchdog.longest": 1,
}  # fmt: skip
_SHARES = ("data.max_problem_share", "data.max_duplicate_share")
_DTYPES = ("float32", "bfloat16")


def check_values(config: ConfigDict) -> None:
    """Refuse counts that are too small, shares and dtypes that are none, sources given whole; the rest is checked where
    it is used.

    Raises:
        UserError: naming all such keys.
    """
    found = flatten(plain(config))
    wrong = [
        f"config.{key}={found[key]!r}: at least {least}"
        for key, least in _LEAST.items()
        if found[key] < least
    ]
    wrong += [SHARE.problem(f"config.{key}", found[key]) for key in _SHARES if not SHARE.holds(found[key])]
    wrong += [
        f"config.{key}={found[key]!r}: one of {', '.join(_DTYPES)}"
        for key in ("dtype", "optimizer.moment_dtype")
        if found[key] not in _DTYPES
    ]
    if found["guard.action"] not in ACTIONS:
        wrong.append(f"config.guard.action={found['guard.action']!r}: one of {', '.join(ACTIONS)}")
    if not all(isinstance(source, ConfigDict) for source in config.data.sources):
        wrong.append(
            f"config.data.sources={plain(config.data.sources)!r}: a flag changes one key of one source: "
            "--config.data.sources[0].path=DIR"
        )
    if not config.epochs and not config.steps:
        wrong.append("config.epochs and config.steps are both 0: give one of them")
    if wrong:
        raise UserError("; ".join(wrong))


def check_resume(saved: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Compare the config that a WORKDIR was started with and the one it is continued with.

    Returns:
        One line per allowed change, to be shown.

    Raises:
        UserError: naming every key that may not change.
    """
    old, now = flatten(saved), flatten(new)
    notes: list[str] = []
    refused: list[str] = []
    adapters = old.get("lora.rank") or now.get("lora.rank")
    for key in sorted(old.keys() | now.keys()):
        before, after = old.get(key), now.get(key)
        # Without adapters their other keys say nothing; a run of before there were any has none of them.
        if before == after or (key.startswith("lora.") and not adapters):
            continue
        line = f"config.{key}: {before!r} -> {after!r}"
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in ELASTIC):
            notes += [line] if key in old else []  # else the key came later
        elif key == "batch.accumulation" and now.get("loss.reduction") == "global":
            notes.append(line)  # one mean over all tokens of a step, however it is divided
        elif key in EXTEND_ONLY and before and after and after > before:
            notes.append(f"{line} (the learning rate follows the longer schedule from here on)")
        else:
            refused.append(line)
    if refused:
        raise UserError(
            "this WORKDIR was started with another config, and a continued run must keep it:\n  "
            + "\n  ".join(refused)
            + "\nRestore these values, or choose another --workdir. (steps and epochs may grow, never shrink.)"
        )
    return notes
