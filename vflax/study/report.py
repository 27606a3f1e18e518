"""Pages: STUDY/ with result.json, report.md, report.html and plots; of all studies WORKDIR/index.html, studies.md."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from vflax.errors import UserError
from vflax.study import markdown, plots, shown
from vflax.whole_file import replace


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write a study's files; result.json last, so that it has all others beside it.

    Args:
        result: what vflax.study.result.build gives; cells may be missing.
        folder: STUDY, made where it is not there.

    Raises:
        UserError: the folder cannot be written.
    """
    view = shown.study(result)
    for plot in view["plots"]:
        picture = plots.png(result, plot["metric"])
        replace(folder / plot["file"], picture)
        plot["source"] = _embedded(picture)
    replace(folder / "report.md", _lines(markdown.study(view, "", 1)))
    replace(folder / "report.html", _page(view["title"], [view], index=False))
    replace(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_index(work: Path) -> None:
    """Write index.html and studies.md of all STUDY/result.json in a folder.

    Raises:
        UserError: one of these is broken, or the folder cannot be written.
    """
    results = {path.parent.name: read(path) for path in sorted(work.glob("*/result.json"))}
    views = [shown.study(result) | {"name": folder} for folder, result in results.items()]
    for result, view in zip(results.values(), views, strict=True):
        for plot in view["plots"]:
            file = work / view["name"] / plot["file"]
            picture = file.read_bytes() if file.is_file() else plots.png(result, plot["metric"])
            plot["source"] = _embedded(picture)
    lines = ["# Studies", "", *markdown.overview(views)]
    for view in views:
        folder = quote(view["name"])
        lines += ["", *markdown.study(view, f"{folder}/", 2), "", f"[Its page]({folder}/report.html)"]
    replace(work / "studies.md", _lines(lines))
    replace(work / "index.html", _page("Studies", views, index=True))


def read(path: Path) -> dict[str, Any]:
    """A result.json.

    Raises:
        UserError: it is broken, or of another version.
    """
    try:
        result = json.loads(path.read_text())
        shown.study(result)  # has all that is told of it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a study's result ({error!r}); delete it, and have it written again by "
            "python -m vflax.study with --report-only"
        ) from None
    return result


def _page(title: str, views: Sequence[Mapping[str, Any]], *, index: bool) -> str:
    """One file that asks no one for anything; its look is the evaluation page's."""
    packages = ("vflax.study", "vflax.evaluate")
    own, others = loaders = [jinja2.PackageLoader(package, ".") for package in packages]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = "".join(loader.get_source(environment, "report.css.j2")[0] for loader in (others, own))
    claims = [claim for view in views for claim in view["claims"]]
    return environment.get_template("report.html.j2").render(
        style=Markup(style), title=title, studies=views, index=index, tally=shown.tally(claims),
    )  # fmt: skip


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
