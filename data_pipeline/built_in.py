"""The built-in data by the names that configs have for it: mini:stage0, mini:scienceqa, mini:benchmarks, ..."""

from __future__ import annotations

from pathlib import Path

from data_pipeline import mini
from vflax.errors import UserError

PREFIX = "mini:"
_STAGES = ("stage0", "stage1", "stage2", "tokenizer")
_SETS = ("scienceqa", "benchmarks")


def path(name: str) -> Path:
    """Where it lies, made now if it is not there.

    Args:
        name: without the prefix.

    Raises:
        UserError: there is none of that name, or the cache cannot be written.
    """
    if name in _STAGES:
        return getattr(mini.ensure(), name)
    # Here, not above: who draws or reads one of them has no use for what the others import.
    if name == "scienceqa":
        from data_pipeline import mini_scienceqa

        return mini_scienceqa.ensure().data
    if name == "benchmarks":
        from data_pipeline import mini_benchmarks

        return mini_benchmarks.ensure()
    raise UserError(
        f"'{PREFIX}{name}': the built-in data has {', '.join(PREFIX + known for known in (*_STAGES, *_SETS))}"
    )


def version(recipe: str) -> str:
    """What decides the bytes of all built-in data that a recipe names, "" where it names none: with others the same
    config makes another model.

    Args:
        recipe: a config as text.
    """
    if PREFIX not in recipe:
        return ""
    versions = [mini.version()]
    if f"{PREFIX}scienceqa" in recipe:
        from data_pipeline import mini_scienceqa

        versions.append(mini_scienceqa.version())
    if f"{PREFIX}benchmarks" in recipe:
        from data_pipeline import mini_benchmarks

        versions.append(mini_benchmarks.version())
    return "-".join(versions)
