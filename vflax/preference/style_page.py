"""style.json, style.md, style.html and its plots, from what `vflax.preference.style` found."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vflax.preference.saving import markdown_table, number, save_json, with_interval
from vflax.whole_file import replace

# {measure: (heading, whether it is a share)}, in the order in which they are told.
LABELS = {
    "words": ("words", False),
    "characters": ("characters", False),
    "sentences": ("sentences", False),
    "follows": ("as asked for", True),
    "right": ("right", True),
    "unfinished": ("unfinished", True),
    "loops": ("loops", True),
    "hallucinated_mentions": ("hallucinated, per mention", True),
    "hallucinated_answers": ("hallucinated, per answer", True),
}
_INK = "#7d8590"  # legible on white and on black
_LISTED = 12  # objects that are listed
_Facts = Mapping[str, Any]


def write(out: Path, facts: _Facts) -> None:
    """Write all files into a folder; style.json last.

    Raises:
        UserError: the disk does not take them.
    """
    plots = {"lengths.png": _lengths_plot(facts)}
    if follows := _follows_plot(facts):
        plots["follows.png"] = follows
    for name, data in plots.items():
        replace(out / name, data)
    replace(out / "style.md", markdown(facts))
    replace(out / "style.html", _page(facts, plots))
    save_json(out / "style.json", facts)


def overview(facts: _Facts) -> str:
    """What a terminal is told: of each model and group the median words and the share that is as asked for."""
    rows = []
    for group, n in facts["groups"].items():
        cells = [group, str(n)]
        for own in facts["models"].values():
            found = own["groups"][group]
            follows = found["measures"].get("follows")
            cells += [
                f"{found['lengths']['words']['median']:g}",
                number(follows and follows["value"], percent=True),
            ]
        rows.append(cells)
    head = [facts["by"], "n"]
    for name in facts["models"]:
        head += [f"{name} words", "as asked for"]
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(facts: _Facts) -> list[dict[str, Any]]:
    """Each with a title, a head and rows of text.

    Lengths of words by group; every other measure by group, model by model; the differences.
    """
    names = list(facts["models"])
    found = [
        {
            "title": "Words of an answer: median, and the quartiles around it",
            "head": [facts["by"], "questions", *names],
            "rows": [
                [group, str(n), *(_quartiles(facts["models"][name]["groups"][group]) for name in names)]
                for group, n in facts["groups"].items()
            ],
        }
    ]
    for measure, (label, percent) in LABELS.items():
        rows = [
            [
                group,
                *(
                    _cell(facts["models"][name]["groups"][group]["measures"], measure, percent)
                    for name in names
                ),
            ]
            for group in facts["groups"]
        ]
        rows = [row for row in rows if any(row[1:])]
        if measure not in ("words", "characters") and rows:
            title = f"{label[0].upper()}{label[1:]}{'' if percent else ', mean'}"
            found.append({"title": title, "head": [facts["by"], *names], "rows": rows})
    for pair in facts["differences"]:
        shown = {name: own for name, own in LABELS.items() if any(name in g for g in pair["groups"].values())}
        found.append(
            {
                "title": f"Difference, {pair['b']} to {pair['a']}, on the same questions",
                "head": [facts["by"], *(label for label, _ in shown.values())],
                "rows": [
                    [group, *(_cell(cells, name, percent) for name, (_, percent) in shown.items())]
                    for group, cells in pair["groups"].items()
                ],
            }
        )
    return found


def _quartiles(group: _Facts) -> str:
    own = group["lengths"]["words"]
    return f"{own['median']:g} ({own['q1']:g} to {own['q3']:g})"


def _cell(cells: Mapping[str, dict[str, Any]], name: str, percent: bool) -> str:
    return with_interval(cells[name], percent=percent) if name in cells else ""


def markdown(facts: _Facts) -> str:
    """style.md: every table, with 95 % intervals."""
    lines = ["# Style\n", f"{facts['groups']['all']:,} questions; intervals hold 95 %.\n"]
    for table in tables(facts):
        lines += [f"## {table['title']}\n", markdown_table(table["head"], table["rows"])]
    if any(own["hallucinated"] for own in facts["models"].values()):
        lines.append("## Mentioned, and not there\n")
    for name, own in facts["models"].items():
        if own["hallucinated"]:
            lines.append(f"{name}: {_most(own['hallucinated'])}\n")
    return "\n".join(lines)


def _most(hallucinated: Mapping[str, int]) -> str:
    listed = [f"{name} {count}" for name, count in list(hallucinated.items())[:_LISTED]]
    more = len(hallucinated) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


# --- plots ------------------------------------------------------------------------------------------------------------


def _lengths_plot(facts: _Facts) -> bytes:
    """Of each group, which share of a model's answers has how many words."""
    groups = list(facts["groups"])
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows + 0.4), layout="constrained")
    for place, group in enumerate(groups, 1):
        axis = figure.add_subplot(rows, columns, place)
        own = {name: model["groups"][group]["lengths"]["words"] for name, model in facts["models"].items()}
        bins = next(iter(own.values()))["histogram"]
        width = 0.8 / len(own)
        for n, (name, lengths) in enumerate(own.items()):
            total = sum(count for _, _, count in lengths["histogram"])
            heights = [100 * count / total for _, _, count in lengths["histogram"]]
            at = [place - 0.4 + (n + 0.5) * width for place in range(len(bins))]
            axis.bar(at, heights, width, label=_plain(name))
        axis.set_xticks(range(len(bins)), [_bin(low, high) for low, high, _ in bins], fontsize=7, rotation=60)
        axis.set_title(f"{_plain(group)} ({facts['groups'][group]})", fontsize=10, color=_INK)
        axis.set_ylabel("% of answers", fontsize=8)
        _soften(axis)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", ncols=4, fontsize=8, labelcolor=_INK, framealpha=0
    )
    figure.supxlabel("words", fontsize=9, color=_INK)
    return _png(figure)


