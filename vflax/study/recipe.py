"""A run of a study as what it really is: a config, a command line, and the folder that is called after them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from vflax import config as configs
from vflax.errors import UserError
from vflax.study.grid import Run

# What changes neither what is learned nor what is measured: runs that differ in these only are one run.
_INDIFFERENT = (
    "mesh.*", "remat", "attention", "compiled", "checkpoint.*", "logging.*", "cluster.*", "watchdog.*", "profile.*",
    "data.threads", "export", "variant",
)  # fmt: skip
_STEP = re.compile(r"(\w+)((?:\[\d+\])*)$")


def config_of(run: Run) -> ConfigDict:
    """The run's config with its changes, but for init.checkpoint, where it starts from another run.

    Raises:
        UserError: a key that the config does not have, or a value of another type.
    """
    config = configs.load_config(run.config)
    for key, value in run.changes.items():
        _change(config, key, value, run.config)
    configs.check_values(config)
    return config


def _change(config: ConfigDict, key: str, value: Any, name: str) -> None:
    """Set one dotted key, as the flag --config.KEY does."""
    here: Any = config
    *path, last = key.split(".")
    try:
        for part in path:
            here = _step(here, part)
        if last not in here:
            raise KeyError(last)
        here[last] = value
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{name} has no key {key} ({error})") from None
    except TypeError as error:
        raise UserError(f"{name}: {key}={value!r}: {error}") from None


def _step(here: Any, part: str) -> Any:
    found = _STEP.match(part)
    if found is None:
        raise KeyError(part)
    here = here[found[1]]
    for index in re.findall(r"\d+", found[2]):
        here = here[int(index)]
    return here


def flags_of(run: Run, workdir: str, work: str, start: str = "") -> list[str]:
    """The arguments of vflax.launch.

    Args:
        run: the launch.
        workdir: its --workdir.
        work: what {work} stands for.
        start: the WORKDIR that it starts from; empty: what the config says.
    """
    changes = placed(run.changes, work)
    if start:
        changes |= {"init.checkpoint": start, "init.make": ""}
    return [
        f"--config={run.config}",
        f"--workdir={workdir}",
        *(f"--config.{k}={_flag(v)}" for k, v in changes.items()),
    ]


def _flag(value: Any) -> str:
    """As ml_collections reads it: a text is taken as it stands, anything else is a Python literal."""
    return value if isinstance(value, str) else repr(value)


def placed(value: Any, work: str) -> Any:
    """The same with a folder for {work} in all its texts."""
    if isinstance(value, str):
        return value.replace("{work}", work)
    if isinstance(value, Mapping):
        return {key: placed(item, work) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(placed(item, work) for item in value)
    return value


def folder_of(run: Run) -> str:
    """The name of its WORKDIR: the config's variant, or file, and a hash of all that decides what it learns and tells.

    A study that is changed, or another one, takes over the runs that are still the same.
    """
    digest = hashlib.sha256(json.dumps(_identity(run), sort_keys=True).encode()).hexdigest()
    path, _, variant = run.config.partition(":")
    return f"{variant or PurePosixPath(path).stem}-{digest[:12]}"


def _identity(run: Run) -> dict[str, Any]:
    flat = configs.flatten(configs.plain(config_of(run)))
    kept = {key: value for key, value in flat.items() if not _indifferent(key)}
    if run.start is not None:
        kept |= {"init.checkpoint": _identity(run.start), "init.make": ""}
    if "mini:" in (text := json.dumps(kept)):
        from data_pipeline import built_in

        kept["mini"] = built_in.version(text)
    return kept


def differences(run: Run, saved: Mapping[str, Any], work: str) -> list[str]:
    """What of WORKDIR/config.json is not what this run is; empty: the launch did what was meant."""
    wanted = configs.flatten(placed(configs.plain(config_of(run)), work))
    found = configs.flatten(dict(saved))
    if run.start is not None:
        for own in (wanted, found):
            own.pop("init.checkpoint", None)
            own.pop("init.make", None)
    keys = sorted(key for key in wanted.keys() | found.keys() if not _indifferent(key))
    return [
        f"{k}: {wanted.get(k)!r} wanted, {found.get(k)!r} run" for k in keys if wanted.get(k) != found.get(k)
    ]


def _indifferent(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _INDIFFERENT)
