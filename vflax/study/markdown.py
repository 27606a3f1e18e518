"""Studies as Markdown: report.md, studies.md of several, and the published part of docs/studies.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vflax.study import shown

# What would begin something; "_" and "~" only where they do.
_SPECIAL = re.compile(r"[\\`*\[\]<>|$]|(?<!\w)_|_(?!\w)|~(?=~)|&(?=#?\w+;)")


def study(view: Mapping[str, Any], pictures: str, level: int) -> list[str]:
    """Lines of a study.

    Args:
        view: what vflax.study.shown.study gives.
        pictures: what stands before a plot's file in its link, "" or "FOLDER/".
        level: of its heading.
    """
    lines = [
        f"{'#' * level} {_text(view['name'])}",
        "",
        f"**{_text(view['title'])}** (`{view['variant']}`)"
        if view["variant"]
        else f"**{_text(view['title'])}**",
        "",
        _text(view["question"]),
        "",
        f"{_text(view['facts'])}.",
    ]
    if view["claims"]:
        lines += ["", *_claims(view["claims"])]
    for plot in view["plots"]:
        lines += ["", f"![{_text(plot['alt'])}]({pictures}{plot['file']})"]
    if view["columns"]:
        lines += ["", *_table(view)]
        lines += ["", "Each seed:", "", *_seeds(view)]
    if view["unmeasured"]:
        lines += ["", f"Not measured here: {_text('; '.join(view['unmeasured']))}."]
    if view["notes"]:
        lines += ["", "What to know of this variant:", "", *(f"- {_text(note)}" for note in view["notes"])]
    return lines


def overview(views: Sequence[Mapping[str, Any]]) -> list[str]:
    """The claims of several studies in one table; a study's name leads to its section."""
    lines = [f"{shown.tally([claim for view in views for claim in view['claims']])}.", ""]
    lines += [_row("study", "claim", "source", "difference (95 %)", "p, Holm", "verdict"), "|---" * 6 + "|"]
    for view in views:
        link = f"[{_text(view['name'])}](#{view['name'].lower()})"
        for claim in view["claims"]:
            lines.append(
                _row(link, _text(claim["text"]), _text(claim["source"]), _difference(claim), _text(claim["p_holm"]),
                     _verdict(claim))
            )  # fmt: skip
    return lines


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [_row("verdict", "claim", "test", "difference (95 %)", "p", "p, Holm", "why"), "|---" * 7 + "|"]
    for claim in claims:
        said = (
            f"{_text(claim['text'])} ({_text(claim['source'])})" if claim["source"] else _text(claim["text"])
        )
        lines.append(
            _row(_verdict(claim), said, _text(claim["test"]), _difference(claim), _text(claim["p"]),
                 _text(claim["p_holm"]), _text(claim["why"]))
        )  # fmt: skip
    return lines


def _table(view: Mapping[str, Any]) -> list[str]:
    """Arms and metrics; what the paper has stands in a column of its own."""
    titles = ["arm"]
    for column in view["columns"]:
        titles.append(_text(column["label"]) + (f" ({column['better']})" if column["better"] else ""))
        titles += [_text(column["paper"])] if column["paper"] else []
    lines = [_row(*titles), "|---" * len(titles) + "|"]
    for row in view["rows"]:
        cells = [_text(row["arm"])]
        for column, cell in zip(view["columns"], row["cells"], strict=True):
            some = f"({cell['some']})" if cell["some"] else ""
            cells.append(" ".join(filter(None, (cell["mean"], cell["half"], some))))
            cells += [cell["paper"]] if column["paper"] else []
        lines.append(_row(*cells))
    return lines


def _seeds(view: Mapping[str, Any]) -> list[str]:
    titles = ["arm", "seed", *(_text(column["label"]) for column in view["columns"])]
    lines = [_row(*titles), "|---" * len(titles) + "|"]
    return lines + [_row(_text(row["arm"]), row["seed"], *row["cells"]) for row in view["seeds"]]


def _verdict(claim: Mapping[str, Any]) -> str:
    return f"{claim['mark']} **{claim['verdict']}**"


def _difference(claim: Mapping[str, Any]) -> str:
    return claim["difference"] + (f" ({claim['interval']})" if claim["interval"] else "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """As it stands, on one line, whatever is in it."""
    return _SPECIAL.sub(lambda found: "\\" + found[0], " ".join(text.split()))