def _follows_plot(facts: _Facts) -> bytes | None:
    """Of each kind, the share of answers that are what was asked for, with its interval; None without kinds."""
    groups = [
        group
        for group in facts["groups"]
        if any("follows" in own["groups"][group]["measures"] for own in facts["models"].values())
    ]
    if not groups:
        return None
    figure = Figure(
        figsize=(8, 0.8 + len(groups) * (0.25 + 0.2 * len(facts["models"]))), layout="constrained"
    )
    axis = figure.add_subplot()
    height = 0.8 / len(facts["models"])
    for n, (name, own) in enumerate(facts["models"].items()):
        cells = [own["groups"][group]["measures"]["follows"] for group in groups]
        at = [place - 0.4 + (n + 0.5) * height for place in range(len(groups))]
        values = [100 * cell["value"] for cell in cells]
        below = [value - 100 * cell["low"] for value, cell in zip(values, cells, strict=True)]
        above = [100 * cell["high"] - value for value, cell in zip(values, cells, strict=True)]
        error = {"ecolor": _INK, "capsize": 2, "linewidth": 1}
        axis.barh(at, values, height, xerr=[below, above], error_kw=error, label=_plain(name))
    axis.set_yticks(range(len(groups)), [_plain(group) for group in groups])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of answers that are what was asked for", fontsize=9)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, labelcolor=_INK, framealpha=0)
    _soften(axis)
    return _png(figure)


def _bin(low: int, high: int | None) -> str:
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


def _plain(text: str) -> str:
    """A "$" would start matplotlib's mathematics."""
    return text.replace("$", r"\$")


def _soften(axis: Any) -> None:
    axis.tick_params(colors=_INK)
    for side in axis.spines.values():
        side.set_color(_INK)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(_INK)
    axis.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=130, transparent=True)
    return file.getvalue()


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(facts: _Facts, plots: Mapping[str, bytes]) -> str:
    """Without a script, and it asks no one for anything."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vflax.preference", "pages"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # The look of the report of an evaluation.
    look = jinja2.PackageLoader("vflax.evaluate", ".").get_source(environment, "report.css.j2")[0]
    return environment.get_template("style.html.j2").render(
        style=Markup(look), facts=facts, tables=tables(facts), most=_most,
        plots={name: base64.b64encode(data).decode() for name, data in plots.items()},
    )  # fmt: skip
